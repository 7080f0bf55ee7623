//! Settles deliveries, at once.

use crate::broker::{Broker, Seat};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tidings_core::transport::{Lease, Settle, Settlement, Tag};

/// Settles what one instance was handed.
pub(crate) struct MemorySettle {
    pub(crate) broker: Arc<Broker>,
    pub(crate) seat: Seat,
    /// Grows when the instance loses what it was handed; the broker's own copy is the same one.
    pub(crate) epoch: Arc<AtomicU32>,
}

impl Settle for MemorySettle {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        self.broker.lock().settle(self.seat, tag, settlement);
    }

    fn lease(&self, tag: Tag) -> Lease {
        if self.epoch.load(Ordering::Relaxed) == tag.epoch { Lease::Live } else { Lease::Lost }
    }
}
