//! Consuming, by the transport and by handlers, which may be slow, fail, or be timed.

use crate::Result;
use crate::broker::Broker;
use crate::event::{self, Plain, Sample, handle};
use crate::measure::Meter;
use crate::publish::{message, publish_all, publish_each};
use crate::scenario::{LIMITS, Loop, provisioned};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;
use tidings::handler::{Attempt, State};
use tidings::transport::{
    Destination, Ordering, Polled, Start, SubscriptionSpec, TopicSpec, Topology, Transport, submit_and_wait,
};
use tidings::{Bus, Event, HandlerError, RetryPolicy, Service, SubscriptionConfig, SubscriptionName, Topic};
use tokio::time::Instant;

/// The subscription of the transport's loop, and of raw loops where there is no log.
pub const POLLED: &str = "bench.polled";
/// How long a slow handler takes.
pub const SLOW: Duration = Duration::from_millis(10);
/// The least time from a failure to the next run.
pub const BACKOFF: Duration = Duration::from_millis(1);
/// Between two events where the time from one end to the other is measured.
pub const EVERY: Duration = Duration::from_millis(5);

/// What becomes of each event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Handled,
    /// Another event is returned, which is published before it is settled.
    Answered,
    /// It fails once, and comes again as a copy.
    Aside,
    /// It fails once, and is held.
    InOrder,
    DeadLettered,
}

impl Fate {
    fn policy(self) -> RetryPolicy {
        let policy = RetryPolicy::default().backoff(BACKOFF, BACKOFF).without_jitter();
        match self {
            Self::Handled | Self::Answered | Self::InOrder => policy.in_order(),
            Self::Aside => policy.aside(),
            Self::DeadLettered => RetryPolicy::none(),
        }
    }

    /// Whether the run of this number fails.
    fn fails(self, attempt: u32) -> bool {
        match self {
            Self::Handled | Self::Answered => false,
            Self::Aside | Self::InOrder => attempt == 1,
            Self::DeadLettered => true,
        }
    }

    /// How many deliveries are settled for one event: a copy is one too.
    fn settled(self) -> u64 {
        if self == Self::Aside { 2 } else { 1 }
    }
}

/// How events are handled.
#[derive(Clone, Copy, Debug)]
pub struct How {
    pub ordering: Ordering,
    pub workers: usize,
    /// How long each run takes.
    pub takes: Duration,
    /// Without one, handlers cannot fail.
    pub fate: Option<Fate>,
    /// The most that are read and not settled.
    pub in_flight: usize,
}

impl Default for How {
    fn default() -> Self {
        Self { ordering: Ordering::None, workers: 1, takes: Duration::ZERO, fate: None, in_flight: LIMITS.in_flight }
    }
}

impl How {
    /// As this loop does it.
    fn of(self, of: Loop) -> Self {
        match of {
            Loop::Slow(workers) => Self { workers, takes: SLOW, ..self },
            Loop::Failing(fate) => Self { fate: Some(fate), ..self },
            _ => self,
        }
    }
}

pub(crate) async fn consume<B: Broker, E: Sample>(
    broker: &B,
    of: Loop,
    namespace: &str,
    meter: &Arc<Meter>,
    how: How,
) -> Result<()> {
    let (transport, bus) = provisioned::<B, E>(broker, namespace).await?;
    let filled = Meter::new(0, meter.total());
    let how = How { in_flight: B::IN_FLIGHT, ..how.of(of) };
    if let Some(Fate::Answered | Fate::Aside) = how.fate {
        // Somebody waits for the answers, as for all events.
        let topics = vec![TopicSpec::new(Topic::new(Plain::TOPIC)?)];
        transport.provision(&Topology { topics, subscriptions: Vec::new() }).await?;
        prepare::<Plain>(&transport, Ordering::None, how.in_flight).await?;
    }
    if how.fate == Some(Fate::Aside) && start(&transport) == Start::New {
        // The first delay in a namespace may have to create what all need.
        let (to, topic) = (Destination::Subscription(SubscriptionName::new(POLLED)?), Topic::new(Plain::TOPIC)?);
        let delayed = (to, message::<Plain>(0, &topic)?, Some(BACKOFF), false);
        if let Some((_, failure)) = submit_and_wait(&*transport.publisher(), &[delayed]).await.pop() {
            return Err(failure.error.into());
        }
    }
    match of {
        Loop::Raw(_) | Loop::Transport => prepare::<E>(&transport, how.ordering, how.in_flight).await?,
        _ if start(&transport) == Start::New => service::<E>(&transport, meter, how).provision(&bus).await?,
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
        Loop::Transport => poll::<E>(&transport, meter, how).await?,
        _ => {
            let settled = how.fate.map_or(1, Fate::settled);
            serve(&bus, service::<E>(&transport, meter, how), meter, settled).await?;
        }
    }
    Ok(bus.close(Duration::from_secs(5)).await?)
}

