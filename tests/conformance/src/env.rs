//! What a case works with: its namespace on the broker, and waiting for a thing with a deadline.

use crate::{Broker, Factory};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidings_core::transport::{Capabilities, DeadLetter, Transport};
use tidings_core::{Bus, BusConfig, Clock, Result, Running, Service, SubscriptionName};
use tokio::time::{Instant, sleep, timeout};

/// How long a case waits for one thing that it expects.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The world of one case: a broker of which it sees its own namespace only. Clones are the same.
#[derive(Clone)]
pub(crate) struct Env {
    factory: Arc<dyn Factory>,
    broker: Arc<dyn Broker>,
    first: Arc<dyn Transport>,
    clock: Clock,
    paused: bool,
}

impl Env {
    pub(crate) async fn open(factory: Arc<dyn Factory>, paused: bool) -> Result<Self> {
        let broker = factory.open(&namespace()).await?;
        let first = broker.connect().await?;
        let clock = if paused { Clock::of_tokio() } else { Clock::SYSTEM };
        Ok(Self { factory, broker, first, clock, paused })
    }

    pub(crate) fn factory(&self) -> &dyn Factory {
        &*self.factory
    }

    /// What the transport can do.
    pub(crate) fn can(&self) -> &Capabilities {
        self.first.capabilities()
    }

    /// The first connection, which every case has.
    pub(crate) fn transport(&self) -> &Arc<dyn Transport> {
        &self.first
    }

    /// Another connection, as another process would have it.
    pub(crate) async fn connect(&self) -> Arc<dyn Transport> {
        self.broker.connect().await.expect("another connection")
    }

    /// A bus on the first connection.
    pub(crate) fn bus(&self) -> Bus {
        self.bus_on(Arc::clone(&self.first))
    }

    /// A bus on another connection, as another process would have it.
    pub(crate) async fn another_bus(&self) -> Bus {
        self.bus_on(self.connect().await)
    }

    pub(crate) fn bus_on(&self, transport: Arc<dyn Transport>) -> Bus {
        self.bus_with(
            transport,
            BusConfig { source: "/suite".into(), publish_timeout_ms: 60_000, ..BusConfig::default() },
        )
    }

    pub(crate) fn bus_with(&self, transport: Arc<dyn Transport>, config: BusConfig) -> Bus {
        Bus::with_clock(transport, config, self.clock).expect("a valid configuration")
    }

    /// The time of day as the buses see it.
    pub(crate) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    /// Whether time passes at once whenever all wait for it; then nothing may leave this runtime.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Has what the retention of a topic no longer covers removed.
    pub(crate) async fn expire(&self, topic: &str) {
        self.broker.expire(topic).await.expect("what is too old goes");
    }

    /// Cuts all connections of this case.
    pub(crate) async fn cut(&self) {
        self.broker.cut().await.expect("the connection is cut");
    }

    /// Cuts all connections of this case until what is held there is lost.
    pub(crate) async fn cut_off(&self) {
        self.broker.cut_off().await.expect("the connection is cut");
    }

    /// Kills the broker and starts it again.
    pub(crate) async fn restart(&self) {
        self.broker.restart().await.expect("the broker restarts");
    }

    pub(crate) async fn clean_up(&self) -> Result<()> {
        // A case may have closed it, or have left it hanging.
        let _ = timeout(Duration::from_secs(5), self.first.close(Instant::now() + Duration::from_secs(1))).await;
        self.broker.clean_up().await
    }
}

/// A namespace that nobody has used.
fn namespace() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let process = u64::from(std::process::id());
    format!("s{:x}-{:x}-{:x}", now & 0xff_ffff_ffff, process, NEXT.fetch_add(1, Relaxed))
}

/// Waits until `condition` holds, asking again whenever other tasks had their turn.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(timeout(PATIENCE, waiting).await.is_ok(), "not within {PATIENCE:?}: {what}");
}

/// What comes within the patience of the suite.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let answer = timeout(PATIENCE, future).await;
    answer.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Starts a service, which must start.
pub(crate) async fn start(service: Service, bus: &Bus) -> Running {
    within("the service starts", service.start(bus)).await.expect("the service starts")
}

/// Drains a service that has nothing left to wait for.
pub(crate) async fn drain(running: Running) -> tidings_core::Drained {
    within("the service drains", running.drain(Duration::from_secs(30))).await
}

/// A sum over the subscriptions of a service.
pub(crate) fn total(running: &Running, number: fn(&tidings_core::Stats) -> u64) -> u64 {
    running.stats().map(|(_, stats)| number(&stats)).sum()
}

pub(crate) fn subscription(name: &str) -> SubscriptionName {
    SubscriptionName::new(name).expect("a valid name")
}

/// The dead letters of a subscription, once there are `count`, and no more than those.
pub(crate) async fn dead_letters(transport: &Arc<dyn Transport>, name: &str, count: usize) -> Vec<DeadLetter> {
    let letters = transport.dead_letters(&subscription(name)).await.expect("dead letters open");
    let enough = || async { letters.count().await.expect("dead letters are counted") >= count as u64 };
    eventually(&format!("{count} dead letters"), enough).await;
    let page = letters.page(None, count + 10).await.expect("dead letters are read");
    assert_eq!(page.len(), count, "as many dead letters as expected");
    page
}

/// A list that handlers write to, as a state.
pub(crate) struct Seen<T>(Arc<parking_lot::Mutex<Vec<T>>>);

impl<T> Default for Seen<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Clone for Seen<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Clone + Send + 'static> Seen<T> {
    pub(crate) fn push(&self, seen: T) {
        self.0.lock().push(seen);
    }

    /// What was seen so far.
    pub(crate) fn all(&self) -> Vec<T> {
        self.0.lock().clone()
    }

    /// All that was seen, once there are as many.
    pub(crate) async fn count(&self, count: usize) -> Vec<T> {
        let waiting = eventually("seen", || async { self.0.lock().len() >= count });
        let enough = timeout(PATIENCE - Duration::from_secs(1), waiting).await;
        assert!(enough.is_ok(), "only {} of {count} were seen", self.0.lock().len());
        self.all()
    }
}

impl Env {
    /// Another namespace on the same broker, which the case must [clean up](Self::clean_up).
    pub(crate) async fn elsewhere(&self) -> Self {
        let broker = self.factory.open(&namespace()).await.expect("another namespace");
        let first = broker.connect().await.expect("a connection");
        Self { broker, first, ..self.clone() }
    }
}

/// How many bytes of memory this process uses; `None` where that cannot be told.
pub(crate) fn memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib * 1024)
}

/// Waits until a sum over the subscriptions of a service is as high.
pub(crate) async fn until(running: &Running, what: &str, number: fn(&tidings_core::Stats) -> u64, at_least: u64) {
    eventually(what, || async { total(running, number) >= at_least }).await;
}
