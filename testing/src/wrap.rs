//! A transport around a transport: what passes between core and a broker can be changed, lost or held.
//!
//! A [`Tamper`] says what is changed; everything else passes as it is.

use async_trait::async_trait;
use parking_lot::Mutex;
use slab::Slab;
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use tidings_core::transport::{
    Acker, BoxFuture, Capabilities, DeadLetters, Delivery, Flushed, Health, Lease, Polled, Publisher, ReplaySpec,
    Settle, Settlement, Subscription, SubscriptionSpec, Tag, Topology, Transport,
};
use tidings_core::{Events, Result, SubscriptionName};
use tokio::time::Instant;

/// What is changed on the way. What a tamper does not say passes unchanged.
#[async_trait]
pub trait Tamper: Send + Sync + 'static {
    /// What the transport says it can do.
    fn capabilities(&self, _can: &mut Capabilities) {}

    /// What publishes; often a publisher around `inner`.
    fn publisher(&self, inner: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        inner
    }

    /// What is subscribed to.
    fn spec(&self, _spec: &mut SubscriptionSpec) {}

    /// What is read; often [`Intercepted`].
    fn subscription(&self, _spec: &SubscriptionSpec, inner: Box<dyn Subscription>) -> Box<dyn Subscription> {
        inner
    }

    /// What a replay reads.
    fn replay(&self, _spec: &ReplaySpec, inner: Box<dyn Subscription>) -> Box<dyn Subscription> {
        inner
    }

    /// The dead letters of a subscription.
    fn dead_letters(&self, _subscription: &SubscriptionName, inner: Arc<dyn DeadLetters>) -> Arc<dyn DeadLetters> {
        inner
    }

    /// Whether the broker can be used.
    fn health(&self, inner: Health) -> Health {
        inner
    }

    /// Before the transport is closed.
    async fn closing(&self) {}
}

/// A transport around a transport.
pub struct Wrapped<T> {
    inner: Arc<dyn Transport>,
    capabilities: Capabilities,
    tamper: Arc<T>,
}

impl<T: Tamper> Wrapped<T> {
    /// Puts `tamper` around `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn Transport>, tamper: Arc<T>) -> Arc<Self> {
        let mut capabilities = inner.capabilities().clone();
        tamper.capabilities(&mut capabilities);
        Arc::new(Self { inner, capabilities, tamper })
    }
}

impl<T> fmt::Debug for Wrapped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wrapped").field("inner", &self.inner.name()).finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: Tamper> Transport for Wrapped<T> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        let mut topology = topology.clone();
        topology.subscriptions.iter_mut().for_each(|spec| self.tamper.spec(spec));
        self.inner.provision(&topology).await
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        self.tamper.publisher(self.inner.publisher())
    }

    async fn subscribe(&self, mut spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        self.tamper.spec(&mut spec);
        Ok(self.tamper.subscription(&spec, self.inner.subscribe(spec.clone()).await?))
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        Ok(self.tamper.replay(&spec, self.inner.replay(spec.clone()).await?))
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        Ok(self.tamper.dead_letters(subscription, self.inner.dead_letters(subscription).await?))
    }

    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        self.inner.remove_subscription(subscription).await
    }

    fn health(&self) -> Health {
        self.tamper.health(self.inner.health())
    }

    fn events(&self) -> &Events {
        self.inner.events()
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.tamper.closing().await;
        self.inner.close(deadline).await
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        self.inner.native()
    }
}

/// What is changed in what a subscription hands out and in how that is settled.
pub trait Intercept: Send + Sync + 'static {
    /// What becomes of a delivery: it is handed out, changed or not, or kept back (`None`). What is dropped is abandoned.
    fn delivered(&self, delivery: Delivery) -> Option<Delivery> {
        Some(delivery)
    }

    /// A delivery is handed out under `tag`, by which it is settled.
    fn handed_out(&self, _tag: Tag, _delivery: &Delivery) {}

    /// How a delivery is settled at the broker: by default as it was settled here.
    fn settled(&self, acker: Acker, settlement: Settlement) {
        settle(acker, settlement);
    }

    /// As [`settled`](Self::settled), which it calls by default, for who must know which delivery it is.
    fn settled_as(&self, _tag: Tag, acker: Acker, settlement: Settlement) {
        self.settled(acker, settlement);
    }

    /// What becomes of what one poll found, before it is handed out.
    fn polled(&self, _polled: &mut Polled) {}

    /// Before it is closed.
    fn closing(&self) -> BoxFuture<()> {
        Box::pin(std::future::ready(()))
    }
}

