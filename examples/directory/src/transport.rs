//! The transport: a directory, and the thread that works in it.

use crate::DirectoryConfig;
use crate::cursor::Wanted;
use crate::dead_letters::DirectoryDeadLetters;
use crate::error::{NAME, error};
use crate::publisher::DirectoryPublisher;
use crate::reader::{Place, Reader};
use crate::settle::Desk;
use crate::store::Store;
use crate::subscription::DirectorySubscription;
use crate::topology;
use crate::worker::{Disk, Link, MAX_PAYLOAD};
use async_trait::async_trait;
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{
    Capabilities, DeadLetters, Health, Ordering, Publisher, ReplayFrom, ReplaySpec, Subscription, SubscriptionSpec,
    Topology, Transport,
};
use tidings_core::{BusEvent, ErrorKind, Events, Result, SubscriptionName};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A transport whose broker is a directory.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> tidings_core::Result<()> {
/// use tidings_core::Bus;
/// use tidings_directory::DirectoryConfig;
///
/// let bus = Bus::connect(DirectoryConfig::at("/var/lib/shop")).await?;
/// # Ok(()) }
/// ```
pub struct DirectoryTransport {
    link: Arc<Link>,
    folder: PathBuf,
    capabilities: Capabilities,
    events: Events,
}

/// What this transport can do, known without connecting.
#[must_use]
pub fn capabilities() -> Capabilities {
    let mut can = Capabilities::NONE;
    can.durable = true;
    can.ordered_repeats = true;
    can.publish_delay = true;
    can.key_ordering = true;
    can.start_beginning = true;
    can.replay = true;
    can.log_positions = true;
    can.counts_hand_outs = true;
    can.counts_losses = true;
    can.max_payload = MAX_PAYLOAD;
    can
}

impl DirectoryTransport {
    /// Opens the directory that `config` names, creating it if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a bad configuration; [`ErrorKind::Denied`] or [`ErrorKind::Connection`] if the
    /// directory cannot be used.
    ///
    /// # Cancel safety
    /// A directory that was created stays.
    pub async fn connect(config: DirectoryConfig) -> Result<Arc<Self>> {
        config.check()?;
        let (folder, events) = (config.path.join(config.folder()), Events::default());
        let (opened, opening) = oneshot::channel();
        let (root, poll, told) = (folder.clone(), Duration::from_millis(config.poll_ms), events.clone());
        std::thread::spawn(move || {
            // Nobody waits any more if the answer cannot be given.
            drop(opened.send(Store::open(root).and_then(|store| Disk::start(store, poll, told))));
        });
        let failed = |_| Err(error(ErrorKind::Internal, "the thread ended"));
        let link = opening.await.unwrap_or_else(failed).map_err(|error| error.with_operation("connect"))?;
        events.tell(BusEvent::Connected);
        Ok(Arc::new(Self { link, folder, capabilities: capabilities(), events }))
    }

    /// Connects to `dir://path?..`; [`DirectoryConfig::from_url`] says what may follow.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a malformed URL, and those of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Arc<Self>> {
        Self::connect(DirectoryConfig::from_url(url)?).await
    }
}

#[async_trait]
impl Transport for DirectoryTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        let topology = topology.clone();
        self.link.queue.ask("provision", move |disk| topology::provision(&mut disk.store, &topology)).await
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(DirectoryPublisher { link: Arc::clone(&self.link) })
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        let link = Arc::clone(&self.link);
        let open = |disk: &mut Disk| subscribe(disk, link, spec);
        Ok(Box::new(self.link.queue.ask("subscribe", open).await?))
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        let link = Arc::clone(&self.link);
        let open = |disk: &mut Disk| replay(disk, link, spec);
        Ok(Box::new(self.link.queue.ask("replay", open).await?))
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        self.link.queue.check().map_err(|error| error.with_operation("dead letters"))?;
        Ok(Arc::new(DirectoryDeadLetters { link: Arc::clone(&self.link), name: subscription.clone() }))
    }

    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        let name = subscription.clone();
        self.link.queue.ask("remove", move |disk| topology::remove(&mut disk.store, &name)).await
    }

    fn health(&self) -> Health {
        self.link.queue.health()
    }

    fn events(&self) -> &Events {
        &self.events
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.link.queue.close(deadline).await
    }

    /// A [`PathBuf`]: the folder of the namespace.
    fn native(&self) -> &(dyn Any + Send + Sync) {
        &self.folder
    }
}

// Both make the handle on the thread: if nobody waits for it any more it is dropped, and what it opened with it.

fn subscribe(disk: &mut Disk, link: Arc<Link>, spec: SubscriptionSpec) -> Result<DirectorySubscription> {
    // Who was dropped before makes room; what fails is told when it fails again.
    drop(disk.read());
    let from = topology::subscription(&mut disk.store, &spec)?;
    let place = Place::open(&disk.store, spec.name.clone(), from)?;
    let ordered = spec.ordering == Ordering::Key;
    let wanted = Wanted { topics: spec.topics, address: Some(spec.name), ordered, since: None, until: None };
    let desk = Desk::new(Arc::clone(&link.queue), false);
    disk.readers.push(Reader::subscription(Arc::clone(&desk), spec.max_in_flight, wanted, place));
    Ok(DirectorySubscription::new(desk, link))
}

fn replay(disk: &mut Disk, link: Arc<Link>, spec: ReplaySpec) -> Result<DirectorySubscription> {
    if spec.max_in_flight == 0 {
        return Err(error(ErrorKind::Config, "max_in_flight must be at least 1"));
    }
    disk.store.move_due()?;
    let until = if spec.follow { None } else { Some(disk.store.end()?) };
    let (from, since) = match spec.from {
        ReplayFrom::Beginning => (1, None),
        ReplayFrom::Time(time) => (1, Some(time)),
        ReplayFrom::Position(position) => (position, None),
    };
    let wanted = Wanted { topics: spec.topics, address: None, ordered: true, since, until };
    let desk = Desk::new(Arc::clone(&link.queue), true);
    disk.readers.push(Reader::replay(Arc::clone(&desk), spec.max_in_flight, wanted, from));
    Ok(DirectorySubscription::new(desk, link))
}
