//! Reads parts of partitions, for what is looked up rather than subscribed to.

use crate::client::{KafkaContext, acquaint};
use crate::error::{client, error};
use parking_lot::Mutex;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use std::ops::Range;
use std::time::{Duration, Instant};
use tidings_core::{ErrorKind, Result};

/// One client for all that is read so; made when it is first needed.
pub(crate) struct RangeReader {
    config: ClientConfig,
    context: KafkaContext,
    timeout: Duration,
    consumer: Mutex<Option<BaseConsumer<KafkaContext>>>,
}

impl RangeReader {
    pub(crate) fn new(mut config: ClientConfig, context: KafkaContext, timeout: Duration) -> Self {
        config.set("enable.partition.eof", "true");
        // What retention takes while it is read is no concern here.
        config.set("auto.offset.reset", "earliest");
        Self { config, context, timeout, consumer: Mutex::default() }
    }

    /// Shows the records of `range`, in order, until there are no more or `take` says so. Blocks.
    pub(crate) fn read(
        &self,
        topic: &str,
        partition: i32,
        range: Range<u64>,
        take: impl FnMut(&BorrowedMessage<'_>) -> bool,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut consumer = self.consumer.lock();
        if consumer.is_none() {
            let created = self.config.create_with_context(self.context.clone());
            *consumer = Some(created.map_err(|e| client("a client could not be created", e))?);
        }
        let Some(consumer) = consumer.as_ref() else { return Ok(()) };
        let read = self.read_with(consumer, (topic, partition), &range, take);
        let unassigned = consumer.unassign().map_err(|e| client("the reading could not be ended", e));
        read.and(unassigned)
    }

    fn read_with(
        &self,
        consumer: &BaseConsumer<KafkaContext>,
        (topic, partition): (&str, i32),
        range: &Range<u64>,
        mut take: impl FnMut(&BorrowedMessage<'_>) -> bool,
    ) -> Result<()> {
        let why = "records cannot be read";
        let mut list = TopicPartitionList::new();
        let first = Offset::Offset(i64::try_from(range.start).unwrap_or(i64::MAX));
        list.add_partition_offset(topic, partition, first).map_err(|e| client(why, e))?;
        consumer.assign(&list).map_err(|e| client(why, e))?;
        acquaint(consumer, [topic]);
        let mut deadline = Instant::now() + self.timeout;
        while Instant::now() < deadline {
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Ok(record)) if record.topic() != topic || record.partition() != partition => {}
                Some(Ok(record)) => {
                    deadline = Instant::now() + self.timeout;
                    let offset = u64::try_from(record.offset()).unwrap_or(0);
                    if offset >= range.end || !take(&record) || offset + 1 >= range.end {
                        return Ok(());
                    }
                }
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(()),
                Some(Err(failed)) => tracing::debug!("reading {topic}: {failed}"),
            }
        }
        Err(error(ErrorKind::Timeout, "records could not be read in time").with_context("topic", topic))
    }
}
