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
    Destination, Ordering, Polled, Start, Subscription, SubscriptionSpec, TopicSpec, Topology, submit_and_wait,
};
use tidings::{Message, MessageId, SubscriptionConfig, SubscriptionName, Topic};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, mpsc};

/// Does so many messages more.
pub(crate) type Work = Box<dyn FnMut(u64) -> Result<()>>;

pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Makes ready what so many messages need.
    pub(crate) prepare: fn(u64) -> Result<Work>,
}

pub(crate) const ALL: &[Scenario] = &[
    // What the others are compared with: a bounded channel of tokio, and a counter of acks.
    Scenario { name: "channel", prepare: channel },
    // `Publisher::submit`, `Subscription::poll_batch`, `Acker::ack`: 256 bytes, one message after another.
    Scenario { name: "transport", prepare: |_| transport(1) },
    Scenario { name: "transport-128", prepare: |_| transport(128) },
    // `Bus::publish` of a small struct as JSON; memory stores it and gives up the oldest.
    Scenario { name: "publish", prepare: |_| publish(plain) },
    Scenario { name: "publish-keyed", prepare: |_| publish(keyed) },
    Scenario { name: "publish-all", prepare: |_| publish_all() },
    // A handler that takes it, of what is there already.
    Scenario { name: "handle", prepare: |total| handle(total, plain) },
    Scenario { name: "handle-keyed", prepare: |total| handle(total, keyed) },
    // One handler that returns an event for each event, and another that takes that.
    Scenario { name: "handle-return", prepare: handle_and_return },
];

pub(crate) fn named(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
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

fn channel(_: u64) -> Result<Work> {
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

async fn subscribed<E: Event>(bus: &Bus) -> Result<Box<dyn Subscription>> {
    let spec = SubscriptionSpec {
        name: SubscriptionName::new("count.transport")?,
        topics: vec![Topic::new(E::TOPIC)?.into()],
        ordering: Ordering::None,
        start: Start::New,
        max_in_flight: 1024,
        max_hold: std::time::Duration::MAX,
    };
    Ok(bus.transport().subscribe(spec).await?)
}

/// Published in batches; read and settled until there is nothing, as a task does that has this one beside it.
fn transport(batch: usize) -> Result<Work> {
    let runtime = runtime()?;
    let (bus, mut subscription) = runtime.block_on(async {
        let bus = bus(1024 * 1024).await?;
        let subscription = subscribed::<Plain>(&bus).await?;
        Ok::<_, BoxError>((bus, subscription))
    })?;
    let publisher = bus.transport().publisher();
    let topic = Topic::new(Plain::TOPIC)?;
    let message = Message::new(MessageId::new(std::time::SystemTime::now()), "/count", Plain::NAME, topic.clone())
        .with_payload("text/plain", vec![b'x'; 256]);
    let outgoing = vec![(Destination::Topic(topic), Arc::new(message), None, false); batch];
    let mut polled = Polled::default();
    Ok(Box::new(move |count| {
        runtime.block_on(async {
            let mut open = 0;
            for sent in (0..count).step_by(batch) {
                let failed = submit_and_wait(&*publisher, &outgoing).await;
                open += batch;
                if !failed.is_empty() {
                    return Err(format!("{failed:?}").into());
                }
                while open >= 512.max(batch) || (open > 0 && sent + batch as u64 >= count) {
                    poll_fn(|cx| subscription.poll_batch(cx, 128, &mut polled)).await?;
                    open -= polled.deliveries.len();
                    polled.notices.clear();
                    polled.deliveries.drain(..).for_each(|delivery| delivery.acker.ack());
                }
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

/// How many were handled, and who waits for how many.
#[derive(Default)]
struct Handled {
    count: AtomicU64,
    goal: AtomicU64,
    reached: Notify,
}

impl Handled {
    fn one(&self) {
        if self.count.fetch_add(1, Relaxed) + 1 == self.goal.load(Relaxed) {
            self.reached.notify_one();
        }
    }

    async fn wait(&self, more: u64) {
        self.goal.store(self.count.load(Relaxed) + more, Relaxed);
        self.reached.notified().await;
    }
}

async fn handled<E: Event>(_: E, State(handled): State<Arc<Handled>>) {
    handled.one();
}

async fn returned(order: Plain, State(handled): State<Arc<Handled>>) -> Result<Keyed, HandlerError> {
    handled.one();
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

fn handle<E: Event + Sync>(total: u64, event: fn(u64) -> E) -> Result<Work> {
    let (runtime, seen) = (runtime()?, Arc::new(Handled::default()));
    let bus = runtime.block_on(filled(total, event))?;
    let config = SubscriptionConfig::default().start(Start::Beginning);
    let service = Service::new("count").state(Arc::clone(&seen)).on_with(config, handled::<E>);
    work(runtime, service, &bus, seen)
}

fn handle_and_return(total: u64) -> Result<Work> {
    let (runtime, seen) = (runtime()?, Arc::new(Handled::default()));
    let bus = runtime.block_on(filled(total, plain))?;
    let config = SubscriptionConfig::default().start(Start::Beginning);
    let none = Arc::new(Handled::default());
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
