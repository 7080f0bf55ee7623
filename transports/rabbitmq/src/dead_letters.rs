//! Dead letters: a queue for each subscription, which is read whole and given back.
//!
//! A queue has no positions, so each letter carries its own: the time at which it was sent, in 1/1024 of a microsecond, the
//! last bits of it random.

use crate::consumers::Consuming;
use crate::error::{failed, is_absent};
use crate::link::Link;
use crate::topology::Topology;
use crate::wire::{DEAD_POSITION, Fnv, Received, count, decode};
use async_trait::async_trait;
use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{DeadLetter, DeadLetters};
use tidings_core::{Result, SubscriptionName};
use tokio::time::{Instant, sleep, timeout};

/// Bits of a position below the microsecond.
const FRACTION: u32 = 10;
/// How long the server may take to send the next letter.
const SILENCE: Duration = Duration::from_secs(5);
/// How long what was given back may take to be there for the next who reads.
const RETURN: Duration = Duration::from_secs(2);

/// Gives a dead letter its position.
pub(crate) fn positioned(properties: BasicProperties) -> BasicProperties {
    let mut headers = properties.headers().clone().unwrap_or_default();
    let now = crate::reader::now_us().max(0) << FRACTION | i64::from(fastrand::u16(..1 << FRACTION));
    headers.insert(DEAD_POSITION.into(), AMQPValue::LongLongInt(now));
    properties.with_headers(headers)
}

/// The position of a letter; of what the broker itself has put here, one that is made of it.
fn position(delivery: &Delivery) -> u64 {
    if let Some(position) = count(&delivery.properties, DEAD_POSITION) {
        return position;
    }
    let headers = delivery.properties.headers().as_ref().map(FieldTable::inner);
    let deaths = headers.and_then(|headers| headers.get("x-death")).and_then(AMQPValue::as_array);
    let death = deaths.and_then(|deaths| deaths.as_slice().first()).and_then(AMQPValue::as_field_table);
    let seconds =
        death.and_then(|death| death.inner().get("time")).and_then(AMQPValue::as_timestamp).unwrap_or_default();
    let mut hash = Fnv::default();
    hash.write(delivery.properties.message_id().as_ref().map_or("", |id| id.as_str()).as_bytes());
    hash.write(&delivery.data);
    let second = 1_000_000 << FRACTION;
    seconds.saturating_mul(second).saturating_add(hash.finish() % second).min(i64::MAX.unsigned_abs())
}

/// The dead letters of one subscription, through one transport.
pub(crate) struct RabbitMqDeadLetters {
    pub(crate) link: Arc<Link>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) name: SubscriptionName,
}

impl RabbitMqDeadLetters {
    /// How many lie there ready; none if there is no queue.
    async fn ready(&self) -> Result<u32> {
        let channel = self.link.channel().await?;
        let passive = QueueDeclareOptions::durable().passive();
        let queue = self.topology.names.dead_letters(&self.name)?;
        match channel.queue_declare(queue, passive, FieldTable::default()).await {
            Ok(queue) => Ok(queue.message_count()),
            Err(failure) if is_absent(&failure) => Ok(0),
            Err(failure) => Err(failed(failure)),
        }
    }

    /// Shows each letter to `see`, until that has seen enough; those for which it says so are deleted, the others given
    /// back. Returns how many were deleted.
    ///
    /// Nobody else reads them meanwhile: what one holds, another would not see.
    async fn scan(&self, see: impl FnMut(u64, Delivery) -> ControlFlow<bool, bool> + Send) -> Result<u64> {
        self.topology.alone_with(&self.name, self.scan_alone(see)).await
    }

    async fn scan_alone(&self, see: impl FnMut(u64, Delivery) -> ControlFlow<bool, bool> + Send) -> Result<u64> {
        let there = self.link.within("the dead letters", self.ready()).await?;
        if there == 0 {
            return Ok(0);
        }
        let mut letters = self.open(there).await?;
        let seen = self.read(&mut letters, there, see).await;
        // Gives back what is left, in its place.
        let closed = async { letters.channel.close(200, "read".into()).await.map_err(failed) };
        self.link.within("the end of the reading", closed).await?;
        let deleted = seen?;
        self.wait_for(u64::from(there) - deleted.min(there.into())).await?;
        Ok(deleted)
    }

