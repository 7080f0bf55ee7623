//! Services under test, and the bus they run on.

use crate::faults::Faults;
use crate::tracker::{LIMIT, Rest, Tracker};
use crate::watch::{Watch, layer};
use crate::wrap::Wrapped;
use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Duration;
use tidings_core::transport::{BoxFuture, Health, Transport};
use tidings_core::{
    Bus, BusConfig, Clock, Connect, Event, Message, MessageId, PublishOptions, Result, Running, Service,
};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// A test bus that is not connected yet: which broker, which faults, how patient.
///
/// # Examples
///
/// See the [crate's documentation](crate).
#[must_use = "nothing runs until it is started"]
pub struct Harness {
    connecting: BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>>,
    faults: Option<Faults>,
    deadline: Duration,
    real_time: bool,
}

impl Harness {
    /// On a memory broker of its own, with a clock that is stopped.
    #[cfg(feature = "memory")]
    pub fn memory() -> Self {
        Self::on(tidings_memory::MemoryConfig::default())
    }

    /// On the broker that `config` names: `tidings::Config`, or the configuration of a transport. Real time passes, unless
    /// it is the memory transport.
    ///
    /// `tidings::Config::for_test()` takes the broker from `TIDINGS_TEST_URL`, and gives each test a namespace of its own,
    /// which any broker that others use needs: what others publish would be handled, and waited for, too.
    pub fn on(config: impl Connect) -> Self {
        Self { connecting: config.connect(), faults: None, deadline: Duration::from_secs(10), real_time: false }
    }

    /// What goes wrong on purpose. Default: nothing.
    pub fn faults(mut self, faults: Faults) -> Self {
        self.faults = Some(faults);
        self
    }

    /// How long, in real time, what was published may take to settle; then the test fails. Default: 10 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The clock goes on as usual on the memory transport too: for handlers that wait for real sockets or threads, and for
    /// runtimes with more than one thread.
    pub fn real_time(mut self) -> Self {
        self.real_time = true;
        self
    }

    /// Connects, and starts these services as they are.
    ///
    /// # Panics
    /// If the broker cannot be reached or a service refuses to start, saying why; or if the clock has to be stopped and
    /// the runtime has more than one thread.
    ///
    /// # Cancel safety
    /// Dropping the future stops what was started.
    #[track_caller]
    pub fn start(self, services: impl IntoIterator<Item = Service>) -> impl Future<Output = Test> {
        let here = Location::caller();
        async move {
            match self.try_start(services, here).await {
                Ok(test) => test,
                Err(error) => panic!("the test could not start: {error}\n  at {here}"),
            }
        }
    }

    async fn try_start(self, services: impl IntoIterator<Item = Service>, here: &Location<'_>) -> Result<Test> {
        let (transport, config) = self.connecting.await?;
        // In this process: nothing happens there that tokio does not know of, and every copy is delivered.
        let is_memory = transport.name() == "memory";
        let stopped = is_memory && !self.real_time;
        if stopped {
            stop_clock(here);
            // Core draws the jitter of its delays on this thread.
            self.faults.iter().for_each(|faults| fastrand::seed(faults.seed));
        }
        let tracker = Arc::new(Tracker::new(transport.events().listen(), is_memory, self.faults));
        let mut heard = transport.events().listen();
        let transport = Wrapped::new(transport, Watch::new(Arc::clone(&tracker)));
        let clock = if stopped { Clock::of_tokio() } else { Clock::SYSTEM };
        let bus = Bus::with_clock(transport, config, clock)?;
        let hears = Arc::clone(&tracker);
        // So that what is told while nothing else happens is taken in at its time.
        let listening = tokio::spawn(async move {
            while heard.next().await.is_some() {
                hears.pull();
            }
        });
        let mut test =
            Test { bus, tracker, services: Vec::new(), deadline: self.deadline, listening: listening.abort_handle() };
        for service in services {
            test.services.push(service.layer(layer(Arc::clone(&test.tracker))).start(&test.bus).await?);
        }
        Ok(test)
    }
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("faults", &self.faults).finish_non_exhaustive()
    }
}

fn stop_clock(here: &Location<'_>) {
    assert!(
        Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread,
        "the clock can only be stopped on a runtime of one thread: use `#[tokio::test]` without a flavor, or \
         `Harness::memory().real_time()`\n  at {here}"
    );
    if !is_clock_stopped() {
        tokio::time::pause();
    }
}

/// Tokio does not tell.
fn is_clock_stopped() -> bool {
    let (stopped, real) = (Instant::now(), std::time::Instant::now());
    while real.elapsed() < Duration::from_micros(100) {
        std::hint::spin_loop();
    }
    stopped.elapsed().is_zero()
}

/// Services that run on a test bus, and all that has happened there.
///
/// What asserts panics with the whole timeline, at the place in the test that asked. Dropped, it stops its services.
pub struct Test {
    bus: Bus,
    pub(crate) tracker: Arc<Tracker>,
    services: Vec<Running>,
    deadline: Duration,
    listening: AbortHandle,
}

impl Drop for Test {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Test {
    /// The bus that the services run on: for what is published without waiting, and for dead letters.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The services under test, in the order they were given.
    #[must_use]
    pub fn services(&self) -> &[Running] {
        &self.services
    }

    /// Publishes an event, and waits until all that it causes has settled.
    ///
    /// # Panics
    /// If it cannot be published, or does not settle within the [deadline](Harness::deadline).
    ///
    /// # Cancel safety
    /// It may be published; nothing waits for it any more.
    #[track_caller]
    pub fn publish<E: Event>(&self, event: &E) -> impl Future<Output = MessageId> {
        self.publish_with(event, PublishOptions::default())
    }

