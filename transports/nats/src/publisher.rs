//! Takes messages to the server: pipelined, each with an answer of its own.
//!
//! `submit` puts them in a queue; one task sends them in that order, another reads the answers. What was on its way when
//! the connection was lost may have arrived: core sends it again, and the server knows it by its id.

use crate::api::parse_ack;
use crate::config::Provision;
use crate::connection::{Link, connects};
use crate::error::{ApiError, Failure, closed, error, publish, timed_out};
use crate::topology::{Catalog, Properties};
use crate::wire;
use async_nats::header::{HeaderMap, HeaderValue};
use async_nats::{Message as Answer, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings_core::transport::{Destination, Fate, Outgoing, Publisher, Receipt, slot_of};
use tidings_core::{Error, ErrorKind, Key, Result, SubscriptionName, Topic};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, interval, sleep, timeout_at};

/// How often is looked for messages that were not answered.
const SWEEP: Duration = Duration::from_millis(250);

/// The publisher of one transport.
pub(crate) struct Outbox {
    catalog: Arc<Catalog>,
    link: Arc<Link>,
    max_payload: usize,
    timeout: Duration,
    queue: Mutex<VecDeque<Item>>,
    queued: Notify,
    /// Sent and not answered, in the order they were sent.
    open: Mutex<BTreeMap<u64, Open>>,
    /// Queued or not answered.
    count: AtomicUsize,
    settled: Notify,
    closed: AtomicBool,
    /// Nobody waits for answers any more.
    gone: AtomicBool,
    /// Topics whose stream did not answer: they are looked for again.
    lost: Mutex<HashSet<Destination>>,
}

/// A message that waits to be sent.
struct Item {
    to: Destination,
    topic: Topic,
    key: Option<Key>,
    headers: HeaderMap,
    payload: Bytes,
    receipt: Receipt,
}

struct Open {
    to: Destination,
    receipt: Receipt,
    sent: Instant,
    connects: u64,
}

/// Where the messages of one destination go.
#[derive(Clone)]
struct Route {
    /// By slot.
    subjects: Vec<Subject>,
    ttl: Option<HeaderValue>,
}

impl Outbox {
    pub(crate) async fn start(
        catalog: Arc<Catalog>,
        link: Arc<Link>,
        max_payload: usize,
        timeout: Duration,
    ) -> Result<Arc<Self>> {
        let client = catalog.api.client.clone();
        let inbox = client.new_inbox();
        let answers = client.subscribe(format!("{inbox}.*")).await;
        let answers = answers.map_err(|e| error(ErrorKind::Connection, "cannot listen for answers").with_source(e))?;
        let outbox = Arc::new(Self {
            catalog,
            link,
            max_payload,
            timeout,
            queue: Mutex::default(),
            queued: Notify::new(),
            open: Mutex::default(),
            count: AtomicUsize::new(0),
            settled: Notify::new(),
            closed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            lost: Mutex::default(),
        });
        tokio::spawn(Arc::clone(&outbox).send(inbox));
        tokio::spawn(Arc::clone(&outbox).read(answers));
        Ok(outbox)
    }

    fn accept(&self, out: Outgoing) -> Result<Item, (Receipt, Error)> {
        let Outgoing { destination, message, delay, receipt, .. } = out;
        if self.closed.load(SeqCst) {
            return Err((receipt, closed().with_operation("publish")));
        }
        if message.payload.len() > self.max_payload {
            let why = format!("payload of {} bytes, allowed are {}", message.payload.len(), self.max_payload);
            return Err((receipt, error(ErrorKind::TooLarge, why).with_operation("publish")));
        }
        if delay.is_some() && !matches!(destination, Destination::Subscription(_)) {
            let why = "NATS delays only what is sent to a subscription's address";
            return Err((receipt, error(ErrorKind::Unsupported, why).with_operation("publish")));
        }
        match wire::encode(&message, &destination, delay) {
            Ok(headers) => Ok(Item {
                to: destination,
                topic: message.topic.clone(),
                key: message.key.clone(),
                headers,
                payload: message.payload.clone(),
                receipt,
            }),
            Err(error) => Err((receipt, error.with_operation("publish"))),
        }
    }

    /// Sends what is queued, in order, until the outbox is closed and empty.
    async fn send(self: Arc<Self>, inbox: String) {
        let mut routes: HashMap<Destination, Route> = HashMap::new();
        let (mut batch, mut next) = (VecDeque::new(), 0_u64);
        let mut connected = self.link.connected.subscribe();
        loop {
            let queued = self.queued.notified();
            std::mem::swap(&mut batch, &mut *self.queue.lock());
            if batch.is_empty() {
                if self.closed.load(SeqCst) {
                    return;
                }
                queued.await;
                continue;
            }
            for item in batch.drain(..) {
                if !self.link.is_connected() {
                    self.connection(&mut connected).await;
                    if item.receipt.is_abandoned() || self.gone.load(SeqCst) {
                        let error = timed_out("nobody waited any more for the connection to come back");
                        self.fail(item.receipt, Fate::NotPersisted, error.with_operation("publish"));
                        continue;
                    }
                }
                next += 1;
                self.send_one(item, &mut routes, (next, &inbox)).await;
            }
        }
    }