/// One event at a time, from being made to being handled.
pub(crate) async fn round_trip<B: Broker>(broker: &B, of: Loop, namespace: &str, meter: &Arc<Meter>) -> Result<()> {
    let (transport, bus) = provisioned::<B, event::Timed>(broker, namespace).await?;
    let (limits, sent) = (crate::broker::Limits { window: 1, ..LIMITS }, Arc::new(Meter::paced(meter, EVERY)));
    if let Loop::Raw(_) = of {
        prepare::<event::Timed>(&transport, Ordering::None, limits.in_flight).await?;
        broker.round_trip::<event::Timed>(namespace, limits, &sent, meter).await?;
    } else {
        let service = service::<event::Timed>(&transport, meter, How::default());
        service.provision(&bus).await?;
        let publish = publish_each::<event::Timed>(&bus, &sent, limits.window);
        tokio::try_join!(publish, serve(&bus, service, meter, 1))?;
    }
    Ok(bus.close(Duration::from_secs(5)).await?)
}

/// What the transport's loop reads.
pub(crate) fn polled<E: Sample>(
    transport: &Arc<dyn Transport>,
    ordering: Ordering,
    in_flight: usize,
) -> Result<SubscriptionSpec> {
    Ok(SubscriptionSpec {
        name: SubscriptionName::new(POLLED)?,
        topics: vec![Topic::new(E::TOPIC)?.into()],
        ordering,
        start: start(transport),
        max_in_flight: in_flight,
        max_hold: Duration::MAX,
    })
}

/// Where there is a log the beginning, else what is published once the subscription exists.
fn start(transport: &Arc<dyn Transport>) -> Start {
    if transport.capabilities().start_beginning { Start::Beginning } else { Start::New }
}

/// Where there is no log, a queue has to be there before anything is published.
pub(crate) async fn prepare<E: Sample>(
    transport: &Arc<dyn Transport>,
    ordering: Ordering,
    in_flight: usize,
) -> Result<()> {
    if start(transport) == Start::New {
        let subscriptions = vec![polled::<E>(transport, ordering, in_flight)?];
        transport.provision(&Topology { topics: Vec::new(), subscriptions }).await?;
    }
    Ok(())
}

async fn poll<E: Sample>(transport: &Arc<dyn Transport>, meter: &Meter, how: How) -> Result<()> {
    let mut subscription = transport.subscribe(polled::<E>(transport, how.ordering, how.in_flight)?).await?;
    let mut polled = Polled::default();
    let mut more = true;
    while more {
        poll_fn(|cx| subscription.poll_batch(cx, how.in_flight, &mut polled)).await?;
        polled.notices.clear();
        for delivery in polled.deliveries.drain(..) {
            handle::<E>(&delivery.message.payload, meter)?;
            delivery.acker.ack();
            more = meter.tick();
        }
    }
    check_settled(meter.total(), subscription.close(Instant::now() + Duration::from_secs(10)).await.applied)
}

pub(crate) fn service<E: Sample>(transport: &Arc<dyn Transport>, meter: &Arc<Meter>, how: How) -> Service {
    let config = SubscriptionConfig::default().concurrency(how.workers).max_in_flight(how.in_flight);
    let config = config.ordering(how.ordering).start(start(transport));
    let service = Service::new("bench");
    match how.fate {
        None => service.state((Arc::clone(meter), how.takes)).on_with(config, handled::<E>),
        Some(fate) => {
            // None of the failures is the fault of what the handler calls.
            let config = config.retry(fate.policy()).without_outage();
            service.state((Arc::clone(meter), fate)).on_with(config, failing::<E>)
        }
    }
}

/// Until all are handled, and each delivery settled: so many for each event.
pub(crate) async fn serve(bus: &Bus, service: Service, meter: &Arc<Meter>, settled: u64) -> Result<()> {
    let running = service.start(bus).await?;
    meter.over().await;
    check_settled(meter.total() * settled, running.drain(Duration::from_secs(10)).await.flushed.applied)
}

async fn handled<E: Sample>(event: E, State((meter, takes)): State<(Arc<Meter>, Duration)>) {
    event::handled(&event, &meter);
    drop(event);
    if !takes.is_zero() {
        tokio::time::sleep(takes).await;
    }
    meter.tick();
}

async fn failing<E: Sample>(
    event: E,
    Attempt(attempt): Attempt,
    State((meter, fate)): State<(Arc<Meter>, Fate)>,
) -> Result<Option<Plain>, HandlerError> {
    meter.begin();
    event::handled(&event, &meter);
    let fails = fate.fails(attempt);
    if !fails || fate == Fate::DeadLettered {
        meter.tick();
    }
    if fails { Err("as it should".into()) } else { Ok((fate == Fate::Answered).then(|| Plain::new(0))) }
}

/// So many deliveries were settled as the broker does it, which need not confirm it.
pub(crate) fn check_settled(deliveries: u64, applied: u64) -> Result<()> {
    if applied == deliveries {
        return Ok(());
    }
    Err(format!("{applied} of {deliveries} deliveries were settled").into())
}
