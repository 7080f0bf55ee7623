//! Services: named sets of handlers that start, drain and stop together.

mod conclude;
mod config;
mod crew;
pub(crate) mod lanes;
mod outage;
mod pump;
mod recent;
mod replay;
mod running;
pub(crate) mod worker;

pub use config::{SubscriptionConfig, Unrouted};
pub use outage::OutagePolicy;
pub use running::{Drained, Running, Stats};

use crate::handler::{
    Args, EventInfo, Handler, IntoOutcome, Next, Outputs, Refuse, Request, Route, Routed, Scope, Setup, States, Wrap,
};
use crate::transport::{Acker, Capabilities, Ordering, Role, SubscriptionSpec, Topology};
use crate::{Bus, BusEvent, Capable, Error, ErrorKind, HandlerError, Result, RetryMode, SubscriptionName, Text};
use conclude::Published;
use crew::Crew;
use lanes::{Job, JobId, Lanes};
use outage::{Outage, Told};
use parking_lot::Mutex;
use running::Counters;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::Notify;
use worker::Worker;

/// How long [`Service::run`] lets handlers finish after a signal, unless said otherwise.
const DRAIN: Duration = Duration::from_secs(30);

/// A named set of handlers.
///
/// There is one subscription per topic, named `<service>.<topic>`, in which each handler takes its event's type.
/// Types that no handler takes are acked and counted. Instances of a service with the same name share the work.
///
/// # Examples
///
/// ```
/// # use tidings_core::{Bus, Event, HandlerError, Result, Service};
/// # use tidings_core::handler::State;
/// # #[derive(Clone)] struct Mailer;
/// # impl Mailer { async fn welcome(&self, _: &str) -> std::io::Result<()> { Ok(()) } }
/// # async fn example<SignedUp: Event + AsRef<str> + Sync>(bus: Bus) -> Result<()> {
/// async fn welcome<SignedUp: Event + AsRef<str> + Sync>(user: SignedUp, State(mailer): State<Mailer>) -> Result<(), HandlerError> {
///     Ok(mailer.welcome(user.as_ref()).await?)
/// }
///
/// Service::new("mailing").state(Mailer).on(welcome::<SignedUp>).run(&bus).await
/// # }
/// ```
#[must_use = "a service does nothing until it is started"]
pub struct Service {
    name: String,
    states: States,
    routes: Vec<(Arc<dyn Route>, Option<SubscriptionConfig>)>,
    layers: Vec<Wrap>,
    drain: Duration,
}

