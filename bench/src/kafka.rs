//! Kafka, beside rdkafka.

use crate::broker::{Broker, Limits, Raw};
use crate::event::{Sample, encode, handle};
use crate::measure::Meter;
use crate::{BoxError, Result};
use std::hint::black_box;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release},
};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tidings::MessageId;
use tidings::kafka::rdkafka::admin::{AdminClient, AdminOptions};
use tidings::kafka::rdkafka::client::{ClientContext, DefaultClientContext};
use tidings::kafka::rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use tidings::kafka::rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tidings::kafka::rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use tidings::kafka::rdkafka::metadata::MetadataTopic;
use tidings::kafka::rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use tidings::kafka::rdkafka::util::get_rdkafka_version;
use tidings::kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tidings::kafka::{KafkaConfig, KafkaTransport};
use tidings::transport::Transport;
use tidings_tests::server::Server;
use tokio::sync::Notify;

const PUBLISHED: Raw = Raw {
    name: "raw",
    what: "rdkafka, `ThreadedProducer`, idempotent, linger 0, lz4, the delivery callback counts; \
        the SDK's headers, made once but for the ids",
    bare: false,
};
const PUBLISHED_BARE: Raw =
    Raw { name: "raw, bare", what: "the same without headers: what the CloudEvents attributes cost", bare: true };
const CONSUMED: Raw = Raw {
    name: "raw",
    what: "rdkafka, `StreamConsumer`, each offset stored when its event is handled, committed every 50 ms; the SDK's messages",
    bare: false,
};
const CONSUMED_READ: Raw = Raw {
    name: "raw, headers",
    what: "the same, and finds the type and id of each in its headers, which librdkafka parses only then: who routes by type has to",
    bare: false,
};
const CONSUMED_BARE: Raw = Raw { name: "raw, bare", what: "the same with messages without headers", bare: true };

const TIMEOUT: Duration = Duration::from_secs(10);

/// A server of its own; dropped, it is stopped.
#[derive(Debug)]
pub struct Kafka(Server);

impl Kafka {
    /// # Errors
    /// The server cannot be installed or started.
    pub fn start() -> Result<Self> {
        // The server's compiler as it is in production: what starts quickly is slower later.
        Ok(Self(Server::start_with("kafka", vec![("TIDINGS_TEST_KAFKA_JVM".into(), String::new())])?))
    }

    /// What the transport sets too, where it decides the speed.
    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.0.url().trim_start_matches("kafka://"));
        config.set("socket.nagle.disable", "true").set("topic.metadata.refresh.fast.interval.ms", "50");
        config
    }

    fn consumer(&self) -> Result<StreamConsumer> {
        let mut config = self.client();
        config.set("group.id", "raw").set("auto.offset.reset", "earliest");
        config.set("enable.auto.offset.store", "false").set("auto.commit.interval.ms", "50");
        config.set("fetch.queue.backoff.ms", "10").set("fetch.wait.max.ms", "100").set("check.crcs", "true");
        config.set("queued.max.messages.kbytes", "4096");
        Ok(config.create()?)
    }
}

/// Counts what is confirmed, and wakes who sends now and then: each time would be a switch of threads for each message.
struct Confirmed {
    count: AtomicU64,
    every: u64,
    total: u64,
    failed: OnceLock<KafkaError>,
    more: Notify,
}

/// As the producer takes it.
struct Context(Arc<Confirmed>);

impl ClientContext for Context {}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.0.failed.get_or_init(|| error.clone());
        }
        let count = self.0.count.fetch_add(1, Release) + 1;
        if count.is_multiple_of(self.0.every) || count == self.0.total {
            self.0.more.notify_one();
        }
    }
}

impl Confirmed {
    /// Waits until `count` are confirmed, and tells the meter of those that it has not been `told` of.
    async fn reach(&self, count: u64, told: &mut u64, meter: &Meter) -> Result<()> {
        loop {
            let confirmed = self.count.load(Acquire);
            if confirmed > *told {
                meter.tick_many(confirmed - *told);
                *told = confirmed;
            }
            if let Some(error) = self.failed.get() {
                return Err(error.clone().into());
            }
            if confirmed >= count {
                return Ok(());
            }
            self.more.notified().await;
        }
    }
}

impl Broker for Kafka {
    const NAME: &'static str = "kafka";
    const PUBLISH: &'static [Raw] = &[PUBLISHED, PUBLISHED_BARE];
    const CONSUME: &'static [Raw] = &[CONSUMED, CONSUMED_READ, CONSUMED_BARE];
    const SETTLED: &'static str = "done with: its offset is stored, and offsets are committed now and then";
    // A commit tells of all that was settled, and takes a millisecond. The raw loop has no limit: what it has not committed after 50 ms.
    const IN_FLIGHT: usize = 4_096;

