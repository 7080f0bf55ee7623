//! What transports implement: small, object-safe, batch-first.
//!
//! A service never sees this module. A transport implements [`Transport`], [`Publisher`],
//! [`Subscription`] and [`Settle`]; core does the rest, once for all brokers: windows, repeats, key
//! lanes, retries, dead letters.

mod acker;
mod prefix;
mod slots;

pub use crate::publish::flight::{Confirmed, Fate, PublishFailure, Receipt, submit_and_wait};
pub(crate) use acker::Watcher;
pub use acker::{ABANDONED_BACKOFF, Acker, Lease, Settle, Settlement, Tag};
pub use prefix::PrefixTracker;
pub use slots::{share_slots, slot_of};

use crate::events::Events;
use crate::{Error, Message, Result, SubscriptionName, Topic, TopicPattern};
use async_trait::async_trait;
use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// A boxed future that can move between threads.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// An adapter to one broker, connected.
///
/// # For implementors
/// Behavior, each sentence a conformance case:
/// - it heals itself: lost connections, restarted brokers and cancelled consumers are repaired with
///   jittered back-off ([`Backoff`](crate::Backoff)); [`health`](Self::health) and [`events`](Self::events) tell;
/// - an option it cannot honour is refused with [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported)
///   and the way out, never ignored and never emulated with a weaker promise;
/// - all of it may be called from many tasks at once.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Its name in errors, health and configuration, such as `memory`.
    fn name(&self) -> &'static str;

    /// What it can do, as connected.
    fn capabilities(&self) -> &Capabilities;

    /// Creates (or, as configured, verifies) topics and subscriptions, so that what is published from
    /// then on waits for them.
    ///
    /// # Errors
    /// [`Mismatch`](crate::ErrorKind::Mismatch) names what exists with other settings; nothing is changed silently.
    async fn provision(&self, topology: &Topology) -> Result<()>;

    /// The publisher; cheap.
    fn publisher(&self) -> Arc<dyn Publisher>;

    /// Opens a subscription, creating it if it is new and may be created.
    ///
    /// Behavior: when it returns, the start position is durable: what is published from then on arrives,
    /// even if this process dies before its first ack. The start position of an existing subscription
    /// never changes.
    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>>;

    /// Reads topics again through deliveries marked [`replayed`](Delivery::replayed); moves no subscription, and acks
    /// settle nothing but the replay's own window.
    ///
    /// Behavior: unless it follows, it ends when all that was there when it began is settled; what is given back comes
    /// again before. It keeps no other limits of a subscription: a delivery may stay unsettled for as long as it takes.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where what was published cannot be read again.
    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>>;

    /// The dead letters of a subscription; none of them need exist.
    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>>;

    /// Deletes a subscription: its position, and what waits for it or was sent to its address. Its dead letters stay, and
    /// so do the topics. Returns whether there was one.
    ///
    /// Behavior: when it returns, the name is free, for a subscription with other settings too; called again after a
    /// failure, it deletes what was left. What is on its way to its address with a delay may still come to a successor.
    /// Instances that are still open end with an error, or create it anew.
    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool>;

    /// Whether the broker can be used now; answers at once.
    fn health(&self) -> Health;

    /// Where the transport tells what happens to it; the bus tells its own events there too.
    fn events(&self) -> &Events;

    /// Flushes what was submitted, then disconnects, at the latest at the deadline. Further calls of
    /// any method fail with [`Closed`](crate::ErrorKind::Closed); closing again is fine.
    async fn close(&self, deadline: Instant) -> Result<()>;

    /// The broker's own client, for what this contract does not cover; each transport documents its type.
    fn native(&self) -> &(dyn Any + Send + Sync);
}

/// Takes messages to the broker.
pub trait Publisher: Send + Sync + 'static {
    /// Hands messages over in the order of the iterator; wire order is the order of the calls.
    ///
    /// Behavior:
    /// - it neither blocks nor fails: the answer for each message is given to its [`Receipt`], when the
    ///   broker has taken responsibility for it or refused it;
    /// - nothing is un-sent when the caller loses interest; a message still waiting inside the transport, for room or
    ///   for the broker to come back, may then be dropped ([`Receipt::is_abandoned`]), whether it is owed or not;
    /// - where it repeats by itself ([`ordered_repeats`](Capabilities::ordered_repeats)), it does so until the message is
    ///   abandoned;
    /// - a message that is [`owed`](Outgoing::owed) does not wait for room;
    /// - the iterator neither settles nor publishes, so it may be driven under the transport's own lock.
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>);
}

/// A message on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// Where it goes.
    pub destination: Destination,
    /// What is sent; shared, so that keeping it copies nothing.
    pub message: Arc<Message>,
    /// Not to be delivered before this time from now has passed; dead letters have none.
    pub delay: Option<Duration>,
    /// Published to settle a delivery (returned by a handler, a retry, a dead letter): room for it must
    /// be made, because the delivery cannot end before.
    pub owed: bool,
    /// Where the broker's answer goes.
    pub receipt: Receipt,
}