impl Service {
    /// A service without handlers. Its name is part of the names of its subscriptions: it must not change between
    /// deployments.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), states: States::default(), routes: Vec::new(), layers: Vec::new(), drain: DRAIN }
    }

    /// Adds a state, of which handlers take a clone as `State<T>`; a second one of the same type takes its place.
    pub fn state<T: Clone + Send + Sync + 'static>(mut self, state: T) -> Self {
        self.states.insert(state);
        self
    }

    /// Adds a handler. What is wrong with it, beside its types, is said by [`start`](Self::start).
    pub fn on<A, H>(mut self, handler: H) -> Self
    where
        A: Args,
        H: Handler<A>,
        H::Out: IntoOutcome,
    {
        self.routes.push((Arc::new(Routed::new(handler)), None));
        self
    }

    /// Adds a handler to a subscription with settings of its own. Handlers of one subscription must agree on them.
    pub fn on_with<A, H>(mut self, config: SubscriptionConfig, handler: H) -> Self
    where
        A: Args,
        H: Handler<A>,
        H::Out: IntoOutcome,
    {
        self.routes.push((Arc::new(Routed::new(handler)), Some(config)));
        self
    }

    /// Wraps all its handlers in a `tower` layer, for tracing, limits or metrics; the first one is the outermost.
    ///
    /// A layer sees each run as a [`Request`](crate::handler::Request) and may fail it; retries and dead letters are around all
    /// layers.
    pub fn layer<L>(mut self, layer: L) -> Self
    where
        L: tower_layer::Layer<Next> + Send + Sync + 'static,
        L::Service:
            tower_service::Service<Request, Response = Outputs, Error = HandlerError> + Clone + Send + Sync + 'static,
        <L::Service as tower_service::Service<Request>>::Future: Send,
    {
        self.layers.push(Next::wrap(layer));
        self
    }

    /// How long [`run`](Self::run) lets handlers finish after a signal. Default: 30 s.
    pub fn drain_within(mut self, deadline: Duration) -> Self {
        self.drain = deadline;
        self
    }

    /// Runs until SIGINT or SIGTERM, then drains.
    ///
    /// # Errors
    /// As [`start`](Self::start); and what ended a subscription for good.
    ///
    /// # Cancel safety
    /// Dropping the future stops the service without draining: what is unsettled will be delivered again.
    pub async fn run(self, bus: &Bus) -> Result<()> {
        let drain = self.drain;
        let mut running = self.start(bus).await?;
        let ended = tokio::select! {
            () = running::signal() => Ok(()),
            error = running.failed() => Err(error),
        };
        running.drain(drain).await;
        ended
    }

    /// Creates its subscriptions without handling anything, so that what is published from then on waits for it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn provision(&self, bus: &Bus) -> Result<()> {
        let planned = self.plan_on(bus)?;
        let subscriptions = planned.into_iter().map(|planned| planned.spec).collect();
        bus.transport().provision(&Topology { topics: Vec::new(), subscriptions }).await
    }

    /// Starts all handlers; when it returns, every subscription exists and reads.
    ///
    /// # Errors
    /// Everything is checked before anything starts: [`ErrorKind::InvalidName`], [`ErrorKind::Duplicate`] for two handlers
    /// of one type in one subscription, [`ErrorKind::Missing`] for a state that was not given, [`ErrorKind::Config`],
    /// and [`ErrorKind::Unsupported`] for what this transport cannot keep. Then whatever the broker refuses.
    pub async fn start(self, bus: &Bus) -> Result<Running> {
        let planned = self.plan_on(bus)?;
        let source = Text::from(format!("/{}", self.name));
        let scope = Arc::new(Scope { states: self.states, bus: bus.clone() });
        let layers = Next::stack(&self.layers);
        let mut running = Running::new();
        for planned in planned {
            let subscription = bus.transport().subscribe(planned.spec.clone()).await?;
            let subscribed =
                Subscribed::new(planned, Arc::clone(&scope), source.clone(), layers.clone(), running.crew());
            running.spawn(Arc::new(subscribed), subscription);
        }
        Ok(running)
    }

    /// Checks, offline, everything that [`start`](Self::start) checks, against what each configured transport can do: for a
    /// test that holds a service to every broker it may be configured for.
    ///
    /// # Errors
    /// As [`start`](Self::start), for the first transport that fails, without what only its broker knows.
    pub fn check(&self, config: &impl Capable) -> Result<()> {
        config.capabilities()?.iter().try_for_each(|(transport, can)| self.plan(transport, can).map(|_| ()))
    }

    fn plan_on(&self, bus: &Bus) -> Result<Vec<Planned>> {
        self.plan(bus.transport().name(), bus.transport().capabilities())
    }

    /// Groups the handlers into subscriptions and checks everything that can be checked offline.
    fn plan(&self, transport: &'static str, capabilities: &Capabilities) -> Result<Vec<Planned>> {
        let here = |error: Error| error.with_operation("start").with_context("service", &self.name);
        SubscriptionName::new(self.name.as_str()).map_err(here)?;
        let mut groups: Vec<Group<'_>> = Vec::new();
        for (route, config) in &self.routes {
            route.check(&Setup { states: &self.states, batch: route.accepts().batch }).map_err(here)?;
            let name = self.name_for(&**route, config.as_ref()).map_err(here)?;
            match groups.iter_mut().find(|group| group.name == name) {
                Some(group) => group.add(route, config.as_ref()).map_err(here)?,
                None => groups.push(Group { name, routes: vec![route], config: config.as_ref() }),
            }
        }
        if groups.is_empty() {
            return Err(here(Error::new(ErrorKind::Config, "a service without handlers; add one with `.on(..)`")));
        }
        groups.into_iter().map(|group| group.plan(transport, capabilities).map_err(here)).collect()
    }

    fn name_for(&self, route: &dyn Route, config: Option<&SubscriptionConfig>) -> Result<SubscriptionName> {
        let given = config.and_then(|config| config.name.as_deref());
        let Some(name) = given.or(route.accepts().event.map(|event| event.topic)) else {
            let why =
                "a handler of raw messages needs a name: `.on_with(SubscriptionConfig::named(..).topics([..]), ..)`";
            return Err(Error::new(ErrorKind::Config, why));
        };
        SubscriptionName::new(format!("{}.{name}", self.name))
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("name", &self.name)
            .field("handlers", &self.routes.len())
            .finish_non_exhaustive()
    }
}

/// Handlers of one subscription.
struct Group<'a> {
    name: SubscriptionName,
    routes: Vec<&'a Arc<dyn Route>>,
    config: Option<&'a SubscriptionConfig>,
}