    async fn versions(&self) -> Result<String> {
        Ok(format!("Kafka 4.3.1, rdkafka 0.39 with librdkafka {}", get_rdkafka_version().1))
    }

    async fn connect(&self, namespace: &str) -> Result<Arc<dyn Transport>> {
        let config = KafkaConfig::from_url(&format!("{}?namespace={namespace}", self.0.url()))?;
        Ok(KafkaTransport::connect(config).await?)
    }

    async fn publish<E: Sample>(&self, raw: Raw, namespace: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let window = limits.window as u64;
        let (count, every, total) = (AtomicU64::new(0), (window / 4).max(1), meter.total());
        let confirmed = Arc::new(Confirmed { count, every, total, failed: OnceLock::new(), more: Notify::new() });
        let mut config = self.client();
        config.set("enable.idempotence", "true").set("linger.ms", "0").set("compression.type", "lz4");
        config.set("partitioner", "murmur2_random").set("queue.buffering.max.messages", "0");
        let producer: ThreadedProducer<Context> = config.create_with_context(Context(Arc::clone(&confirmed)))?;
        let topic = format!("{namespace}.{}", E::TOPIC);
        let template = attributes::<E>();
        let mut told = 0;
        for number in 0..meter.total() {
            meter.due(number).await;
            if number >= told + window {
                // A quarter of the window at a time.
                confirmed.reach(number - window + every, &mut told, meter).await?;
            }
            let (event, id) = (E::new(number), MessageId::new(SystemTime::now()).to_string());
            let payload = encode(&event)?;
            let mut record = BaseRecord::to(&topic).payload(&payload[..]);
            let key = event.key();
            if let Some(key) = &key {
                record = record.key(key.as_bytes());
            }
            if !raw.bare {
                record = record.headers(template.clone().insert(Header { key: "ce_id", value: Some(&id) }));
            }
            producer.send(record).map_err(|(error, _)| error)?;
        }
        confirmed.reach(total, &mut told, meter).await?;
        Ok(producer.flush(TIMEOUT)?)
    }

    async fn consume<E: Sample>(&self, raw: Raw, namespace: &str, _: Limits, meter: &Meter) -> Result<()> {
        let consumer = self.consumer()?;
        let topic = format!("{namespace}.{}", E::TOPIC);
        consumer.subscribe(&[&topic])?;
        let mut next = TopicPartitionList::new();
        loop {
            let message = consumer.recv().await?;
            if raw.name == CONSUMED_READ.name {
                black_box(routed_by(message.headers()));
            }
            handle::<E>(message.payload().unwrap_or_default(), meter)?;
            consumer.store_offset_from_message(&message)?;
            if !meter.tick() {
                next.add_partition_offset(&topic, message.partition(), Offset::Offset(message.offset() + 1))?;
                break;
            }
        }
        Ok(tokio::task::block_in_place(|| consumer.commit(&next, CommitMode::Sync))?)
    }

    async fn clean_up(&self) -> Result<()> {
        let admin: AdminClient<DefaultClientContext> = self.client().create()?;
        let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(None, TIMEOUT))?;
        let names: Vec<_> =
            metadata.topics().iter().map(MetadataTopic::name).filter(|n| !n.starts_with("__")).collect();
        let deleted = admin.delete_topics(&names, &AdminOptions::new()).await?;
        match deleted.into_iter().find_map(Result::err) {
            Some((name, why)) if why != RDKafkaErrorCode::UnknownTopicOrPartition => {
                Err(BoxError::from(format!("{name}: {why}")))
            }
            _ => Ok(()),
        }
    }
}

fn routed_by<H: Headers>(headers: Option<&H>) -> [Option<&[u8]>; 2] {
    let mut found = [None; 2];
    for header in headers.into_iter().flat_map(Headers::iter) {
        match header.key {
            "ce_type" => found[0] = header.value,
            "ce_id" => found[1] = header.value,
            _ => {}
        }
    }
    found
}

/// Those that the SDK sends, but for the id.
fn attributes<E: Sample>() -> OwnedHeaders {
    let mut headers = OwnedHeaders::new_with_capacity(8);
    for (key, value) in [
        ("ce_specversion", "1.0"),
        ("ce_source", crate::scenario::SOURCE),
        ("ce_type", E::NAME),
        ("content-type", E::CONTENT),
        ("ce_time", "2026-01-01T00:00:00.123456789Z"),
        ("ce_recordedtime", "2026-01-01T00:00:00.123456789Z"),
    ] {
        headers = headers.insert(Header { key, value: Some(value) });
    }
    headers
}
