//! What exists on the server: created once, or verified, and never changed silently.

use crate::config::{Provision, RabbitMqConfig};
use crate::error::{error, failed, is_absent, is_unknown_type};
use crate::link::Link;
use crate::names::{Names, binding, bit, due_address, due_topic};
use crate::register::{Lock, Register, Terms, TopicTerms, update};
use lapin::options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings_core::transport::{self, Ordering, Start, SubscriptionSpec, TopicSpec};
use tidings_core::{ErrorKind, Result, SubscriptionName, Topic, TopicPattern};
use tokio::sync::Mutex;

/// Far above what a subscription ends by itself: on some versions what is only given back counts too.
const DELIVERY_LIMIT: i64 = 100_000;
/// How long the stream of a retained topic keeps what it has, unless the topic says.
const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// A server that is killed right after it has created a quorum queue may not know the queue any more: it writes the names of
/// its queues up to a second after the last change (two rounds of `auto_save` in Ra's `ra_directory.erl`; tried on 4.0.5).
const REMEMBERED: Duration = Duration::from_millis(1_250);
/// How many levels of the delay chain are created at first: delays of up to a minute.
const FIRST_LEVELS: usize = 11;
/// A stream forgets by whole segments.
const SEGMENT_BYTES: i64 = 16 * 1024 * 1024;
/// The exchange type that spreads by key, of a plug-in that comes with the server.
const BY_HASH: &str = "x-consistent-hash";

/// Creates and checks what exists.
pub(crate) struct Topology {
    config: Arc<RabbitMqConfig>,
    link: Arc<Link>,
    pub(crate) names: Names,
    /// Within one connection, who changes something takes turns here.
    turn: Mutex<()>,
    /// Who has the delay chain created; the others wait.
    delay: Mutex<()>,
    /// How many levels of the delay chain are known to exist.
    levels: AtomicUsize,
}

/// The queues of a subscription, by slot.
pub(crate) type Queues = Vec<ShortString>;

impl Topology {
    pub(crate) fn new(config: &Arc<RabbitMqConfig>, link: &Arc<Link>) -> Self {
        Self {
            config: Arc::clone(config),
            link: Arc::clone(link),
            names: Names::new(&config.namespace),
            turn: Mutex::new(()),
            delay: Mutex::default(),
            levels: AtomicUsize::new(0),
        }
    }

    fn creates(&self) -> bool {
        self.config.provision == Provision::Create
    }

    pub(crate) fn consumer_timeout(&self) -> Duration {
        self.config.consumer_timeout()
    }

    /// What every namespace has.
    pub(crate) async fn prepare(&self) -> Result<()> {
        let work = async {
            match self.config.provision {
                Provision::Off => Ok(()),
                Provision::Verify => self.verify_base(&self.link.channel().await?).await,
                Provision::Create => self.create_base(&self.link.channel().await?).await,
            }
        };
        self.link.within("what the namespace needs", work).await
    }

    async fn create_base(&self, channel: &Channel) -> Result<()> {
        let names = &self.names;
        exchange(channel, names.topics()?, ExchangeKind::Topic, FieldTable::default()).await?;
        exchange(channel, names.addresses()?, ExchangeKind::Direct, FieldTable::default()).await?;
        exchange(channel, names.members()?, ExchangeKind::Direct, FieldTable::default()).await?;
        // A chain that could not get rid of a message would hold up those behind it.
        exchange(channel, names.undeliverable()?, ExchangeKind::Topic, FieldTable::default()).await?;
        let otherwise = string("alternate-exchange", names.undeliverable()?.as_str());
        exchange(channel, names.due()?, ExchangeKind::Topic, table([otherwise])).await?;
        queue(channel, names.undeliverable()?, quorum([("x-delivery-limit", AMQPValue::LongLongInt(-1))])).await?;
        bind(channel, names.undeliverable()?, names.undeliverable()?, "#._s.#").await?;
        queue(
            channel,
            names.nowhere()?,
            table([string("x-queue-type", "classic"), ("x-max-length", AMQPValue::LongLongInt(0))]),
        )
        .await?;
        bind(channel, names.nowhere()?, names.undeliverable()?, "#._t.#").await?;
        queue(channel, names.register()?, quorum([("x-delivery-limit", AMQPValue::LongLongInt(-1))])).await
    }

    async fn verify_base(&self, channel: &Channel) -> Result<()> {
        let names = &self.names;
        for name in [names.topics()?, names.addresses()?, names.members()?, names.due()?] {
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            let declared = channel.exchange_declare(name.clone(), ExchangeKind::Topic, passive, FieldTable::default());
            declared.await.map_err(|failure| missing(failure, &name))?;
        }
        present(channel, &names.register()?).await
    }

