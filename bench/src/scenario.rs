//! What is measured: each loop of a scenario in turn, several rounds.

use crate::broker::{Broker, Limits, Raw};
use crate::event::{JSON, Sample, encode, handle};
use crate::measure::{Meter, Sample as Measured};
use crate::{Result, event};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings::handler::State;
use tidings::transport::{
    Destination, Ordering, Polled, Start, SubscriptionSpec, TopicSpec, Topology, Transport, submit_and_wait,
};
use tidings::{Bus, BusConfig, Message, MessageId, Service, SubscriptionConfig, SubscriptionName, Topic};
use tokio::time::Instant;

pub const SOURCE: &str = "/bench";
pub const LIMITS: Limits = Limits { window: 1_000, in_flight: 512 };
/// How many messages the transport is handed at once; the window is a multiple.
const SUBMITTED: usize = 50;
/// How many events one call of `publish_all` takes.
const ALL: u64 = 10_000;
/// The subscription of the transport's loop, and of raw loops where there is no log.
pub const POLLED: &str = "bench.polled";
/// A loop that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a slow handler takes.
const SLOW: Duration = Duration::from_millis(10);

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub rounds: usize,
    pub warm_up: u64,
    pub count: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    Raw(Raw),
    /// `Publisher::submit`, `Subscription::poll_batch`.
    Transport,
    /// `Bus::publish`, or a handler of a `Service`.
    Sdk,
    /// `Bus::publish_all`.
    All,
    /// So many handlers at a time, each of which takes 10 ms.
    Slow(usize),
}

impl Loop {
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw(raw) => raw.name,
            Self::Transport => "transport",
            Self::Sdk => "SDK",
            Self::All => "SDK, `publish_all`",
            Self::Slow(1) => "SDK, one handler",
            Self::Slow(_) => "SDK, 64 handlers",
        }
    }
}

/// What was measured of one loop, by round.
#[derive(Clone, Debug)]
pub struct Row {
    pub of: Loop,
    pub rounds: Vec<Measured>,
}

/// What was measured in one scenario. The first row is what the others are compared with.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: &'static str,
    pub what: String,
    pub rows: Vec<Row>,
}

