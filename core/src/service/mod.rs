//! Services: named sets of handlers that start, drain and stop together.

mod conclude;
mod config;
mod lanes;
mod pump;
mod running;
pub(crate) mod worker;

pub use config::SubscriptionConfig;
pub use running::{Drained, Running, Stats};

use crate::handler::{Args, EventInfo, Handler, IntoOutcome, Route, Routed, Scope, Setup, States};
use crate::transport::{Acker, SubscriptionSpec, Topology};
use crate::{Bus, Error, ErrorKind, Result, RetryMode, SubscriptionName, Text};
use lanes::{Job, JobId, Lanes};
use parking_lot::Mutex;
use running::Counters;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::Notify;

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
    drain: Duration,
}

impl Service {
    /// A service without handlers. Its name is part of the names of its subscriptions: it must not change between
    /// deployments.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), states: States::default(), routes: Vec::new(), drain: DRAIN }
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
        let subscriptions = self.plan(bus)?.into_iter().map(|planned| planned.spec).collect();
        bus.transport().provision(&Topology { topics: Vec::new(), subscriptions }).await
    }

    /// Starts all handlers; when it returns, every subscription exists and reads.
    ///
    /// # Errors
    /// Everything is checked before anything starts: [`ErrorKind::InvalidName`], [`ErrorKind::Duplicate`] for two handlers
    /// of one type in one subscription, [`ErrorKind::Missing`] for a state that was not given, [`ErrorKind::Config`],
    /// and [`ErrorKind::Unsupported`] for what this transport cannot keep. Then whatever the broker refuses.
    pub async fn start(self, bus: &Bus) -> Result<Running> {
        let planned = self.plan(bus)?;
        let source = Text::from(format!("/{}", self.name));
        let scope = Arc::new(Scope { states: self.states, bus: bus.clone() });
        let mut running = Running::new();
        for planned in planned {
            let subscription = bus.transport().subscribe(planned.spec.clone()).await?;
            running.spawn(Arc::new(Subscribed::new(planned, Arc::clone(&scope), source.clone())), subscription);
        }
        Ok(running)
    }

    /// Groups the handlers into subscriptions and checks everything that can be checked offline.
    fn plan(&self, bus: &Bus) -> Result<Vec<Planned>> {
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
        groups.into_iter().map(|group| group.plan(bus).map_err(here)).collect()
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

    fn plan(self, bus: &Bus) -> Result<Planned> {
        let config = self.config.cloned().unwrap_or_default();
        let events: Vec<EventInfo> = self.routes.iter().filter_map(|route| route.accepts().event).collect();
        let spec = config.spec(&self.name, &events)?;
        let transport = bus.transport();
        let about = |error: Error| error.with_context("subscription", &self.name);
        config.check(&spec, transport.capabilities(), transport.name()).map_err(about)?;
        Ok(Planned { spec, config, routes: self.routes.into_iter().cloned().collect() })
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
    routes: Vec<Arc<dyn Route>>,
    scope: Arc<Scope>,
    lanes: Mutex<Lanes>,
    /// By route: there is something to run.
    ready: Vec<Notify>,
    /// There is room again, or a hold has changed.
    pump: Notify,
    counters: Counters,
}

impl Subscribed {
    fn new(planned: Planned, scope: Arc<Scope>, source: Text) -> Self {
        let Planned { spec, config, routes } = planned;
        Self {
            source,
            retry_mode: config.retry_mode(spec.ordering),
            scope,
            lanes: Mutex::new(Lanes::new(spec.ordering, config.max_in_flight, routes.len())),
            ready: routes.iter().map(|_| Notify::new()).collect(),
            pump: Notify::new(),
            counters: Counters::default(),
            name: spec.name,
            routes,
            config,
        }
    }

    /// Changes the lanes, then wakes a worker of each route that has something to do.
    fn with_lanes<R>(&self, change: impl FnOnce(&mut Lanes) -> R) -> R {
        let mut lanes = self.lanes.lock();
        let result = change(&mut lanes);
        let may_start = lanes.running() < self.config.concurrency;
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

    /// Ends a running job in the lanes, and tells the pump when it should read again.
    fn finish(&self, id: JobId) -> Option<Acker> {
        let (successor, should_read) = self.with_lanes(|lanes| (lanes.finish(id), lanes.should_read()));
        if should_read {
            self.pump.notify_one();
        }
        successor
    }

    /// The event was handled.
    fn ack(&self, job: Job) {
        self.counters.handled.fetch_add(1, Relaxed);
        self.ack_failed(job);
    }

    /// The event was not handled, but what replaces it is durable.
    fn ack_failed(&self, job: Job) {
        let successor = self.finish(job.id);
        successor.unwrap_or(job.delivery.acker).ack();
    }

    fn stats(&self) -> Stats {
        let (in_flight, running) = {
            let lanes = self.lanes.lock();
            (lanes.len(), lanes.running())
        };
        self.counters.snapshot(in_flight, running)
    }
}