    /// The right to change what exists, for as long as `work` takes.
    async fn alone<T>(&self, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        let _turn = self.turn.lock().await;
        let lock = Lock::take(&self.link, self.names.lock(what)?, self.config.timeout()).await?;
        let result = self.link.within("a change of what exists", work).await;
        lock.free().await;
        result
    }

    /// Does something with the dead letters of a subscription that nobody else does meanwhile.
    pub(crate) async fn alone_with<T>(
        &self,
        name: &SubscriptionName,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _turn = self.turn.lock().await;
        let lock = Lock::take(&self.link, self.names.lock(&format!("dead.{name}"))?, self.config.timeout()).await?;
        let result = work.await;
        lock.free().await;
        result
    }

    /// Reads the register, and changes it.
    async fn registered<T>(&self, change: impl AsyncFnOnce(&mut Register) -> Result<T>) -> Result<T> {
        let work = async {
            let channel = self.link.confirming().await?;
            update(&channel, &self.names, change).await
        };
        self.alone("topology", work).await
    }

    pub(crate) async fn provision(&self, topology: &transport::Topology) -> Result<()> {
        topology.topics.iter().try_for_each(check_topic)?;
        topology.subscriptions.iter().try_for_each(check_subscription)?;
        if self.config.provision == Provision::Off {
            return Ok(());
        }
        self.registered(async |register| {
            topology.topics.iter().try_for_each(|spec| registered_topic(register, spec).map(drop))?;
            for spec in &topology.topics {
                self.create_topic(register, spec).await?;
            }
            topology.subscriptions.iter().try_for_each(|spec| registered_subscription(register, spec).map(drop))?;
            let before = register.subscriptions.len();
            for spec in &topology.subscriptions {
                self.create_subscription(register, spec).await?;
            }
            Ok(register.subscriptions.len() > before)
        })
        .await
        .map(remembered)?
        .await
    }

    /// Creates a subscription if it is new, and says what its queues are.
    pub(crate) async fn subscribe(&self, spec: &SubscriptionSpec) -> Result<Queues> {
        check_subscription(spec)?;
        if self.config.provision == Provision::Off {
            return Ok(vec![self.names.queue(&spec.name)?]);
        }
        let created = self.registered(async |register| {
            let before = register.subscriptions.len();
            let queues = self.create_subscription(register, spec).await?;
            Ok((queues, register.subscriptions.len() > before))
        });
        let (queues, new) = created.await?;
        remembered(new).await?;
        Ok(queues)
    }

    /// Creates the queues of a subscription again, which somebody has deleted.
    pub(crate) async fn restore(&self, spec: &SubscriptionSpec) -> Result<()> {
        self.subscribe(spec).await.map(drop)
    }

    async fn create_topic(&self, register: &mut Register, spec: &TopicSpec) -> Result<()> {
        let at = |error: tidings_core::Error| error.with_context("topic", &spec.topic);
        let known = registered_topic(register, spec)?;
        if spec.retained {
            let channel = self.link.channel().await?;
            self.log(&channel, &spec.topic, spec.retention.unwrap_or(RETENTION)).await.map_err(at)?;
        }
        if !known {
            if !self.creates() {
                return Err(at(error(
                    ErrorKind::NotFound,
                    "the topic was not provisioned; say `provision = \"create\"`",
                )));
            }
            register.topics.insert(spec.topic.to_string(), TopicTerms::of(spec));
        }
        Ok(())
    }

