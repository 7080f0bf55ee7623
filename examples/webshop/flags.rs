//! The command line.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::orders::Source;

/// What one process does, where the services are processes of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    Shop,
    Logistics,
    Billing,
    Crm,
}

/// A webshop on events: the shop publishes orders, Logistics answers with a shipping label, Billing with an invoice,
/// CRM with a follow-up e-mail. At the end it proves that every order is accounted for, or exits with an error.
#[derive(Clone, Debug, Parser)]
#[command(name = "webshop")]
pub(crate) struct Flags {
    /// Orders, one JSON object per line; - is standard input [default: the sample of 300]
    #[arg(long, value_name = "FILE|-")]
    pub(crate) orders: Option<Source>,

    /// Place exactly this many orders; the input is repeated under fresh order ids if it has fewer
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<NonZeroUsize>,

    /// The broker, such as memory://webshop
    #[arg(long, conflicts_with = "config")]
    pub(crate) url: Option<String>,

    /// The broker and its options, from a file such as tidings.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Be only this one, in a process of its own; the shop places orders and waits for the others' answers
    #[arg(long, value_name = "ROLE", conflicts_with_all = ["billing_outage", "instances", "redrive", "replay"])]
    pub(crate) role: Option<Role>,

    /// Billing starts this much later than the shop: 3s, 500ms, 2m
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration)]
    pub(crate) billing_outage: Duration,

    /// What this service (logistics, billing, crm) depends on is down for this long after the start: 5s
    #[arg(long, num_args = 2, value_names = ["SERVICE", "TIME"])]
    outage_of: Option<Vec<String>>,

    /// Run this many instances of each service; with two or more, one of each is killed half-way
    #[arg(long, value_name = "N", default_value = "1")]
    pub(crate) instances: NonZeroUsize,

    /// At the end, mend the dead letters and send them back to Billing
    #[arg(long)]
    pub(crate) redrive: bool,

    /// At the end, replay all orders through a new service and compare
    #[arg(long)]
    pub(crate) replay: bool,

    /// Logistics fails this share of its runs, from 0 to below 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub(crate) flaky: f64,

    /// Poison this many of the orders: Billing can never invoice them, whatever is retried
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) poison: usize,

    /// Place at most this many orders a second [default: as fast as they are confirmed]
    #[arg(long, value_name = "N")]
    pub(crate) rate: Option<NonZeroU32>,

    /// Keep the invoices in this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// Add a subscriber that the shop knows nothing of
    #[arg(long)]
    pub(crate) with_analytics: bool,

    /// What chance is drawn from: the same seed, the same run
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

impl Flags {
    /// Which service's dependency is down, and for how long.
    pub(crate) fn outage(&self) -> Result<Option<(&str, Duration)>, String> {
        let Some([service, time]) = self.outage_of.as_deref() else { return Ok(None) };
        if !["logistics", "billing", "crm"].contains(&service.as_str()) {
            return Err(format!("--outage-of: no service `{service}`; there are logistics, billing and crm"));
        }
        duration(time).map(|time| Some((service.as_str(), time))).map_err(|why| format!("--outage-of: {why}"))
    }
}

/// Reads `500ms`, `3s` or `2m`, up to a day.
fn duration(text: &str) -> Result<Duration, String> {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis_per_unit = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err(form()),
    };
    if number.is_empty() {
        return Err(form());
    }
    // All digits: what does not parse or multiply is too large.
    let millis = number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis_per_unit));
    let duration = millis.map(Duration::from_millis).filter(|duration| *duration <= DAY);
    duration.ok_or_else(|| "at most a day (1440m)".to_owned())
}

fn form() -> String {
    "expected a whole number with a unit, such as 500ms, 3s or 2m".to_owned()
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| (0.0..1.0).contains(share));
    share.ok_or_else(|| "expected a number from 0 to below 1, such as 0.2 (at 1, no run would ever succeed)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &str) -> Result<Flags, String> {
        let words = std::iter::once("webshop").chain(flags.split_whitespace());
        Flags::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_run_of_the_readme() {
        let flags = parse("--count 1000 --billing-outage 3s --flaky 0.2 --poison 3 --orders - --with-analytics")
            .expect("good flags");
        assert_eq!(flags.orders, Some(Source::Stdin));
        assert_eq!(flags.count.map(NonZeroUsize::get), Some(1000));
        assert_eq!((flags.billing_outage, flags.flaky, flags.poison), (Duration::from_secs(3), 0.2, 3));
        assert!(flags.with_analytics);
    }

    #[test]
    fn nothing_is_required() {
        let flags = parse("").expect("no flags");
        assert_eq!((flags.billing_outage, flags.flaky, flags.poison, flags.rate), (Duration::ZERO, 0.0, 0, None));
    }

    #[test]
    fn reads_durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "3", "s", "3 s", "-3s", "1.5s", "3h", "3sec", "٣s"] {
            assert_eq!(duration(wrong), Err(form()), "{wrong:?}");
        }
        for large in ["1441m", "99999999999999999999s", "18446744073709551615m"] {
            assert_eq!(duration(large), Err("at most a day (1440m)".to_owned()), "{large:?}");
        }
    }

    #[test]
    fn errors_name_the_flag_and_what_it_takes() {
        for (flags, parts) in [
            ("--billing-outage 3", ["--billing-outage", "500ms, 3s or 2m"]),
            ("--flaky 1", ["--flaky", "from 0 to below 1"]),
            ("--flaky NaN", ["--flaky", "from 0 to below 1"]),
            ("--rate 0", ["--rate", "zero"]),
            ("--count 0", ["--count", "zero"]),
            ("--url memory://a --config b", ["--url", "--config"]),
            ("--role clerk", ["--role", "shop, logistics, billing, crm"]),
            ("--role shop --replay", ["--role", "--replay"]),
        ] {
            let error = parse(flags).expect_err("bad flags");
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