    async fn open(&self, there: u32) -> Result<Consuming> {
        let channel = self.link.channel().await?;
        // All of them are held at once; beyond what can be said there is no limit but the queue's own length.
        channel.basic_qos(u16::try_from(there).unwrap_or(0), BasicQosOptions::default()).await.map_err(failed)?;
        let queue = self.topology.names.dead_letters(&self.name)?;
        Consuming::open(channel, queue, "letters".into(), BasicConsumeOptions::default()).await.map_err(failed)
    }

    async fn read(
        &self,
        letters: &mut Consuming,
        there: u32,
        mut see: impl FnMut(u64, Delivery) -> ControlFlow<bool, bool> + Send,
    ) -> Result<u64> {
        let (channel, consumer, mut deleted) = (&letters.channel, &mut letters.consumer, 0);
        for _ in 0..there {
            let next = async { consumer.as_mut()?.next().await };
            let Ok(Some(letter)) = timeout(SILENCE, next).await else { break };
            let letter = letter.map_err(failed)?;
            let tag = letter.delivery_tag;
            let seen = see(position(&letter), letter);
            let (delete, enough) = match seen {
                ControlFlow::Continue(delete) => (delete, false),
                ControlFlow::Break(delete) => (delete, true),
            };
            if delete {
                channel.basic_ack(tag, BasicAckOptions::default()).await.map_err(failed)?;
                deleted += 1;
            }
            if enough {
                break;
            }
        }
        // Goes through the queue's log behind what was deleted, which is applied then.
        channel.basic_cancel("letters".into(), BasicCancelOptions::default()).await.map_err(failed)?;
        channel.basic_qos(1, BasicQosOptions::default()).await.map_err(failed)?;
        Ok(deleted)
    }

    /// Waits until what was given back is there again, so that who reads next sees it.
    async fn wait_for(&self, count: u64) -> Result<()> {
        let deadline = Instant::now() + RETURN;
        while u64::from(self.link.within("the dead letters", self.ready()).await?) < count && Instant::now() < deadline
        {
            sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    fn about(&self, failure: tidings_core::Error) -> tidings_core::Error {
        let failure = if self.link.is_closed() { crate::error::closed() } else { failure };
        failure.with_operation("dead letters").with_context("subscription", &self.name)
    }
}

#[async_trait]
impl DeadLetters for RabbitMqDeadLetters {
    async fn count(&self) -> Result<u64> {
        let count =
            async || self.topology.alone_with(&self.name, self.link.within("the dead letters", self.ready())).await;
        self.link.patiently(count).await.map(u64::from).map_err(|error| self.about(error))
    }

    async fn last(&self) -> Result<Option<u64>> {
        let find = move || async move {
            let mut last = None;
            let scanned = self.scan(|position, _| {
                last = last.max(Some(position));
                ControlFlow::Continue(false)
            });
            scanned.await.map(|_| last)
        };
        self.link.patiently(find).await.map_err(|error| self.about(error))
    }

    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
        if max == 0 {
            return Ok(Vec::new());
        }
        let read = move || async move {
            let mut page: BTreeMap<u64, Delivery> = BTreeMap::new();
            let scanned = self.scan(|position, letter| {
                if after.is_none_or(|after| position > after) {
                    page.insert(position, letter);
                    if page.len() > max {
                        page.pop_last();
                    }
                }
                ControlFlow::Continue(false)
            });
            scanned.await.map(|_| page)
        };
        let page = self.link.patiently(read).await.map_err(|error| self.about(error))?;
        let read = |(position, letter): (u64, Delivery)| {
            let Delivery { routing_key, properties, data, .. } = letter;
            DeadLetter { position, message: decode(Received { routing_key: routing_key.into(), properties, data }) }
        };
        Ok(page.into_iter().map(read).collect())
    }

    async fn remove(&self, positions: &[u64]) -> Result<u64> {
        if positions.is_empty() {
            return self.count().await.map(|_| 0);
        }
        let remove = move || async move {
            let mut left: BTreeSet<u64> = positions.iter().copied().collect();
            let scanned = self.scan(|position, _| {
                let delete = left.remove(&position);
                if left.is_empty() { ControlFlow::Break(delete) } else { ControlFlow::Continue(delete) }
            });
            scanned.await
        };
        self.link.patiently(remove).await.map_err(|error| self.about(error))
    }
}