    /// The stream that keeps what is published to a topic.
    async fn log(&self, channel: &Channel, topic: &Topic, retention: Duration) -> Result<()> {
        let log = self.names.log(topic)?;
        if !self.creates() {
            return present(channel, &log).await;
        }
        let age = format!("{}s", retention.as_secs().max(1));
        let segment = ("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(SEGMENT_BYTES));
        queue(channel, log.clone(), table([string("x-queue-type", "stream"), string("x-max-age", &age), segment]))
            .await?;
        bind(channel, log.clone(), self.names.topics()?, topic.as_str()).await?;
        bind(channel, log, self.names.due()?, &due_topic(topic.as_str())).await
    }

    async fn create_subscription(&self, register: &mut Register, spec: &SubscriptionSpec) -> Result<Queues> {
        let at = |error: tidings_core::Error| error.with_context("subscription", &spec.name);
        let terms = Terms::of(spec, register.slots(spec));
        let known = registered_subscription(register, spec)?;
        let channel = self.link.channel().await?;
        let queues = self.queues(&spec.name, terms.slots)?;
        if !self.creates() {
            for queue in &queues {
                present(&channel, queue).await.map_err(at)?;
            }
            return Ok(queues);
        }
        self.create_queues(&channel, spec, &queues).await.map_err(at)?;
        if !known {
            register.subscriptions.insert(spec.name.to_string(), terms);
        }
        Ok(queues)
    }

    fn queues(&self, name: &SubscriptionName, slots: u32) -> Result<Queues> {
        if slots == 1 {
            return Ok(vec![self.names.queue(name)?]);
        }
        (0..slots).map(|slot| self.names.slot(name, slot)).collect()
    }

    async fn create_queues(&self, channel: &Channel, spec: &SubscriptionSpec, queues: &[ShortString]) -> Result<()> {
        self.dead_letters_in(channel, &spec.name).await?;
        for name in queues {
            queue(channel, name.clone(), self.arguments(spec)?).await?;
        }
        let [only] = queues else { return self.create_spread(channel, spec, queues).await };
        for (exchange, key) in self.sources(spec)? {
            bind(channel, only.clone(), exchange, &key).await?;
        }
        Ok(())
    }

    /// Spreads what comes by its key: each slot has a queue of its own.
    async fn create_spread(&self, channel: &Channel, spec: &SubscriptionSpec, queues: &[ShortString]) -> Result<()> {
        self.probe_spread().await?;
        let (spread, kind) = (self.names.spread(&spec.name)?, ExchangeKind::Custom(BY_HASH.into()));
        exchange(channel, spread.clone(), kind, table([string("hash-header", crate::wire::KEY)])).await?;
        for name in queues {
            // The weight of the slot.
            bind(channel, name.clone(), spread.clone(), "1").await?;
        }
        for (source, key) in self.sources(spec)? {
            let (options, key) = (ExchangeBindOptions::default(), crate::error::short(key)?);
            let bound = channel.exchange_bind(spread.clone(), source, key, options, FieldTable::default());
            bound.await.map_err(failed)?;
        }
        Ok(())
    }

    /// From which exchanges a subscription gets what.
    fn sources(&self, spec: &SubscriptionSpec) -> Result<Vec<(ShortString, String)>> {
        let names = &self.names;
        let mut sources = vec![(names.addresses()?, spec.name.to_string()), (names.due()?, due_address(&spec.name))];
        for pattern in &spec.topics {
            let binding = binding(pattern);
            sources.push((names.due()?, due_topic(&binding)));
            sources.push((names.topics()?, binding));
        }
        Ok(sources)
    }

    fn arguments(&self, spec: &SubscriptionSpec) -> Result<FieldTable> {
        let dead = self.names.dead_letters(&spec.name)?;
        let timeout = i64::try_from(self.config.consumer_timeout_ms).unwrap_or(i64::MAX);
        let mut arguments = quorum([
            ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
            ("x-consumer-timeout", AMQPValue::LongLongInt(timeout)),
            string("x-dead-letter-exchange", ""),
            string("x-dead-letter-routing-key", dead.as_str()),
            string("x-dead-letter-strategy", "at-least-once"),
            string("x-overflow", "reject-publish"),
        ]);
        if spec.ordering == Ordering::Key {
            arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        }
        Ok(arguments)
    }

    /// The server answers an unknown type by closing the connection: not one that is in use.
    async fn probe_spread(&self) -> Result<()> {
        let probe = self.link.another().await?;
        let channel = probe.create_channel().await.map_err(failed)?;
        let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
        let name = crate::error::short(format!(
            "{}.{:x}",
            self.names.spread(&SubscriptionName::new("probe")?)?,
            fastrand::u64(..)
        ))?;
        let kind = ExchangeKind::Custom(BY_HASH.into());
        let declared = channel.exchange_declare(name.clone(), kind, options, FieldTable::default()).await;
        let deleted = channel.exchange_delete(name, lapin::options::ExchangeDeleteOptions::default());
        match declared {
            Ok(()) => deleted.await.map_err(failed),
            Err(failure) if is_unknown_type(&failure) => {
                let why = "slots need a plug-in of the server that is not enabled; run `rabbitmq-plugins enable \
                           rabbitmq_consistent_hash_exchange`, or use one slot";
                Err(error(ErrorKind::Unsupported, why).with_source(failure))
            }
            Err(failure) => Err(failed(failure)),
        }
    }

    async fn dead_letters_in(&self, channel: &Channel, name: &SubscriptionName) -> Result<()> {
        let limit = ("x-delivery-limit", AMQPValue::LongLongInt(-1));
        queue(channel, self.names.dead_letters(name)?, quorum([limit])).await
    }

    /// Creates the dead letters of a subscription that does not exist here yet, or any more.
    pub(crate) async fn dead_letters(&self, name: &SubscriptionName) -> Result<()> {
        if !self.creates() {
            let why = "the queue of its dead letters is missing, and nothing may be created";
            return Err(error(ErrorKind::NotFound, why).with_context("subscription", name));
        }
        // The server does not know a queue while another channel creates it, and says so.
        let _turn = self.turn.lock().await;
        let work = async { self.dead_letters_in(&self.link.channel().await?, name).await };
        self.link.within("the queue of dead letters", work).await
    }

    /// Whether the delay chain is known to have these levels.
    pub(crate) fn has_levels(&self, count: usize) -> bool {
        !self.creates() || self.levels.load(SeqCst) >= count
    }

    /// Creates the first `count` levels of the delay chain, from its end: a queue in which messages wait, and an exchange
    /// that takes each to it, or past it. Whoever else needs them meanwhile waits.
    pub(crate) async fn levels(&self, count: usize) -> Result<()> {
        let count = count.max(FIRST_LEVELS);
        let _delay = self.delay.lock().await;
        if self.has_levels(count) {
            return Ok(());
        }
        self.registered(async |register| {
            if register.levels >= count {
                return Ok(());
            }
            let channel = self.link.channel().await?;
            for level in register.levels..count {
                self.level(&channel, level).await?;
            }
            register.levels = count;
            remembered(true).await
        })
        .await?;
        self.levels.fetch_max(count, SeqCst);
        Ok(())
    }

    async fn level(&self, channel: &Channel, level: usize) -> Result<()> {
        let name = self.names.delay(level)?;
        let next = if level == 0 { self.names.due()? } else { self.names.delay(level - 1)? };
        // At most 50 ms << 25, which fits.
        let ttl = (crate::names::STEP_MS << level) as i64;
        let arguments = quorum([
            ("x-message-ttl", AMQPValue::LongLongInt(ttl)),
            string("x-dead-letter-exchange", next.as_str()),
            string("x-dead-letter-strategy", "at-least-once"),
            string("x-overflow", "reject-publish"),
        ]);
        exchange(channel, name.clone(), ExchangeKind::Topic, FieldTable::default()).await?;
        queue(channel, name.clone(), arguments).await?;
        let (options, past) = (ExchangeBindOptions::default(), crate::error::short(bit(level, 0))?);
        channel.exchange_bind(next, name.clone(), past, options, FieldTable::default()).await.map_err(failed)?;
        bind(channel, name.clone(), name, &bit(level, 1)).await
    }

    /// Deletes a subscription, its dead letters excepted; the register, which says that it exists, forgets it last.
    pub(crate) async fn remove_subscription(&self, name: &SubscriptionName) -> Result<bool> {
        self.registered(async |register| {
            let Some(terms) = register.subscriptions.get(name.as_str()) else { return Ok(false) };
            if !self.creates() {
                let why = "nothing may be created or deleted; say `provision = \"create\"`";
                return Err(error(ErrorKind::Denied, why));
            }
            let channel = self.link.channel().await?;
            for queue in self.queues(name, terms.slots)? {
                channel.queue_delete(queue, lapin::options::QueueDeleteOptions::default()).await.map_err(failed)?;
            }
            let deleted = lapin::options::ExchangeDeleteOptions::default();
            channel.exchange_delete(self.names.spread(name)?, deleted).await.map_err(failed)?;
            register.subscriptions.remove(name.as_str());
            Ok(true)
        })
        .await
    }

    /// Deletes everything in the namespace that the register knows, with what is in it.
    pub(crate) async fn remove(&self) -> Result<()> {
        let names = &self.names;
        let (queues, exchanges) = self
            .registered(async |register| {
                let mut queues = vec![names.undeliverable()?, names.nowhere()?, names.register()?];
                let mut exchanges =
                    vec![names.topics()?, names.addresses()?, names.members()?, names.due()?, names.undeliverable()?];
                for level in 0..crate::names::LEVELS {
                    queues.push(names.delay(level)?);
                    exchanges.push(names.delay(level)?);
                }
                for (name, terms) in &register.subscriptions {
                    let name = SubscriptionName::new(name.as_str())?;
                    queues.extend([names.queue(&name)?, names.dead_letters(&name)?]);
                    queues.extend((0..terms.slots).map(|slot| names.slot(&name, slot)).collect::<Result<Vec<_>>>()?);
                    exchanges.push(names.spread(&name)?);
                }
                for (name, _) in register.topics.iter().filter(|(_, terms)| terms.retained) {
                    queues.push(names.log(&Topic::new(name.as_str())?)?);
                }
                Ok((queues, exchanges))
            })
            .await?;
        let channel = self.link.channel().await?;
        for queue in queues {
            channel.queue_delete(queue, lapin::options::QueueDeleteOptions::default()).await.map_err(failed)?;
        }
        for exchange in exchanges {
            let deleted = channel.exchange_delete(exchange, lapin::options::ExchangeDeleteOptions::default());
            deleted.await.map_err(failed)?;
        }
        Ok(())
    }

    /// The topics among these that can be read again.
    pub(crate) async fn retained(&self, patterns: &[TopicPattern]) -> Result<Vec<Topic>> {
        self.registered(async |register| Ok(register.retained(patterns))).await
    }
}

/// Waits until the server remembers queues that are new, even if it is killed.
async fn remembered(new: bool) -> Result<()> {
    if new {
        tokio::time::sleep(REMEMBERED).await;
    }
    Ok(())
}

/// Whether it is known, with what is asked for.
fn registered_topic(register: &Register, spec: &TopicSpec) -> Result<bool> {
    let Some(known) = register.topics.get(spec.topic.as_str()) else { return Ok(false) };
    known.check(&TopicTerms::of(spec)).map_err(|error| error.with_context("topic", &spec.topic))?;
    Ok(true)
}

fn registered_subscription(register: &Register, spec: &SubscriptionSpec) -> Result<bool> {
    let Some(known) = register.subscriptions.get(spec.name.as_str()) else { return Ok(false) };
    let asked = Terms::of(spec, register.slots(spec));
    known.check(&asked).map_err(|error| error.with_context("subscription", &spec.name))?;
    Ok(true)
}

fn check_topic(spec: &TopicSpec) -> Result<()> {
    let refuse = |kind, why: &str| Err(error(kind, why).with_context("topic", &spec.topic));
    if spec.slots == 0 || spec.slots > 1024 {
        return refuse(ErrorKind::Config, "a topic has 1 to 1024 slots");
    }
    if spec.retention.is_some() && !spec.retained {
        let why = "queues keep what is unread until it is read; only a topic with `retained = true` has a retention";
        return refuse(ErrorKind::Unsupported, why);
    }
    Ok(())
}

fn check_subscription(spec: &SubscriptionSpec) -> Result<()> {
    let refuse = |kind, why: &str| Err(error(kind, why).with_context("subscription", &spec.name));
    if spec.max_in_flight == 0 || spec.max_in_flight > usize::from(u16::MAX) {
        return refuse(ErrorKind::Config, "max_in_flight must be 1 to 65,535");
    }
    if spec.topics.is_empty() {
        return refuse(ErrorKind::Config, "a subscription reads at least one topic");
    }
    if spec.start == Start::Beginning {
        let why = "a queue starts with what is published once it exists; say `Start::New`, and replay a retained topic";
        return refuse(ErrorKind::Unsupported, why);
    }
    Ok(())
}

fn missing(failure: lapin::Error, name: &ShortString) -> tidings_core::Error {
    if is_absent(&failure) {
        let why = "it does not exist, and nothing may be created; say `provision = \"create\"`";
        return error(ErrorKind::NotFound, why).with_context("name", name);
    }
    failed(failure)
}

async fn present(channel: &Channel, name: &ShortString) -> Result<()> {
    let passive = QueueDeclareOptions::durable().passive();
    let declared = channel.queue_declare(name.clone(), passive, FieldTable::default()).await;
    declared.map(drop).map_err(|failure| missing(failure, name))
}

async fn exchange(channel: &Channel, name: ShortString, kind: ExchangeKind, arguments: FieldTable) -> Result<()> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(name, kind, options, arguments).await.map_err(failed)
}

async fn queue(channel: &Channel, name: ShortString, arguments: FieldTable) -> Result<()> {
    channel.queue_declare(name, QueueDeclareOptions::durable(), arguments).await.map(drop).map_err(failed)
}

async fn bind(channel: &Channel, queue: ShortString, exchange: ShortString, key: &str) -> Result<()> {
    let key = crate::error::short(key)?;
    channel.queue_bind(queue, exchange, key, QueueBindOptions::default(), FieldTable::default()).await.map_err(failed)
}

fn string(name: &'static str, value: &str) -> (&'static str, AMQPValue) {
    (name, AMQPValue::LongString(value.into()))
}

fn table<const N: usize>(entries: [(&'static str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(name.into(), value);
    }
    table
}

fn quorum<const N: usize>(entries: [(&'static str, AMQPValue); N]) -> FieldTable {
    let mut table = table(entries);
    table.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    table
}
