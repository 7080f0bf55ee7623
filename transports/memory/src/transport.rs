//! The transport: a connection to a broker in this process.

use crate::MemoryConfig;
use crate::broker::{Broker, Client};
use crate::dead_letters::MemoryDeadLetters;
use crate::error::{NAME, closed, error, mismatch};
use crate::publisher::MemoryPublisher;
use crate::subscription::MemorySubscription;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::any::Any;
use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, LazyLock, Weak};
use tidings_core::transport::{
    Capabilities, DeadLetters, Health, Publisher, ReplaySpec, Subscription, SubscriptionSpec, Topology, Transport,
};
use tidings_core::{BusEvent, ErrorKind, Events, Result, SubscriptionName};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// The brokers that have a name, for as long as anything is connected to them.
static BROKERS: LazyLock<Mutex<HashMap<String, Weak<Broker>>>> = LazyLock::new(Mutex::default);

/// The in-process transport.
///
/// # Examples
///
/// ```
/// use tidings_core::transport::Transport;
/// use tidings_memory::{MemoryConfig, MemoryTransport};
///
/// let transport = MemoryTransport::connect(MemoryConfig::default())?;
/// assert_eq!(transport.name(), "memory");
/// assert!(!transport.capabilities().durable);
/// # Ok::<(), tidings_core::Error>(())
/// ```
pub struct MemoryTransport {
    native: MemoryBroker,
    client: Arc<Client>,
    capabilities: Capabilities,
    events: Events,
}

/// The broker itself: the [`native`](Transport::native) client of this transport.
#[derive(Clone)]
pub struct MemoryBroker {
    broker: Arc<Broker>,
    space: usize,
    client: u64,
    events: Events,
}

/// What a broker holds at the moment, over all namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Bytes stored.
    pub stored: usize,
    /// Bytes of those that are settled and only kept to be read again.
    pub retained: usize,
    /// How many publishes wait for room.
    pub waiting: usize,
}

impl MemoryTransport {
    /// Connects to the broker that `config` names, starting it if nothing is connected to it.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if it runs with another configuration.
    pub fn connect(config: MemoryConfig) -> Result<Arc<Self>> {
        let namespace = config.namespace.clone();
        let broker = broker(config)?;
        let mut state = broker.lock();
        let client = Arc::new(Client {
            id: state.number(),
            space: state.space(&namespace),
            closed: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            flushed: Notify::new(),
        });
        drop(state);
        let events = Events::default();
        let native = MemoryBroker { broker, space: client.space, client: client.id, events: events.clone() };
        events.tell(BusEvent::Connected);
        Ok(Arc::new(Self { native, client, capabilities: capabilities(), events }))
    }

    /// Connects to `memory://name?..`; [`MemoryConfig::from_url`] says what may follow.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a malformed URL, and those of [`connect`](Self::connect).
    pub fn from_url(url: &str) -> Result<Arc<Self>> {
        Self::connect(MemoryConfig::from_url(url)?)
    }

    fn broker(&self) -> &Arc<Broker> {
        &self.native.broker
    }
}

impl MemoryBroker {
    /// What it holds at the moment.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.broker.lock().stats()
    }

    /// Takes from each active instance of a subscription what it was handed, as if it had been cut off and had
    /// come back: leases are lost, events come again, a stand-by takes over. For tests of what a real
    /// broker does now and then.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such subscription.
    pub fn lose_leases(&self, subscription: &SubscriptionName) -> Result<()> {
        let wait = self.broker.redelivery();
        self.broker.lock().lose_leases(self.space, subscription, wait)
    }

    /// Cuts this transport off for a moment: what its instances were handed is lost and comes again, here or to a
    /// stand-by of another transport. Replays are not cut. For tests, as [`lose_leases`](Self::lose_leases).
    pub fn cut(&self) {
        self.events.tell(BusEvent::Disconnected { reason: "cut, as asked".into() });
        let wait = self.broker.redelivery();
        self.broker.lock().cut(self.client, wait);
        self.events.tell(BusEvent::Connected);
    }
}

