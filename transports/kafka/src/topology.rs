//! Topics and subscriptions: created, verified or left alone.

use crate::client::{self, KafkaContext, Link};
use crate::config::{KafkaConfig, Provision};
use crate::error::{client as failed, closed, code, error, mismatch};
use crate::names::Names;
use crate::reader::RangeReader;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message as _;
use rdkafka::types::RDKafkaErrorCode as Code;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Ordering, Start, SubscriptionSpec, TopicSpec, Topology};
use tidings_core::{ErrorKind, Result, SubscriptionName, TopicPattern};
use tokio::time::{Instant, sleep};

/// The delays for which there is a partition beside an address: 250 ms, and twice the one before.
pub(crate) const RUNGS: u32 = 15;
/// The shortest of them.
pub(crate) const FIRST_RUNG: Duration = Duration::from_millis(250);
/// Between looks at what the brokers do not know yet.
const AGAIN: Duration = Duration::from_millis(10);
/// The partition behind those, which holds what the subscription was created with.
pub(crate) const TERMS: i32 = RUNGS as i32;

/// The delay of a partition; `None` for the one with the terms.
pub(crate) fn rung(partition: i32) -> Option<Duration> {
    let rung = u32::try_from(partition).ok().filter(|rung| *rung < RUNGS)?;
    Some(FIRST_RUNG * (1 << rung))
}

/// The partition for what is due after `delay`.
pub(crate) fn partition_for(delay: Duration) -> i32 {
    let fits = |partition: &i32| rung(*partition).is_some_and(|rung| rung >= delay);
    (0..TERMS).find(fits).unwrap_or(TERMS - 1)
}

/// What a subscription was created with, as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Terms {
    topics: Vec<String>,
    ordering: Ordering,
    start: Start,
}

impl Terms {
    pub(crate) fn of(spec: &SubscriptionSpec) -> Self {
        let mut topics: Vec<String> = spec.topics.iter().map(|topic| topic.as_str().to_owned()).collect();
        topics.sort_unstable();
        topics.dedup();
        Self { topics, ordering: spec.ordering, start: spec.start }
    }

    /// Refuses what differs.
    pub(crate) fn check(&self, asked: &Self) -> Result<()> {
        if self.topics != asked.topics {
            return Err(mismatch("topics", &self.topics, &asked.topics));
        }
        if self.ordering != asked.ordering {
            return Err(mismatch("ordering", self.ordering, asked.ordering));
        }
        if self.start != asked.start {
            let why = format!(
                "start: it was created with {:?}, asked for was {:?}; where it starts is decided once (`Bus::remove_subscription` lets it begin anew)",
                self.start, asked.start
            );
            return Err(error(ErrorKind::Mismatch, why));
        }
        Ok(())
    }
}

/// What is known of the cluster, and what asks and changes it.
pub(crate) struct Catalog {
    pub(crate) config: KafkaConfig,
    pub(crate) names: Names,
    pub(crate) link: Arc<Link>,
    pub(crate) admin: AdminClient<KafkaContext>,
    /// Asks for metadata and offsets; it would create no topic by asking.
    pub(crate) lookup: BaseConsumer<KafkaContext>,
    pub(crate) reader: RangeReader,
}

/// Runs what blocks for the cluster where that blocks nobody else.
pub(crate) async fn blocking<T: Send + 'static>(
    catalog: &Arc<Catalog>,
    work: impl FnOnce(&Catalog) -> Result<T> + Send + 'static,
) -> Result<T> {
    let catalog = Arc::clone(catalog);
    let done = tokio::task::spawn_blocking(move || work(&catalog)).await;
    done.unwrap_or_else(|_| Err(closed()))
}

impl Catalog {
    pub(crate) fn new(config: KafkaConfig, link: &Arc<Link>) -> Result<Self> {
        let context = KafkaContext::new(link, &config);
        let why = "a client could not be created";
        let common = client::common(&config)?;
        let admin = common.create_with_context(context.clone()).map_err(|e| failed(why, e))?;
        let lookup = client::reader(&config, None)?.create_with_context(context.clone()).map_err(|e| failed(why, e))?;
        let names = Names::new(&config.namespace);
        let reader = RangeReader::new(client::reader(&config, Some(&names.reader()))?, context, config.request_timeout);
        Ok(Self { names, link: Arc::clone(link), admin, lookup, reader, config })
    }

