//! Takes messages to the broker: several channels, each with one owner, because two tasks on one channel of the client
//! are given each other's confirms.

use crate::config::RabbitMqConfig;
use crate::error::{closed, denial, error, failed, late, named, short, size_limit};
use crate::flights::Flights;
use crate::link::Link;
use crate::names::{Due, LEVELS, STEP_MS, delayed_key};
use crate::topology::Topology;
use crate::wire::{Fnv, encode};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use std::collections::{HashMap, VecDeque};
use std::hash::Hasher;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings_core::transport::{Destination, Fate, Outgoing, Publisher, Receipt};
use tidings_core::{Error, ErrorKind, Message, Result};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// How long an answer may be kept by a message that was sent before it and has none, if few are under way, and a confirm that
/// came with another message's return: its own may be on the way.
const GLANCE: Duration = Duration::from_millis(5);
/// How often a channel is looked at on which nothing happens, and what waits for one for what nobody waits for any more.
const SWEEP: Duration = Duration::from_millis(250);

/// How long the client may take to say that what it had sent on a lost channel has failed.
const LANDING: Duration = Duration::from_secs(1);

/// The publisher of one transport; clones are the same.
#[derive(Clone)]
pub(crate) struct RabbitMqPublisher(Arc<Inner>);

struct Inner {
    topology: Arc<Topology>,
    config: Arc<RabbitMqConfig>,
    channels: Vec<mpsc::UnboundedSender<Box<Post>>>,
    open: Arc<Open>,
}

/// What is under way.
#[derive(Default)]
pub(crate) struct Open {
    closed: AtomicBool,
    count: AtomicUsize,
    none: Notify,
    /// How many events went to a topic that nobody has subscribed to.
    pub(crate) unrouted: AtomicU64,
}

/// A message on its way to the broker; boxed, because it is moved often.
struct Post {
    exchange: ShortString,
    key: ShortString,
    properties: BasicProperties,
    message: Arc<Message>,
    to: To,
    receipt: Receipt,
    _open: Counted,
}

/// What it means if no queue takes it.
enum To {
    /// Nobody reads the topic, which is no error.
    Topic,
    /// Somebody must.
    Required,
    /// The delay chain is gone.
    Delay,
    /// The subscription does not exist.
    Subscription,
    /// The queue is created, once.
    DeadLetter { name: tidings_core::SubscriptionName, created: bool },
}

/// A message, and the broker's answer.
type Landed = (Box<Post>, lapin::Result<Confirmation>);

impl Post {
    /// Exchange, routing key and properties, of which is kept what is needed again: the key if a return may be the answer,
    /// the properties of dead letters, which are sent again once their queue is there.
    fn take_address(&mut self) -> (ShortString, ShortString, BasicProperties) {
        let key = if self.is_judged() { self.key.clone() } else { std::mem::take(&mut self.key) };
        let properties = match self.to {
            To::DeadLetter { created: false, .. } => self.properties.clone(),
            _ => std::mem::take(&mut self.properties),
        };
        (std::mem::take(&mut self.exchange), key, properties)
    }

    /// Whether it must have been taken by a queue.
    fn is_judged(&self) -> bool {
        !matches!(self.to, To::Topic)
    }
}

struct Counted(Arc<Open>);

