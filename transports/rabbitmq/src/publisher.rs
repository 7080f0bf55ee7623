//! Takes messages to the broker: several channels, each with one owner, because two tasks on one channel of the client
//! are given each other's confirms.

use crate::config::RabbitMqConfig;
use crate::error::{closed, error, failed, late, short, size_limit};
use crate::link::Link;
use crate::names::{Due, LEVELS, STEP_MS, delayed_key};
use crate::topology::Topology;
use crate::wire::{Fnv, encode};
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use std::collections::{HashMap, VecDeque};
use std::hash::Hasher;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings_core::transport::{Destination, Fate, Outgoing, Publisher, Receipt};
use tidings_core::{Error, ErrorKind, MessageId, Result};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, interval, sleep, timeout_at};

/// How long a confirm waits that came with another message's return: its own may be on the way.
const SECOND_LOOK: Duration = Duration::from_millis(5);
/// How often what waits for a connection is looked through for what nobody waits for any more.
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
    payload: Bytes,
    id: MessageId,
    to: To,
    receipt: Receipt,
    _open: Counted,
}

/// What it means if no queue takes it.
enum To {
    /// Nobody reads the topic; an error only where somebody must.
    Topic { required: bool },
    /// The subscription does not exist.
    Subscription,
    /// The queue is created, once.
    DeadLetter { name: tidings_core::SubscriptionName, created: bool },
}