    /// Waits for the connection, or for the end.
    async fn connection(&self, connected: &mut watch::Receiver<bool>) {
        loop {
            tokio::select! {
                _ = connected.wait_for(|connected| *connected) => return,
                () = sleep(SWEEP) => if self.gone.load(SeqCst) { return },
            }
        }
    }

    async fn send_one(&self, mut item: Item, routes: &mut HashMap<Destination, Route>, (number, inbox): (u64, &str)) {
        if !self.lost.lock().is_empty() {
            self.lost.lock().drain().for_each(|to| drop(routes.remove(&to)));
        }
        if !routes.contains_key(&item.to) {
            match self.route(&item.to, &item.topic).await {
                Ok(route) => drop(routes.insert(item.to.clone(), route)),
                Err(error) => return self.fail(item.receipt, Fate::NotPersisted, error.with_operation("publish")),
            }
        }
        let Some(route) = routes.get(&item.to) else { return };
        let slot = slot_of(item.key.as_ref(), route.subjects.len() as u32);
        let subject = route.subjects[slot as usize].clone();
        if let Some(ttl) = &route.ttl {
            item.headers.insert(wire::TTL, ttl.clone());
        }
        let client = &self.catalog.api.client;
        let open = Open { to: item.to, receipt: item.receipt, sent: Instant::now(), connects: connects(client) };
        self.open.lock().insert(number, open);
        let reply = Subject::from(format!("{inbox}.{number}"));
        let sent = client.publish_with_reply_and_headers(subject, reply, item.headers, item.payload).await;
        if let Err(failed) = sent
            && let Some(open) = self.open.lock().remove(&number)
        {
            self.fail(open.receipt, Fate::NotPersisted, publish(failed).with_operation("publish"));
        }
    }

    async fn route(&self, to: &Destination, topic: &Topic) -> Result<Route> {
        let (catalog, names) = (&self.catalog, &self.catalog.names);
        match to {
            Destination::Topic(topic) => {
                let stream = catalog.stream_of(topic.as_str(), true).await?;
                let properties = catalog.settled(topic).await?;
                let held = |subject: &str| stream.as_ref().is_some_and(|stream| stream.holds(subject));
                topic_route(catalog, topic, properties, held)
            }
            Destination::Subscription(name) => {
                self.check_exists(name).await?;
                let slots = if catalog.bucket().await? { catalog.properties(topic).await? } else { None };
                let slots = slots.map_or(1, |properties| properties.slots);
                let subjects = (0..slots).map(|slot| Subject::from(names.address(name, &slot.to_string())));
                Ok(Route { subjects: subjects.collect(), ttl: None })
            }
            Destination::DeadLetter(name) => {
                if !catalog.dead_stream().await? {
                    let why = "the stream for dead letters is missing; provision with `provision = \"create\"` first";
                    return Err(error(ErrorKind::NotFound, why));
                }
                Ok(Route { subjects: vec![Subject::from(names.dead(name))], ttl: None })
            }
        }
    }

    async fn check_exists(&self, name: &SubscriptionName) -> Result<()> {
        if self.catalog.exists(name).await? {
            return Ok(());
        }
        let why = "the subscription does not exist; subscribe or provision it first";
        Err(error(ErrorKind::NotFound, why).with_context("subscription", name))
    }

    // ---- Answers ----

