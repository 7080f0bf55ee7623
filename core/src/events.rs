//! What happens to a bus: one stream that logs, metrics and tests can all read.

use crate::{MessageId, SubscriptionName, Text, Topic};
use std::time::Duration;
use tokio::sync::broadcast;

/// How many events a slow reader may be behind before it misses some.
const BUFFER: usize = 1024;

/// Something that happened to a bus, its transport or one of its subscriptions.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum BusEvent {
    /// The transport is connected, at first or again.
    Connected,
    /// The transport lost its connection and repairs it.
    Disconnected {
        /// Why.
        reason: Text,
    },
    /// A handler failed and its event will be handled again.
    Retry {
        /// The subscription.
        subscription: SubscriptionName,
        /// The message.
        id: MessageId,
        /// How many runs have failed.
        attempts: u32,
        /// When it is handled again, from now.
        delay: Duration,
        /// The error, in one line.
        error: Text,
    },
    /// An event was dead-lettered, and that was confirmed.
    DeadLettered {
        /// The subscription.
        subscription: SubscriptionName,
        /// The message.
        id: MessageId,
        /// Why, as in the dead letter.
        reason: crate::DeadLetterReason,
        /// The error, in one line.
        error: Text,
    },
    /// An event of a type that no handler takes was acked.
    Unrouted {
        /// The subscription.
        subscription: SubscriptionName,
        /// The message.
        id: MessageId,
        /// Its type.
        event_type: Text,
    },
    /// All recent runs of a subscription failed for now: it probes with one event at a time and counts no attempts.
    OutageBegan {
        /// The subscription.
        subscription: SubscriptionName,
        /// The last error, in one line.
        error: Text,
    },
    /// A run has passed: the subscription goes on at full speed.
    OutageOver {
        /// The subscription.
        subscription: SubscriptionName,
    },
    /// What settles a delivery could not be published; it is tried until it can.
    PublishStalled {
        /// The subscription.
        subscription: SubscriptionName,
        /// Why.
        error: Text,
    },
    /// Events were lost to retention before a subscription read them.
    Gap {
        /// The subscription.
        subscription: SubscriptionName,
        /// The topic, where it is known.
        topic: Option<Topic>,
        /// How many at the most.
        missed_at_most: u64,
        /// The first position missed.
        from: u64,
        /// The first position after the gap.
        to: u64,
    },
    /// An instance of a subscription became active or went on stand-by.
    Role {
        /// The subscription.
        subscription: SubscriptionName,
        /// What it does now.
        role: crate::transport::Role,
    },
}

/// Where events are told; cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(broadcast::Sender<BusEvent>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(BUFFER))
    }
}

impl Events {
    /// Tells an event; never blocks. It is logged with `tracing` even if nobody listens.
    pub fn tell(&self, event: BusEvent) {
        match &event {
            BusEvent::Connected | BusEvent::Role { .. } => tracing::info!(?event, "tidings"),
            BusEvent::Retry { .. } | BusEvent::Unrouted { .. } => tracing::debug!(?event, "tidings"),
            _ => tracing::warn!(?event, "tidings"),
        }
        // An error only says that nobody listens.
        let _ = self.0.send(event);
    }

    /// Listens from now on.
    #[must_use]
    pub fn listen(&self) -> EventStream {
        EventStream(self.0.subscribe())
    }
}

/// Reads what happens to a bus, from [`Bus::events`](crate::Bus::events).
#[derive(Debug)]
pub struct EventStream(broadcast::Receiver<BusEvent>);

impl EventStream {
    /// The next event; `None` when the bus is gone. A reader that is more than 1,024 events behind
    /// misses the oldest.
    ///
    /// # Cancel safety
    /// Nothing is missed when the future is dropped.
    pub async fn next(&mut self) -> Option<BusEvent> {
        loop {
            match self.0.recv().await {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