/// All scenarios whose name has `only` in it, of each the loops whose name has `of` in it.
///
/// # Errors
/// A loop failed, or took too long.
pub async fn all<B: Broker>(broker: &B, effort: Effort, only: &str, of: &str) -> Result<Vec<Table>> {
    let mut tables = Vec::new();
    let publish = |raw: &[Raw]| {
        let raw = raw.iter().copied().map(Loop::Raw);
        raw.chain([Loop::Transport, Loop::Sdk, Loop::All]).collect::<Vec<_>>()
    };
    let consume =
        |raw: &[Raw]| raw.iter().copied().map(Loop::Raw).chain([Loop::Transport, Loop::Sdk]).collect::<Vec<_>>();
    let scenarios: [(&'static str, String, Scenario, Vec<Loop>); 6] = [
        (
            "publish, confirmed",
            format!("Each confirmed, at most {} unconfirmed at a time; encoded from a struct; no key.", LIMITS.window),
            Scenario::Publish,
            publish(B::PUBLISH),
        ),
        (
            "publish, confirmed, with keys",
            "The same with 500 keys in turn. The SDK keeps the order of a key also when it repeats a publish, so of each key one \
             is unconfirmed at a time, and at most 500 are; no raw client promises that."
                .into(),
            Scenario::PublishKeyed,
            publish(B::PUBLISH),
        ),
        (
            "publish, one at a time",
            "The next is sent when the one before is confirmed; no key; a tenth of the events.".into(),
            Scenario::PublishOne,
            publish(B::PUBLISH).into_iter().filter(|of| !matches!(of, Loop::Transport | Loop::All)).collect(),
        ),
        (
            "consume, acks confirmed",
            format!(
                "Decoded into a struct, then acked, the ack confirmed; at most {} read and not acked; no order, 1 worker.",
                LIMITS.in_flight
            ),
            Scenario::Consume(1),
            consume(B::CONSUME),
        ),
        (
            "consume by key, acks confirmed",
            "The same with 500 keys, of which each keeps its order, and 16 workers. The raw loop keeps the order by handling one \
             message after another."
                .into(),
            Scenario::ConsumeKeyed(16),
            consume(B::CONSUME),
        ),
        (
            "consume by slow handlers",
            format!("Each waits for {SLOW:?}; 64 of them compared with one, which should be 64 times as fast; a hundredth of the events."),
            Scenario::Slow,
            vec![Loop::Slow(1), Loop::Slow(64)],
        ),
    ];
    for (name, what, scenario, mut loops) in scenarios {
        loops.retain(|one| one.name().contains(of));
        if name.contains(only) {
            tables.push(Table { name, what, rows: rounds(broker, scenario, &loops, effort).await? });
        }
    }
    Ok(tables)
}

#[derive(Clone, Copy, Debug)]
enum Scenario {
    Publish,
    PublishKeyed,
    PublishOne,
    /// With so many workers.
    Consume(usize),
    ConsumeKeyed(usize),
    Slow,
}

impl Scenario {
    /// How many unconfirmed publishes, or unsettled deliveries, there may be.
    fn limits(self) -> Limits {
        Limits { window: if matches!(self, Self::PublishOne) { 1 } else { LIMITS.window }, ..LIMITS }
    }

    /// A part of the effort, where one event takes long.
    fn effort(self, effort: Effort) -> Effort {
        let part = match self {
            Self::PublishOne => 10,
            Self::Slow => 100,
            _ => 1,
        };
        Effort { warm_up: (effort.warm_up / part).max(1), count: (effort.count / part).max(1), ..effort }
    }
}

/// All loops in turn, in each round beginning with another.
async fn rounds<B: Broker>(broker: &B, scenario: Scenario, loops: &[Loop], effort: Effort) -> Result<Vec<Row>> {
    let effort = scenario.effort(effort);
    let mut rows: Vec<_> = loops.iter().map(|of| Row { of: *of, rounds: Vec::new() }).collect();
    for round in 0..effort.rounds {
        for turn in 0..rows.len() {
            let row = (turn + round) % rows.len();
            let namespace = format!("b{round}-{row}-{:x}", fresh());
            let of = rows[row].of;
            let meter = Arc::new(Meter::new(effort.warm_up, effort.count));
            let run = run(broker, scenario, of, &namespace, &meter);
            let ran = tokio::time::timeout(PATIENCE, run).await;
            ran.map_err(|_| format!("{scenario:?}, {}: no end", of.name()))??;
            broker.clean_up().await?;
            let measured = meter.sample().ok_or("the loop ended before its last event")?;
            eprintln!(
                "{scenario:?}, round {}, {}: {:.0}/s, {:.2} us",
                round + 1,
                of.name(),
                measured.per_second(),
                measured.cpu_micros()
            );
            rows[row].rounds.push(measured);
        }
    }
    Ok(rows)
}

/// So that two runs on one broker do not meet.
fn fresh() -> u32 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.subsec_nanos())
}

async fn run<B: Broker>(broker: &B, scenario: Scenario, of: Loop, namespace: &str, meter: &Arc<Meter>) -> Result<()> {
    match scenario {
        Scenario::Publish | Scenario::PublishOne => {
            publish::<B, event::Plain>(broker, of, namespace, meter, scenario.limits()).await
        }
        Scenario::PublishKeyed => publish::<B, event::Keyed>(broker, of, namespace, meter, scenario.limits()).await,
        Scenario::Slow => consume::<B, event::Plain>(broker, of, namespace, meter, (Ordering::None, 1)).await,
        Scenario::Consume(workers) => {
            consume::<B, event::Plain>(broker, of, namespace, meter, (Ordering::None, workers)).await
        }
        Scenario::ConsumeKeyed(workers) => {
            consume::<B, event::Keyed>(broker, of, namespace, meter, (Ordering::Key, workers)).await
        }
    }
}