impl<'a> Group<'a> {
    fn add(&mut self, route: &'a Arc<dyn Route>, config: Option<&'a SubscriptionConfig>) -> Result<()> {
        let about = |kind, why: &'static str| Err(Error::new(kind, why).with_context("subscription", &self.name));
        let event = |route: &Arc<dyn Route>| route.accepts().event.map(|event| event.name);
        if self.routes.iter().any(|r| event(r) == event(route) || event(r).is_none()) || event(route).is_none() {
            let why = "two handlers for one type; name the second: `.on_with(SubscriptionConfig::named(..), ..)`";
            return about(ErrorKind::Duplicate, why);
        }
        match (self.config, config) {
            (Some(one), Some(other)) if one != other => {
                return about(
                    ErrorKind::Config,
                    "handlers of one subscription disagree on its settings; give all the same",
                );
            }
            (one, other) => self.config = one.or(other),
        }
        self.routes.push(route);
        Ok(())
    }

    fn plan(self, transport: &'static str, capabilities: &Capabilities) -> Result<Planned> {
        let config = self.config.cloned().unwrap_or_default();
        let events: Vec<EventInfo> = self.routes.iter().filter_map(|route| route.accepts().event).collect();
        let spec = config.spec(&self.name, &events)?;
        let about = |error: Error| error.with_context("subscription", &self.name);
        config.check(&spec, capabilities, transport).map_err(about)?;
        let mut routes: Vec<Arc<dyn Route>> = self.routes.into_iter().cloned().collect();
        if config.unrouted == Unrouted::DeadLetter {
            routes.push(Arc::new(Refuse));
        }
        Ok(Planned { spec, config, routes })
    }
}

/// A subscription that has been checked and can be opened.
struct Planned {
    spec: SubscriptionSpec,
    config: SubscriptionConfig,
    routes: Vec<Arc<dyn Route>>,
}

/// An open subscription as its pump and its workers share it.
pub(crate) struct Subscribed {
    name: SubscriptionName,
    /// `source` of what its handlers return.
    source: Text,
    config: SubscriptionConfig,
    retry_mode: RetryMode,
    keeps_order: bool,
    /// It is a replay, which ends by itself.
    replays: bool,
    routes: Vec<Arc<dyn Route>>,
    layers: Option<Next>,
    scope: Arc<Scope>,
    lanes: Mutex<Lanes>,
    /// How many runs go on; changed under the lock of the lanes.
    runs: AtomicUsize,
    /// By route: there is something to run.
    ready: Vec<Notify>,
    crew: Arc<Crew>,
    /// By route: how many of its workers do not wait for a confirmation.
    free: Vec<AtomicUsize>,
    /// There is room again, or a hold has changed.
    pump: Notify,
    role: Mutex<Option<Role>>,
    /// Leases were lost.
    pub(crate) leases: Notify,
    counters: Counters,
}

/// What follows from the end of a job.
struct Finished {
    successor: Option<Acker>,
    should_read: bool,
    told: Told,
}

impl Finished {
    fn of(lanes: &mut Lanes, id: JobId, passed: bool) -> Self {
        let told = if passed { lanes.outage.passed() } else { Told::Nothing };
        Self { successor: lanes.finish(id), should_read: lanes.should_read(), told }
    }
}

impl Subscribed {
    fn new(planned: Planned, scope: Arc<Scope>, source: Text, layers: Option<Next>, crew: &Arc<Crew>) -> Self {
        let Planned { spec, config, routes } = planned;
        Self {
            source,
            crew: Arc::clone(crew),
            free: routes.iter().map(|_| AtomicUsize::new(0)).collect(),
            layers,
            retry_mode: config.retry_mode(spec.ordering),
            keeps_order: spec.ordering == Ordering::Key,
            replays: false,
            scope,
            runs: AtomicUsize::new(0),
            lanes: Mutex::new(Lanes::new(
                spec.ordering,
                config.max_in_flight,
                routes.len(),
                Outage::new(config.outage),
            )),
            ready: routes.iter().map(|_| Notify::new()).collect(),
            pump: Notify::new(),
            role: Mutex::new(None),
            leases: Notify::new(),
            counters: Counters::default(),
            name: spec.name,
            routes,
            config,
        }
    }

    /// Adds a worker that runs a handler.
    fn hire(self: &Arc<Self>, route: usize) {
        self.free[route].fetch_add(1, Relaxed);
        self.crew.add(Arc::clone(&self.routes[route]).work(Worker::new(Arc::clone(self), route)));
    }

