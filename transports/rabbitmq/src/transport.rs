//! The transport: two connections to a server.

use crate::config::RabbitMqConfig;
use crate::dead_letters::RabbitMqDeadLetters;
use crate::error::{NAME, closed, error};
use crate::link::{Link, Outages};
use crate::publisher::RabbitMqPublisher;
use crate::reader::Reader;
use crate::replay::Replay;
use crate::settle::Desk;
use crate::subscription::RabbitMqSubscription;
use crate::topology::Topology;
use crate::window::Window;
use async_trait::async_trait;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use tidings_core::transport::{
    self, Capabilities, DeadLetters, Health, Ordering, Publisher, ReplaySpec, Subscription, SubscriptionSpec, Transport,
};
use tidings_core::{BusEvent, ErrorKind, Events, Result, SubscriptionName};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// The RabbitMQ transport.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> tidings_core::Result<()> {
/// use tidings_core::transport::Transport;
/// use tidings_rabbitmq::RabbitMqTransport;
///
/// let transport = RabbitMqTransport::from_url("amqp://localhost").await?;
/// assert_eq!(transport.name(), "rabbitmq");
/// # Ok(()) }
/// ```
pub struct RabbitMqTransport {
    native: RabbitMqClient,
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    topology: Arc<Topology>,
    publisher: RabbitMqPublisher,
    capabilities: Capabilities,
    outages: Arc<Outages>,
    events: Events,
}

/// The client's connections: the [`native`](Transport::native) client of this transport.
#[derive(Clone)]
pub struct RabbitMqClient {
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    publisher: RabbitMqPublisher,
    topology: Arc<Topology>,
    namespace: String,
}

impl RabbitMqClient {
    /// Deletes everything that was created in the configured namespace, with what is in it; `namespace` repeats its name, which
    /// is the confirmation. For tests, and for tenants that go.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if it is another, or none: without a namespace nothing is deleted.
    pub async fn remove_namespace(&self, namespace: &str) -> Result<()> {
        if namespace.is_empty() || namespace != self.namespace {
            let why = "the namespace given is not the one that is configured; nothing was deleted";
            return Err(error(ErrorKind::Mismatch, why).with_operation("remove namespace"));
        }
        self.topology.remove().await.map_err(|error| error.with_operation("remove namespace"))
    }

    /// The connection that consumes, as it is now; another one after a reconnect. Open channels of your own on it.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`].
    pub async fn consuming(&self) -> Result<Arc<lapin::Connection>> {
        self.consuming.live().await
    }

    /// The connection that publishes, which the server may block.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`].
    pub async fn publishing(&self) -> Result<Arc<lapin::Connection>> {
        self.publishing.live().await
    }

    /// How many events were published to a topic that nobody had subscribed to: the server has kept none of them.
    #[must_use]
    pub fn unrouted(&self) -> u64 {
        self.publisher.open().unrouted.load(SeqCst)
    }
}

impl RabbitMqTransport {
    /// Connects to the server that `config` names.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for what cannot work, [`ErrorKind::Denied`] for refused credentials, [`ErrorKind::NotFound`] for
    /// an unknown virtual host, [`ErrorKind::Connection`] or [`ErrorKind::Timeout`] if the server cannot be reached.
    pub async fn connect(config: RabbitMqConfig) -> Result<Arc<Self>> {
        let about = |error: tidings_core::Error| error.with_operation("connect");
        config.check().map_err(about)?;
        if config.allow_plaintext && !config.tls {
            tracing::warn!("rabbitmq: the connection is not encrypted, as configured");
        }
        if tracing::enabled!(target: "lapin::io_loop", tracing::Level::TRACE) {
            tracing::warn!("rabbitmq: credentials are logged, by the client at TRACE; filter `lapin=debug`");
        }
        let (config, events) = (Arc::new(config), Events::default());
        let outages = Outages::new(&events);
        let publishing = Link::connect(&config, "publishing", &outages).await.map_err(about)?;
        let consuming = Link::connect(&config, "consuming", &outages).await.map_err(about)?;
        let topology = Arc::new(Topology::new(&config, &publishing));
        topology.prepare().await.map_err(about)?;
        let publisher = RabbitMqPublisher::new(&config, &publishing, &topology);
        let native = RabbitMqClient {
            publishing: Arc::clone(&publishing),
            consuming: Arc::clone(&consuming),
            publisher: publisher.clone(),
            topology: Arc::clone(&topology),
            namespace: config.namespace.clone(),
        };
        events.tell(BusEvent::Connected);
        let capabilities = capabilities(&config);
        Ok(Arc::new(Self { native, publishing, consuming, topology, publisher, capabilities, outages, events }))
    }