async fn provisioned<B: Broker, E: Sample>(broker: &B, namespace: &str) -> Result<(Arc<dyn Transport>, Bus)> {
    let transport = broker.connect(namespace).await?;
    let topics = vec![TopicSpec::new(Topic::new(E::TOPIC)?)];
    transport.provision(&Topology { topics, subscriptions: Vec::new() }).await?;
    let config = BusConfig { source: SOURCE.into(), max_unconfirmed: LIMITS.window, ..BusConfig::default() };
    let bus = Bus::new(Arc::clone(&transport), config)?;
    Ok((transport, bus))
}

// ---- Publishing ----

async fn publish<B: Broker, E: Sample>(
    broker: &B,
    of: Loop,
    namespace: &str,
    meter: &Arc<Meter>,
    limits: Limits,
) -> Result<()> {
    let (transport, bus) = provisioned::<B, E>(broker, namespace).await?;
    prepare::<E>(&transport, Ordering::None).await?;
    match of {
        Loop::Raw(raw) => broker.publish::<E>(raw, namespace, limits, meter).await?,
        Loop::Transport => submit::<E>(&transport, meter).await?,
        Loop::All => publish_all::<E>(&bus, meter).await?,
        _ => publish_each::<E>(&bus, meter, limits.window).await?,
    }
    Ok(bus.close(Duration::from_secs(5)).await?)
}

async fn submit<E: Sample>(transport: &Arc<dyn Transport>, meter: &Meter) -> Result<()> {
    let publisher = transport.publisher();
    let topic = Topic::new(E::TOPIC)?;
    let mut open = VecDeque::new();
    let mut number = 0;
    while number < meter.total() {
        if open.len() == LIMITS.window / SUBMITTED
            && let Some((count, oldest)) = open.pop_front()
        {
            confirmed(oldest, count, meter).await?;
        }
        let count = (SUBMITTED as u64).min(meter.total() - number);
        let batch: Result<Vec<_>> = (number..number + count)
            .map(|number| Ok((Destination::Topic(topic.clone()), message::<E>(number, &topic)?, None, false)))
            .collect();
        open.push_back((count, Box::pin(submit_and_wait(&*publisher, &batch?))));
        number += count;
    }
    for (count, oldest) in open {
        confirmed(oldest, count, meter).await?;
    }
    Ok(())
}

async fn confirmed(
    answers: impl Future<Output = Vec<(usize, tidings::transport::PublishFailure)>>,
    count: u64,
    meter: &Meter,
) -> Result<()> {
    if let Some((_, failure)) = answers.await.pop() {
        return Err(failure.error.into());
    }
    meter.tick_many(count);
    Ok(())
}

/// As core makes it.
fn message<E: Sample>(number: u64, topic: &Topic) -> Result<Message> {
    let (event, now) = (E::new(number), SystemTime::now());
    let mut message = Message::new(MessageId::new(now), SOURCE, E::NAME, topic.clone());
    message = message.with_payload(JSON, encode(&event)?);
    (message.key, message.time, message.recorded_time) = (event.key(), Some(now), Some(now));
    Ok(message)
}

async fn publish_each<E: Sample>(bus: &Bus, meter: &Meter, window: usize) -> Result<()> {
    let publish = |number| async move { bus.publish(&E::new(number)).await };
    let mut confirmed = stream::iter(0..meter.total()).map(publish).buffered(window);
    while confirmed.try_next().await?.is_some() {
        meter.tick();
    }
    Ok(())
}

async fn publish_all<E: Sample>(bus: &Bus, meter: &Meter) -> Result<()> {
    let mut number = 0;
    while number < meter.total() {
        // The warm-up by itself, because events are counted call by call.
        let end = if number < meter.warm_up() { meter.warm_up() } else { meter.total() };
        let count = ALL.min(end - number);
        let events: Vec<_> = (number..number + count).map(E::new).collect();
        bus.publish_all(&events).await?;
        meter.tick_many(count);
        number += count;
    }
    Ok(())
}

// ---- Consuming ----

