//! A webshop on events: it places orders, and Logistics, Billing and CRM answer through the broker.
//!
//! ```sh
//! cargo run --example webshop -- --count 1000 --billing-outage 3s --flaky 0.2 --poison 3
//! ```

mod events;
mod flags;
mod invoice;
mod label;
mod observe;
mod orders;
mod pdf;
mod report;
mod services;
mod shop;
mod text;

use clap::Parser;
use flags::Flags;
use observe::{Observed, name_of};
use report::{Progress, ServiceRow, Standing, Trouble};
use services::{Archive, Carrier, Turnover};
use shop::Ledger;
use std::collections::{HashMap, HashSet};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tidings::prelude::*;
use tidings::{Message, Running, SubscriptionName, header};

/// Without any progress for this long, what is open stays open.
const PATIENCE: Duration = Duration::from_secs(30);

type Anything<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Flags::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The broker is configuration: this is the only place that knows of it.
fn config(flags: &Flags) -> tidings::Result<Config> {
    match &flags.config {
        Some(file) => Config::from_file(file),
        None => Config::from_url(flags.url.as_deref().unwrap_or("memory://webshop")),
    }
}

/// Runs the shop and says whether every order is accounted for.
async fn run(flags: Flags) -> Anything<bool> {
    let config = config(&flags)?;
    let orders = orders(&flags)?;
    if let Some(folder) = &flags.out {
        std::fs::create_dir_all(folder)?;
    }
    let (observed, ledger, turnover) = (Observed::default(), Ledger::default(), Turnover::default());
    let bus = Bus::connect(config.clone().with_source("/shop")).await?;
    let billing = || services::billing(Archive(flags.out.clone())).layer(observed.layer());
    let mut services = vec![
        shop::accounting(ledger.clone()).layer(observed.layer()),
        services::logistics(Carrier::new(flags.flaky, flags.seed)).layer(observed.layer()),
        services::crm().layer(observed.layer()),
    ];
    if flags.with_analytics {
        services.push(services::analytics(turnover.clone()).layer(observed.layer()));
    }
    let mut running = Vec::new();
    for service in services {
        // A bus of its own for each, as if they were processes.
        running.push(service.start(&Bus::connect(config.clone()).await?).await?);
    }
    // Its subscription exists from now on: what is published while it is down waits in the broker.
    billing().provision(&bus).await?;

    let start = Instant::now();
    let rate = flags.rate.map(std::num::NonZeroU32::get);
    let placing = tokio::spawn(shop::place_orders(bus.clone(), ledger.clone(), orders, (flags.poison, rate)));
    let mut watch = Watch { ledger: &ledger, placing, start, expected: flags.expected() };
    if !flags.billing_outage.is_zero() {
        watch.until(&running, flags.billing_outage).await;
    }
    running.push(billing().start(&Bus::connect(config).await?).await?);
    let dead = watch.finish(&bus, &running).await?;
    let rows = rows(&ledger, &running);
    for service in running {
        service.drain(Duration::from_secs(5)).await;
    }
    bus.close(Duration::from_secs(5)).await?;
    show(&observed, &ledger, &rows, &dead, &turnover);
    Ok(prove(&flags, &ledger, &dead))
}

fn orders(flags: &Flags) -> Anything<Box<dyn Iterator<Item = Result<orders::Order, orders::BadLine>> + Send>> {
    let orders = orders::open(&flags.orders.clone().unwrap_or_default())?;
    Ok(match flags.count {
        Some(count) => Box::new(orders.exactly(count.get())),
        None => Box::new(orders),
    })
}

/// Waits for the end, and shows what goes on.
struct Watch<'a> {
    ledger: &'a Ledger,
    placing: tokio::task::JoinHandle<()>,
    start: Instant,
    expected: Option<u64>,
}

impl Watch<'_> {
    async fn until(&mut self, running: &[Running], time: Duration) {
        let mut progress = Progress::new(std::io::stdout().is_terminal());
        while self.start.elapsed() < time {
            let rest = time.saturating_sub(self.start.elapsed());
            let _ = tokio::time::timeout(rest, self.ledger.changed()).await;
            self.show(&mut progress, running);
        }
    }

    /// Until every order is accounted for, or nothing has happened for long; returns the dead letters.
    async fn finish(&mut self, bus: &Bus, running: &[Running]) -> tidings::Result<Dead> {
        let mut progress = Progress::new(std::io::stdout().is_terminal());
        let (mut steps, mut since) = (0, Instant::now());
        loop {
            let now = self.ledger.accounts().steps();
            if now > steps {
                (steps, since) = (now, Instant::now());
            }
            let settled = |(_, stats): (&str, tidings::Stats)| stats.in_flight == 0;
            let quiet = running.iter().flat_map(Running::stats).all(settled);
            if self.placing.is_finished() && quiet {
                let dead = Dead::read(bus).await?;
                if self.ledger.accounts().open(&dead.by_service()).is_empty() || since.elapsed() > PATIENCE {
                    print!("{}", progress.finish(self.start.elapsed(), &self.standing(running)));
                    return Ok(dead);
                }
            }
            tokio::select! {
                () = self.ledger.changed() => self.show(&mut progress, running),
                _ = tokio::signal::ctrl_c() => return Dead::read(bus).await,
            }
        }
    }

    fn show(&self, progress: &mut Progress, running: &[Running]) {
        if let Some(line) = progress.show(self.start.elapsed(), &self.standing(running)) {
            print!("{line}");
            let _ = std::io::stdout().flush();
        }
    }

    fn standing(&self, running: &[Running]) -> Standing {
        let placed = self.ledger.accounts().placed() as u64;
        let mut standing = Standing { placed, expected: self.expected, ..Standing::default() };
        for (_, stats) in
            running.iter().flat_map(Running::stats).filter(|(name, _)| name.ends_with("shop.order.placed"))
        {
            standing.handled += stats.handled;
            standing.retried += stats.retried;
            standing.dead_lettered += stats.dead_lettered;
        }
        let services = 3.max(running.len() as u64 - 1);
        standing.waiting = (placed * services).saturating_sub(standing.handled + standing.dead_lettered);
        standing
    }
}

