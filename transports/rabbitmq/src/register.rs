//! What topics and subscriptions were created with: AMQP 0-9-1 cannot ask for bindings or arguments, so it is kept as one
//! message in a queue, which is replaced under a lock.

use crate::consumers::Consuming;
use crate::error::{error, failed, is_absent, is_locked, late, mismatch};
use crate::link::Link;
use crate::names::Names;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tidings_core::transport::{Ordering, Start, SubscriptionSpec, TopicSpec};
use tidings_core::{Backoff, ErrorKind, Result, Topic, TopicPattern};
use tokio::time::{Instant, sleep, timeout};

/// Between tries to get a lock that another instance holds.
const TAKEN: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(200));

/// How long freeing a lock may take.
const FREED: Duration = Duration::from_secs(1);

/// Everything that was created in a namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Register {
    version: u64,
    pub(crate) topics: BTreeMap<String, TopicTerms>,
    pub(crate) subscriptions: BTreeMap<String, Terms>,
    /// So many levels of the delay chain, each to its end.
    pub(crate) levels: usize,
}

/// What a topic was created with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TopicTerms {
    pub(crate) slots: u32,
    retention_ms: Option<u64>,
    pub(crate) retained: bool,
}

/// What a subscription was created with, and must be opened with again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Terms {
    topics: Vec<String>,
    ordering: Ordering,
    start: Start,
    pub(crate) slots: u32,
}

impl TopicTerms {
    pub(crate) fn of(spec: &TopicSpec) -> Self {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self { slots: spec.slots, retention_ms: spec.retention.map(millis), retained: spec.retained }
    }

    /// That it has what is asked for.
    pub(crate) fn check(&self, asked: &Self) -> Result<()> {
        if self.slots != asked.slots {
            return Err(mismatch("slots of the topic", self.slots, asked.slots));
        }
        if self.retained != asked.retained {
            return Err(mismatch("`retained` of the topic", self.retained, asked.retained));
        }
        if self.retention_ms != asked.retention_ms {
            return Err(mismatch("retention of the topic, in ms", self.retention_ms, asked.retention_ms));
        }
        Ok(())
    }
}

impl Terms {
    /// What a subscription is created with; the order and repetition of its topics mean nothing.
    pub(crate) fn of(spec: &SubscriptionSpec, slots: u32) -> Self {
        let mut topics: Vec<_> = spec.topics.iter().map(|topic| topic.as_str().to_owned()).collect();
        topics.sort_unstable();
        topics.dedup();
        Self { topics, ordering: spec.ordering, start: spec.start, slots }
    }

    pub(crate) fn check(&self, asked: &Self) -> Result<()> {
        if self.topics != asked.topics {
            return Err(mismatch("topics of the subscription", &self.topics, &asked.topics));
        }
        if self.ordering != asked.ordering {
            return Err(mismatch("ordering of the subscription", self.ordering, asked.ordering));
        }
        if self.start != asked.start {
            let what = "start of the subscription, decided when it was created (`Bus::remove_subscription` lets it begin anew)";
            return Err(mismatch(what, self.start, asked.start));
        }
        if self.slots != asked.slots {
            let what =
                "slots of the subscription, those its topics had when it was created (drain it and delete its queues)";
            return Err(mismatch(what, self.slots, asked.slots));
        }
        Ok(())
    }
}

impl Register {
    /// Over how many slots a subscription to these is spread: as many as its topics have at most.
    pub(crate) fn slots(&self, spec: &SubscriptionSpec) -> u32 {
        let read = |name: &str| spec.topics.iter().any(|pattern| matches(pattern, name));
        let slots = self.topics.iter().filter(|(name, _)| read(name)).map(|(_, topic)| topic.slots).max();
        if spec.ordering == Ordering::Key { slots.unwrap_or(1) } else { 1 }
    }

    /// The topics among these that can be read again.
    pub(crate) fn retained(&self, patterns: &[TopicPattern]) -> Vec<Topic> {
        let read = |name: &str| patterns.iter().any(|pattern| matches(pattern, name));
        let retained = self.topics.iter().filter(|(name, topic)| topic.retained && read(name));
        retained.filter_map(|(name, _)| Topic::new(name.as_str()).ok()).collect()
    }
}