async fn consume<B: Broker, E: Sample>(
    broker: &B,
    of: Loop,
    namespace: &str,
    meter: &Arc<Meter>,
    (ordering, workers): (Ordering, usize),
) -> Result<()> {
    let (transport, bus) = provisioned::<B, E>(broker, namespace).await?;
    let filled = Meter::new(0, meter.total());
    let (workers, takes) = if let Loop::Slow(workers) = of { (workers, SLOW) } else { (workers, Duration::ZERO) };
    match of {
        Loop::Raw(_) | Loop::Transport => prepare::<E>(&transport, ordering).await?,
        _ if start(&transport) == Start::New => {
            service::<E>(&transport, meter, (ordering, workers, takes)).provision(&bus).await?;
        }
        _ => {}
    }
    match of {
        Loop::Raw(raw) if raw.bare => {
            let same = B::PUBLISH.iter().find(|publish| publish.bare).ok_or("no such raw publish")?;
            broker.publish::<E>(*same, namespace, LIMITS, &filled).await?;
        }
        _ => publish_all::<E>(&bus, &filled).await?,
    }
    match of {
        Loop::Raw(raw) => broker.consume::<E>(raw, namespace, LIMITS, meter).await?,
        Loop::Transport => poll::<E>(&transport, meter, ordering).await?,
        _ => serve(&bus, service::<E>(&transport, meter, (ordering, workers, takes)), meter).await?,
    }
    Ok(bus.close(Duration::from_secs(5)).await?)
}

/// What the transport's loop reads.
fn polled<E: Sample>(transport: &Arc<dyn Transport>, ordering: Ordering) -> Result<SubscriptionSpec> {
    Ok(SubscriptionSpec {
        name: SubscriptionName::new(POLLED)?,
        topics: vec![Topic::new(E::TOPIC)?.into()],
        ordering,
        start: start(transport),
        max_in_flight: LIMITS.in_flight,
        max_hold: Duration::MAX,
    })
}

/// Where there is a log the beginning, else what is published once the subscription exists.
fn start(transport: &Arc<dyn Transport>) -> Start {
    if transport.capabilities().start_beginning { Start::Beginning } else { Start::New }
}

/// Where there is no log, a queue has to be there before anything is published.
async fn prepare<E: Sample>(transport: &Arc<dyn Transport>, ordering: Ordering) -> Result<()> {
    if start(transport) == Start::New {
        let subscriptions = vec![polled::<E>(transport, ordering)?];
        transport.provision(&Topology { topics: Vec::new(), subscriptions }).await?;
    }
    Ok(())
}

async fn poll<E: Sample>(transport: &Arc<dyn Transport>, meter: &Meter, ordering: Ordering) -> Result<()> {
    let mut subscription = transport.subscribe(polled::<E>(transport, ordering)?).await?;
    let mut polled = Polled::default();
    let mut more = true;
    while more {
        poll_fn(|cx| subscription.poll_batch(cx, LIMITS.in_flight, &mut polled)).await?;
        polled.notices.clear();
        for delivery in polled.deliveries.drain(..) {
            handle::<E>(&delivery.message.payload)?;
            delivery.acker.ack();
            more = meter.tick();
        }
    }
    check_settled(meter, subscription.close(Instant::now() + Duration::from_secs(10)).await.applied)
}

fn service<E: Sample>(
    transport: &Arc<dyn Transport>,
    meter: &Arc<Meter>,
    (ordering, workers, takes): (Ordering, usize, Duration),
) -> Service {
    let config = SubscriptionConfig::default().concurrency(workers).max_in_flight(LIMITS.in_flight);
    let config = config.ordering(ordering).start(start(transport));
    Service::new("bench").state((Arc::clone(meter), takes)).on_with(config, handled::<E>)
}

async fn serve(bus: &Bus, service: Service, meter: &Arc<Meter>) -> Result<()> {
    let running = service.start(bus).await?;
    meter.over().await;
    check_settled(meter, running.drain(Duration::from_secs(10)).await.flushed.applied)
}

async fn handled<E: Sample>(event: E, State((meter, takes)): State<(Arc<Meter>, Duration)>) {
    drop(std::hint::black_box(event));
    if !takes.is_zero() {
        tokio::time::sleep(takes).await;
    }
    meter.tick();
}

/// All were acked, each confirmed by the broker.
fn check_settled(meter: &Meter, applied: u64) -> Result<()> {
    if applied == meter.total() {
        return Ok(());
    }
    Err(format!("{applied} of {} acks were confirmed", meter.total()).into())
}
