//! The transport: a connection to the servers of one cluster.

use crate::config::NatsConfig;
use crate::connection::{self, Link};
use crate::dead_letters::NatsDeadLetters;
use crate::error::{NAME, closed, error};
use crate::publisher::{NatsPublisher, Outbox};
use crate::replay;
use crate::subscription::{self, Instance, NatsSubscription};
use crate::topology::Catalog;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::any::Any;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tidings_core::transport::{
    Capabilities, DeadLetters, Health, Publisher, ReplaySpec, Subscription, SubscriptionSpec, Topology, Transport,
};
use tidings_core::{ErrorKind, Events, Result, SubscriptionName};
use tokio::time::{Instant, timeout_at};

/// What headers may take of the server's limit for a message: those of an application, the attributes, and what a dead letter adds.
const HEADERS: usize = 24 * 1024;

/// The NATS JetStream transport.
///
/// # Examples
///
/// ```no_run
/// use tidings_core::transport::Transport;
/// use tidings_nats::{NatsConfig, NatsTransport};
///
/// # async fn example() -> tidings_core::Result<()> {
/// let transport = NatsTransport::connect(NatsConfig::from_url("nats://127.0.0.1:4222")?).await?;
/// assert!(transport.capabilities().durable);
/// # Ok(()) }
/// ```
pub struct NatsTransport {
    catalog: Arc<Catalog>,
    link: Arc<Link>,
    outbox: Arc<Outbox>,
    publisher: Arc<NatsPublisher>,
    capabilities: Capabilities,
    /// What is open, to end it with the transport.
    instances: Mutex<Vec<Weak<Instance>>>,
}

impl NatsTransport {
    /// Connects to the servers that `config` names.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a bad configuration, [`ErrorKind::Denied`] for refused credentials, [`ErrorKind::Connection`] or
    /// [`ErrorKind::Timeout`] if no server can be reached, [`ErrorKind::Unsupported`] for a server that is too old or has no
    /// JetStream.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn connect(config: NatsConfig) -> Result<Arc<Self>> {
        let (api, link) = connection::open(&config).await?;
        let mut capabilities = capabilities();
        capabilities.max_payload = api.client.server_info().max_payload.saturating_sub(HEADERS);
        let catalog = Arc::new(Catalog::new(api, &config));
        let (max_payload, timeout) = (capabilities.max_payload, config.request_timeout);
        let outbox = Outbox::start(Arc::clone(&catalog), Arc::clone(&link), max_payload, timeout).await?;
        let publisher = Arc::new(NatsPublisher(Arc::clone(&outbox)));
        Ok(Arc::new(Self { catalog, link, outbox, publisher, capabilities, instances: Mutex::default() }))
    }

    fn check(&self) -> Result<()> {
        if self.link.is_closed() { Err(closed()) } else { Ok(()) }
    }

    fn keep(&self, instance: &Arc<Instance>) {
        let mut instances = self.instances.lock();
        instances.retain(|instance| instance.strong_count() > 0);
        instances.push(Arc::downgrade(instance));
    }
}

/// What this transport can do, known without connecting; the largest payload is the server's to say.
#[must_use]
pub fn capabilities() -> Capabilities {
    let mut can = Capabilities::NONE;
    can.durable = true;
    can.key_ordering = true;
    can.slots = true;
    can.sharing = true;
    can.retention = true;
    can.start_beginning = true;
    can.replay = true;
    can.max_payload = 1024 * 1024 - HEADERS;
    can
}

#[async_trait]
impl Transport for NatsTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        self.check().map_err(|error| error.with_operation("provision"))?;
        self.catalog.provision(topology).await.map_err(|error| error.with_operation("provision"))
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::clone(&self.publisher) as Arc<dyn Publisher>
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        self.check().map_err(|error| error.with_operation("subscribe"))?;
        let instance = subscription::open(&self.catalog, &self.link, spec).await;
        let instance = instance.map_err(|error| error.with_operation("subscribe"))?;
        self.keep(&instance);
        Ok(Box::new(NatsSubscription::new(instance)))
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        self.check().map_err(|error| error.with_operation("replay"))?;
        let instance = replay::open(&self.catalog, &self.link, spec).await;
        let instance = instance.map_err(|error| error.with_operation("replay"))?;
        self.keep(&instance);
        Ok(Box::new(NatsSubscription::new(instance)))
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        self.check().map_err(|error| error.with_operation("dead letters"))?;
        let (catalog, link) = (Arc::clone(&self.catalog), Arc::clone(&self.link));
        Ok(Arc::new(NatsDeadLetters { catalog, link, name: subscription.clone() }))
    }

    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        self.check().map_err(|error| error.with_operation("remove"))?;
        let removed = self.catalog.remove(subscription).await;
        removed.map_err(|error| error.with_operation("remove").with_context("subscription", subscription))
    }

    fn health(&self) -> Health {
        self.link.health()
    }

    fn events(&self) -> &Events {
        &self.link.events
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        if self.link.closed.swap(true, SeqCst) {
            return Ok(());
        }
        let left = self.outbox.close(deadline).await;
        for instance in self.instances.lock().drain(..).filter_map(|instance| instance.upgrade()) {
            // Its poller is woken, and learns that the transport is closed.
            instance.kill();
        }
        let client = &self.catalog.api.client;
        let end = deadline.max(Instant::now() + Duration::from_millis(100));
        let drained = timeout_at(end, client.drain()).await;
        match (left, drained) {
            (0, Ok(_)) => Ok(()),
            (0, Err(_)) => Err(error(ErrorKind::Timeout, "the connection did not end in time").with_operation("close")),
            (left, _) => {
                let why = format!("{left} publishes were not confirmed before the deadline");
                Err(error(ErrorKind::Timeout, why).with_operation("close"))
            }
        }
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        &self.catalog.api.client
    }
}

impl Drop for NatsTransport {
    fn drop(&mut self) {
        self.outbox.abandon();
    }
}
