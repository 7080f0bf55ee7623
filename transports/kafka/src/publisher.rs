//! Takes messages to the cluster: pipelined, idempotent, each with an answer of its own.
//!
//! The client repeats by itself in order and the brokers know a repeat, so many messages of one key may be on their way. What can
//! be handed to the client at once is; what waits for room, or for its topic to be found, waits in one queue, in order.

use crate::client::{self, KafkaContext, Link};
use crate::error::{client as failed, closed, error, publish};
use crate::topology::{Catalog, partition_for};
use crate::wire::{self, Encoded};
use bytes::Bytes;
use foldhash::fast::RandomState;
use parking_lot::Mutex;
use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, PurgeConfig, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode as Code;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tidings_core::transport::{Destination, Fate, Outgoing, Publisher, Receipt, TopicSpec};
use tidings_core::{Backoff, Error, ErrorKind, Result};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

/// The most messages that the client holds, and bytes of them; what is owed may exceed it.
const MAX_MESSAGES: usize = 10_000;
const MAX_BYTES: usize = 32 * 1024 * 1024;

/// How long a delayed copy or a dead letter waits for others, and how many go at once: alone each is a request of its own, to write it
/// and to read it. Nobody waits for one, and they come together when something fails.
const LINGER: Duration = Duration::from_millis(2);
const FULL: usize = 256;

/// What is told of a message when it was delivered.
pub(crate) struct Open {
    answer: Answer,
    size: usize,
}

/// Whose message it is.
enum Answer {
    Published(Receipt, Goal),
    /// A record of the transport's own.
    Own(oneshot::Sender<Result<()>>),
}

impl Answer {
    fn confirm(self) {
        match self {
            Self::Published(receipt, _) => receipt.confirm(),
            // Nobody may wait for it any more.
            Self::Own(tell) => drop(tell.send(Ok(()))),
        }
    }

    fn fail(self, fate: Fate, error: Error) {
        match self {
            Self::Published(receipt, _) => receipt.fail(fate, error),
            Self::Own(tell) => drop(tell.send(Err(error))),
        }
    }
}

/// What the producing client tells.
pub(crate) struct Reports {
    base: KafkaContext,
    outbox: Weak<Outbox>,
}

impl ClientContext for Reports {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn log(&self, level: RDKafkaLogLevel, facility: &str, said: &str) {
        self.base.log(level, facility, said);
    }

    fn error(&self, failed: KafkaError, reason: &str) {
        if failed.rdkafka_error_code() == Some(Code::Fatal)
            && let Some(outbox) = self.outbox.upgrade()
        {
            outbox.is_broken.store(true, SeqCst);
            outbox.changed.notify_one();
        }
        self.base.error(failed, reason);
    }

    fn generate_oauth_token(&self, config: Option<&str>) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        self.base.generate_oauth_token(config)
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Open>;

    fn delivery(&self, result: &DeliveryResult<'_>, open: Box<Open>) {
        let Open { answer, size } = *open;
        let outbox = self.outbox.upgrade();
        match result {
            Ok(_) => {
                self.base.link.recover();
                answer.confirm();
            }
            Err((failed, _)) => {
                if let Some(outbox) = &outbox {
                    outbox.heed(failed.rdkafka_error_code(), &answer);
                }
                let (fate, mut error) = publish(failed.clone());
                if outbox.as_ref().is_none_or(|outbox| outbox.is_closed.load(SeqCst)) {
                    error = closed().with_operation("publish").with_source(error);
                }
                answer.fail(fate, error);
            }
        }
        if let Some(outbox) = outbox {
            outbox.leave(size);
        }
    }
}

type Client = ThreadedProducer<Reports>;

/// The publishing side of one transport.
pub(crate) struct Outbox {
    catalog: Arc<Catalog>,
    link: Arc<Link>,
    pub(crate) max_payload: usize,
    state: Mutex<State>,
    /// There may be something to do for the task.
    changed: Notify,
    /// Something was answered.
    answered: Notify,
    is_closed: AtomicBool,
    /// The client has failed for good, and is to be replaced.
    is_broken: AtomicBool,
    count: AtomicUsize,
    bytes: AtomicUsize,
    /// Something may wait in the queue: set under the lock, looked at without it for each answer.
    waits: AtomicBool,
}

struct State {
    client: Option<Arc<Client>>,
    routes: HashMap<Goal, Arc<str>, RandomState>,
    waiting: VecDeque<Item>,
    /// How many of those that wait are owed: then nobody waits for room.
    owed: usize,
    /// Not among them: what waits for others like it.
    lingering: Vec<Item>,
}

