//! Settling a delivery, exactly once, from anywhere.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How long a delivery that was dropped unsettled stays away at least, so that it cannot spin.
pub const ABANDONED_BACKOFF: Duration = Duration::from_millis(100);

/// How a delivery ended for the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The subscription is done with it.
    Ack,
    /// Given back, to be handed out again not before `after` has passed.
    Release {
        /// The least time until it is handed out again.
        after: Duration,
    },
    /// Dropped while it was being handled, by an abort or a crash of its task: given back after [`ABANDONED_BACKOFF`],
    /// and counted as [lost](super::Delivery::lost).
    Abandon,
}

/// Which delivery of which connection, assignment or ownership; opaque to core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Grows whenever the transport loses what it had handed out: a rebalance; a reconnect, where leases end with a connection.
    pub epoch: u32,
    /// The delivery within its epoch.
    pub seq: u64,
}

/// Whether this instance may still work on a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// Yes.
    Live,
    /// It may finish what runs, but start nothing.
    Revoking,
    /// No: the event will be, or was, handed out again.
    Lost,
}

/// The side of a transport that settles.
///
/// # For implementors
/// Both calls are synchronous, never block for the broker, never fail and never call back into core:
/// they are made from `Drop`. Each delivery handed out owns a place in the settlement queue, which
/// therefore neither blocks nor grows. A tag of a former epoch settles nothing.
pub trait Settle: Send + Sync + 'static {
    /// Settles the delivery.
    fn settle(&self, tag: Tag, settlement: Settlement);
    /// Whether the delivery may still be worked on.
    fn lease(&self, tag: Tag) -> Lease;
}

/// The duty to settle one delivery: by value, exactly once, from any thread or from `Drop`.
///
/// Dropped unsettled, it [abandons](Settlement::Abandon) the delivery, which comes again.
pub struct Acker {
    settle: Option<Arc<dyn Settle>>,
    tag: Tag,
}

/// Asks for the lease of a delivery that somebody else settles.
pub(crate) struct Watcher {
    settle: Option<Arc<dyn Settle>>,
    tag: Tag,
}

impl Watcher {
    pub(crate) fn lease(&self) -> Lease {
        self.settle.as_ref().map_or(Lease::Lost, |settle| settle.lease(self.tag))
    }
}

impl Acker {
    /// The acker of the delivery `tag`.
    #[must_use]
    pub fn new(settle: Arc<dyn Settle>, tag: Tag) -> Self {
        Self { settle: Some(settle), tag }
    }

    /// The subscription is done with the event.
    pub fn ack(mut self) {
        self.settle_once(Settlement::Ack);
    }

    /// Gives the event back, to be handed out again not before `after` has passed.
    pub fn release(mut self, after: Duration) {
        self.settle_once(Settlement::Release { after });
    }

    /// Whether the event may still be worked on; core asks before a handler starts.
    #[must_use]
    pub fn lease(&self) -> Lease {
        self.settle.as_ref().map_or(Lease::Lost, |settle| settle.lease(self.tag))
    }

    pub(crate) fn watcher(&self) -> Watcher {
        Watcher { settle: self.settle.clone(), tag: self.tag }
    }

    fn settle_once(&mut self, settlement: Settlement) {
        if let Some(settle) = self.settle.take() {
            settle.settle(self.tag, settlement);
        }
    }
}

impl Drop for Acker {
    fn drop(&mut self) {
        self.settle_once(Settlement::Abandon);
    }
}

impl fmt::Debug for Acker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Acker").field(&self.tag).finish()
    }
}
