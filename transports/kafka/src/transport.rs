//! The transport: clients of one cluster.

use crate::client::{KafkaContext, Link, Refusal};
use crate::config::KafkaConfig;
use crate::dead_letters::KafkaDeadLetters;
use crate::error::{NAME, client as failed, closed, error};
use crate::publisher::{KafkaPublisher, Outbox};
use crate::replay;
use crate::subscription::{self, Instance, KafkaSubscription};
use crate::topology::{Catalog, blocking};
use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::admin::AdminClient;
use rdkafka::consumer::Consumer;
use std::any::Any;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tidings_core::transport::{
    Capabilities, DeadLetters, Health, Publisher, ReplaySpec, Subscription, SubscriptionSpec, Topology, Transport,
};
use tidings_core::{Backoff, Error, ErrorKind, Events, Result, SubscriptionName};
use tokio::time::{Instant, sleep};

/// What headers may take of the broker's limit for a record: those of an application, the attributes, and what a dead letter adds.
const HEADERS: usize = 24 * 1024;

/// How often the cluster is asked at least whether it is there.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// The native client, as [`Transport::native`] gives it.
pub type KafkaClient = AdminClient<KafkaContext>;

/// The Kafka transport.
///
/// # Examples
///
/// ```no_run
/// use tidings_core::transport::Transport;
/// use tidings_kafka::{KafkaConfig, KafkaTransport};
///
/// # async fn example() -> tidings_core::Result<()> {
/// let transport = KafkaTransport::connect(KafkaConfig::from_url("kafka://127.0.0.1:9092")?).await?;
/// assert!(transport.capabilities().durable);
/// # Ok(()) }
/// ```
pub struct KafkaTransport {
    catalog: Arc<Catalog>,
    link: Arc<Link>,
    outbox: Arc<Outbox>,
    publisher: Arc<KafkaPublisher>,
    capabilities: Capabilities,
    /// What is open, to end it with the transport.
    instances: Mutex<Vec<Weak<Instance>>>,
}

impl KafkaTransport {
    /// Connects to the cluster of the brokers that `config` names.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a bad configuration, [`ErrorKind::Denied`] for refused credentials, [`ErrorKind::Connection`] if
    /// no broker can be reached, [`ErrorKind::Timeout`] if none answers.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn connect(config: KafkaConfig) -> Result<Arc<Self>> {
        config.check()?;
        let link = Link::new();
        let mut capabilities = capabilities();
        capabilities.max_payload = max_payload(&config);
        let catalog = Arc::new(Catalog::new(config, &link)?);
        // First, because it fetches its id meanwhile.
        let outbox = Outbox::start(&catalog, &link, capabilities.max_payload)?;
        let publisher = Arc::new(KafkaPublisher(Arc::clone(&outbox)));
        let transport = Self {
            catalog: Arc::clone(&catalog),
            link: Arc::clone(&link),
            outbox,
            publisher,
            capabilities,
            instances: Mutex::default(),
        };
        let answered = blocking(&catalog, move |catalog| catalog.answers(catalog.config.connect_timeout)).await;
        if let Err(unreachable) = answered {
            return Err(not_connected(&link, unreachable).with_operation("connect"));
        }
        tokio::spawn(watch(Arc::downgrade(&catalog), link));
        Ok(Arc::new(transport))
    }

    fn check(&self) -> Result<()> {
        if self.link.is_closed() { Err(closed()) } else { Ok(()) }
    }

    fn keep(&self, instance: &Arc<Instance>) {
        let mut instances = self.instances.lock();
        instances.retain(|instance| instance.strong_count() > 0);
        instances.push(Arc::downgrade(instance));
    }

    fn end(&self) {
        for instance in self.instances.lock().drain(..).filter_map(|instance| instance.upgrade()) {
            // Its poller is woken, and learns that the transport is closed.
            instance.kill();
        }
    }

    async fn provisioned(&self, topology: &Topology) -> Result<()> {
        self.check()?;
        for spec in self.catalog.provision(topology).await? {
            let instance = subscription::open(&self.catalog, &self.outbox, spec).await?;
            let deadline = Instant::now() + self.catalog.config.request_timeout;
            Box::new(KafkaSubscription::new(instance)).close(deadline).await;
        }
        Ok(())
    }
}