    /// A worker waits for a confirmation, and does not come back for the next run: another does. There are to be as many as may run; they
    /// stay, so there may come to be one for each event in flight.
    fn relieve(self: &Arc<Self>, route: usize) {
        if self.free[route].fetch_sub(1, Relaxed) <= self.config.concurrency {
            self.hire(route);
        } else {
            self.with_lanes(|_| {});
        }
    }

    /// It waits no more.
    fn relieved(&self, route: usize) {
        self.free[route].fetch_add(1, Relaxed);
    }

    /// Whether one more run may go on.
    fn may_run(&self) -> bool {
        self.runs.load(Relaxed) < self.config.concurrency
    }

    /// A run is over. If there were fewer than may be, nobody was refused one; nor if all are of one handler, which has a
    /// worker for each.
    fn end_turn(&self) {
        if self.runs.fetch_sub(1, Relaxed) == self.config.concurrency && self.routes.len() > 1 {
            self.with_lanes(|_| {});
        }
    }

    /// Changes the lanes, then wakes a worker of each route that has something to do.
    fn with_lanes<R>(&self, change: impl FnOnce(&mut Lanes) -> R) -> R {
        let mut lanes = self.lanes.lock();
        let result = change(&mut lanes);
        let may_start = self.may_run();
        for (route, ready) in self.ready.iter().enumerate() {
            if may_start && lanes.has_ready(route) {
                ready.notify_one();
            }
        }
        result
    }

    /// Which handler takes a type.
    fn route_of(&self, event_type: &str) -> Option<usize> {
        let takes = |route: &Arc<dyn Route>| route.accepts().event.is_none_or(|event| event.name == event_type);
        self.routes.iter().position(takes)
    }

    fn batch_of(&self, route: usize) -> usize {
        if self.routes[route].accepts().batch { self.config.batch } else { 1 }
    }

    /// Ends a running job in the lanes, and tells the pump when it should read again. `passed` says that its handler
    /// did not fail for now.
    fn finish(&self, id: JobId, passed: bool) -> Option<Acker> {
        self.finished(self.with_lanes(|lanes| Finished::of(lanes, id, passed)))
    }

    fn finished(&self, finished: Finished) -> Option<Acker> {
        let Finished { successor, should_read, told } = finished;
        if should_read || told == Told::Over {
            self.pump.notify_one();
        }
        if told == Told::Over {
            self.scope.bus.tell().tell(BusEvent::OutageOver { subscription: self.name.clone() });
        }
        successor
    }

    /// The event was handled: acked if what its handler returned was confirmed, else left to who has the lease.
    fn settle(&self, job: Job, published: Published) {
        if let Published::Nothing = published {
            return self.leave(job);
        }
        self.counters.handled.fetch_add(1, Relaxed);
        self.finish(job.id, true).unwrap_or(job.delivery.acker).ack();
    }

    /// The event was handled, nothing was returned, and its worker comes back at once for what that makes ready: if there is
    /// no other handler, nobody has to be woken.
    fn settle_plain(&self, job: Job) {
        self.counters.handled.fetch_add(1, Relaxed);
        let finish = |lanes: &mut Lanes| Finished::of(lanes, job.id, true);
        let finished = if self.routes.len() == 1 { finish(&mut self.lanes.lock()) } else { self.with_lanes(finish) };
        self.finished(finished).unwrap_or(job.delivery.acker).ack();
    }

    /// The lease was lost: the event is left to who has it, which may be a copy that has come here meanwhile.
    fn leave(&self, job: Job) {
        let (left, should_read) = self.with_lanes(|lanes| (lanes.leave(job), lanes.should_read()));
        if should_read {
            self.pump.notify_one();
        }
        // Where the lease is lost this settles nothing; where it is being revoked, another instance gets it.
        if let Some(job) = left {
            job.give_back();
        }
    }

    /// The event was not handled, but what replaces it is durable.
    fn ack_replaced(&self, job: Job, passed: bool) {
        let successor = self.finish(job.id, passed);
        successor.unwrap_or(job.delivery.acker).ack();
    }

    /// Whether a redelivered copy of a running job has come, so that its result counts although its lease is lost.
    pub(crate) fn has_successor(&self, id: JobId) -> bool {
        self.lanes.lock().has_successor(id)
    }

    fn stats(&self) -> Stats {
        let lanes = self.lanes.lock();
        Stats {
            in_flight: lanes.len(),
            running: lanes.running(),
            outage: lanes.outage.next_probe().is_some(),
            paused: lanes.is_paused(),
            role: self.role.lock().clone(),
            ..self.counters.snapshot()
        }
    }
}