    /// As [`publish`](Self::publish), with an id, headers, a time or a delay of your own.
    ///
    /// # Panics
    /// As [`publish`](Self::publish).
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish).
    #[track_caller]
    pub fn publish_with<E: Event>(&self, event: &E, options: PublishOptions) -> impl Future<Output = MessageId> {
        let here = Location::caller();
        async move { self.settled(self.bus.publish_with(event, options).await, here).await }
    }

    /// Publishes events in order, and waits until all that they cause has settled.
    ///
    /// # Panics
    /// As [`publish`](Self::publish).
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish), for each.
    #[track_caller]
    pub fn publish_all<'a, E: Event>(
        &self,
        events: impl IntoIterator<Item = &'a E>,
    ) -> impl Future<Output = Vec<MessageId>> {
        let here = Location::caller();
        async move { self.settled(self.bus.publish_all(events).await.map_err(Into::into), here).await }
    }

    /// Publishes a message as it is, such as one that cannot be decoded, and waits until all that it causes has settled.
    ///
    /// # Panics
    /// As [`publish`](Self::publish).
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish).
    #[track_caller]
    pub fn publish_raw(&self, message: Message) -> impl Future<Output = MessageId> {
        let here = Location::caller();
        async move { self.settled(self.bus.publish_raw(message).await, here).await }
    }

    async fn settled<T>(&self, published: Result<T>, here: &Location<'_>) -> T {
        let published = published.unwrap_or_else(|error| self.fail_at(&format!("it was not published: {error}"), here));
        self.settle_at(here).await;
        published
    }

    /// Waits until nothing that was published is left to be handled by the services under test: everything is handled or
    /// dead-lettered, retries and what handlers returned included.
    ///
    /// # Panics
    /// If that is not so within the [deadline](Harness::deadline).
    ///
    /// # Cancel safety
    /// Nothing is lost with the future.
    #[track_caller]
    pub fn settle(&self) -> impl Future<Output = ()> {
        let here = Location::caller();
        async move { self.settle_at(here).await }
    }

    async fn settle_at(&self, here: &Location<'_>) {
        let alarm = Alarm::set(self.deadline, &self.tracker);
        loop {
            let mut changed = pin!(self.tracker.changed.notified());
            changed.as_mut().enable();
            match self.tracker.rest() {
                Rest::Nothing => return,
                Rest::NoEnd => self.fail_at(&format!("no end of it: {LIMIT} things have happened"), here),
                _ if alarm.has_rung() => {
                    let why = format!("not settled within {:?} of real time:\n{}", self.deadline, self.rest());
                    self.fail_at(why.trim_end(), here)
                }
                Rest::NothingAt(time) => drop(tokio::time::timeout_at(time, changed).await),
                Rest::Something => changed.await,
            }
        }
    }

    /// Lets time pass, in which what is due happens: at once where the clock is stopped, else by waiting.
    ///
    /// # Cancel safety
    /// Nothing is lost with the future.
    pub async fn advance(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// The time since the start, on the clock of the test.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.tracker.elapsed()
    }

    /// What has happened so far, a line for each thing: as it is printed when an assertion fails.
    #[must_use]
    pub fn timeline(&self) -> String {
        self.tracker.timeline()
    }

    /// Drains the services and closes the bus, as at the end of a program.
    ///
    /// # Cancel safety
    /// All is stopped nevertheless.
    pub async fn stop(mut self) {
        for running in std::mem::take(&mut self.services) {
            running.drain(self.deadline).await;
        }
        // What could not be flushed will be delivered again, to nobody.
        let _ = self.bus.close(self.deadline).await;
    }

    /// What is left to happen, and what may be why.
    fn rest(&self) -> String {
        let ill = self.services.iter().filter_map(|running| match running.health() {
            Health::Up => None,
            Health::Degraded(error) | Health::Down(error) => Some(format!("  {error}\n")),
        });
        self.tracker.describe_rest() + &ill.collect::<String>()
    }

    #[track_caller]
    pub(crate) fn fail(&self, why: &str) -> ! {
        self.fail_at(why, Location::caller())
    }

    #[track_caller]
    fn fail_at(&self, why: &str, here: &Location<'_>) -> ! {
        let faults = self.tracker.faults.as_ref().map(|faults| format!("\nfaults: {faults}\n")).unwrap_or_default();
        panic!("{why}\n  at {here}\n\nwhat has happened:\n{}{faults}", self.timeline());
    }
}

impl fmt::Debug for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Test").field("services", &self.services).finish_non_exhaustive()
    }
}

/// Rings after a real time, whatever the clock of the test does; dropped, never.
struct Alarm {
    rung: Arc<AtomicBool>,
    _off: mpsc::Sender<()>,
}

impl Alarm {
    fn set(after: Duration, tracker: &Arc<Tracker>) -> Self {
        let (_off, wait) = mpsc::channel::<()>();
        let (rung, tracker) = (Arc::new(AtomicBool::new(false)), Arc::clone(tracker));
        let rings = Arc::clone(&rung);
        std::thread::spawn(move || {
            if wait.recv_timeout(after) == Err(mpsc::RecvTimeoutError::Timeout) {
                rings.store(true, SeqCst);
                tracker.changed.notify_waiters();
            }
        });
        Self { rung, _off }
    }

    fn has_rung(&self) -> bool {
        self.rung.load(SeqCst)
    }
}