    fn timeout(&self) -> Duration {
        self.config.request_timeout
    }

    fn options(&self) -> AdminOptions {
        AdminOptions::new().request_timeout(Some(self.timeout())).operation_timeout(Some(self.timeout()))
    }

    /// How many partitions a topic has; `None` if there is no such topic. Blocks.
    pub(crate) fn partitions(&self, name: &str) -> Result<Option<u32>> {
        let metadata = self.lookup.fetch_metadata(Some(name), self.timeout());
        let metadata = metadata.map_err(|e| failed("the topic cannot be looked up", e))?;
        let Some(topic) = metadata.topics().iter().find(|topic| topic.name() == name) else { return Ok(None) };
        match topic.error().map(Code::from) {
            None => Ok(Some(topic.partitions().len() as u32)),
            Some(Code::UnknownTopicOrPartition | Code::UnknownTopic) => Ok(None),
            Some(other) => Err(code("the topic cannot be looked up", other).with_context("topic", name)),
        }
    }

    /// The topics that are read by any of `patterns`, with their partitions. Blocks.
    pub(crate) fn matching(&self, patterns: &[TopicPattern]) -> Result<Vec<(String, u32)>> {
        let metadata = self.lookup.fetch_metadata(None, self.timeout());
        let metadata = metadata.map_err(|e| failed("the topics cannot be listed", e))?;
        let mut matching: Vec<_> = metadata
            .topics()
            .iter()
            .filter(|topic| {
                let named = self.names.topic_of(topic.name());
                named.is_some_and(|named| patterns.iter().any(|pattern| pattern.matches(&named)))
            })
            .map(|topic| (topic.name().to_owned(), topic.partitions().len() as u32))
            .collect();
        matching.sort_unstable();
        Ok(matching)
    }

    /// The first offset of a partition, and one after the last. Blocks.
    pub(crate) fn ends(&self, name: &str, partition: i32) -> Result<(u64, u64)> {
        let why = "the ends of a partition cannot be looked up";
        let look = || self.lookup.fetch_watermarks(name, partition, self.timeout()).map_err(|e| failed(why, e));
        let (low, high) = self.patiently(look)?;
        Ok((u64::try_from(low).unwrap_or(0), u64::try_from(high).unwrap_or(0)))
    }

    /// Asks again what a broker could not answer just then: leaders move, and what was created becomes known one by one.
    fn patiently<T>(&self, ask: impl Fn() -> Result<T>) -> Result<T> {
        let deadline = std::time::Instant::now() + self.timeout();
        loop {
            match ask() {
                Err(error)
                    if error.is_transient() && std::time::Instant::now() < deadline && !self.link.is_closed() =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                answer => return answer,
            }
        }
    }

    /// What a subscription was created with; `None` if it was not, or not to the end. Blocks.
    pub(crate) fn terms(&self, name: &SubscriptionName) -> Result<Option<Terms>> {
        let later = self.names.later(name);
        if self.partitions(&later)?.is_none() {
            return Ok(None);
        }
        let (low, high) = self.ends(&later, TERMS)?;
        let mut terms = None;
        self.reader.read(&later, TERMS, low..high, |record| {
            terms = record.payload().and_then(|payload| serde_json::from_slice(payload).ok());
            terms.is_none()
        })?;
        Ok(terms)
    }