/// Where a message goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// To all subscriptions of this topic.
    Topic(Topic),
    /// To this subscription alone.
    Subscription(SubscriptionName),
    /// To the dead letters of this subscription.
    DeadLetter(SubscriptionName),
}

/// An open subscription: a durable reading position, of which this is one instance.
///
/// # For implementors
/// It heals itself; what happens to it meanwhile it tells by [`Notice`]s. An error from
/// [`poll_batch`](Self::poll_batch) is final. Dropped without [`close`](Self::close) it has crashed: what is out comes
/// again, here or elsewhere; what was settled before may still be applied.
pub trait Subscription: Send + 'static {
    /// Adds up to `max` deliveries, and what there is to notice, to `out`.
    ///
    /// Behavior:
    /// - pending only while there is nothing to add; the waker is called when there is; with a `max` of 0, notices alone
    ///   are something;
    /// - what is handed out and not settled *at the broker* never exceeds `max_in_flight`;
    /// - what was handed out is handed out again only when its lease is lost or it was released;
    /// - with [`Ordering::Key`], what is given back is handed out again before anything newer of its topic and key, in
    ///   whichever instance, also if that was read already; other keys go on;
    /// - ready with nothing added means that it has stopped and will never add anything again.
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>>;

    /// Hands nothing out any more. Leases are kept, what is out still settles, and nobody else is given
    /// an event of a key that is still out here.
    fn stop(&mut self);

    /// Flushes settlements, at the latest at the deadline, then lets go; what is unsettled is given back in order.
    fn close(self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed>;
}

/// What one [`Subscription::poll_batch`] found; core owns and reuses it.
#[derive(Debug, Default)]
pub struct Polled {
    /// Deliveries, in order.
    pub deliveries: Vec<Delivery>,
    /// What changed before these deliveries; core heeds it first.
    pub notices: Vec<Notice>,
}

/// One attempt to hand a message to a subscription, with the duty to settle it.
#[derive(Debug)]
pub struct Delivery {
    /// What was published; shared, so that handing it on copies nothing.
    pub message: Arc<Message>,
    /// Its place in its slot's order; the same each time it is handed out.
    pub position: u64,
    /// The slot (partition, queue) whose order it is part of; 0 where there is one.
    pub slot: u32,
    /// It may have been handed out before, here or elsewhere.
    pub redelivered: bool,
    /// It was read by a replay.
    pub replayed: bool,
    /// How often it was handed out, this time included, where the broker counts.
    pub hand_outs: Option<u32>,
    /// How often an instance ended, or [abandoned](Settlement::Abandon) it, while it had it, where the broker counts:
    /// neither what was given back nor a lost lease counts.
    pub lost: Option<u32>,
    /// Settles it.
    pub acker: Acker,
}

/// What a subscription tells beside deliveries.
#[derive(Debug)]
#[non_exhaustive]
pub enum Notice {
    /// Leases were lost or are being revoked: ask each acker.
    Leases,
    /// This instance took over a slot. What has a position after `after` is handed to no handler until
    /// [`HoldBackOver`](Self::HoldBackOver): older events that the former owner left open are still to come. The
    /// transport keeps room for them within `max_in_flight`, hands them out in the order of their positions, and ends
    /// the hold-back of a slot that is lost or handed on.
    HoldBack {
        /// The slot taken over.
        slot: u32,
        /// The last position that the former owner may have been handed.
        after: u64,
    },
    /// Everything that was open when the slot was taken over has been handed out here or is settled.
    HoldBackOver {
        /// The slot taken over.
        slot: u32,
    },
    /// This instance became active or went on stand-by.
    Role(Role),
    /// Events were lost to retention before this subscription read them.
    Gap {
        /// The topic, where it is known.
        topic: Option<Topic>,
        /// How many at the most.
        missed_at_most: u64,
        /// The first position missed.
        from: u64,
        /// The first position after the gap.
        to: u64,
    },
}

/// What an instance does in its subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes part, owning these slots where events are shared by key.
    Active {
        /// The slots owned; empty where work is shared message by message.
        slots: Vec<u32>,
    },
    /// Another instance owns the keys; this one waits to take over.
    StandBy,
}

/// How the settlements of an instance ended, from when it was opened until it was closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// The broker has applied them.
    pub applied: u64,
    /// Their lease was lost before; the events will come again.
    pub stale: u64,
    /// The broker did not answer in time.
    pub unknown: u64,
}

/// What to open: the name, what it reads, and what must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct SubscriptionSpec {
    /// Its name, the same in all its instances.
    pub name: SubscriptionName,
    /// What it reads.
    pub topics: Vec<TopicPattern>,
    /// What must hold for events with the same key. How (one active instance, slots, partitions) is the transport's.
    pub ordering: Ordering,
    /// Where it starts if it is new.
    pub start: Start,
    /// The most deliveries that may be unsettled at the broker.
    pub max_in_flight: usize,
    /// The longest that a delivery may stay unsettled; [`Duration::MAX`] if there is no limit.
    pub max_hold: Duration,
}

