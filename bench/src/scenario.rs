//! What is measured: each loop of a scenario in turn, several rounds.

use crate::broker::{Broker, Limits, Raw};
use crate::consume::{BACKOFF, EVERY, Fate, How, SLOW, consume, round_trip};
use crate::event::{Keyed, Large, Packed, Plain, Sample};
use crate::measure::{Memory, Meter, Sample as Measured};
use crate::publish::publish;
use crate::through::{self, ACKED, ACKED_BATCHES, ACKED_TYPED, BATCH, Through};
use crate::{BoxError, Result};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings::transport::{Ordering, TopicSpec, Topology, Transport};
use tidings::{Bus, BusConfig, Topic};

pub const SOURCE: &str = "/bench";
pub const LIMITS: Limits = Limits { window: 1_000, in_flight: 512 };
/// A loop that takes longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

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
    /// Handlers that may fail, or return something.
    Failing(Fate),
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
            Self::Failing(Fate::Handled) => "SDK, handled at once",
            Self::Failing(Fate::Answered) => "SDK, answered",
            Self::Failing(Fate::InOrder) => "SDK, retried in order",
            Self::Failing(Fate::Aside) => "SDK, retried aside",
            Self::Failing(Fate::DeadLettered) => "SDK, dead-lettered",
        }
    }
}

/// What was measured of one loop, by round.
#[derive(Clone, Debug)]
pub struct Row {
    pub of: Loop,
    pub rounds: Vec<Measured>,
    /// What it allocates, once another process has counted it.
    pub memory: Option<Memory>,
}

/// What was measured in one scenario. The first row is what the others are compared with.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: &'static str,
    pub what: String,
    pub effort: Effort,
    pub rows: Vec<Row>,
}

/// What is to be measured.
struct Plan {
    name: &'static str,
    what: String,
    scenario: Scenario,
    loops: Vec<Loop>,
}

/// All scenarios whose name has `only` in it, of each the loops whose name has `of` in it.
///
/// # Errors
/// A loop failed, or took too long.
pub async fn all<B: Broker>(broker: &B, effort: Effort, only: &str, of: &str) -> Result<Vec<Table>> {
    let mut tables = Vec::new();
    let plans = publishing::<B>().into_iter().chain(consuming::<B>()).chain(at_once::<B>());
    for Plan { name, what, scenario, mut loops } in plans.filter(|plan| plan.name.contains(only)) {
        loops.retain(|one| one.name().contains(of));
        let effort = scenario.effort(effort);
        tables.push(Table { name, what, effort, rows: rounds(broker, scenario, &loops, effort).await? });
    }
    Ok(tables)
}

fn publishing<B: Broker>() -> Vec<Plan> {
    let raw = || B::PUBLISH.iter().copied().map(Loop::Raw);
    let all = || raw().chain([Loop::Transport, Loop::Sdk, Loop::All]).collect::<Vec<_>>();
    let first = || raw().take(1).chain([Loop::Sdk, Loop::All]).collect::<Vec<_>>();
    let window = LIMITS.window;
    vec![
        Plan {
            name: "publish, confirmed",
            what: format!("Each confirmed, at most {window} unconfirmed at a time; encoded from a struct; no key."),
            scenario: Scenario::Publish,
            loops: all(),
        },
        Plan {
            name: "publish, confirmed, 4 KiB",
            what: "The same with payloads of 4,096 bytes.".into(),
            scenario: Scenario::PublishLarge,
            loops: first(),
        },
        Plan {
            name: "publish, confirmed, MessagePack",
            what: "The same with 256 bytes of MessagePack.".into(),
            scenario: Scenario::PublishPacked,
            loops: first(),
        },
        Plan {
            name: "publish, confirmed, with keys",
            what: "JSON with 500 keys in turn. The SDK keeps the order of a key also when it repeats a publish, so of each key one \
                is unconfirmed at a time, and at most 500 are, where the broker does not repeat in order by itself; no raw client \
                promises that."
                .into(),
            scenario: Scenario::PublishKeyed,
            loops: all(),
        },
        Plan {
            name: "publish, one at a time",
            what: "The next is sent when the one before is confirmed; no key.".into(),
            scenario: Scenario::PublishOne,
            loops: raw().chain([Loop::Sdk]).collect(),
        },
    ]
}