impl Catalog {
    /// Whether a broker answers. Blocks.
    fn answers(&self, timeout: Duration) -> Result<()> {
        // Who logs in by token is given it there.
        while self.lookup.poll(Duration::ZERO).is_some() {}
        let answer = self.lookup.fetch_metadata(Some(&self.names.reader()), timeout);
        // What the client tells of its troubles waits there too.
        while self.lookup.poll(Duration::ZERO).is_some() {}
        answer.map(drop).map_err(|e| failed("no broker can be reached", e))
    }
}

/// Why nobody has answered.
fn not_connected(link: &Link, unreachable: Error) -> Error {
    match link.denied() {
        Some((Refusal::Login, why)) => error(ErrorKind::Denied, format!("the credentials were refused: {why}")),
        Some((Refusal::Tls, why)) => error(ErrorKind::Connection, format!("no TLS: {why}")),
        None if link.is_up() => error(ErrorKind::Timeout, "no broker has answered in time").with_source(unreachable),
        None => unreachable,
    }
}

/// Finds out whether the cluster can be reached, and keeps what clients tell from piling up.
async fn watch(catalog: Weak<Catalog>, link: Arc<Link>) {
    let mut up = link.up.subscribe();
    let mut round = 0;
    while !link.is_closed() {
        if link.is_up() {
            round = 0;
            if tokio::time::timeout(ASK_EVERY, up.changed()).await.is_ok() {
                continue;
            }
        }
        let Some(catalog) = catalog.upgrade() else { return };
        // A connection that is silent is noticed by asking; the client takes long while it has nothing to send.
        let timeout = if link.is_up() { catalog.config.request_timeout } else { Duration::from_secs(1) };
        let answered = blocking(&catalog, move |catalog| catalog.answers(timeout)).await;
        drop(catalog);
        match answered {
            Ok(()) => link.recover(),
            Err(silent) if link.is_up() => link.lose(&silent.to_string()),
            Err(_) => {
                round += 1;
                sleep(Backoff::new(Duration::from_millis(50), Duration::from_secs(1)).delay(round)).await;
            }
        }
    }
}

fn max_payload(config: &KafkaConfig) -> usize {
    (config.max_message_bytes as usize).saturating_sub(HEADERS)
}

/// What this transport can do, known without connecting.
#[must_use]
pub fn capabilities() -> Capabilities {
    let mut can = Capabilities::NONE;
    can.durable = true;
    can.ordered_repeats = true;
    can.key_ordering = true;
    can.slots = true;
    can.sharing = true;
    can.retention = true;
    can.start_beginning = true;
    can.replay = true;
    can.max_payload = max_payload(&KafkaConfig::default());
    can
}

#[async_trait]
impl Transport for KafkaTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        self.provisioned(topology).await.map_err(|error| error.with_operation("provision"))
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::clone(&self.publisher) as Arc<dyn Publisher>
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        self.check().map_err(|error| error.with_operation("subscribe"))?;
        let instance = subscription::open(&self.catalog, &self.outbox, spec).await;
        let instance = instance.map_err(|error| error.with_operation("subscribe"))?;
        self.keep(&instance);
        Ok(Box::new(KafkaSubscription::new(instance)))
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        self.check().map_err(|error| error.with_operation("replay"))?;
        let instance = replay::open(&self.catalog, &self.outbox, spec).await;
        let instance = instance.map_err(|error| error.with_operation("replay"))?;
        self.keep(&instance);
        Ok(Box::new(KafkaSubscription::new(instance)))
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        self.check().map_err(|error| error.with_operation("dead letters"))?;
        Ok(Arc::new(KafkaDeadLetters::new(&self.catalog, &self.outbox, subscription)))
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
        self.end();
        if left == 0 {
            return Ok(());
        }
        let why = format!("{left} publishes were not confirmed before the deadline");
        Err(error(ErrorKind::Timeout, why).with_operation("close"))
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        &self.catalog.admin
    }
}

impl Drop for KafkaTransport {
    fn drop(&mut self) {
        // What is open goes on without it, and publishes nothing any more.
        self.outbox.abandon();
    }
}