/// Settles `acker` so.
pub fn settle(acker: Acker, settlement: Settlement) {
    match settlement {
        Settlement::Ack => acker.ack(),
        Settlement::Release { after } => acker.release(after),
        Settlement::Abandon => drop(acker),
    }
}

/// A subscription whose deliveries and settlements pass an [`Intercept`].
pub struct Intercepted<I> {
    inner: Box<dyn Subscription>,
    found: Polled,
    settling: Arc<Settling<I>>,
}

struct Settling<I> {
    intercept: Arc<I>,
    open: Mutex<Open>,
}

/// The ackers of what is out, by place; a place that is used again gets another tag.
#[derive(Default)]
struct Open {
    ackers: Slab<(Tag, Acker)>,
    epoch: u32,
}

impl<I: Intercept> Intercepted<I> {
    /// Puts `intercept` around `inner`.
    #[must_use]
    pub fn boxed(inner: Box<dyn Subscription>, intercept: Arc<I>) -> Box<dyn Subscription> {
        let settling = Arc::new(Settling { intercept, open: Mutex::default() });
        Box::new(Self { inner, found: Polled::default(), settling })
    }
}

impl<I: Intercept> Settling<I> {
    /// The delivery with an acker that is intercepted.
    fn open(self: &Arc<Self>, mut delivery: Delivery) -> Delivery {
        let mut open = self.open.lock();
        open.epoch = open.epoch.wrapping_add(1);
        let epoch = open.epoch;
        let entry = open.ackers.vacant_entry();
        let tag = Tag { epoch, seq: entry.key() as u64 };
        let ours = Acker::new(Arc::clone(self) as Arc<dyn Settle>, tag);
        entry.insert((tag, std::mem::replace(&mut delivery.acker, ours)));
        drop(open);
        self.intercept.handed_out(tag, &delivery);
        delivery
    }
}

impl<I: Intercept> Settle for Settling<I> {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        // The lock is free again before what is settled can call anything.
        let removed = self.open.lock().ackers.try_remove(tag.seq as usize);
        if let Some((_, acker)) = removed {
            self.intercept.settled_as(tag, acker, settlement);
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        let open = self.open.lock();
        open.ackers.get(tag.seq as usize).filter(|(its, _)| *its == tag).map_or(Lease::Lost, |(_, acker)| acker.lease())
    }
}

impl<I: Intercept> Subscription for Intercepted<I> {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        let before = (out.deliveries.len(), out.notices.len());
        loop {
            let polled = self.inner.poll_batch(cx, max, &mut self.found);
            let nothing = self.found.deliveries.is_empty() && self.found.notices.is_empty();
            self.settling.intercept.polled(&mut self.found);
            out.notices.append(&mut self.found.notices);
            let settling = &self.settling;
            let passed = self.found.deliveries.drain(..).filter_map(|found| settling.intercept.delivered(found));
            out.deliveries.extend(passed.map(|delivery| settling.open(delivery)));
            let something = before != (out.deliveries.len(), out.notices.len());
            match polled {
                // All that was found was kept back: ready with nothing would say that it has stopped.
                Poll::Ready(Ok(())) if !nothing && !something => {}
                Poll::Pending if something => return Poll::Ready(Ok(())),
                other => return other,
            }
        }
    }

    fn stop(&mut self) {
        self.inner.stop();
    }

    fn close(self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed> {
        Box::pin(async move {
            self.settling.intercept.closing().await;
            self.inner.close(deadline).await
        })
    }
}