fn consuming<B: Broker>() -> Vec<Plan> {
    let raw = || B::CONSUME.iter().copied().map(Loop::Raw);
    let all = || raw().chain([Loop::Transport, Loop::Sdk]).collect::<Vec<_>>();
    let first = || raw().take(1).chain([Loop::Sdk]).collect::<Vec<_>>();
    let (open, settled) = (B::IN_FLIGHT, B::SETTLED);
    vec![
        Plan {
            name: "consume",
            what: format!("Decoded into a struct, then {settled}; at most {open} read and not settled; no order, 1 worker."),
            scenario: Scenario::Consume,
            loops: all(),
        },
        Plan {
            name: "consume, 4 KiB",
            what: "The same with payloads of 4,096 bytes.".into(),
            scenario: Scenario::ConsumeLarge,
            loops: first(),
        },
        Plan {
            name: "consume, MessagePack",
            what: "The same with 256 bytes of MessagePack.".into(),
            scenario: Scenario::ConsumePacked,
            loops: first(),
        },
        Plan {
            name: "consume by key",
            what: "JSON with 500 keys, of which each keeps its order, and 16 workers. The raw loop keeps the order by handling one \
                message after another."
                .into(),
            scenario: Scenario::ConsumeKeyed,
            loops: all(),
        },
        Plan {
            name: "consume by slow handlers",
            what: format!("Each waits for {SLOW:?}; 64 of them compared with one, which should be 64 times as fast."),
            scenario: Scenario::Slow,
            loops: vec![Loop::Slow(1), Loop::Slow(64)],
        },
        Plan {
            name: "answers and failures",
            what: format!(
                "500 keys and 16 workers. Each event has its handler return another, which is confirmed; or fails once, and is retried after \
                 {BACKOFF:?}, held in its order or aside as a confirmed copy; or its one failure makes it a dead letter, which is confirmed. From the \
                 first run on. Compared with the same handler when it neither returns anything nor fails: no native client does this, so nothing is raw here."
            ),
            scenario: Scenario::Failures,
            loops: [Fate::Handled, Fate::Answered, Fate::InOrder, Fate::Aside, Fate::DeadLettered].map(Loop::Failing).into(),
        },
    ]
}

/// Publishing and consuming at the same time.
fn at_once<B: Broker>() -> Vec<Plan> {
    let round_trip = Plan {
        name: "round trip",
        what: format!(
            "From when an event is made to when it was decoded for its handler: one at a time, {EVERY:?} after the one before, \
             published and consumed by one process. Goal: an added p50 of at most 50 us."
        ),
        scenario: Scenario::RoundTrip,
        loops: B::PUBLISH.iter().copied().take(1).map(Loop::Raw).chain([Loop::Sdk]).collect(),
    };
    let mut plans = vec![round_trip];
    if B::IN_PROCESS {
        plans.extend([false, true].into_iter().flat_map(passing));
    }
    plans
}

/// One task publishes, another consumes, on the runtime of this process or on one of one thread.
fn passing(one_thread: bool) -> [Plan; 3] {
    let [each, batches, typed] = if one_thread {
        ["pass on, one thread", "pass on in batches, one thread", "pass on to a handler, one thread"]
    } else {
        ["pass on", "pass on in batches", "pass on to a handler"]
    };
    let runtime = if one_thread { "On tokio's current-thread runtime" } else { "On tokio's multi-thread runtime" };
    let open = LIMITS.in_flight;
    let scenario = |batch| Scenario::Through(Through { batch, one_thread });
    [
        Plan {
            name: each,
            what: format!(
                "{runtime}, one task publishes one message after another, another takes and acks them; at most {open} are not \
                 acked, and nothing is kept longer. 256 bytes that are ready, no codec. The transport's reader takes what there is, \
                 up to {BATCH}. Goal: at least 0.94."
            ),
            scenario: scenario(1),
            loops: vec![Loop::Raw(ACKED), Loop::Transport],
        },
        Plan {
            name: batches,
            what: format!("{runtime}, the same in batches of {BATCH}. Goal: at least 0.4."),
            scenario: scenario(BATCH),
            loops: vec![Loop::Raw(ACKED_BATCHES), Loop::Transport],
        },
        Plan {
            name: typed,
            what: format!("{runtime}, from `Bus::publish` to a typed handler, both with JSON; 1 worker, no order."),
            scenario: scenario(1),
            loops: vec![Loop::Raw(ACKED_TYPED), Loop::Sdk],
        },
    ]
}

#[derive(Clone, Copy, Debug)]
enum Scenario {
    Publish,
    PublishLarge,
    PublishPacked,
    PublishKeyed,
    PublishOne,
    Consume,
    ConsumeLarge,
    ConsumePacked,
    ConsumeKeyed,
    Slow,
    Failures,
    RoundTrip,
    Through(Through),
}