impl Post {
    /// The properties, which are not needed any more but of dead letters: those are sent again once their queue is there.
    fn take_properties(&mut self) -> BasicProperties {
        match self.to {
            To::DeadLetter { created: false, .. } => self.properties.clone(),
            _ => std::mem::take(&mut self.properties),
        }
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
                window: config.publish_window,
                timeout: config.timeout(),
                open: Arc::clone(&open),
                again: sender.downgrade(),
                posts,
                waiting: VecDeque::new(),
                flying: FuturesUnordered::new(),
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
            if matches!(to, To::Topic { .. }) && (steps > 0 || message.recorded_time.is_none()) {
                properties = crate::replay::sent(properties, delay.unwrap_or_default());
            }
            Ok((exchange, key, to, properties))
        });
        let (exchange, key, to, properties) = match routed {
            Ok(routed) => routed,
            Err(error) => return refuse(receipt, error),
        };
        let (payload, id) = (message.payload.clone(), message.id.clone());
        let post =
            Box::new(Post { exchange, key, properties, payload, id, to, receipt, _open: Counted::new(&self.0.open) });
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
        let delayed = |due| -> Result<_> { Ok((names.delay(levels(steps) - 1)?, short(delayed_key(steps, due))?)) };
        Ok(match destination {
            Destination::Topic(topic) => {
                let required = self.0.config.required.iter().any(|name| name == topic.as_str());
                let (exchange, key) =
                    if steps == 0 { (names.topics()?, short(topic.as_str())?) } else { delayed(Due::Topic(topic))? };
                (exchange, key, To::Topic { required })
            }
            Destination::Subscription(name) => {
                let (exchange, key) = if steps == 0 {
                    (names.addresses()?, short(name.as_str())?)
                } else {
                    delayed(Due::Subscription(name))?
                };
                (exchange, key, To::Subscription)
            }
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

/// A delay in steps of the chain, never less than asked for.
fn steps(delay: Duration) -> u64 {
    u64::try_from(delay.as_micros().div_ceil(u128::from(STEP_MS) * 1000)).unwrap_or(u64::MAX)
}

/// How many levels of the chain a delay needs.
fn levels(steps: u64) -> usize {
    (u64::BITS - steps.leading_zeros()) as usize
}

/// What keeps its order by being on one channel: events of one topic with one key, or with none.
fn lane(destination: &Destination, message: &tidings_core::Message) -> u64 {
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

type Flight = Pin<Box<dyn Future<Output = (Box<Post>, lapin::Result<Confirmation>)> + Send>>;

/// The owner of one channel.
struct Owner {
    link: Arc<Link>,
    topology: Arc<Topology>,
    window: usize,
    timeout: Duration,
    open: Arc<Open>,
    /// Back to itself, for what has to be prepared first.
    again: mpsc::WeakUnboundedSender<Box<Post>>,
    posts: mpsc::UnboundedReceiver<Box<Post>>,
    /// Taken, but not sent while there is no connection.
    waiting: VecDeque<Box<Post>>,
    flying: FuturesUnordered<Flight>,
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
        let too_long = since.elapsed() > self.timeout;
        for post in std::mem::take(&mut self.waiting) {
            if post.receipt.is_abandoned() || too_long {
                let error = self.link.fault().unwrap_or_else(|| late("a channel", self.timeout));
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
        let mut taken = Vec::with_capacity(self.window);
        // What flew when a connection was lost does not always land.
        let mut look_again = interval(SWEEP);
        let mut landed_last = Instant::now();
        loop {
            if !channel.status().connected() {
                return self.drain_failed().await;
            }
            let blocked = self.link.is_blocked();
            if blocked || self.flying.is_empty() {
                landed_last = Instant::now();
            } else if landed_last.elapsed() > self.timeout {
                // The server has forgotten them; on another channel they can be sent again.
                drop(tokio::time::timeout(LANDING, channel.close(200, "no confirms".into())).await);
                return self.drain_failed().await;
            }
            if blocked {
                self.sweep(Instant::now());
            }
            while !blocked && channel.status().connected() && self.flying.len() < self.window {
                let Some(post) = self.waiting.pop_front() else { break };
                self.send(channel, post);
            }
            let room = if blocked { 0 } else { self.window.saturating_sub(self.flying.len()) };
            let look = self.doubted.first().map(|(_, until)| *until);
            let landed = tokio::select! {
                biased;
                landed = self.flying.next(), if !self.flying.is_empty() => landed,
                count = self.posts.recv_many(&mut taken, room.min(256)), if room > 0 => {
                    if count == 0 {
                        self.land(None);
                        return false;
                    }
                    self.waiting.extend(taken.drain(..));
                    continue;
                }
                _ = look_again.tick() => None,
                () = tokio::time::sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => None,
            };
            if landed.is_some() {
                landed_last = Instant::now();
            }
            self.land(landed);
        }
    }

    /// All that fly on a channel that has failed fail with it.
    async fn drain_failed(&mut self) -> bool {
        while let Ok(Some(landed)) = tokio::time::timeout(LANDING, self.flying.next()).await {
            self.land(Some(landed));
        }
        self.flying.clear();
        self.returned.clear();
        self.doubted.drain(..).for_each(|(post, _)| post.receipt.confirm());
        true
    }

    /// Queues the frames, in the order of the calls, and leaves the confirm to come.
    fn send(&mut self, channel: &Channel, mut post: Box<Post>) {
        if post.receipt.is_abandoned() {
            let error = late("a place on the channel", self.timeout);
            return post.receipt.fail(Fate::NotPersisted, error.with_operation("publish"));
        }
        let properties = post.take_properties();
        let channel = channel.clone();
        let mut flight: Flight = Box::pin(async move {
            let options = BasicPublishOptions { mandatory: true, immediate: false };
            let (exchange, key) = (std::mem::take(&mut post.exchange), post.key.clone());
            let sent = channel.basic_publish(exchange, key, options, &post.payload, properties).await;
            let confirmed = match sent {
                Ok(confirm) => confirm.await,
                Err(failure) => Err(failure),
            };
            (post, confirmed)
        });
        match flight.as_mut().now_or_never() {
            // It never left: core sends it again.
            Some((post, Err(failure))) => {
                post.receipt.fail(Fate::NotPersisted, failed(failure).with_transient(true).with_operation("publish"));
            }
            Some((post, Ok(confirmation))) => self.flying.push(Box::pin(async { (post, Ok(confirmation)) })),
            None => self.flying.push(flight),
        }
    }

    /// Answers for all that have landed: first all returns are collected, then each confirm is judged.
    fn land(&mut self, first: Option<(Box<Post>, lapin::Result<Confirmation>)>) {
        let mut landed: Vec<_> = first.into_iter().collect();
        while let Some(Some(next)) = self.flying.next().now_or_never() {
            landed.push(next);
        }
        let mut judged = Vec::with_capacity(landed.len());
        for (post, confirmation) in landed {
            match confirmation {
                Err(failure) => fail(post, failure),
                Ok(Confirmation::Nack(returned)) => {
                    self.note(returned);
                    let error = error(ErrorKind::Full, "the queue did not take it").with_operation("publish");
                    post.receipt.fail(Fate::NotPersisted, error);
                }
                Ok(Confirmation::Ack(returned)) => {
                    let doubtful = returned.is_some();
                    self.note(returned);
                    judged.push((post, doubtful));
                }
                Ok(Confirmation::NotRequested) => judged.push((post, false)),
            }
        }
        self.judge(judged);
    }

    fn note(&mut self, returned: Option<lapin::message::BasicReturnMessage>) {
        if let Some(returned) = returned {
            let id = returned.properties.message_id().as_ref().map_or("", |id| id.as_str()).to_owned();
            *self.returned.entry((id, returned.routing_key.to_string())).or_default() += 1;
        }
    }

    fn judge(&mut self, judged: Vec<(Box<Post>, bool)>) {
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
                false if doubtful => self.doubted.push((post, now + SECOND_LOOK)),
                false => post.receipt.confirm(),
            }
        }
    }

    fn came_back(&mut self, post: &Post) -> bool {
        if self.returned.is_empty() {
            return false;
        }
        let place = (post.id.to_string(), post.key.to_string());
        let Some(count) = self.returned.get_mut(&place) else { return false };
        *count -= 1;
        if *count == 0 {
            self.returned.remove(&place);
        }
        true
    }

    /// No queue took it.
    fn unroutable(&mut self, mut post: Box<Post>) {
        match &mut post.to {
            To::Topic { required: false } => {
                self.open.unrouted.fetch_add(1, SeqCst);
                tracing::debug!(topic = %post.key, "rabbitmq: nobody has subscribed to what was published");
                post.receipt.confirm();
            }
            To::Topic { required: true } => {
                let why = "nobody has subscribed to the topic, which is configured as required";
                refuse(post, ErrorKind::NotFound, why);
            }
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
            To::DeadLetter { .. } => refuse(post, ErrorKind::NotFound, "the queue of the dead letters does not exist"),
            To::Subscription => {
                refuse(post, ErrorKind::NotFound, "the subscription does not exist; subscribe or provision it first");
            }
        }
    }
}

fn refuse(post: Box<Post>, kind: ErrorKind, why: &'static str) {
    let error = error(kind, why).with_context("key", &post.key).with_operation("publish");
    post.receipt.fail(Fate::NotPersisted, error);
}

/// The channel or the connection is gone, and with it the answer.
fn fail(post: Box<Post>, failure: lapin::Error) {
    if let Some(limit) = size_limit(&failure).filter(|limit| post.payload.len() > *limit) {
        let why =
            format!("a payload of {} bytes, the server takes {limit}; set `max_message_size`", post.payload.len());
        return post.receipt.fail(Fate::NotPersisted, error(ErrorKind::TooLarge, why).with_operation("publish"));
    }
    let denied = matches!(failed(failure.clone()).kind(), ErrorKind::Denied);
    let error = failed(failure).with_transient(!denied).with_operation("publish");
    post.receipt.fail(Fate::PossiblyPersisted, error);
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