impl Counted {
    fn new(open: &Arc<Open>) -> Self {
        open.count.fetch_add(1, SeqCst);
        Self(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, SeqCst) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

impl RabbitMqPublisher {
    pub(crate) fn new(config: &Arc<RabbitMqConfig>, link: &Arc<Link>, topology: &Arc<Topology>) -> Self {
        let open = Arc::new(Open::default());
        let mut channels = Vec::new();
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..config.publish_channels).map(|_| mpsc::unbounded_channel()).unzip();
        for (sender, posts) in senders.iter().zip(receivers) {
            let owner = Owner {
                link: Arc::clone(link),
                topology: Arc::clone(topology),
                config: Arc::clone(config),
                open: Arc::clone(&open),
                again: sender.downgrade(),
                posts,
                waiting: VecDeque::new(),
                returned: HashMap::new(),
                doubted: Vec::new(),
            };
            tokio::spawn(owner.run());
            channels.push(sender.clone());
        }
        Self(Arc::new(Inner { topology: Arc::clone(topology), config: Arc::clone(config), channels, open }))
    }

    pub(crate) fn open(&self) -> &Open {
        &self.0.open
    }

    /// Takes nothing more, and waits until all that was submitted is answered.
    pub(crate) async fn close(&self, deadline: Instant) -> Result<()> {
        let open = &self.0.open;
        open.closed.store(true, SeqCst);
        let flushed = async {
            loop {
                let mut none = std::pin::pin!(open.none.notified());
                none.as_mut().enable();
                if open.count.load(SeqCst) == 0 {
                    return;
                }
                none.await;
            }
        };
        match timeout_at(deadline, flushed).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let why = format!("{} publishes were not confirmed before the deadline", open.count.load(SeqCst));
                Err(error(ErrorKind::Timeout, why).with_operation("close"))
            }
        }
    }

    fn post(&self, out: Outgoing) {
        let Outgoing { destination, message, delay, owed: _, receipt } = out;
        let refuse = |receipt: Receipt, error: Error| receipt.fail(Fate::NotPersisted, error.with_operation("publish"));
        if self.0.open.closed.load(SeqCst) {
            return refuse(receipt, closed());
        }
        let limit = self.0.config.max_payload();
        if message.payload.len() > limit {
            let why =
                format!("a payload of {} bytes, the server takes {limit}; send a reference", message.payload.len());
            return refuse(receipt, error(ErrorKind::TooLarge, why));
        }
        let steps = delay.map_or(0, steps);
        let lane = lane(&destination, &message);
        let routed = self.route(&destination, steps).and_then(|(exchange, key, to)| {
            let addressed = steps > 0 || !matches!(destination, Destination::Topic(_));
            let mut properties = encode(&message, addressed)?;
            if matches!(to, To::DeadLetter { .. }) {
                properties = crate::dead_letters::positioned(properties);
            }
            if matches!(destination, Destination::Topic(_)) && (steps > 0 || message.recorded_time.is_none()) {
                properties = crate::replay::sent(properties, delay.unwrap_or_default());
            }
            Ok((exchange, key, to, properties))
        });
        let (exchange, key, to, properties) = match routed {
            Ok(routed) => routed,
            Err(error) => return refuse(receipt, error),
        };
        let post =
            Box::new(Post { exchange, key, properties, message, to, receipt, _open: Counted::new(&self.0.open) });
        let channel = &self.0.channels[lane as usize % self.0.channels.len()];
        let needed = levels(steps);
        if self.0.topology.has_levels(needed) {
            return hand_over(channel, post);
        }
        let (topology, channel) = (Arc::clone(&self.0.topology), channel.clone());
        tokio::spawn(async move {
            match topology.levels(needed).await {
                Ok(()) => hand_over(&channel, post),
                Err(error) => post.receipt.fail(Fate::NotPersisted, error.with_operation("publish")),
            }
        });
    }

    /// Exchange and routing key.
    fn route(&self, destination: &Destination, steps: u64) -> Result<(ShortString, ShortString, To)> {
        let names = &self.0.topology.names;
        if levels(steps) > LEVELS {
            let days = (STEP_MS << LEVELS) / 86_400_000;
            return Err(error(
                ErrorKind::Unsupported,
                format!("a delay of more than {days} days; send it when it is due"),
            ));
        }
        let delayed =
            |due| -> Result<_> { Ok((names.delay(levels(steps) - 1)?, short(delayed_key(steps, due))?, To::Delay)) };
        Ok(match destination {
            Destination::Topic(topic) if steps > 0 => delayed(Due::Topic(topic))?,
            Destination::Topic(topic) => {
                let to = if self.0.config.requires(topic.as_str()) { To::Required } else { To::Topic };
                (names.topics()?, short(topic.as_str())?, to)
            }
            Destination::Subscription(name) if steps > 0 => delayed(Due::Subscription(name))?,
            Destination::Subscription(name) => (names.addresses()?, short(name.as_str())?, To::Subscription),
            Destination::DeadLetter(_) if steps > 0 => {
                let why = "dead letters are not delayed; publish to the subscription's address instead";
                return Err(error(ErrorKind::Unsupported, why));
            }
            Destination::DeadLetter(name) => {
                let to = To::DeadLetter { name: name.clone(), created: false };
                ("".into(), names.dead_letters(name)?, to)
            }
        })
    }
}

impl Publisher for RabbitMqPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        batch.for_each(|out| self.post(out));
    }
}

fn hand_over(channel: &mpsc::UnboundedSender<Box<Post>>, post: Box<Post>) {
    if let Err(mpsc::error::SendError(post)) = channel.send(post) {
        post.receipt.fail(Fate::NotPersisted, closed().with_operation("publish"));
    }
}

/// When to look again for what has landed behind the first: a look asks all that fly.
fn glance(flying: usize) -> Duration {
    GLANCE * u32::try_from(1 + flying / 64).unwrap_or(u32::MAX)
}

