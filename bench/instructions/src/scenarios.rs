//! What is counted. All run in one thread, at steady state.

use crate::{BoxError, Result};
use bytes::Bytes;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tidings::handler::State;
use tidings::memory::MemoryConfig;
use tidings::prelude::*;
use tidings::transport::{
    Destination, Ordering, Polled, Publisher, Start, Subscription, SubscriptionSpec, TopicSpec, Topology,
    submit_and_wait,
};
use tidings::{Message, MessageId, SubscriptionConfig, SubscriptionName, Topic};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, mpsc};

/// Does so many messages more.
pub(crate) type Work = Box<dyn FnMut(u64) -> Result<()>>;

/// Makes ready what so many messages need.
type Prepare = fn(u64, usize) -> Result<Work>;

/// Names and what they count.
pub(crate) const ALL: &[(&str, Prepare)] = &[
    // What the others are compared with: a bounded channel of tokio, and a counter of acks.
    ("channel", |_, _| channel()),
    // `Publisher::submit`, `Subscription::poll_batch`, `Acker::ack`: 256 bytes, one message after another.
    ("transport", |_, _| transport(1)),
    ("transport-128", |_, _| transport(128)),
    // `Bus::publish` of a small struct as JSON; memory stores it and gives up the oldest.
    ("publish", |_, _| publish(plain)),
    ("publish-keyed", |_, _| publish(keyed)),
    ("publish-all", |_, _| publish_all()),
    // A handler that takes it, of what is there already.
    ("handle", |total, _| handle(total, plain, 16)),
    ("handle-keyed", |total, _| handle(total, keyed, 16)),
    // One handler that returns an event for each event, and another that takes that.
    ("handle-return", |total, _| handle_and_return(total)),
];

/// What grows, how far, and what is counted: each message, delivery or event costs the same if it scales.
pub(crate) const SCALES: &[(&str, &[usize], Prepare)] = &[
    ("topics published to in turn", &[1, 10, 100, 1_000, 10_000], |_, topics| many_topics(topics)),
    ("subscriptions of one topic, for each delivery", &[1, 8, 64, 512, 1024], |_, many| many_subscriptions(many)),
    ("events that wait, read and acked", &[1_000, 10_000, 100_000, 1_000_000], |_, events| backlog(events)),
    ("workers of a handler", &[1, 4, 16, 64, 256], |total, workers| handle(total, plain, workers)),
    ("workers of a handler by key", &[1, 4, 16, 64, 256], |total, workers| handle(total, keyed, workers)),
];

/// The work of a scenario, or of `what/how-many` of a scale, for `total` messages.
pub(crate) fn prepare(name: &str, total: u64) -> Result<Work> {
    if let Some((_, prepare)) = ALL.iter().find(|(known, _)| *known == name) {
        return prepare(total, 1);
    }
    let (what, many) = name.split_once('/').ok_or_else(|| format!("no scenario `{name}`"))?;
    let scale = SCALES.iter().find(|(known, ..)| *known == what).ok_or_else(|| format!("no scale `{what}`"))?;
    scale.2(total, many.parse()?)
}

#[derive(Clone, Copy, Debug, Event, Serialize, Deserialize)]
#[event(name = "count.order.placed")]
struct Plain {
    number: u64,
    quantity: u32,
    price_cents: u64,
}

#[derive(Clone, Copy, Debug, Event, Serialize, Deserialize)]
#[event(name = "count.order.keyed", key = number)]
struct Keyed {
    number: u64,
    quantity: u32,
    price_cents: u64,
}

fn plain(number: u64) -> Plain {
    Plain { number, quantity: 3, price_cents: 12_345 }
}

fn keyed(number: u64) -> Keyed {
    Keyed { number: number % 500, quantity: 3, price_cents: 12_345 }
}

fn runtime() -> Result<Arc<Runtime>> {
    Ok(Arc::new(Builder::new_current_thread().enable_time().build()?))
}

/// A broker that keeps `retain` bytes of what is settled.
async fn bus(retain: usize) -> Result<Bus> {
    let config = MemoryConfig { capacity: usize::MAX / 4, retain, ..MemoryConfig::default() };
    Ok(Bus::connect(config).await?)
}

fn channel() -> Result<Work> {
    let runtime = runtime()?;
    let payload = Bytes::from(vec![b'x'; 256]);
    let acked = Arc::new(AtomicU64::new(0));
    let (sender, mut receiver) = mpsc::channel::<Bytes>(1024);
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            let (sender, payload) = (sender.clone(), payload.clone());
            let producer = tokio::spawn(async move {
                for _ in 0..count {
                    sender.send(payload.clone()).await?;
                }
                Ok::<_, BoxError>(())
            });
            for _ in 0..count {
                drop(receiver.recv().await);
                acked.fetch_add(1, Relaxed);
            }
            producer.await?
        })
    }))
}