    async fn read(self: Arc<Self>, mut answers: Subscriber) {
        let mut connected = self.link.connected.subscribe();
        let mut sweep = interval(SWEEP);
        loop {
            tokio::select! {
                answer = answers.next() => match answer {
                    Some(answer) => self.answer(&answer),
                    None => break,
                },
                _ = sweep.tick() => self.sweep(),
                changed = connected.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.sweep();
                }
            }
            if self.closed.load(SeqCst) && self.count.load(SeqCst) == 0 {
                break;
            }
        }
        self.fail_all();
    }

    fn answer(&self, answer: &Answer) {
        let number = answer.subject.rsplit('.').next().and_then(|number| number.parse().ok());
        let Some(open) = number.and_then(|number: u64| self.open.lock().remove(&number)) else { return };
        match parse_ack(answer) {
            // What is stored already is this very publish: its id is a hash of all that it is.
            Ok(_) => {
                open.receipt.confirm();
                self.done();
            }
            Err(failure) => {
                let gone = failure.is(ApiError::STREAM_NOT_FOUND);
                let error = self.refused(failure, gone);
                if gone {
                    self.catalog.doubt();
                    self.lost.lock().insert(open.to);
                }
                self.fail(open.receipt, Fate::NotPersisted, error.with_operation("publish"));
            }
        }
    }

    /// A stream that is gone is created again by the next attempt, where that is allowed.
    fn refused(&self, failure: Failure, gone: bool) -> Error {
        let error = Error::from(failure);
        if gone { error.with_transient(self.catalog.provision == Provision::Create) } else { error }
    }

    /// Gives up what was not answered in time, or was on its way when the connection was lost.
    fn sweep(&self) {
        let (now, current) = (Instant::now(), connects(&self.catalog.api.client));
        let cut = !self.link.is_connected();
        let late = |open: &Open| now.duration_since(open.sent) >= self.timeout;
        let over: Vec<_> = {
            let mut open = self.open.lock();
            let over: Vec<u64> =
                open.iter().filter(|(_, o)| cut || late(o) || o.connects != current).map(|(n, _)| *n).collect();
            over.iter().filter_map(|number| open.remove(number)).collect()
        };
        for open in over {
            let error = if late(&open) {
                timed_out("the server did not confirm in time")
            } else {
                error(ErrorKind::Connection, "the connection was lost before the server confirmed")
            };
            self.fail(open.receipt, Fate::PossiblyPersisted, error.with_operation("publish"));
        }
    }

    fn fail(&self, receipt: Receipt, fate: Fate, error: Error) {
        receipt.fail(fate, error);
        self.done();
    }

    fn done(&self) {
        if self.count.fetch_sub(1, SeqCst) == 1 {
            self.settled.notify_waiters();
        }
    }

    fn fail_all(&self) {
        self.gone.store(true, SeqCst);
        let queued = std::mem::take(&mut *self.queue.lock());
        for item in queued {
            self.fail(item.receipt, Fate::NotPersisted, closed().with_operation("publish"));
        }
        let open = std::mem::take(&mut *self.open.lock());
        for open in open.into_values() {
            self.fail(open.receipt, Fate::PossiblyPersisted, closed().with_operation("publish"));
        }
    }

    /// The transport is gone: what waits is refused, and the tasks end.
    pub(crate) fn abandon(&self) {
        self.closed.store(true, SeqCst);
        self.gone.store(true, SeqCst);
        self.queued.notify_one();
    }

    /// Takes nothing any more, and waits for the answers; how many did not come before the deadline.
    pub(crate) async fn close(&self, deadline: Instant) -> usize {
        self.closed.store(true, SeqCst);
        self.queued.notify_one();
        let all = async {
            loop {
                let settled = self.settled.notified();
                if self.count.load(SeqCst) == 0 {
                    return;
                }
                settled.await;
            }
        };
        // What is left is counted.
        let _ = timeout_at(deadline, all).await;
        let left = self.count.load(SeqCst);
        self.fail_all();
        left
    }
}

fn topic_route(catalog: &Catalog, topic: &Topic, properties: Properties, held: impl Fn(&str) -> bool) -> Result<Route> {
    let names = &catalog.names;
    let slots = properties.slots.max(1);
    let subjects: Vec<_> = match slots {
        1 => vec![names.topic(topic.as_str())],
        _ => (0..slots).map(|slot| names.slot(&slot.to_string(), topic.as_str())).collect(),
    };
    if let Some(missing) = subjects.iter().find(|subject| !held(subject)) {
        let why = format!("no stream holds `{missing}`, where a slot of the topic goes");
        return Err(error(ErrorKind::Mismatch, why).with_context("topic", topic));
    }
    let ttl = properties.retention_ms.map(|millis| HeaderValue::from_str(&format!("{millis}ms")));
    let ttl = ttl.transpose().map_err(|e| error(ErrorKind::Internal, "a time cannot be written").with_source(e))?;
    Ok(Route { subjects: subjects.into_iter().map(Subject::from).collect(), ttl })
}

/// What the transport gives out; the outbox is one for all.
pub(crate) struct NatsPublisher(pub(crate) Arc<Outbox>);

impl Publisher for NatsPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        let mut queue = self.0.queue.lock();
        for out in batch {
            match self.0.accept(out) {
                Ok(item) => {
                    self.0.count.fetch_add(1, SeqCst);
                    queue.push_back(item);
                }
                Err((receipt, error)) => receipt.fail(Fate::NotPersisted, error),
            }
        }
        drop(queue);
        self.0.queued.notify_one();
    }
}
