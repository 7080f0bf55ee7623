//! One run of the simulation: a broker, instances that come and go, an application that publishes.

use super::checker;
use super::faults::{Connection, Faults, Faulty};
use super::history::{Entry, History, What, timeline};
use super::plan::{Action, Ev, Plan, ms};
use super::service::{self, NAME, Step};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tidings::memory::{MemoryBroker, MemoryConfig, MemoryTransport};
use tidings::prelude::*;
use tidings::transport::{DeadLetter, TopicSpec, Topology, Transport};
use tidings::{BusConfig, Running, SubscriptionName, Topic};
use tidings_core::Clock;
use tidings_testing::wrap::Wrapped;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

/// By when all must be settled after all is calm, in virtual time.
const QUIET: Duration = Duration::from_secs(6 * 3600);

/// What one seed came to.
pub struct Report {
    seed: u64,
    wrong: Vec<String>,
    plan: Arc<Plan>,
    entries: Vec<Entry>,
}

/// What the checks need beside the history.
pub(crate) struct End {
    pub(crate) letters: Vec<DeadLetter>,
    /// What is stored, and settled, and dead, in bytes.
    pub(crate) stored: (usize, usize, usize),
    pub(crate) in_flight: usize,
}

struct Instance {
    by: usize,
    running: Running,
    bus: Bus,
    connection: Arc<Connection>,
}

struct World {
    history: Arc<History>,
    faults: Arc<Faults>,
    config: MemoryConfig,
    clock: Clock,
    keeps: Arc<MemoryTransport>,
    instances: Vec<Instance>,
    started: usize,
    drains: JoinSet<()>,
}

/// Runs one seed.
///
/// # Panics
/// If the runtime cannot be built.
#[must_use]
pub fn run(seed: u64) -> Report {
    fastrand::seed(seed);
    let plan = Arc::new(Plan::new(seed));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let (entries, wrong) = runtime.expect("a runtime").block_on(async {
        let world = World::new(Arc::clone(&plan)).await;
        world.run().await
    });
    Report { seed, wrong, plan, entries }
}

impl World {
    async fn new(plan: Arc<Plan>) -> Self {
        // Brokers of one name are one: so each run has one of its own.
        static RUNS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let run = RUNS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let config = MemoryConfig {
            redelivery_delay: plan.redelivery_delay,
            retain: 0,
            ..MemoryConfig::named(format!("sim-{run}"))
        };
        let keeps = MemoryTransport::connect(config.clone()).expect("memory connects");
        let topics = vec![TopicSpec { slots: plan.slots, ..TopicSpec::new(Topic::new("sim.step").expect("a topic")) }];
        let topology = Topology { topics, subscriptions: Vec::new() };
        keeps.provision(&topology).await.expect("memory provisions");
        let history = History::new(plan);
        let faults = Faults::new(Arc::clone(&history));
        let clock = Clock::of_tokio();
        Self { history, faults, config, clock, keeps, instances: Vec::new(), started: 0, drains: JoinSet::new() }
    }

    fn connect(&self, by: Option<usize>) -> (Bus, Arc<Connection>) {
        let transport = MemoryTransport::connect(self.config.clone()).expect("memory connects");
        let connection = Connection::new(&self.faults, by);
        let wrapped = Wrapped::new(transport, Arc::new(Faulty(Arc::clone(&connection))));
        let config = BusConfig { publish_timeout_ms: 2_000, ..BusConfig::default() };
        (Bus::with_clock(wrapped, config, self.clock).expect("the defaults are fine"), connection)
    }

    async fn run(mut self) -> (Vec<Entry>, Vec<String>) {
        let plan = Arc::clone(&self.history.plan);
        self.start().await;
        if plan.seed.is_multiple_of(2) {
            self.start().await;
        }
        let publishing = self.publish();
        let start = tokio::time::Instant::now();
        for (at, action) in &plan.actions {
            self.until(start + *at).await;
            self.act(*action).await;
        }
        self.until(start + plan.calm()).await;
        self.history.say("all is calm");
        self.faults.end();
        if self.instances.is_empty() {
            self.start().await;
        }
        publishing.join_all().await;
        let end = self.settle_down().await;
        let (entries, mut wrong) = self.history.take();
        wrong.extend(checker::check(&plan, &entries, &end));
        (entries, wrong)
    }

    /// Waits, and looks at the limits meanwhile.
    async fn until(&self, then: tokio::time::Instant) {
        let mut pace = ms(100);
        while tokio::time::Instant::now() < then && !self.history.is_too_long() {
            sleep_until(then.min(tokio::time::Instant::now() + pace)).await;
            pace = (pace * 2).min(Duration::from_secs(60));
            for instance in &self.instances {
                for (_, stats) in instance.running.stats() {
                    if stats.in_flight > self.history.plan.max_in_flight {
                        self.history.wrong(&format!("instance {} has {} in flight", instance.by, stats.in_flight));
                    }
                }
            }
        }
    }

    fn publish(&self) -> JoinSet<()> {
        let (bus, _) = self.connect(None);
        let plan = &self.history.plan;
        let keys = plan.events.iter().map(|event| event.key).max().unwrap_or(0);
        let mut publishing = JoinSet::new();
        for key in 0..=keys {
            let events: Vec<Ev> = (0..plan.events.len()).filter(|ev| plan.events[*ev].key == key).collect();
            let (bus, history) = (bus.clone(), Arc::clone(&self.history));
            publishing.spawn(async move {
                let start = tokio::time::Instant::now();
                let at = |ev: &Ev| history.plan.events[*ev].at;
                for together in events.chunk_by(|one, other| at(one) == at(other)) {
                    sleep_until(start + at(&together[0])).await;
                    let sent = together.iter().map(|ev| publish_one(&bus, &history, *ev));
                    for (ev, confirmed) in together.iter().zip(futures_util::future::join_all(sent).await) {
                        history.add(What::Published { ev: *ev, confirmed });
                    }
                }
            });
        }
        publishing
    }