    /// Creates topics, each with so many partitions; that they exist is fine.
    async fn create(self: &Arc<Self>, topics: &[(&str, u32)], config: &[(&str, &str)]) -> Result<()> {
        let replication = match self.config.replication {
            0 => -1,
            n => i32::try_from(n).unwrap_or(i32::MAX),
        };
        let mut new = Vec::with_capacity(topics.len());
        for (name, partitions) in topics {
            let partitions = i32::try_from(*partitions).unwrap_or(i32::MAX);
            let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(replication));
            topic.config = config.to_vec();
            new.push(topic);
        }
        self.create_all(&new).await?;
        for (name, partitions) in topics {
            self.wait_for(name, *partitions).await?;
        }
        Ok(())
    }

    /// Creates those that do not exist. A cluster whose brokers are just being registered, again or for the first time, has too few for any
    /// replication: that is an error only if it lasts.
    async fn create_all(&self, topics: &[NewTopic<'_>]) -> Result<()> {
        let why = "a topic cannot be created";
        let deadline = Instant::now() + self.timeout();
        loop {
            let created = self.admin.create_topics(topics, &self.options()).await.map_err(|e| failed(why, e))?;
            let refused =
                created.into_iter().filter_map(Result::err).find(|(_, code)| *code != Code::TopicAlreadyExists);
            match refused {
                None => return Ok(()),
                Some((_, Code::InvalidReplicationFactor)) if Instant::now() < deadline => sleep(AGAIN).await,
                Some((name, refused)) => {
                    let error = code(why, refused).with_context("topic", name);
                    return Err(match refused {
                        Code::InvalidReplicationFactor => error.with_context("replication", self.config.replication),
                        _ => error,
                    });
                }
            }
        }
    }

    /// Waits until the brokers know a topic that was created.
    async fn wait_for(self: &Arc<Self>, name: &str, partitions: u32) -> Result<()> {
        let deadline = Instant::now() + self.timeout();
        loop {
            let wanted = name.to_owned();
            let lacking = blocking(self, move |catalog| catalog.lacking(&wanted, partitions)).await?;
            let Some(lacking) = lacking else { return Ok(()) };
            if Instant::now() >= deadline {
                let why = "the topic was created, and no broker serves it yet";
                let error = error(ErrorKind::Timeout, why).with_context("topic", name);
                return Err(error.with_context("lacking", lacking));
            }
            sleep(AGAIN).await;
        }
    }

    /// What a topic lacks until all its partitions can be used.
    fn lacking(&self, name: &str, partitions: u32) -> Result<Option<String>> {
        let metadata = self.lookup.fetch_metadata(Some(name), self.timeout());
        let metadata = metadata.map_err(|e| failed("the topic cannot be looked up", e))?;
        let Some(topic) = metadata.topics().iter().find(|topic| topic.name() == name) else {
            return Ok(Some("it is not known".into()));
        };
        if let Some(error) = topic.error() {
            return Ok(Some(Code::from(error).to_string()));
        }
        let served = |p: &&rdkafka::metadata::MetadataPartition| p.leader() >= 0 && p.error().is_none();
        let served = topic.partitions().iter().filter(served).count();
        let missing = (partitions as usize).max(topic.partitions().len()) - served;
        Ok((missing > 0).then(|| format!("{missing} of {partitions} partitions have no leader")))
    }

    /// Creates what a topic is kept in.
    async fn create_topic(self: &Arc<Self>, spec: &TopicSpec) -> Result<()> {
        let retention = retention_ms(spec.retention.unwrap_or(self.config.retention));
        let config = [("retention.ms", retention.as_str()), ("cleanup.policy", "delete")];
        self.create(&[(&self.names.topic(&spec.topic), spec.slots)], &config).await
    }

    async fn create_address(self: &Arc<Self>, name: &SubscriptionName) -> Result<()> {
        let config = [("retention.ms", "-1"), ("cleanup.policy", "delete")];
        self.create(&[(&self.names.address(name), 1), (&self.names.later(name), RUNGS + 1)], &config).await
    }

    async fn create_dead(self: &Arc<Self>, name: &SubscriptionName) -> Result<()> {
        self.create(&[(&self.names.dead(name), 1)], &[("cleanup.policy", "compact")]).await
    }

    /// Finds a topic to publish to, creating it if that is allowed.
    pub(crate) async fn ensure_topic(self: &Arc<Self>, spec: TopicSpec) -> Result<()> {
        let name = self.names.topic(&spec.topic);
        let looked_up = name.clone();
        if blocking(self, move |catalog| catalog.partitions(&looked_up)).await?.is_some() {
            return Ok(());
        }
        if self.config.provision != Provision::Create {
            let why = "the topic does not exist; create it, or provision with `provision = \"create\"`";
            return Err(error(ErrorKind::NotFound, why).with_context("topic", name));
        }
        self.create_topic(&spec).await
    }

    pub(crate) async fn ensure_dead(self: &Arc<Self>, name: &SubscriptionName) -> Result<()> {
        let dead = self.names.dead(name);
        let looked_up = dead.clone();
        if blocking(self, move |catalog| catalog.partitions(&looked_up)).await?.is_some() {
            return Ok(());
        }
        if self.config.provision != Provision::Create {
            let why = "the topic for dead letters does not exist; provision with `provision = \"create\"` first";
            return Err(error(ErrorKind::NotFound, why).with_context("topic", dead));
        }
        self.create_dead(name).await
    }

    pub(crate) async fn exists(self: &Arc<Self>, name: &SubscriptionName) -> Result<bool> {
        let address = self.names.address(name);
        Ok(blocking(self, move |catalog| catalog.partitions(&address)).await?.is_some())
    }

    /// Deletes a subscription; the topic that says that it exists goes last.
    pub(crate) async fn remove(self: &Arc<Self>, name: &SubscriptionName) -> Result<bool> {
        let (address, later) = (self.names.address(name), self.names.later(name));
        let looked_up = later.clone();
        if blocking(self, move |catalog| catalog.partitions(&looked_up)).await?.is_none() {
            return Ok(false);
        }
        if self.config.provision != Provision::Create {
            let why = "nothing may be created or deleted; say `provision = \"create\"`";
            return Err(error(ErrorKind::Denied, why));
        }
        self.delete_group(&self.names.group(name)).await?;
        self.delete_topic(address).await?;
        self.delete_topic(later).await?;
        Ok(true)
    }

    /// Deletes a group; who has just left it may still be counted.
    async fn delete_group(&self, group: &str) -> Result<()> {
        let (why, deadline) = ("the group cannot be deleted", Instant::now() + self.timeout());
        loop {
            let deleted = self.admin.delete_groups(&[group], &self.options()).await.map_err(|e| failed(why, e))?;
            match deleted.into_iter().next() {
                Some(Err((_, Code::NonEmptyGroup))) if Instant::now() < deadline => sleep(AGAIN).await,
                Some(Err((_, Code::NonEmptyGroup))) => {
                    let why = "an instance of the subscription is open; stop all of them before";
                    return Err(error(ErrorKind::Refused, why));
                }
                None | Some(Ok(_) | Err((_, Code::GroupIdNotFound))) => return Ok(()),
                Some(Err((_, refused))) => return Err(code(why, refused)),
            }
        }
    }

    /// Deletes a topic and waits until the brokers do not know it any more.
    async fn delete_topic(self: &Arc<Self>, name: String) -> Result<()> {
        let (why, deadline) = ("a topic cannot be deleted", Instant::now() + self.timeout());
        let deleted = self.admin.delete_topics(&[name.as_str()], &self.options()).await;
        match deleted.map_err(|e| failed(why, e))?.into_iter().next() {
            None | Some(Ok(_) | Err((_, Code::UnknownTopicOrPartition | Code::UnknownTopic))) => {}
            Some(Err((_, refused))) => return Err(code(why, refused).with_context("topic", name)),
        }
        loop {
            let looked_up = name.clone();
            if blocking(self, move |catalog| catalog.partitions(&looked_up)).await?.is_none() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let why = "the topic was deleted, and brokers still know it";
                return Err(error(ErrorKind::Timeout, why).with_context("topic", name));
            }
            sleep(AGAIN).await;
        }
    }

    /// Checks a topic; whether it is to be created.
    async fn check_topic(self: &Arc<Self>, spec: &TopicSpec) -> Result<bool> {
        if spec.slots == 0 || spec.slots > 10_000 {
            let why = format!("{} slots are asked for; there may be 1 to 10,000", spec.slots);
            return Err(error(ErrorKind::Unsupported, why).with_context("topic", &spec.topic));
        }
        if self.config.provision == Provision::Off {
            return Ok(false);
        }
        let name = self.names.topic(&spec.topic);
        let looked_up = name.clone();
        match blocking(self, move |catalog| catalog.partitions(&looked_up)).await? {
            None if self.config.provision == Provision::Create => Ok(true),
            None => Err(error(ErrorKind::NotFound, "the topic does not exist").with_context("topic", name)),
            Some(slots) if slots != spec.slots => {
                Err(mismatch(&format!("topic `{}`: slots (partitions)", spec.topic), slots, spec.slots))
            }
            Some(_) => {
                if let Some(retention) = spec.retention {
                    self.check_retention(spec, &name, retention).await?;
                }
                Ok(false)
            }
        }
    }

    async fn check_retention(self: &Arc<Self>, spec: &TopicSpec, name: &str, asked: Duration) -> Result<()> {
        let why = "the topic's settings cannot be read";
        let described = self.admin.describe_configs([&ResourceSpecifier::Topic(name)], &self.options()).await;
        for resource in described.map_err(|e| failed(why, e))? {
            let resource = resource.map_err(|refused| code(why, refused).with_context("topic", name))?;
            let has = resource.get("retention.ms").and_then(|entry| entry.value.clone()).unwrap_or_default();
            if has != retention_ms(asked) {
                let what = format!("topic `{}`: retention in milliseconds", spec.topic);
                return Err(mismatch(&what, has, retention_ms(asked)));
            }
        }
        Ok(())
    }

    /// Checks everything, then creates what is missing of topics; says which subscriptions are new.
    pub(crate) async fn provision(self: &Arc<Self>, topology: &Topology) -> Result<Vec<SubscriptionSpec>> {
        let (mut topics, mut subscriptions) = (Vec::new(), Vec::new());
        for spec in &topology.topics {
            if self.check_topic(spec).await? {
                topics.push(spec);
            }
        }
        for spec in &topology.subscriptions {
            let exists = self.check_subscription(spec).await;
            if !exists.map_err(|error| error.with_context("subscription", &spec.name))? {
                subscriptions.push(spec.clone());
            }
        }
        for spec in topics {
            self.create_topic(spec).await?;
        }
        Ok(subscriptions)
    }

    /// Whether a subscription exists, as it is asked for.
    pub(crate) async fn check_subscription(self: &Arc<Self>, spec: &SubscriptionSpec) -> Result<bool> {
        if spec.max_in_flight == 0 || spec.topics.is_empty() {
            return Err(error(ErrorKind::Config, "max_in_flight and the number of topics must be at least 1"));
        }
        let name = spec.name.clone();
        match blocking(self, move |catalog| catalog.terms(&name)).await? {
            Some(terms) if self.config.provision != Provision::Off => terms.check(&Terms::of(spec)).map(|()| true),
            Some(_) => Ok(true),
            None if self.config.provision == Provision::Create => Ok(false),
            None => {
                let why = "the subscription does not exist; provision with `provision = \"create\"` first";
                Err(error(ErrorKind::NotFound, why))
            }
        }
    }

    /// Creates what a subscription needs, but for its start.
    pub(crate) async fn prepare(self: &Arc<Self>, spec: &SubscriptionSpec, exists: bool) -> Result<()> {
        for topic in spec.topics.iter().filter_map(TopicPattern::as_topic) {
            self.ensure_topic(TopicSpec::new(topic)).await?;
        }
        if !exists {
            self.create_address(&spec.name).await?;
        }
        Ok(())
    }
}

fn retention_ms(retention: Duration) -> String {
    if retention.is_zero() { "-1".into() } else { retention.as_millis().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_goes_to_the_first_rung_that_is_as_long() {
        let partition = |millis| partition_for(Duration::from_millis(millis));
        assert_eq!((partition(1), partition(250), partition(251), partition(500)), (0, 0, 1, 1));
        assert_eq!((partition(4_096_000), partition(u64::MAX / 2)), (14, 14));
        assert_eq!((rung(14), rung(TERMS)), (Some(Duration::from_millis(4_096_000)), None));
    }
}
