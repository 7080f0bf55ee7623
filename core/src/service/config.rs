//! How one subscription of a service behaves.

use super::OutagePolicy;
use crate::handler::EventInfo;
use crate::transport::{Capabilities, Ordering, Start, SubscriptionSpec};
use crate::{Error, ErrorKind, Result, RetryMode, RetryPolicy, SubscriptionName, Topic, TopicPattern};
use std::time::Duration;

/// What happens to an event of a type that no handler of its subscription takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Unrouted {
    /// It is acked, counted and told as [`BusEvent::Unrouted`](crate::BusEvent::Unrouted).
    #[default]
    Ack,
    /// It is dead-lettered.
    DeadLetter,
}

/// How one subscription of a service behaves; the defaults are safe on every transport.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tidings_core::{RetryPolicy, SubscriptionConfig};
///
/// let config = SubscriptionConfig::default().concurrency(32).timeout(Duration::from_secs(5)).retry(RetryPolicy::default().aside());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct SubscriptionConfig {
    pub(crate) name: Option<String>,
    pub(crate) topics: Vec<String>,
    pub(crate) concurrency: usize,
    pub(crate) max_in_flight: usize,
    pub(crate) ordering: Option<Ordering>,
    pub(crate) retry: RetryPolicy,
    pub(crate) timeout: Option<Duration>,
    pub(crate) start: Start,
    pub(crate) batch: usize,
    pub(crate) linger: Duration,
    pub(crate) unrouted: Unrouted,
    pub(crate) max_deliveries: u32,
    pub(crate) outage: Option<OutagePolicy>,
}

impl Default for SubscriptionConfig {
    fn default() -> Self {
        Self {
            name: None,
            topics: Vec::new(),
            concurrency: 16,
            max_in_flight: 256,
            ordering: None,
            retry: RetryPolicy::default(),
            timeout: Some(Duration::from_secs(60)),
            start: Start::New,
            batch: 100,
            linger: Duration::ZERO,
            unrouted: Unrouted::Ack,
            max_deliveries: 5,
            outage: Some(OutagePolicy::default()),
        }
    }
}