/// What this transport can do, known without connecting.
#[must_use]
pub fn capabilities() -> Capabilities {
    let mut can = Capabilities::NONE;
    can.ordered_repeats = true;
    can.publish_delay = true;
    can.key_ordering = true;
    can.slots = true;
    can.sharing = true;
    can.retention = true;
    can.start_beginning = true;
    can.replay = true;
    can.log_positions = true;
    can.counts_hand_outs = true;
    can.counts_losses = true;
    can
}

fn broker(config: MemoryConfig) -> Result<Arc<Broker>> {
    if config.capacity == 0 {
        return Err(error(ErrorKind::Config, "`capacity` must be more than 0").with_operation("connect"));
    }
    if config.name.is_empty() {
        return Ok(Arc::new(Broker::new(config)));
    }
    let mut brokers = BROKERS.lock();
    if let Some(running) = brokers.get(&config.name).and_then(Weak::upgrade) {
        check(&running.config, &config).map_err(|e| e.with_operation("connect").with_context("name", &config.name))?;
        return Ok(running);
    }
    brokers.retain(|_, broker| broker.strong_count() > 0);
    let broker = Arc::new(Broker::new(config));
    brokers.insert(broker.config.name.clone(), Arc::downgrade(&broker));
    Ok(broker)
}

fn check(has: &MemoryConfig, asked: &MemoryConfig) -> Result<()> {
    if has.capacity != asked.capacity {
        return Err(mismatch("`capacity` of the running broker", has.capacity, asked.capacity));
    }
    if has.retain != asked.retain {
        return Err(mismatch("`retain` of the running broker", has.retain, asked.retain));
    }
    if has.redelivery_delay != asked.redelivery_delay {
        let what = "`redelivery_delay_ms` of the running broker";
        return Err(mismatch(what, has.redelivery_delay, asked.redelivery_delay));
    }
    Ok(())
}

#[async_trait]
impl Transport for MemoryTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        self.client
            .check()
            .and_then(|()| self.broker().lock().provision(self.client.space, topology))
            .map_err(|error| error.with_operation("provision"))
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(MemoryPublisher { broker: Arc::clone(self.broker()), client: Arc::clone(&self.client) })
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        let seat = self.client.check().and_then(|()| self.broker().lock().subscribe(&self.client, &spec));
        let seat = seat.map_err(|error| error.with_operation("subscribe"))?;
        Ok(Box::new(MemorySubscription::new(Arc::clone(self.broker()), seat)))
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        let broker = self.broker();
        let seat = self.client.check().and_then(|()| broker.lock().replay(broker, &self.client, spec));
        let seat = seat.map_err(|error| error.with_operation("replay"))?;
        Ok(Box::new(MemorySubscription::new(Arc::clone(broker), seat)))
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        self.client.check().map_err(|error| error.with_operation("dead letters"))?;
        let (broker, client) = (Arc::clone(self.broker()), Arc::clone(&self.client));
        Ok(Arc::new(MemoryDeadLetters { broker, client, name: subscription.clone() }))
    }

    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        self.client.check().map_err(|error| error.with_operation("remove"))?;
        Ok(self.broker().lock().remove(self.client.space, subscription))
    }

    fn health(&self) -> Health {
        let waiting = self.client.waiting.load(SeqCst);
        if self.client.closed.load(SeqCst) {
            Health::Down(closed())
        } else if waiting > 0 {
            let why = format!("{waiting} publishes wait for room; read faster or raise `capacity`");
            Health::Degraded(error(ErrorKind::Full, why))
        } else {
            Health::Up
        }
    }

    fn events(&self) -> &Events {
        &self.events
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.client.closed.store(true, SeqCst);
        // What still waits at the deadline is refused below.
        let _ = timeout_at(deadline, flush(&self.client)).await;
        match self.broker().lock().disconnect(&self.client) {
            0 => Ok(()),
            left => {
                let why = format!("no room for {left} publishes before the deadline; they were refused");
                Err(error(ErrorKind::Timeout, why).with_operation("close"))
            }
        }
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        &self.native
    }
}

/// Waits until none of the transport's publishes waits for room.
async fn flush(client: &Client) {
    loop {
        let mut flushed = pin!(client.flushed.notified());
        flushed.as_mut().enable();
        if client.waiting.load(SeqCst) == 0 {
            return;
        }
        flushed.await;
    }
}