/// What holds for events of one topic with the same key in one subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ordering {
    /// Each key has one owner at a time, among all instances, and is handled in publish order.
    Key,
    /// None; instances share the work message by message.
    None,
}

/// Where a new subscription starts. It is decided when the subscription is created, never again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// With what is published from now on.
    #[default]
    New,
    /// With the oldest event that the broker still has.
    Beginning,
}

/// What to read again.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplaySpec {
    /// What it reads.
    pub topics: Vec<TopicPattern>,
    /// Where it starts.
    pub from: ReplayFrom,
    /// Where it ends: with what was there when it began, or never.
    pub follow: bool,
    /// The most deliveries that may be unsettled.
    pub max_in_flight: usize,
}

/// Where a replay starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayFrom {
    /// With the oldest event that the broker still has.
    Beginning,
    /// With the first event that the broker received (a delayed one: made due) at or after this time.
    Time(SystemTime),
    /// With the first event at or after this [`Delivery::position`]: of a replay, or also of a subscription where
    /// [`Capabilities::log_positions`] says so.
    Position(u64),
}

/// The dead letters of one subscription.
#[async_trait]
pub trait DeadLetters: Send + Sync {
    /// How many there are.
    async fn count(&self) -> Result<u64>;
    /// The position of the newest; `None` if there are none.
    async fn last(&self) -> Result<Option<u64>>;
    /// Up to `max` of them, the oldest first, of those after the position `after`.
    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>>;
    /// Deletes those at these positions; what is not there is ignored. Returns how many were deleted.
    async fn remove(&self, positions: &[u64]) -> Result<u64>;
}

/// One dead letter as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// Its place among the dead letters of its subscription; never given twice, even if the newest was removed.
    pub position: u64,
    /// The message, with the headers that tell why ([`header`](crate::header)).
    pub message: Message,
}

/// A topic and its properties, which are kept with it on the broker: the same for publishers and subscribers.
#[derive(Clone, Debug, PartialEq)]
pub struct TopicSpec {
    /// The topic.
    pub topic: Topic,
    /// Over how many slots (partitions, queues) its keys are spread; 1 for none.
    pub slots: u32,
    /// How long what is published is kept for those who have not read it; the transport's default if `None`.
    pub retention: Option<Duration>,
    /// Whether it can be read again, where that is not always so.
    pub retained: bool,
}

impl TopicSpec {
    /// One slot, the transport's retention, not retained.
    #[must_use]
    pub fn new(topic: Topic) -> Self {
        Self { topic, slots: 1, retention: None, retained: false }
    }
}

/// Topics and subscriptions to provision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// Topics.
    pub topics: Vec<TopicSpec>,
    /// Subscriptions.
    pub subscriptions: Vec<SubscriptionSpec>,
}

/// What a transport can do: plain data, checked before anything starts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Confirmed messages survive the death of this process.
    pub durable: bool,
    /// It repeats publishes by itself without changing their order; core then never repeats, and may
    /// have many unconfirmed publishes of one key in flight.
    pub ordered_repeats: bool,
    /// It can delay a message that is published to a topic.
    pub publish_delay: bool,
    /// A subscription can give each key one owner at a time.
    pub key_ordering: bool,
    /// Keys of a topic can be spread over slots, which instances share.
    pub slots: bool,
    /// Without order, instances share the work message by message; else one of them is active, and the others stand by.
    pub sharing: bool,
    /// A topic can limit how long it keeps what is published ([`TopicSpec::retention`]).
    pub retention: bool,
    /// A new subscription can start at the beginning.
    pub start_beginning: bool,
    /// What was published can be read again.
    pub replay: bool,
    /// The position of a subscription's delivery is one that a replay of its topic can start at. Where subscriptions have
    /// queues of their own it is not, and such a position is refused.
    pub log_positions: bool,
    /// [`Delivery::hand_outs`] is given.
    pub counts_hand_outs: bool,
    /// [`Delivery::lost`] is given, so that an event that kills its process is found out.
    pub counts_losses: bool,
    /// The largest payload it takes, in bytes.
    pub max_payload: usize,
    /// The longest that a delivery may stay unsettled, where that is limited and cannot be extended.
    pub max_hold: Option<Duration>,
}

impl Capabilities {
    /// Nothing but the least: no durability, no order, no limits. Set what is more.
    pub const NONE: Self = Self {
        durable: false,
        ordered_repeats: false,
        publish_delay: false,
        key_ordering: false,
        slots: false,
        sharing: false,
        retention: false,
        start_beginning: false,
        replay: false,
        log_positions: false,
        counts_hand_outs: false,
        counts_losses: false,
        max_payload: usize::MAX,
        max_hold: None,
    };
}

/// Whether something can be used now.
#[derive(Debug)]
pub enum Health {
    /// Fully.
    Up,
    /// In part; the error says what is missing.
    Degraded(Error),
    /// Not at all; it is being repaired.
    Down(Error),
}

// The contract is used as trait objects.
const _: fn(&dyn Transport, &dyn Publisher) = |_, _| {};
const _: fn(&dyn Subscription, &dyn Settle, &dyn DeadLetters) = |_, _, _| {};