impl SubscriptionConfig {
    /// The subscription `<service>.<name>`, in place of `<service>.<topic>`: a subscription of its own, which gets
    /// every event too. A second handler for the same type needs one.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..Self::default() }
    }

    /// What it reads, in place of its events' topic: topics or patterns such as `shop.>`.
    #[must_use]
    pub fn topics(mut self, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.topics = topics.into_iter().map(Into::into).collect();
        self
    }

    /// How many runs of its handlers go on at a time in this instance. What a run returned, and its retry aside or dead letter,
    /// is confirmed beside the next runs. Default: 16.
    #[must_use]
    pub fn concurrency(mut self, runs: usize) -> Self {
        self.concurrency = runs;
        self
    }

    /// How many events this instance may hold unsettled, running and waiting. Default: 256.
    #[must_use]
    pub fn max_in_flight(mut self, events: usize) -> Self {
        self.max_in_flight = events;
        self
    }

    /// Whether events with the same key are handled in order. Default: they are, if an event it takes has a key.
    #[must_use]
    pub fn ordering(mut self, ordering: Ordering) -> Self {
        self.ordering = Some(ordering);
        self
    }

    /// What happens after a failure.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// How long one run may take; then it counts as failed and its future is dropped. Default: 60 s.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// Runs may take for ever. Transports with a fixed limit refuse it.
    #[must_use]
    pub fn without_timeout(mut self) -> Self {
        self.timeout = None;
        self
    }

    /// Where it starts if it is new. Default: with what is published from then on.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// The most events in one run of a handler that takes a [`Batch`](crate::Batch). Default: 100.
    #[must_use]
    pub fn batch(mut self, events: usize) -> Self {
        self.batch = events;
        self
    }

    /// How long a batch that is not full waits for more. Default: not at all.
    #[must_use]
    pub fn linger(mut self, time: Duration) -> Self {
        self.linger = time;
        self
    }

    /// What happens to types that no handler takes. Default: they are acked and counted.
    #[must_use]
    pub fn unrouted(mut self, unrouted: Unrouted) -> Self {
        self.unrouted = unrouted;
        self
    }

    /// How often an event may end its process while it is handled alone; then it is dead-lettered. Default: 5.
    ///
    /// An event that is lost with its process more than 3 times is suspect: it is handled with no other in flight beside
    /// it, so that it takes none with it. Only what is lost so is counted here, where the broker tells
    /// ([`Capabilities::counts_losses`]).
    #[must_use]
    pub fn max_deliveries(mut self, times: u32) -> Self {
        self.max_deliveries = times;
        self
    }

    /// When failures are taken for an outage, in which no attempts are counted. Default: [`OutagePolicy::default`].
    #[must_use]
    pub fn outage(mut self, policy: OutagePolicy) -> Self {
        self.outage = Some(policy);
        self
    }

    /// Failures are never taken for an outage: each counts as an attempt.
    #[must_use]
    pub fn without_outage(mut self) -> Self {
        self.outage = None;
        self
    }

    pub(crate) fn timeout_or_forever(&self) -> Duration {
        self.timeout.unwrap_or(super::worker::NO_LIMIT)
    }

    /// Whether the events' order is kept: as set, or if one of them has a key.
    pub(crate) fn order(&self, events: &[EventInfo]) -> Ordering {
        let keyed = events.iter().any(|event| event.keyed);
        self.ordering.unwrap_or(if keyed { Ordering::Key } else { Ordering::None })
    }

    pub(crate) fn retry_mode(&self, ordering: Ordering) -> RetryMode {
        let by_order = if ordering == Ordering::Key { RetryMode::InOrder } else { RetryMode::Aside };
        self.retry.mode.unwrap_or(by_order)
    }

    /// The subscription to open.
    pub(crate) fn spec(&self, name: &SubscriptionName, events: &[EventInfo]) -> Result<SubscriptionSpec> {
        let topics = if self.topics.is_empty() {
            let mut topics: Vec<_> = events.iter().map(|event| event.topic).collect();
            topics.dedup();
            topics.into_iter().map(|topic| Topic::new(topic).map(TopicPattern::from)).collect::<Result<Vec<_>>>()?
        } else {
            self.topics.iter().map(|topic| TopicPattern::new(topic.as_str())).collect::<Result<Vec<_>>>()?
        };
        let ordering = self.order(events);
        let (start, max_in_flight) = (self.start, self.max_in_flight);
        Ok(SubscriptionSpec {
            name: name.clone(),
            topics,
            ordering,
            start,
            max_in_flight,
            max_hold: self.max_hold(ordering),
        })
    }

    /// The longest that a delivery can stay unsettled: behind all that is in flight before it, then in its own runs and holds.
    fn max_hold(&self, ordering: Ordering) -> Duration {
        let Some(timeout) = self.timeout else { return Duration::MAX };
        let rounds = u32::try_from(self.max_in_flight.div_ceil(self.concurrency.max(1))).unwrap_or(u32::MAX);
        let holds =
            if self.retry_mode(ordering) == RetryMode::InOrder { self.retry.hold_at_most } else { Duration::ZERO };
        timeout.saturating_mul(rounds).saturating_add(holds)
    }

    /// Refuses what contradicts itself, and what the transport cannot keep.
    pub(crate) fn check(
        &self,
        spec: &SubscriptionSpec,
        capabilities: &Capabilities,
        transport: &'static str,
    ) -> Result<()> {
        let config = |why: String| Err(Error::new(ErrorKind::Config, why));
        let unsupported = |why: String| Err(Error::new(ErrorKind::Unsupported, why).with_transport(transport));
        if self.concurrency == 0 || self.batch == 0 || self.max_in_flight < self.concurrency {
            return config("concurrency and batch must be at least 1, and max_in_flight at least concurrency".into());
        }
        if spec.topics.is_empty() {
            return config("a handler of raw messages needs `.topics([..])` in its SubscriptionConfig".into());
        }
        let (longest, limit) = (self.retry.longest_hold(), self.retry.hold_at_most);
        if self.retry_mode(spec.ordering) == RetryMode::InOrder && longest > limit {
            let why = format!("in-order retries may hold their key for {longest:?}, hold_at_most is {limit:?}");
            return config(format!("{why}; raise it, lower attempts or back-off, or let retries step `.aside()`"));
        }
        if spec.ordering == Ordering::Key && !capabilities.key_ordering {
            return unsupported(
                "it cannot keep the order of keys; say `.ordering(Ordering::None)` if they need none".into(),
            );
        }
        if self.start == Start::Beginning && !capabilities.start_beginning {
            return unsupported("a subscription cannot start at the beginning; say `.start(Start::New)`".into());
        }
        if let Some(limit) = capabilities.max_hold.filter(|limit| *limit < spec.max_hold) {
            let why = format!("an event may stay unsettled for {:?}, the broker allows {limit:?}", spec.max_hold);
            return unsupported(format!("{why}; lower max_in_flight, timeout or hold_at_most, or raise concurrency"));
        }
        Ok(())
    }
}