/// A delay in steps of the chain, never less than asked for.
fn steps(delay: Duration) -> u64 {
    u64::try_from(delay.as_micros().div_ceil(u128::from(STEP_MS) * 1000)).unwrap_or(u64::MAX)
}

/// How many levels of the chain a delay needs.
fn levels(steps: u64) -> usize {
    (u64::BITS - steps.leading_zeros()) as usize
}

/// What keeps its order by being on one channel: events of one topic with one key, or with none.
fn lane(destination: &Destination, message: &Message) -> u64 {
    let mut hash = Fnv::default();
    match destination {
        Destination::Topic(topic) => hash.write(topic.as_str().as_bytes()),
        Destination::Subscription(name) | Destination::DeadLetter(name) => hash.write(name.as_str().as_bytes()),
    }
    hash.write_u8(0);
    hash.write(message.key.as_ref().map_or(&[][..], |key| key.as_bytes()));
    // The low bits of FNV are those of its last bytes.
    hash.finish() >> 17
}

/// The owner of one channel.
struct Owner {
    link: Arc<Link>,
    topology: Arc<Topology>,
    config: Arc<RabbitMqConfig>,
    open: Arc<Open>,
    /// Back to itself, for what has to be prepared first.
    again: mpsc::WeakUnboundedSender<Box<Post>>,
    posts: mpsc::UnboundedReceiver<Box<Post>>,
    /// Taken, but not sent while there is no connection.
    waiting: VecDeque<Box<Post>>,
    /// What came back, by id and key: the client hands a return over with whichever confirm comes next.
    returned: HashMap<(String, String), usize>,
    /// Confirmed together with another message's return.
    doubted: Vec<(Box<Post>, Instant)>,
}

impl Owner {
    async fn run(mut self) {
        while let Some(channel) = self.channel().await {
            if !self.publish(&channel).await {
                return;
            }
        }
        self.refuse_all(&closed());
    }

    /// A channel, as soon as there is one; `None` when the transport is closed.
    async fn channel(&mut self) -> Option<Channel> {
        let since = Instant::now();
        loop {
            let link = Arc::clone(&self.link);
            let mut opening = std::pin::pin!(link.confirming());
            let opened = loop {
                tokio::select! {
                    opened = &mut opening => break opened,
                    () = sleep(SWEEP) => self.sweep(since),
                }
            };
            match opened {
                Ok(channel) => return Some(channel),
                Err(error) if error.kind() == ErrorKind::Closed => return None,
                Err(_) => sleep(SWEEP).await,
            }
        }
    }

    /// Takes in what comes while nothing can be sent, and gives up what nobody waits for, or has waited for long.
    fn sweep(&mut self, since: Instant) {
        while let Ok(post) = self.posts.try_recv() {
            self.waiting.push_back(post);
        }
        let too_long = since.elapsed() > self.config.timeout();
        for post in std::mem::take(&mut self.waiting) {
            if post.receipt.is_abandoned() || too_long {
                let error = self.link.fault().unwrap_or_else(|| late("a channel", self.config.timeout()));
                post.receipt.fail(Fate::NotPersisted, error.with_transient(true).with_operation("publish"));
            } else {
                self.waiting.push_back(post);
            }
        }
    }

    fn refuse_all(&mut self, why: &Error) {
        self.posts.close();
        while let Ok(post) = self.posts.try_recv() {
            self.waiting.push_back(post);
        }
        for post in self.waiting.drain(..) {
            let error = error(why.kind(), why.to_string()).with_operation("publish");
            post.receipt.fail(Fate::NotPersisted, error);
        }
    }

    /// Publishes until the channel fails, or (`false`) until nobody publishes any more.
    async fn publish(&mut self, channel: &Channel) -> bool {
        let (mut flights, mut taken) = (Flights::new(), Vec::new());
        let mut look = pin!(sleep(SWEEP));
        let (mut landed, mut landed_last) = (false, Instant::now());
        while channel.status().connected() {
            let blocked = self.link.is_blocked();
            let rested = flights.is_empty();
            self.send_all(channel, &mut flights, blocked);
            if rested && !flights.is_empty() {
                landed_last = Instant::now();
                look.as_mut().reset(landed_last + GLANCE);
            }
            let room = if blocked { 0 } else { self.config.publish_window.saturating_sub(flights.len()) };
            tokio::select! {
                biased;
                () = flights.first() => {
                    landed = true;
                    self.land(&mut flights);
                }
                count = self.posts.recv_many(&mut taken, room.min(256)), if room > 0 => {
                    if count == 0 {
                        flights.sweep();
                        self.land(&mut flights);
                        return false;
                    }
                    self.waiting.extend(taken.drain(..));
                }
                () = &mut look => {
                    let now = Instant::now();
                    landed |= self.look_around(&mut flights, blocked);
                    let flies = !blocked && !flights.is_empty();
                    if std::mem::take(&mut landed) || !flies {
                        landed_last = now;
                    } else if landed_last + self.config.timeout() < now {
                        // The server has forgotten them; on another channel they can be sent again.
                        drop(timeout(LANDING, channel.close(200, "no confirms".into())).await);
                        break;
                    }
                    let busy = flies || !self.doubted.is_empty();
                    look.as_mut().reset(now + if busy { glance(flights.len()) } else { SWEEP });
                }
            }
        }
        self.drain_failed(flights).await;
        true
    }