async fn subscribed<E: Event>(bus: &Bus, number: usize) -> Result<Box<dyn Subscription>> {
    let spec = SubscriptionSpec {
        name: SubscriptionName::new(format!("count.transport-{number}"))?,
        topics: vec![Topic::new(E::TOPIC)?.into()],
        ordering: Ordering::None,
        start: Start::New,
        max_in_flight: 1024,
        max_hold: std::time::Duration::MAX,
    };
    Ok(bus.transport().subscribe(spec).await?)
}

type Post = (Destination, Arc<Message>, Option<std::time::Duration>, bool);

/// 256 bytes on their way to a topic.
fn post(topic: &str) -> Result<Post> {
    let topic = Topic::new(topic)?;
    let id = MessageId::new(std::time::SystemTime::now());
    let message = Message::new(id, "/count", Plain::NAME, topic.clone()).with_payload("text/plain", vec![b'x'; 256]);
    Ok((Destination::Topic(topic), Arc::new(message), None, false))
}

async fn submit(publisher: &dyn Publisher, posts: &[Post]) -> Result<()> {
    let failed = submit_and_wait(publisher, posts).await;
    if failed.is_empty() { Ok(()) } else { Err(format!("{failed:?}").into()) }
}

/// Reads what there is, up to so many, and settles it.
async fn settle(subscription: &mut Box<dyn Subscription>, most: usize, polled: &mut Polled) -> Result<usize> {
    poll_fn(|cx| subscription.poll_batch(cx, most, polled)).await?;
    let count = polled.deliveries.len();
    polled.notices.clear();
    polled.deliveries.drain(..).for_each(|delivery| delivery.acker.ack());
    Ok(count)
}

/// Published in batches; read and settled until there is nothing, as a task does that has this one beside it.
fn transport(batch: usize) -> Result<Work> {
    let runtime = runtime()?;
    let (bus, mut subscription) = runtime.block_on(async {
        let bus = bus(1024 * 1024).await?;
        let subscription = subscribed::<Plain>(&bus, 0).await?;
        Ok::<_, BoxError>((bus, subscription))
    })?;
    let (publisher, outgoing) = (bus.transport().publisher(), vec![post(Plain::TOPIC)?; batch]);
    let mut polled = Polled::default();
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            let mut open = 0;
            for sent in (0..count).step_by(batch) {
                submit(&*publisher, &outgoing).await?;
                open += batch;
                while open >= 512.max(batch) || (open > 0 && sent + batch as u64 >= count) {
                    open -= settle(&mut subscription, 128, &mut polled).await?;
                }
            }
            Ok(())
        })
    }))
}

fn many_topics(topics: usize) -> Result<Work> {
    let (runtime, mut next) = (runtime()?, 0);
    let bus = runtime.block_on(bus(1024 * 1024))?;
    let publisher = bus.transport().publisher();
    let posts = (0..topics).map(|number| post(&format!("count.topic-{number}"))).collect::<Result<Vec<_>>>()?;
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            for _ in 0..count {
                submit(&*publisher, &posts[next..=next]).await?;
                next = (next + 1) % posts.len();
            }
            Ok(())
        })
    }))
}

/// Each message is read by all of so many; what is counted is deliveries.
fn many_subscriptions(many: usize) -> Result<Work> {
    let (runtime, mut subscriptions, mut polled) = (runtime()?, Vec::new(), Polled::default());
    let bus = runtime.block_on(bus(1024 * 1024))?;
    for number in 0..many {
        subscriptions.push(runtime.block_on(subscribed::<Plain>(&bus, number))?);
    }
    let (publisher, posts) = (bus.transport().publisher(), vec![post(Plain::TOPIC)?; 10]);
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            let mut left = count as usize;
            while left > 0 {
                submit(&*publisher, &posts).await?;
                for subscription in &mut subscriptions {
                    let mut open = posts.len();
                    while open > 0 {
                        open -= settle(subscription, open, &mut polled).await?;
                    }
                    left = left.saturating_sub(posts.len());
                }
            }
            Ok(())
        })
    }))
}