/// The dead letters of the services that handle orders.
struct Dead(Vec<(&'static str, Message)>);

impl Dead {
    async fn read(bus: &Bus) -> tidings::Result<Self> {
        let mut all = Vec::new();
        for service in ["logistics", "billing", "crm"] {
            let name = SubscriptionName::new(format!("{service}.shop.order.placed"))?;
            let letters = bus.transport().dead_letters(&name).await?.page(None, usize::MAX).await?;
            all.extend(letters.into_iter().map(|letter| (service, letter.message)));
        }
        Ok(Self(all))
    }

    fn by_service(&self) -> HashMap<&'static str, HashSet<String>> {
        let mut by_service: HashMap<_, HashSet<_>> = HashMap::new();
        for (service, letter) in &self.0 {
            let order = letter.key.as_ref().and_then(tidings::Key::as_str).unwrap_or_default();
            by_service.entry(*service).or_default().insert(order.to_owned());
        }
        by_service
    }
}

fn rows(ledger: &Ledger, running: &[Running]) -> Vec<ServiceRow> {
    let mut rows: Vec<ServiceRow> = Vec::new();
    for (name, stats) in running.iter().flat_map(Running::stats) {
        let service = name_of(name);
        let at = rows.iter().position(|row| row.service == service).unwrap_or_else(|| {
            rows.push(ServiceRow { service, ..ServiceRow::default() });
            rows.len() - 1
        });
        let row = &mut rows[at];
        row.published += stats.published;
        row.handled += stats.handled;
        row.retried += stats.retried;
        row.dead_lettered += stats.dead_lettered;
        row.waiting += stats.in_flight as u64;
    }
    if let Some(shop) = rows.first_mut() {
        shop.published += ledger.accounts().placed() as u64;
    }
    rows
}

fn show(observed: &Observed, ledger: &Ledger, rows: &[ServiceRow], dead: &Dead, turnover: &Turnover) {
    println!("\n{}", report::service_table(rows));
    println!("From publish to handled:\n{}", report::delay_table(&observed.delays()));
    let checkouts = ledger.accounts().checkouts();
    let percent = |p| report::percentile(&checkouts, p).unwrap_or_default();
    println!("Checkout (publish to confirmed): p50 {:.1?}, p99 {:.1?}\n", percent(50), percent(99));
    let event = "shop.order.placed".to_owned();
    let trouble = |row: &ServiceRow| Trouble {
        event: event.clone(),
        service: row.service.clone(),
        retries: row.retried,
        dead_letters: row.dead_lettered,
    };
    let troubles: Vec<_> = rows.iter().filter(|row| row.retried + row.dead_lettered > 0).map(trouble).collect();
    println!("As observed:\n{}", report::sequence_diagram(&observed.hops(), &troubles));
    for (service, letter) in &dead.0 {
        let get = |name| letter.headers.get_str(name).unwrap_or("?");
        let key = letter.key.as_ref().map(ToString::to_string).unwrap_or_default();
        println!("Dead letter: {service}, order {key}: {}, {}", get(header::REASON), get(header::ERROR));
    }
    for ((country, currency), cents) in turnover.largest(5) {
        println!("Turnover: {country} {currency} {}", text::money(cents));
    }
}

/// Every order is shipped, invoiced and followed up, or a dead letter that was meant to be.
fn prove(flags: &Flags, ledger: &Ledger, dead: &Dead) -> bool {
    let accounts = ledger.accounts();
    let open = accounts.open(&dead.by_service());
    for (order, service) in open.iter().take(10) {
        println!("NOT ACCOUNTED FOR: order {order} at {service}");
    }
    let expected = flags.poison.min(accounts.placed());
    println!("{}, {} dead letters of {expected} poisoned orders.", accounts.summary(), dead.0.len());
    let good = open.is_empty() && dead.0.len() == expected && accounts.is_complete();
    println!("{}", if good { "Every order is accounted for." } else { "NOT every order is accounted for." });
    good
}
