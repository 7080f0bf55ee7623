//! A transport with faults on demand, around one without.

use async_trait::async_trait;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tidings::memory::MemoryConfig;
use tidings::transport::{
    Capabilities, DeadLetter, DeadLetters, Destination, Fate, Health, Outgoing, Publisher, ReplaySpec, Subscription,
    SubscriptionSpec, Topology, Transport,
};
use tidings::{Bus, Connect, Error, ErrorKind, Result, SubscriptionName};
use tidings_core::Events;
use tokio::time::Instant;

/// A transport with faults on demand.
pub struct Faulty {
    inner: Arc<dyn Transport>,
    capabilities: Capabilities,
    /// What is sent to a subscription's address is refused.
    pub refuses: Arc<AtomicBool>,
    /// Dead letters cannot be removed.
    pub keeps: Arc<AtomicBool>,
}

impl Faulty {
    /// A bus on a memory broker of its own, and its faults, of which it has none yet; `limit` takes abilities away.
    ///
    /// # Panics
    /// If the memory transport refuses its defaults.
    pub async fn bus(limit: impl FnOnce(&mut Capabilities)) -> (Bus, Arc<Self>) {
        let (inner, config) = MemoryConfig::default().connect().await.expect("memory connects");
        let mut capabilities = inner.capabilities().clone();
        limit(&mut capabilities);
        let faulty = Arc::new(Self { inner, capabilities, refuses: Arc::default(), keeps: Arc::default() });
        (Bus::new(Arc::clone(&faulty) as Arc<dyn Transport>, config).expect("the defaults are fine"), faulty)
    }
}

impl std::fmt::Debug for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faulty").field("refuses", &self.refuses).field("keeps", &self.keeps).finish_non_exhaustive()
    }
}

struct FaultyPublisher(Arc<dyn Publisher>, Arc<AtomicBool>);

struct FaultyLetters(Arc<dyn DeadLetters>, Arc<AtomicBool>);

impl Publisher for FaultyPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing<'_>>) {
        let refuses = self.1.load(SeqCst);
        self.0.submit(&mut batch.filter_map(|out| match out.destination {
            Destination::Subscription(_) if refuses => {
                out.receipt.fail(Fate::NotPersisted, Error::new(ErrorKind::Refused, "not today"));
                None
            }
            _ => Some(out),
        }));
    }
}

#[async_trait]
impl DeadLetters for FaultyLetters {
    async fn count(&self) -> Result<u64> {
        self.0.count().await
    }

    async fn last(&self) -> Result<Option<u64>> {
        self.0.last().await
    }

    async fn page(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetter>> {
        self.0.page(after, max).await
    }

    async fn remove(&self, positions: &[u64]) -> Result<u64> {
        if self.1.load(SeqCst) {
            return Err(Error::new(ErrorKind::Connection, "cut"));
        }
        // Time for the service to handle, and to dead-letter again, what was just sent back.
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.0.remove(positions).await
    }
}

#[async_trait]
impl Transport for Faulty {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        self.inner.provision(topology).await
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(FaultyPublisher(self.inner.publisher(), Arc::clone(&self.refuses)))
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        self.inner.subscribe(spec).await
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        self.inner.replay(spec).await
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        Ok(Arc::new(FaultyLetters(self.inner.dead_letters(subscription).await?, Arc::clone(&self.keeps))))
    }

    fn health(&self) -> Health {
        self.inner.health()
    }

    fn events(&self) -> &Events {
        self.inner.events()
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.inner.close(deadline).await
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        self.inner.native()
    }
}