/// Where a message goes, and whether that is later.
type Goal = (Destination, bool);

struct Item {
    to: Goal,
    delay: Option<Duration>,
    encoded: Encoded,
    payload: Bytes,
    size: usize,
    owed: bool,
    receipt: Receipt,
}

impl Item {
    fn lingers(&self) -> bool {
        self.owed && (self.delay.is_some() || matches!(self.to.0, Destination::DeadLetter(_)))
    }
}

impl Outbox {
    pub(crate) fn start(catalog: &Arc<Catalog>, link: &Arc<Link>, max_payload: usize) -> Result<Arc<Self>> {
        let (waiting, lingering) = (VecDeque::new(), Vec::new());
        let state = State { client: None, routes: HashMap::default(), waiting, owed: 0, lingering };
        let outbox = Arc::new(Self {
            catalog: Arc::clone(catalog),
            link: Arc::clone(link),
            max_payload,
            state: Mutex::new(state),
            changed: Notify::new(),
            answered: Notify::new(),
            is_closed: AtomicBool::new(false),
            is_broken: AtomicBool::new(false),
            count: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            waits: AtomicBool::new(false),
        });
        outbox.state.lock().client = Some(outbox.connect()?);
        tokio::spawn(Arc::clone(&outbox).work());
        Ok(outbox)
    }

    fn connect(self: &Arc<Self>) -> Result<Arc<Client>> {
        let base = KafkaContext::new(&self.link, &self.catalog.config).speaking();
        let reports = Reports { base, outbox: Arc::downgrade(self) };
        let client = client::producer(&self.catalog.config)?.create_with_context(reports);
        client.map(Arc::new).map_err(|e| failed("a client could not be created", e))
    }

    fn accept(&self, out: Outgoing) -> Result<Item, (Receipt, Error)> {
        let Outgoing { destination, message, delay, owed, receipt } = out;
        let refuse = |receipt, error: Error| Err((receipt, error.with_operation("publish")));
        if self.is_closed.load(SeqCst) {
            return refuse(receipt, closed());
        }
        if message.payload.len() > self.max_payload {
            let why = format!("payload of {} bytes, allowed are {}", message.payload.len(), self.max_payload);
            return refuse(receipt, error(ErrorKind::TooLarge, why));
        }
        if delay.is_some() && !matches!(destination, Destination::Subscription(_)) {
            let why = "Kafka delays only what is sent to a subscription's address";
            return refuse(receipt, error(ErrorKind::Unsupported, why));
        }
        let delay = delay.filter(|delay| !delay.is_zero());
        match wire::encode(&message, &destination, delay) {
            Ok(encoded) => {
                let (payload, size) = (message.payload.clone(), wire::size(&message));
                Ok(Item { to: (destination, delay.is_some()), delay, encoded, payload, size, owed, receipt })
            }
            Err(error) => refuse(receipt, error),
        }
    }

    fn has_room(&self) -> bool {
        self.count.load(SeqCst) < MAX_MESSAGES && self.bytes.load(SeqCst) < MAX_BYTES
    }

    /// Hands a message to the client, or lets it wait for its turn.
    fn pass(&self, state: &mut State, item: Item) {
        let direct = state.waiting.is_empty() && (item.owed || self.has_room());
        match (direct, &state.client, state.routes.get(&item.to)) {
            (true, Some(client), Some(topic)) => self.produce(client, topic, item),
            _ => {
                self.waits.store(true, SeqCst);
                state.owed += usize::from(item.owed);
                state.waiting.push_back(item);
                self.changed.notify_one();
            }
        }
    }

    /// Has a message wait for others like it.
    fn linger(self: &Arc<Self>, state: &mut State, item: Item) {
        state.lingering.push(item);
        match state.lingering.len() {
            1 => {
                let outbox = Arc::clone(self);
                tokio::spawn(async move {
                    sleep(LINGER).await;
                    outbox.pass_lingering(&mut outbox.state.lock());
                });
            }
            FULL.. => self.pass_lingering(state),
            _ => {}
        }
    }

    fn pass_lingering(&self, state: &mut State) {
        for item in std::mem::take(&mut state.lingering) {
            self.pass(state, item);
        }
    }