    async fn start(&mut self) {
        let by = self.started;
        self.started += 1;
        let (bus, connection) = self.connect(Some(by));
        self.history.listen(by, bus.events());
        self.history.say(format!("[{by}] starts"));
        let running = service::start(&bus, by, &self.history).await.expect("the service starts");
        self.instances.push(Instance { by, running, bus, connection });
    }

    async fn act(&mut self, action: Action) {
        let at = match action {
            Action::Start if self.instances.len() < 3 => return self.start().await,
            Action::Start => return,
            Action::LoseLeases => {
                self.history.say("all leases are lost");
                let name = SubscriptionName::new(NAME).expect("a name");
                return native(&*self.keeps).lose_leases(&name).expect("it exists");
            }
            Action::Kill(at) | Action::Drop(at) | Action::Drain(at, _) | Action::Cut(at) | Action::LoseSome(at) => at,
        };
        if at >= self.instances.len() {
            return;
        }
        if matches!(action, Action::LoseSome(_)) && self.history.plan.ordering == Ordering::None {
            self.history.say(format!("[{}] loses some leases", self.instances[at].by));
            return self.instances[at].connection.lose_some();
        }
        if let Action::Cut(_) | Action::LoseSome(_) = action {
            self.history.say(format!("[{}] is cut off", self.instances[at].by));
            return native(&**self.instances[at].bus.transport()).cut();
        }
        let Instance { by, running, bus, connection } = self.instances.remove(at);
        let history = Arc::clone(&self.history);
        match action {
            Action::Drain(_, deadline) => {
                history.say(format!("[{by}] is to drain within {deadline:?}"));
                history.add(What::Stopped { by, how: "draining" });
                self.drains.spawn(async move {
                    let drained = running.drain(deadline).await;
                    history.say(format!("[{by}] has drained: {drained:?}"));
                    drop(bus);
                });
            }
            Action::Kill(_) => {
                history.add(What::Stopped { by, how: "killed" });
                history.died(by);
                connection.kill();
            }
            _ => {
                history.add(What::Stopped { by, how: "dropped" });
                history.died(by);
            }
        }
    }

    /// Waits for everything to be settled.
    async fn settle_down(&mut self) -> End {
        let from = tokio::time::Instant::now();
        let mut pause = ms(200);
        loop {
            self.until(tokio::time::Instant::now() + pause).await;
            let end = self.end().await;
            let (stored, retained, dead) = end.stored;
            let done = end.in_flight == 0 && stored == retained + dead && self.drains.is_empty();
            if done || from.elapsed() > QUIET || self.history.is_too_long() {
                return end;
            }
            while self.drains.try_join_next().is_some() {}
            pause = (pause * 2).min(Duration::from_secs(300));
        }
    }

    async fn end(&self) -> End {
        let name = SubscriptionName::new(NAME).expect("a name");
        let letters = self.keeps.dead_letters(&name).await.expect("dead letters open");
        let letters = letters.page(None, 100_000).await.expect("dead letters can be read");
        let dead = letters.iter().map(|letter| letter.message.size()).sum();
        let stats = native(&*self.keeps).stats();
        let in_flight = |instance: &Instance| instance.running.stats().map(|(_, s)| s.in_flight).sum::<usize>();
        End {
            letters,
            stored: (stats.stored, stats.retained, dead),
            in_flight: self.instances.iter().map(in_flight).sum(),
        }
    }
}

fn native(transport: &dyn Transport) -> &MemoryBroker {
    transport.native().downcast_ref().expect("memory")
}

/// Whether it was confirmed.
async fn publish_one(bus: &Bus, history: &History, ev: Ev) -> bool {
    let event = &history.plan.events[ev];
    let key = format!("k{}", event.key);
    if event.bad {
        let topic = Topic::new("sim.step").expect("a topic");
        let message = tidings::Message::new(event.name.as_str().into(), "/app", "sim.step", topic)
            .with_payload("application/json", "{")
            .with_key(key);
        return bus.publish_raw(message).await.is_ok();
    }
    let options = PublishOptions::default().with_id(event.name.as_str());
    bus.publish_with(&Step { key, name: event.name.clone() }, options).await.is_ok()
}

impl Report {
    /// What was found wrong; nothing, if all promises were kept.
    #[must_use]
    pub fn wrong(&self) -> &[String] {
        &self.wrong
    }

    /// What happened, for a reader.
    #[must_use]
    pub fn timeline(&self) -> String {
        timeline(&self.plan, &self.entries)
    }

    /// How many things happened.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// What is wrong, how to see it again, and the timeline.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.plan.head())?;
        writeln!(f, "{}", self.timeline())?;
        self.wrong.iter().try_for_each(|wrong| writeln!(f, "wrong: {wrong}"))?;
        let seed = self.seed;
        write!(f, "seed {seed}; again: TIDINGS_SIM_SEED={seed} cargo test -p tidings-tests --test simulation")
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report").field("seed", &self.seed).field("wrong", &self.wrong).finish_non_exhaustive()
    }
}