    fn send_all<'c>(&mut self, channel: &'c Channel, flights: &mut Flights<'c, Landed>, blocked: bool) {
        while !blocked && channel.status().connected() && flights.len() < self.config.publish_window {
            let Some(post) = self.waiting.pop_front() else { break };
            self.send(channel, flights, post);
        }
    }

    /// Queues the frames, in the order of the calls, and leaves the confirm to come.
    fn send<'c>(&self, channel: &'c Channel, flights: &mut Flights<'c, Landed>, post: Box<Post>) {
        if post.receipt.is_abandoned() {
            let error = late("a place on the channel", self.config.timeout());
            return post.receipt.fail(Fate::NotPersisted, error.with_operation("publish"));
        }
        match flights.begin(fly(channel, post)) {
            // It never left: core sends it again.
            Some((post, Err(failure))) => {
                post.receipt.fail(Fate::NotPersisted, failed(failure).with_transient(true).with_operation("publish"));
            }
            landed => flights.landed.extend(landed),
        }
    }

    /// Answers for what has landed behind one that has not, and takes in what waits while nothing can be sent. Whether any
    /// has landed.
    fn look_around(&mut self, flights: &mut Flights<'_, Landed>, blocked: bool) -> bool {
        flights.sweep();
        let landed = !flights.landed.is_empty();
        self.land(flights);
        if blocked {
            self.sweep(Instant::now());
        }
        landed
    }

    /// All that fly on a channel that has failed fail with it.
    async fn drain_failed(&mut self, mut flights: Flights<'_, Landed>) {
        while !flights.is_empty() && timeout(LANDING, flights.first()).await.is_ok() {
            self.land(&mut flights);
        }
        flights.sweep();
        self.land(&mut flights);
        self.returned.clear();
        self.doubted.drain(..).for_each(|(post, _)| post.receipt.confirm());
    }

    /// Answers for all that have landed. Where a return can be the answer, all that have come are collected first.
    fn land(&mut self, flights: &mut Flights<'_, Landed>) {
        if !self.doubted.is_empty() || flights.landed.iter().any(|(post, _)| post.is_judged()) {
            flights.sweep();
        }
        let mut judged = Vec::new();
        for (post, confirmation) in flights.landed.drain(..) {
            let doubtful = match confirmation {
                Err(failure) => {
                    self.fail(post, failure);
                    continue;
                }
                Ok(Confirmation::Nack(returned)) => {
                    self.note(returned);
                    let error = error(ErrorKind::Full, "the queue did not take it").with_operation("publish");
                    post.receipt.fail(Fate::NotPersisted, error);
                    continue;
                }
                Ok(confirmation) => self.note(confirmation.take_message()),
            };
            if post.is_judged() { judged.push((post, doubtful)) } else { post.receipt.confirm() }
        }
        self.judge(judged);
    }

    /// Whether anything came back, of whatever was sent.
    fn note(&mut self, returned: Option<lapin::message::BasicReturnMessage>) -> bool {
        let Some(returned) = returned else { return false };
        let (exchange, key) = (&returned.exchange, returned.routing_key.as_str());
        let is_event = self.topology.names.topics().is_ok_and(|topics| topics == *exchange);
        if is_event && !self.config.requires(key) {
            self.open.unrouted.fetch_add(1, SeqCst);
            tracing::debug!(topic = key, "rabbitmq: nobody has subscribed to what was published");
            return true;
        }
        let id = returned.properties.message_id().as_ref().map_or("", |id| id.as_str()).to_owned();
        *self.returned.entry((id, key.to_owned())).or_default() += 1;
        true
    }

    fn judge(&mut self, judged: Vec<(Box<Post>, bool)>) {
        if judged.is_empty() && self.doubted.is_empty() {
            return;
        }
        let now = Instant::now();
        let doubted = std::mem::take(&mut self.doubted);
        for (post, until) in doubted {
            match self.came_back(&post) {
                true => self.unroutable(post),
                false if until <= now => post.receipt.confirm(),
                false => self.doubted.push((post, until)),
            }
        }
        for (post, doubtful) in judged {
            match self.came_back(&post) {
                true => self.unroutable(post),
                false if doubtful => self.doubted.push((post, now + GLANCE)),
                false => post.receipt.confirm(),
            }
        }
    }

    fn came_back(&mut self, post: &Post) -> bool {
        if self.returned.is_empty() {
            return false;
        }
        let place = (post.message.id.to_string(), post.key.to_string());
        let Some(count) = self.returned.get_mut(&place) else { return false };
        *count -= 1;
        if *count == 0 {
            self.returned.remove(&place);
        }
        true
    }

    /// The channel or the connection is gone, and with it the answer.
    fn fail(&self, post: Box<Post>, failure: lapin::Error) {
        let size = post.message.payload.len();
        if let Some(limit) = size_limit(&failure).filter(|limit| size > *limit) {
            let why = format!("a payload of {size} bytes, the server takes {limit}; set `max_message_size`");
            return post.receipt.fail(Fate::NotPersisted, error(ErrorKind::TooLarge, why).with_operation("publish"));
        }
        let error = match denial(&failure) {
            Some(text) if self.is_meant(&post, text) => failed(failure).with_transient(false),
            Some(_) => {
                let why = "the server closed the channel over another message, to which it denies access";
                error(ErrorKind::Connection, why).with_source(failure).with_transient(true)
            }
            None => failed(failure).with_transient(true),
        };
        post.receipt.fail(Fate::PossiblyPersisted, error.with_operation("publish"));
    }

    /// Whether a denial is about what this message goes to: all that is on a channel fails with it.
    fn is_meant(&self, post: &Post, denial: &str) -> bool {
        let names = &self.topology.names;
        let Some(exchange) = named(denial, "exchange") else { return true };
        let is = |name: Result<ShortString>| name.is_ok_and(|name| name.as_str() == exchange);
        let goes_there = match post.to {
            To::Topic | To::Required => is(names.topics()),
            To::Delay => (0..LEVELS).any(|level| is(names.delay(level))),
            To::Subscription => is(names.addresses()),
            To::DeadLetter { .. } => exchange == "amq.default",
        };
        let key = if post.key.as_str().is_empty() { post.message.topic.as_str() } else { post.key.as_str() };
        goes_there && named(denial, "topic").is_none_or(|topic| topic == key)
    }

    /// No queue took it.
    fn unroutable(&mut self, mut post: Box<Post>) {
        match &mut post.to {
            To::Topic => post.receipt.confirm(),
            To::Required => refuse(post, "nobody has subscribed to the topic, which is configured as required"),
            To::Delay => refuse(post, "the queues of delayed messages were deleted; connect again"),
            To::DeadLetter { name, created } if !*created => {
                *created = true;
                let (topology, name, again) = (Arc::clone(&self.topology), name.clone(), self.again.clone());
                tokio::spawn(async move {
                    match (topology.dead_letters(&name).await, again.upgrade()) {
                        (Ok(()), Some(again)) => hand_over(&again, post),
                        (Ok(()), None) => post.receipt.fail(Fate::NotPersisted, closed()),
                        (Err(error), _) => post.receipt.fail(Fate::NotPersisted, error.with_operation("publish")),
                    }
                });
            }
            To::DeadLetter { .. } => refuse(post, "the queue of the dead letters does not exist"),
            To::Subscription => refuse(post, "the subscription does not exist; subscribe or provision it first"),
        }
    }
}

async fn fly(channel: &Channel, mut post: Box<Post>) -> Landed {
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let (exchange, key, properties) = post.take_address();
    let sent = channel.basic_publish(exchange, key, options, &post.message.payload, properties).await;
    let confirmed = match sent {
        Ok(confirm) => confirm.await,
        Err(failure) => Err(failure),
    };
    (post, confirmed)
}

fn refuse(post: Box<Post>, why: &'static str) {
    let error = error(ErrorKind::NotFound, why).with_context("key", &post.key).with_operation("publish");
    post.receipt.fail(Fate::NotPersisted, error);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_never_shortened() {
        for (millis, expected) in [(0, 0), (1, 1), (50, 1), (51, 2), (200, 4), (600_000, 12_000)] {
            assert_eq!(steps(Duration::from_millis(millis)), expected, "{millis}");
        }
        assert_eq!((levels(0), levels(1), levels(4), levels(5)), (0, 1, 3, 3));
        assert!(levels(steps(Duration::MAX)) > LEVELS);
        assert!(levels(steps(Duration::from_secs(30 * 86_400))) <= LEVELS);
    }
}