    /// Hands a message to the client, which copies it and answers by its report.
    fn produce(&self, client: &Client, topic: &str, item: Item) {
        let Item { to, delay, encoded, payload, size, receipt, .. } = item;
        let partition = match (&to.0, to.1, delay) {
            (Destination::Topic(_), ..) => None,
            (Destination::Subscription(_), true, Some(delay)) => Some(partition_for(delay)),
            _ => Some(0),
        };
        let record = BaseRecord {
            topic,
            partition,
            payload: Some(&payload[..]),
            key: encoded.key.as_deref(),
            timestamp: None,
            headers: Some(encoded.headers),
            delivery_opaque: Box::new(Open { answer: Answer::Published(receipt, to), size }),
        };
        self.hand_over(client, record);
    }

    fn hand_over(&self, client: &Client, record: BaseRecord<'_, [u8], [u8], Box<Open>>) {
        self.count.fetch_add(1, SeqCst);
        self.bytes.fetch_add(record.delivery_opaque.size, SeqCst);
        if let Err((refused, record)) = client.send(record) {
            let Open { answer, size } = *record.delivery_opaque;
            self.heed(refused.rdkafka_error_code(), &answer);
            let (_, error) = publish(refused);
            answer.fail(Fate::NotPersisted, error);
            self.leave(size);
        }
    }

    /// Looks again for topics that are gone, and for a client that has failed.
    fn heed(&self, code: Option<Code>, answer: &Answer) {
        match code {
            Some(Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition) => {
                if let (Answer::Published(_, to), Some(mut state)) = (answer, self.state.try_lock()) {
                    state.routes.remove(to);
                }
            }
            Some(Code::Fatal) => {
                self.is_broken.store(true, SeqCst);
                self.changed.notify_one();
            }
            _ => {}
        }
    }

    fn leave(&self, size: usize) {
        self.bytes.fetch_sub(size, SeqCst);
        if self.count.fetch_sub(1, SeqCst) == 1 || self.is_closed.load(SeqCst) {
            self.answered.notify_waiters();
        }
        if self.waits.load(SeqCst) {
            self.changed.notify_one();
        }
    }

    /// Sends what waits, until the transport is closed.
    async fn work(self: Arc<Self>) {
        loop {
            let changed = self.changed.notified();
            if self.is_broken.swap(false, SeqCst) {
                self.replace().await;
            }
            while let Some(to) = self.send_waiting() {
                self.find(&to).await;
            }
            if self.is_closed.load(SeqCst) && self.state.lock().waiting.is_empty() {
                return;
            }
            changed.await;
        }
    }

    /// Sends from the front of the queue; stops at what waits for room, and at a destination that must be found first.
    fn send_waiting(&self) -> Option<Goal> {
        let mut state = self.state.lock();
        let client = state.client.clone()?;
        while let Some(first) = state.waiting.front() {
            if state.owed == 0 && !self.has_room() {
                return None;
            }
            let Some(topic) = state.routes.get(&first.to).cloned() else { return Some(first.to.clone()) };
            let item = state.waiting.pop_front()?;
            state.owed -= usize::from(item.owed);
            self.produce(&client, &topic, item);
        }
        self.waits.store(false, SeqCst);
        None
    }

    /// Finds the topic of a destination, or refuses what waits for it. While no broker answers, it waits.
    async fn find(self: &Arc<Self>, to: &Goal) {
        let backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
        for round in 1.. {
            let error = match self.route(to).await {
                Ok(topic) => return drop(self.state.lock().routes.insert(to.clone(), topic)),
                Err(error) => error.with_operation("publish"),
            };
            let closed = self.is_closed.load(SeqCst);
            self.refuse(
                |item| item.to == *to && (closed || !error.is_transient() || item.receipt.is_abandoned()),
                &error,
            );
            if closed || !error.is_transient() || !self.state.lock().waiting.iter().any(|item| item.to == *to) {
                return;
            }
            sleep(backoff.delay(round)).await;
        }
    }

    async fn route(self: &Arc<Self>, (to, is_later): &Goal) -> Result<Arc<str>> {
        let (catalog, names) = (&self.catalog, &self.catalog.names);
        match to {
            Destination::Topic(topic) => {
                catalog.ensure_topic(TopicSpec::new(topic.clone())).await?;
                Ok(names.topic(topic).into())
            }
            Destination::Subscription(name) => {
                if !catalog.exists(name).await? {
                    let why = "the subscription does not exist; subscribe or provision it first";
                    return Err(error(ErrorKind::NotFound, why).with_context("subscription", name));
                }
                Ok(if *is_later { names.later(name) } else { names.address(name) }.into())
            }
            Destination::DeadLetter(name) => {
                catalog.ensure_dead(name).await?;
                Ok(names.dead(name).into())
            }
        }
    }

