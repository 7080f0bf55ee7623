//! A webshop on events: `cargo run --example webshop -- --help`.
//!
//! `events.rs` says what the services tell each other; `logistics.rs`, `billing.rs`, `crm.rs` and `analytics.rs` are the
//! services, `shop.rs` publishes the orders and follows them. The rest is scenery: reading orders, drawing invoices and
//! labels, and watching that nothing is lost. `tests.rs` tests the services: `cargo test --example webshop`.

mod analytics;
mod billing;
mod crew;
mod crm;
mod events;
mod flags;
mod invoice;
mod journal;
mod label;
mod ledger;
mod logistics;
mod orders;
mod pdf;
mod report;
mod shop;
#[cfg(test)]
mod tests;
mod text;
mod trouble;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use tidings::BoxError;
use tidings::prelude::*;

use crate::analytics::Totals;
use crate::billing::Archive;
use crate::crew::Crew;
use crate::flags::{Flags, Role};
use crate::journal::Journal;
use crate::ledger::Ledger;
use crate::logistics::Carrier;
use crate::shop::Checkout;
use crate::watch::Watch;

#[tokio::main]
async fn main() -> ExitCode {
    match webshop(Flags::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let causes = std::iter::successors(error.source(), |error| error.source());
            let causes: String = causes.map(|cause| format!(": {cause}")).collect();
            eprintln!("webshop: {error}{causes}");
            ExitCode::FAILURE
        }
    }
}

/// Runs it; `true` if every order ended as it should.
async fn webshop(flags: Flags) -> Result<bool, BoxError> {
    if let Some(directory) = &flags.out {
        std::fs::create_dir_all(directory)?;
    }
    let (ledger, journal, totals) = (Ledger::default(), Journal::default(), Totals::default());
    let carrier = Carrier::new(flags.flaky, flags.seed);
    let outage = flags.outage()?;
    let trouble = |name: &str, service: Service| match outage {
        Some((down, time)) if down == name => service.layer(trouble::down_for(time)),
        _ => service,
    };
    let instances = |one: &dyn Fn() -> Service| (0..flags.instances.get()).map(|_| one()).collect::<Vec<_>>();
    let logistics = || trouble("logistics", logistics::service(carrier.clone(), &journal));
    let billing = || trouble("billing", billing::service(Archive(flags.out.clone()), &journal));
    let crm = || trouble("crm", crm::service(&journal));

    let mut crew = Crew::new(broker(&flags)?);
    match flags.role {
        None | Some(Role::Shop) => {}
        Some(Role::Logistics) => return crew.serve("logistics", logistics()).await,
        Some(Role::Billing) => return crew.serve("billing", billing()).await,
        Some(Role::Crm) => return crew.serve("crm", crm()).await,
    }
    let shop = crew.start("shop", vec![shop::service(&ledger, &journal)]).await?;
    if flags.role.is_some() {
        // As at deployment: whoever comes later, orders wait for them from now on.
        crew.expect_elsewhere("logistics", &logistics()).await?;
        crew.expect_elsewhere("billing", &billing()).await?;
        crew.expect_elsewhere("crm", &crm()).await?;
    } else {
        crew.start("logistics", instances(&logistics)).await?;
        crew.prepare("billing", &billing()).await?; // it starts after its outage: orders wait in the broker
        crew.start("crm", instances(&crm)).await?;
    }
    if flags.with_analytics {
        crew.start("analytics", vec![analytics::service(&totals, &journal)]).await?;
    }

    let checkout = Checkout::new(shop, ledger.clone(), &flags)?;
    let seen_anew = Totals::default();
    let watch = Watch {
        crew,
        ledger,
        expected: flags.count.map(|count| count.get() as u64),
        poison: flags.poison as u64,
        outage: flags.billing_outage,
        billing: if flags.role.is_none() { instances(&billing) } else { Vec::new() },
        kills: flags.instances.get() > 1,
        redrives: flags.redrive,
        replay: flags.replay.then(|| (analytics::service(&seen_anew, &Journal::default()), seen_anew.clone())),
        letters: Vec::new(),
        journal: journal.clone(),
    };
    let is_good = watch.run(checkout).await?;
    if flags.with_analytics {
        print!("\n{}", totals.show(5));
    }
    Ok(is_good)
}

/// Which broker: the only place that knows, and it only reads it.
fn broker(flags: &Flags) -> tidings::Result<Config> {
    let is_memory = flags.config.is_none() && flags.url.as_deref().is_none_or(|url| url.starts_with("memory:"));
    if is_memory && flags.role.is_some() {
        let why = "--role needs a broker that processes share, such as --url nats://127.0.0.1:4222";
        return Err(tidings::Error::new(ErrorKind::Config, why));
    }
    match (&flags.config, &flags.url) {
        (Some(file), _) => Config::from_file(file),
        (None, url) => Config::from_url(url.as_deref().unwrap_or("memory://webshop")),
    }
}
