//! What services of several cases are made of.

use crate::env::{Env, Seen};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::Ordering;
use tidings_core::{RetryPolicy, SubscriptionConfig};
use tokio::sync::watch;

/// What a handler was told of each run: the number of the event, the attempt, whether it may be a duplicate.
pub(crate) type Runs = Seen<(u64, u32, bool)>;

/// The subscription to orders of the service `crm`.
pub(crate) const CRM_ORDERS: &str = "crm.suite.order.placed";

/// The subscription to page views of the service `crm`.
pub(crate) const CRM_VIEWS: &str = "crm.suite.page.viewed";

/// Settings that the transport can keep: ordered where it can, and without an outage, which failures on purpose are not.
pub(crate) fn settings(env: &Env) -> SubscriptionConfig {
    let ordering = if env.can().key_ordering { Ordering::Key } else { Ordering::None };
    SubscriptionConfig::default().ordering(ordering).without_outage()
}

/// Runs again soon, as often as this in all.
pub(crate) fn soon(attempts: u32) -> RetryPolicy {
    RetryPolicy::default().attempts(attempts).backoff(Duration::from_millis(20), Duration::from_millis(100))
}

/// Something that is open or closed, and on which handlers may wait.
#[derive(Clone)]
pub(crate) struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub(crate) fn closed() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub(crate) fn open(&self) {
        self.0.send_replace(true);
    }

    pub(crate) fn is_open(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it is open.
    pub(crate) async fn passed(&self) {
        let mut changes = self.0.subscribe();
        // The sender lives as long as this.
        let _ = changes.wait_for(|open| *open).await;
    }
}