/// So many wait, and are not less meanwhile.
fn backlog(events: usize) -> Result<Work> {
    let (runtime, mut polled) = (runtime()?, Polled::default());
    let bus = runtime.block_on(bus(1024 * 1024))?;
    let mut subscription = runtime.block_on(subscribed::<Plain>(&bus, 0))?;
    let (publisher, posts) = (bus.transport().publisher(), vec![post(Plain::TOPIC)?; 64]);
    for _ in 0..events.div_ceil(posts.len()) {
        runtime.block_on(submit(&*publisher, &posts))?;
    }
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            let mut left = count as usize;
            while left > 0 {
                submit(&*publisher, &posts).await?;
                let mut open = posts.len();
                while open > 0 {
                    open -= settle(&mut subscription, open, &mut polled).await?;
                }
                left = left.saturating_sub(posts.len());
            }
            Ok(())
        })
    }))
}

async fn provision<E: Event>(bus: &Bus) -> Result<()> {
    let topics = vec![TopicSpec::new(Topic::new(E::TOPIC)?)];
    Ok(bus.transport().provision(&Topology { topics, subscriptions: Vec::new() }).await?)
}

fn publish<E: Event + Sync>(event: fn(u64) -> E) -> Result<Work> {
    let runtime = runtime()?;
    let bus = runtime.block_on(bus(1024 * 1024))?;
    runtime.block_on(provision::<E>(&bus))?;
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            for number in 0..count {
                bus.publish(&event(number)).await?;
            }
            Ok(())
        })
    }))
}

fn publish_all() -> Result<Work> {
    let runtime = runtime()?;
    let bus = runtime.block_on(bus(1024 * 1024))?;
    runtime.block_on(provision::<Plain>(&bus))?;
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            let events: Vec<_> = (0..128).map(plain).collect();
            for _ in (0..count).step_by(events.len()) {
                bus.publish_all(&events).await?;
            }
            Ok(())
        })
    }))
}

/// How many were handled, and how many are to be: those that come later wait, however far the workers are ahead.
#[derive(Default)]
struct Handled {
    count: AtomicU64,
    goal: AtomicU64,
    reached: Notify,
    raised: Notify,
}

impl Handled {
    async fn one(&self) {
        let number = self.count.fetch_add(1, Relaxed) + 1;
        if number == self.goal.load(Relaxed) {
            self.reached.notify_one();
        }
        while number > self.goal.load(Relaxed) {
            self.raised.notified().await;
        }
    }

    async fn wait(&self, more: u64) {
        self.goal.fetch_add(more, Relaxed);
        self.raised.notify_waiters();
        self.reached.notified().await;
    }
}

async fn handled<E: Event>(_: E, State(handled): State<Arc<Handled>>) {
    handled.one().await;
}

async fn returned(order: Plain, State(handled): State<Arc<Handled>>) -> Result<Keyed, HandlerError> {
    handled.one().await;
    Ok(keyed(order.number))
}

fn work(runtime: Arc<Runtime>, service: Service, bus: &Bus, handled: Arc<Handled>) -> Result<Work> {
    let running = runtime.block_on(service.start(bus))?;
    Ok(Box::new(move |count| {
        let _running = &running;
        runtime.block_on(handled.wait(count));
        Ok(())
    }))
}

fn handle<E: Event + Sync>(total: u64, event: fn(u64) -> E, workers: usize) -> Result<Work> {
    let (runtime, seen) = (runtime()?, Arc::new(Handled::default()));
    let bus = runtime.block_on(filled(total, event))?;
    let config = SubscriptionConfig::default().start(Start::Beginning).concurrency(workers);
    let service = Service::new("count").state(Arc::clone(&seen)).on_with(config, handled::<E>);
    work(runtime, service, &bus, seen)
}

fn handle_and_return(total: u64) -> Result<Work> {
    let (runtime, seen) = (runtime()?, Arc::new(Handled::default()));
    let bus = runtime.block_on(filled(total, plain))?;
    let config = SubscriptionConfig::default().start(Start::Beginning);
    let none = Arc::new(Handled { goal: AtomicU64::new(u64::MAX), ..Handled::default() });
    let other = Service::new("other").state(none).on(handled::<Keyed>);
    let other = runtime.block_on(other.start(&bus))?;
    let service = Service::new("count").state(Arc::clone(&seen)).on_with(config, returned);
    let mut work = work(runtime, service, &bus, seen)?;
    Ok(Box::new(move |count| {
        let _other = &other;
        work(count)
    }))
}

/// A broker with `count` events, and some more to be read ahead.
async fn filled<E: Event + Sync>(count: u64, event: fn(u64) -> E) -> Result<Bus> {
    let bus = bus(usize::MAX / 4).await?;
    provision::<E>(&bus).await?;
    let events: Vec<_> = (0..count + 1_000).map(event).collect();
    bus.publish_all(&events).await?;
    Ok(bus)
}
