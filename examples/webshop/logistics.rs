//! Logistics: a shipping label for each order, from a carrier that may be flaky.

use std::time::Duration;

use tidings::prelude::*;

use crate::events::{LabelPrinted, OrderPlaced};
use crate::journal::{Journal, Noted};
use crate::label;
use crate::text::stable_hash;

/// The carrier's server, which fails a share of all requests.
#[derive(Clone, Copy)]
pub(crate) struct Carrier {
    pub(crate) flaky: f64,
    pub(crate) seed: u64,
}

pub(crate) fn service(carrier: Carrier, journal: &Journal) -> Service {
    let config = SubscriptionConfig::default().retry(carrier.patience());
    Service::new("logistics").state(carrier).state(journal.at("logistics")).on_with(config, print_label)
}

async fn print_label(
    OrderPlaced { order }: OrderPlaced,
    State(carrier): State<Carrier>,
    Attempt(attempt): Attempt,
    _: Noted,
) -> Result<LabelPrinted, HandlerError> {
    carrier.request(&order.order_id, attempt)?; // transient: retried as the policy says
    let label = label::print(&order);
    Ok(LabelPrinted {
        order_id: order.order_id,
        carrier: label.carrier.to_owned(),
        tracking_number: label.tracking_number,
        label: label.text,
    })
}

impl Carrier {
    /// Fails at random, but for the same seed always at the same orders and attempts.
    fn request(&self, order_id: &str, attempt: u32) -> Result<(), &'static str> {
        let seed = self.seed ^ stable_hash(&format!("{attempt} {order_id}"));
        let is_down = fastrand::Rng::with_seed(seed).f64() < self.flaky;
        if is_down { Err("the carrier does not answer") } else { Ok(()) }
    }

    /// So many attempts that not one order in a billion runs out of them, at `--flaky 0.2` for instance 13.
    fn patience(&self) -> RetryPolicy {
        const FIRST: Duration = Duration::from_millis(20);
        const LONGEST: Duration = Duration::from_millis(200);
        let needed = (1e-9_f64.ln() / self.flaky.ln()).ceil();
        let attempts = (needed as u32).clamp(5, 1_000_000);
        RetryPolicy::default().attempts(attempts).backoff(FIRST, LONGEST).hold_at_most(LONGEST * attempts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_carrier_fails_its_share_and_each_attempt_anew() {
        let carrier = Carrier { flaky: 0.2, seed: 1 };
        let fails = |attempt| (0..10_000).filter(|i| carrier.request(&format!("W-{i}"), attempt).is_err()).count();
        assert!((1_800..2_200).contains(&fails(1)), "{}", fails(1));
        let twice = |i: &u32| (1..=2).all(|attempt| carrier.request(&format!("W-{i}"), attempt).is_err());
        let twice = (0..10_000).filter(twice).count();
        assert!((300..500).contains(&twice), "{twice}");
    }

    #[test]
    fn patience_fits_the_share() {
        let attempts = |flaky| Carrier { flaky, seed: 1 }.patience();
        assert_eq!(attempts(0.0), attempts(0.01), "at least the usual five");
        assert!(format!("{:?}", attempts(0.2)).contains("attempts: 13"));
    }
}