fn matches(pattern: &TopicPattern, name: &str) -> bool {
    Topic::new(name).is_ok_and(|topic| pattern.matches(&topic))
}

/// The right to do what nobody else may do meanwhile. It goes with the channel: dropped, it is free.
pub(crate) struct Lock {
    /// The queue is gone with its consumer.
    consuming: Consuming,
    queue: ShortString,
}

impl Lock {
    /// Waits for it, at the latest within `time`. Within one connection, callers take turns themselves.
    pub(crate) async fn take(link: &Link, queue: ShortString, time: Duration) -> Result<Self> {
        let deadline = Instant::now() + time;
        for round in 1.. {
            match declare(link.channel().await?, &queue).await {
                Ok(consuming) => return Ok(Self { consuming, queue }),
                Err(failure) if is_locked(&failure) || is_absent(&failure) => {}
                Err(failure) => return Err(failed(failure)),
            }
            let delay = TAKEN.delay(round);
            if Instant::now() + delay > deadline {
                return Err(late("a lock that another instance holds", time).with_context("lock", &queue));
            }
            sleep(delay).await;
        }
        Err(late("a lock", time))
    }

    /// Frees it; when this returns, another may have it.
    pub(crate) async fn free(self) {
        // It goes with the channel if this fails, or is not answered: a server that is short of memory answers nothing.
        let freed = self.consuming.channel.queue_delete(self.queue.clone(), QueueDeleteOptions::default());
        let _ = timeout(FREED, freed).await;
    }
}

/// An exclusive queue is locked for all other connections; its consumer ties it to the channel. If it never gets one,
/// because nobody waits any more, it expires.
async fn declare(channel: Channel, queue: &ShortString) -> lapin::Result<Consuming> {
    let options = QueueDeclareOptions::exclusive().auto_delete();
    let mut arguments = FieldTable::default();
    arguments.insert("x-expires".into(), AMQPValue::LongInt(5_000));
    channel.queue_declare(queue.clone(), options, arguments).await?;
    let consume = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    Consuming::open(channel, queue.clone(), "".into(), consume).await
}

/// Reads the register, lets `change` change it, and writes it back if that has returned `Ok` and it has changed.
///
/// What is read is always replaced by a confirmed copy: what is given back to a queue is not there at once for others.
pub(crate) async fn update<T>(
    channel: &Channel,
    names: &Names,
    change: impl AsyncFnOnce(&mut Register) -> Result<T>,
) -> Result<T> {
    let queue = names.register()?;
    let (mut tags, mut register) = (Vec::new(), Register::default());
    while let Some(got) = channel.basic_get(queue.clone(), BasicGetOptions::default()).await.map_err(failed)? {
        tags.push(got.delivery.delivery_tag);
        let read: Register = serde_json::from_slice(&got.delivery.data).map_err(|source| {
            let why = "the queue that keeps what was created holds something else; look into it";
            error(ErrorKind::Internal, why).with_context("queue", &queue).with_source(source)
        })?;
        // Two, if a writer has ended between writing and deleting.
        register = if read.version >= register.version { read } else { register };
    }
    let before = register.clone();
    let changed = change(&mut register).await;
    let write = if changed.is_ok() { register } else { before };
    if !tags.is_empty() || write != Register::default() {
        replace(channel, &queue, write).await?;
    }
    for tag in tags {
        channel.basic_ack(tag, BasicAckOptions::default()).await.map_err(failed)?;
    }
    changed
}

async fn replace(channel: &Channel, queue: &ShortString, mut register: Register) -> Result<()> {
    register.version += 1;
    let bytes = serde_json::to_vec(&register)
        .map_err(|source| error(ErrorKind::Internal, "the register cannot be written").with_source(source))?;
    let properties = BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let confirm = channel.basic_publish("".into(), queue.clone(), options, &bytes, properties).await.map_err(failed)?;
    match confirm.await.map_err(failed)? {
        lapin::Confirmation::Ack(None) => Ok(()),
        _ => Err(error(ErrorKind::Refused, "the register was not taken").with_context("queue", queue)),
    }
}