impl Scenario {
    /// A part of the effort, where one event takes long or fewer say enough; more, where they take nothing.
    fn effort(self, effort: Effort) -> Effort {
        let Effort { rounds, warm_up, count } = effort;
        let part = |part: u64| Effort { warm_up: (warm_up / part).max(1), count: (count / part).max(1), rounds };
        match self {
            Self::PublishLarge | Self::PublishPacked | Self::ConsumeLarge | Self::ConsumePacked => part(2),
            Self::PublishOne => part(10),
            // Copies queue up behind all that is there: a warm-up by events handled would end after most of the work.
            Self::Failures => Effort { warm_up: 0, ..part(10) },
            // All handlers, several times over.
            Self::Slow => Effort { rounds: rounds.min(3), warm_up: 64, count: 64 * (count / 4_000).max(1) },
            Self::RoundTrip => Effort { rounds: rounds.min(5), ..part(80) },
            Self::Through(_) => Effort { count: count * 10, ..effort },
            _ => effort,
        }
    }
}

/// All loops in turn, in each round beginning with another.
async fn rounds<B: Broker>(broker: &B, scenario: Scenario, loops: &[Loop], effort: Effort) -> Result<Vec<Row>> {
    let mut rows: Vec<_> = loops.iter().map(|of| Row { of: *of, rounds: Vec::new(), memory: None }).collect();
    for round in 0..effort.rounds {
        for turn in 0..rows.len() {
            let row = (turn + round) % rows.len();
            let namespace = format!("b{round}-{row}-{:x}", fresh());
            let of = rows[row].of;
            let meter = Arc::new(Meter::new(effort.warm_up, effort.count));
            let run = run(broker, scenario, of, &namespace, &meter);
            let ran = tokio::time::timeout(PATIENCE, run).await.unwrap_or_else(|_| Err("no end".into()));
            ran.map_err(|why| BoxError::from(format!("{scenario:?}, {}: {why}", of.name())))?;
            broker.clean_up().await?;
            let measured = meter.sample().ok_or("the loop ended before its last event")?;
            let (speed, cpu) = (measured.per_second(), measured.cpu_micros());
            eprintln!("{scenario:?}, round {}, {}: {speed:.0}/s, {cpu:.2} us", round + 1, of.name());
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
    let keyed = How { ordering: Ordering::Key, workers: 16, ..How::default() };
    match scenario {
        Scenario::Publish => publish::<B, Plain>(broker, of, namespace, meter, LIMITS).await,
        Scenario::PublishLarge => publish::<B, Large>(broker, of, namespace, meter, LIMITS).await,
        Scenario::PublishPacked => publish::<B, Packed>(broker, of, namespace, meter, LIMITS).await,
        Scenario::PublishKeyed => publish::<B, Keyed>(broker, of, namespace, meter, LIMITS).await,
        Scenario::PublishOne => publish::<B, Plain>(broker, of, namespace, meter, Limits { window: 1, ..LIMITS }).await,
        Scenario::Consume | Scenario::Slow => consume::<B, Plain>(broker, of, namespace, meter, How::default()).await,
        Scenario::ConsumeLarge => consume::<B, Large>(broker, of, namespace, meter, How::default()).await,
        Scenario::ConsumePacked => consume::<B, Packed>(broker, of, namespace, meter, How::default()).await,
        Scenario::ConsumeKeyed | Scenario::Failures => consume::<B, Keyed>(broker, of, namespace, meter, keyed).await,
        Scenario::RoundTrip => round_trip(broker, of, namespace, meter).await,
        Scenario::Through(how) => through::run(of, how, meter).await,
    }
}

/// A transport in this namespace, with a topic, and a bus over it.
pub(crate) async fn provisioned<B: Broker, E: Sample>(
    broker: &B,
    namespace: &str,
) -> Result<(Arc<dyn Transport>, Bus)> {
    let transport = broker.connect(namespace).await?;
    let topics = vec![TopicSpec::new(Topic::new(E::TOPIC)?)];
    transport.provision(&Topology { topics, subscriptions: Vec::new() }).await?;
    let bus = bus(&transport)?;
    Ok((transport, bus))
}

pub(crate) fn bus(transport: &Arc<dyn Transport>) -> Result<Bus> {
    let config = BusConfig { source: SOURCE.into(), max_unconfirmed: LIMITS.window, ..BusConfig::default() };
    Ok(Bus::new(Arc::clone(transport), config)?)
}