    /// Refuses what waits and is meant by `which`.
    fn refuse(&self, which: impl Fn(&Item) -> bool, why: &Error) {
        let mut refused = Vec::new();
        let mut state = self.state.lock();
        let (gone, kept): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut state.waiting).into_iter().partition(&which);
        state.owed = kept.iter().filter(|item| item.owed).count();
        state.waiting = kept;
        drop(state);
        refused.extend(gone);
        for item in refused {
            item.receipt.fail(Fate::NotPersisted, again(why));
        }
        self.answered.notify_waiters();
    }

    /// Replaces a client that has failed for good: what it holds it answers for while it is dropped.
    async fn replace(self: &Arc<Self>) {
        tracing::warn!("the producing client has failed and is replaced");
        let old = self.state.lock().client.take();
        if let Some(old) = old {
            let _ = tokio::task::spawn_blocking(move || {
                old.purge(PurgeConfig::default().queue().inflight());
                let _ = old.flush(Duration::from_secs(1));
                drop(old);
            })
            .await;
        }
        let mut round = 0;
        let client = loop {
            match self.connect() {
                Ok(client) => break client,
                Err(error) => tracing::warn!(%error, "the producing client cannot be replaced yet"),
            }
            round += 1;
            sleep(Backoff::new(Duration::from_millis(50), Duration::from_secs(5)).delay(round)).await;
        };
        self.state.lock().client = Some(client);
    }

    /// Refuses what comes from now on, and waits until all was answered; returns how much was not.
    pub(crate) async fn close(self: &Arc<Self>, deadline: Instant) -> usize {
        {
            let mut state = self.state.lock();
            self.is_closed.store(true, SeqCst);
            // Before the task may see that nothing waits, and end.
            self.pass_lingering(&mut state);
        }
        self.changed.notify_one();
        let idle = async {
            loop {
                let answered = self.answered.notified();
                if self.left() == 0 {
                    return;
                }
                answered.await;
            }
        };
        let _ = timeout_at(deadline, idle).await;
        let left = self.left();
        self.abandon();
        left
    }

    /// How many are not answered.
    fn left(&self) -> usize {
        let state = self.state.lock();
        self.count.load(SeqCst) + state.waiting.len() + state.lingering.len()
    }

    /// Ends at once. What is not answered is answered now: what was never sent was not persisted.
    pub(crate) fn abandon(&self) {
        self.is_closed.store(true, SeqCst);
        self.changed.notify_one();
        {
            let state = &mut *self.state.lock();
            state.waiting.extend(state.lingering.drain(..));
        }
        self.refuse(|_| true, &closed().with_operation("publish"));
        let client = self.state.lock().client.take();
        if let Some(client) = client {
            // Its end takes a moment, and joins its thread.
            std::thread::spawn(move || {
                client.purge(PurgeConfig::default().queue().inflight());
                let _ = client.flush(Duration::from_millis(500));
                drop(client);
            });
        }
    }

    /// Writes a record of the transport's own.
    pub(crate) async fn write(&self, record: BaseRecord<'_, [u8], [u8], ()>) -> Result<()> {
        let (tell, told) = oneshot::channel();
        {
            let client = self.state.lock().client.clone().ok_or_else(closed)?;
            let open = Open { answer: Answer::Own(tell), size: record.payload.map_or(0, <[u8]>::len) };
            let BaseRecord { topic, partition, payload, key, timestamp, headers, .. } = record;
            let delivery_opaque = Box::new(open);
            self.hand_over(&client, BaseRecord { topic, partition, payload, key, timestamp, headers, delivery_opaque });
        }
        let in_time = timeout_at(Instant::now() + self.catalog.config.request_timeout, told).await;
        let in_time = in_time.map_err(|_| error(ErrorKind::Timeout, "a record was not confirmed in time"))?;
        in_time.unwrap_or_else(|_| Err(closed()))
    }
}

/// The same error for several messages.
fn again(why: &Error) -> Error {
    error(why.kind(), why.to_string()).with_transient(why.is_transient()).with_operation("publish")
}

/// The publisher of one transport.
pub(crate) struct KafkaPublisher(pub(crate) Arc<Outbox>);

impl Publisher for KafkaPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        let outbox = &self.0;
        let mut refused = Vec::new();
        let mut state = outbox.state.lock();
        for out in batch {
            match outbox.accept(out) {
                Ok(item) if item.lingers() => outbox.linger(&mut state, item),
                Ok(item) => outbox.pass(&mut state, item),
                Err(failed) => refused.push(failed),
            }
        }
        drop(state);
        refused.into_iter().for_each(|(receipt, error)| receipt.fail(Fate::NotPersisted, error));
    }
}
