//! Logistics: a shipping label for each order, from a carrier that may be flaky.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tidings::prelude::*;

use crate::events::{LabelPrinted, OrderPlaced};
use crate::journal::{Journal, Noted};
use crate::label;
use crate::text::stable_hash;

/// The carrier's server, which fails a share of all requests.
#[derive(Clone)]
pub(crate) struct Carrier {
    flaky: f64,
    seed: u64,
    requests: Arc<AtomicU64>,
}

pub(crate) fn service(carrier: Carrier, journal: &Journal) -> Service {
    let config = SubscriptionConfig::default().retry(carrier.patience());
    Service::new("logistics").state(carrier).state(journal.at("logistics")).on_with(config, print_label)
}

async fn print_label(
    OrderPlaced { order }: OrderPlaced,
    State(carrier): State<Carrier>,
    _: Noted,
) -> Result<LabelPrinted, HandlerError> {
    carrier.request()?; // transient: retried as the policy says
    let label = label::print(&order);
    Ok(LabelPrinted {
        order_id: order.order_id,
        carrier: label.carrier.to_owned(),
        tracking_number: label.tracking_number,
        label: label.text,
    })
}

impl Carrier {
    pub(crate) fn new(flaky: f64, seed: u64) -> Self {
        Self { flaky, seed, requests: Arc::default() }
    }

    /// Fails at random, whoever asks; with the same seed at the same requests.
    fn request(&self) -> Result<(), &'static str> {
        let request = self.requests.fetch_add(1, Relaxed);
        let is_down = fastrand::Rng::with_seed(self.seed ^ stable_hash(&request.to_string())).f64() < self.flaky;
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
    fn a_carrier_fails_its_share_and_each_request_anew() {
        let carrier = Carrier::new(0.2, 1);
        let failed: Vec<_> = (0..10_000).map(|_| carrier.request().is_err()).collect();
        let count = failed.iter().filter(|failed| **failed).count();
        assert!((1_800..2_200).contains(&count), "{count}");
        let twice = failed.windows(2).filter(|pair| pair[0] && pair[1]).count();
        assert!((300..500).contains(&twice), "{twice}");
    }

    #[test]
    fn patience_fits_the_share() {
        let attempts = |flaky| Carrier::new(flaky, 1).patience();
        assert_eq!(attempts(0.0), attempts(0.01), "at least the usual five");
        assert!(format!("{:?}", attempts(0.2)).contains("attempts: 13"));
    }
}