    /// Connects to `amqp://user:password@host:port/vhost?..`; [`RabbitMqConfig::from_url`] says what may follow.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a malformed URL, and those of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Arc<Self>> {
        Self::connect(RabbitMqConfig::from_url(url)?).await
    }

    fn check(&self) -> Result<()> {
        if self.publishing.is_closed() { Err(closed()) } else { Ok(()) }
    }

    async fn open(&self, spec: SubscriptionSpec) -> Result<RabbitMqSubscription> {
        self.check()?;
        if spec.max_hold > self.topology.consumer_timeout() && spec.max_hold != std::time::Duration::MAX {
            let why = "a delivery may stay unsettled for longer than the server allows; lower max_in_flight, timeout or \
                       hold_at_most, or raise the server's consumer_timeout and `consumer_timeout_ms`";
            return Err(error(ErrorKind::Unsupported, why));
        }
        let queues = self.publishing.patiently(|| self.topology.subscribe(&spec)).await?;
        let desk = Desk::new(Window::new(spec.ordering == Ordering::Key, spec.max_in_flight));
        let reader = Reader {
            spec,
            queues,
            link: Arc::clone(&self.consuming),
            greetings: Arc::clone(&self.publishing),
            topology: Arc::clone(&self.topology),
            outages: Arc::clone(&self.outages),
            desk: Arc::clone(&desk),
        };
        let first = self.consuming.patiently(|| reader.open()).await?;
        let (close, closing) = mpsc::channel(1);
        tokio::spawn(reader.run(first, closing));
        Ok(RabbitMqSubscription::new(desk, Arc::clone(&self.consuming), close, false))
    }
}

/// What this transport can do with this configuration, known without connecting.
#[must_use]
pub fn capabilities(config: &RabbitMqConfig) -> Capabilities {
    let mut can = Capabilities::NONE;
    can.durable = true;
    can.publish_delay = true;
    can.key_ordering = true;
    can.slots = true;
    can.sharing = true;
    can.replay = true;
    can.counts_hand_outs = true;
    can.max_payload = config.max_payload();
    can.max_hold = Some(config.consumer_timeout());
    can
}

#[async_trait]
impl Transport for RabbitMqTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &transport::Topology) -> Result<()> {
        let about = |error: tidings_core::Error| error.with_operation("provision");
        self.check().map_err(about)?;
        self.publishing.patiently(|| self.topology.provision(topology)).await.map_err(about)
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(self.publisher.clone())
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        let name = spec.name.clone();
        let about = |error: tidings_core::Error| {
            let known = error.context().any(|(key, _)| key == "subscription");
            let error = error.with_operation("subscribe");
            if known { error } else { error.with_context("subscription", &name) }
        };
        Ok(Box::new(self.open(spec).await.map_err(about)?))
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        let about = |error: tidings_core::Error| error.with_operation("replay");
        self.check().map_err(about)?;
        let (spec, this) = (&spec, self);
        let opened = self.publishing.patiently(move || async move {
            Replay::new(spec.clone(), &this.consuming, &this.publishing, &this.topology).await?.open().await
        });
        Ok(Box::new(opened.await.map_err(about)?))
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        self.check().map_err(|error| error.with_operation("dead letters"))?;
        let (link, topology) = (Arc::clone(&self.publishing), Arc::clone(&self.topology));
        Ok(Arc::new(RabbitMqDeadLetters { link, topology, name: subscription.clone() }))
    }

    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        self.check().map_err(|error| error.with_operation("remove"))?;
        let removed = self.publishing.patiently(|| self.topology.remove_subscription(subscription)).await;
        removed.map_err(|error| error.with_operation("remove").with_context("subscription", subscription))
    }

    fn health(&self) -> Health {
        match (self.consuming.fault(), self.publishing.fault()) {
            (None, None) => Health::Up,
            (Some(fault), Some(_)) => Health::Down(fault),
            (Some(fault), None) | (None, Some(fault)) => Health::Degraded(fault),
        }
    }

    fn events(&self) -> &Events {
        &self.events
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        let flushed = self.publisher.close(deadline).await;
        self.publishing.close(deadline).await;
        self.consuming.close(deadline).await;
        flushed
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        &self.native
    }
}
