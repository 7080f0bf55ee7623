//! Memory with one defect each, for the conformance suite to catch.

use async_trait::async_trait;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings::memory::{MemoryConfig, MemoryTransport};
use tidings::transport::{
    Acker, BoxFuture, Delivery, Destination, Notice, Outgoing, Polled, Publisher, ReplaySpec, Settle, Settlement,
    Subscription, SubscriptionSpec, Tag, Transport, submit_and_wait,
};
use tidings::{SubscriptionName, header};
use tidings_conformance::{Broker, Factory};
use tidings_core::Result;
use tidings_testing::wrap::{Intercept, Intercepted, Tamper, Wrapped, settle};

/// One thing that a transport does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// None: to see that the wrapping itself breaks nothing.
    None,
    /// What is given back is gone.
    LosesOnNack,
    /// It is acked when it is handed out.
    AcksEarly,
    /// A dropped delivery is acked.
    AcksOnDrop,
    /// What comes together comes backwards.
    ReordersWithinAKey,
    /// Each instance gets everything.
    DeliversToTwoMembers,
    /// A new owner is not told to hold back.
    LetsANewOwnerOvertake,
    /// Nothing is marked as redelivered.
    UnmarkedDuplicate,
    /// Delays are not kept at all.
    ForgetsTheDelay,
    /// Delays are only half as long.
    DeliversEarly,
    /// A retry that steps aside begins to count anew.
    ResetsAttempts,
    /// A dead letter arrives without headers.
    DropsTheDeadLettersHeaders,
    /// What failed is confirmed.
    SwallowsAPublishFailure,
    /// It is confirmed, and stored a little later.
    ConfirmsBeforeStoring,
    /// Closing a subscription does not end.
    HangsOnClose,
    /// `max_in_flight` means nothing to it.
    IgnoresMaxInFlight,
    /// What is settled stays in memory.
    GrowsWithoutBound,
    /// Replayed events look like new ones.
    ReplaysUnmarked,
    /// What retention took is not told.
    SwallowsGaps,
    /// What is sent to one subscription's address reaches all of its topic.
    SharesAddresses,
    /// What is delivered has lost its headers.
    DropsHeaders,
}

/// Memory with a defect.
#[derive(Clone, Copy, Debug)]
pub struct Broken(pub Defect);

struct BrokenBroker {
    config: MemoryConfig,
    defect: Arc<Tampering>,
    /// A broker ends with its last handle.
    _keeps: Arc<MemoryTransport>,
}

/// What one case shares of a defect.
struct Tampering {
    defect: Defect,
    subscribed: AtomicUsize,
    leaked: Arc<Mutex<Vec<Vec<u8>>>>,
}

#[async_trait]
impl Factory for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        // Only where open events come back late can a new owner overtake them.
        let late = if self.0 == Defect::LetsANewOwnerOvertake { 300 } else { 0 };
        let config = MemoryConfig { redelivery_delay: Duration::from_millis(late), ..MemoryConfig::named(namespace) };
        let keeps = MemoryTransport::connect(config.clone())?;
        let defect = Tampering { defect: self.0, subscribed: AtomicUsize::new(0), leaked: Arc::default() };
        Ok(Arc::new(BrokenBroker { config, defect: Arc::new(defect), _keeps: keeps }))
    }

    fn in_process(&self) -> bool {
        true
    }
}

#[async_trait]
impl Broker for BrokenBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        let inner = MemoryTransport::connect(self.config.clone())?;
        let gone = Arc::new(AtomicBool::new(false));
        Ok(Wrapped::new(inner, Arc::new(Connection { of: Arc::clone(&self.defect), gone })))
    }

    async fn clean_up(&self) -> Result<()> {
        Ok(())
    }
}

struct Connection {
    of: Arc<Tampering>,
    /// It was closed.
    gone: Arc<AtomicBool>,
}

#[async_trait]
impl Tamper for Connection {
    fn publisher(&self, inner: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        Arc::new(BrokenPublisher { inner, defect: self.of.defect, gone: Arc::clone(&self.gone) })
    }

    fn spec(&self, spec: &mut SubscriptionSpec) {
        match self.of.defect {
            Defect::IgnoresMaxInFlight => spec.max_in_flight = 1_000_000,
            Defect::DeliversToTwoMembers => {
                let instance = self.of.subscribed.fetch_add(1, SeqCst);
                let name = format!("{}.i{instance}", spec.name);
                if instance > 0 {
                    spec.name = SubscriptionName::new(name).expect("a valid name");
                }
            }
            _ => {}
        }
    }

    fn subscription(&self, _: &SubscriptionSpec, inner: Box<dyn Subscription>) -> Box<dyn Subscription> {
        let (defect, leaked) = (self.of.defect, Arc::clone(&self.of.leaked));
        Intercepted::boxed(inner, Arc::new(BrokenSubscription { defect, leaked }))
    }

    fn replay(&self, _: &ReplaySpec, inner: Box<dyn Subscription>) -> Box<dyn Subscription> {
        let (defect, leaked) = (self.of.defect, Arc::clone(&self.of.leaked));
        Intercepted::boxed(inner, Arc::new(BrokenSubscription { defect, leaked }))
    }

    async fn closing(&self) {
        self.gone.store(true, SeqCst);
    }
}

struct BrokenPublisher {
    inner: Arc<dyn Publisher>,
    defect: Defect,
    gone: Arc<AtomicBool>,
}

impl Publisher for BrokenPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        match self.defect {
            Defect::SwallowsAPublishFailure => batch.for_each(|out| self.store(out, Duration::ZERO)),
            Defect::ConfirmsBeforeStoring => batch.for_each(|out| self.store(out, Duration::from_millis(50))),
            // A copy of each, because what is sent is only borrowed.
            _ => batch.for_each(|out| self.send(out)),
        }
    }
}

impl BrokenPublisher {
    /// Confirms it, whatever becomes of it.
    fn store(&self, out: Outgoing, later: Duration) {
        if self.gone.load(SeqCst) {
            return self.inner.submit(&mut std::iter::once(out));
        }
        let posts = [(out.destination, out.message.clone(), out.delay, out.owed)];
        let (inner, gone) = (Arc::clone(&self.inner), Arc::clone(&self.gone));
        out.receipt.confirm();
        if later.is_zero() {
            drop(submit_and_wait(&*inner, &posts));
            return;
        }
        tokio::spawn(async move {
            tokio::time::sleep(later).await;
            if !gone.load(SeqCst) {
                submit_and_wait(&*inner, &posts).await;
            }
        });
    }

    fn send(&self, mut out: Outgoing) {
        let mut message = Arc::clone(&out.message);
        match (self.defect, &out.destination) {
            (Defect::ForgetsTheDelay, _) => out.delay = out.delay.map(|_| Duration::ZERO),
            (Defect::DeliversEarly, _) => out.delay = out.delay.map(|delay| delay / 2),
            (Defect::ResetsAttempts, Destination::Subscription(_)) => {
                Arc::make_mut(&mut message).headers.remove(header::ATTEMPTS);
            }
            (Defect::DropsTheDeadLettersHeaders, Destination::DeadLetter(_)) => {
                Arc::make_mut(&mut message).headers = Default::default();
            }
            (Defect::SharesAddresses, Destination::Subscription(_)) if out.delay.is_none() => {
                out.destination = Destination::Topic(message.topic.clone());
            }
            _ => {}
        }
        let Outgoing { destination, delay, owed, receipt, .. } = out;
        self.inner.submit(&mut std::iter::once(Outgoing { destination, message, delay, owed, receipt }));
    }
}

struct BrokenSubscription {
    defect: Defect,
    leaked: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Intercept for BrokenSubscription {
    fn delivered(&self, mut delivery: Delivery) -> Option<Delivery> {
        match self.defect {
            Defect::AcksEarly => {
                let nothing = Acker::new(Arc::new(Nothing), Tag { epoch: 0, seq: 0 });
                std::mem::replace(&mut delivery.acker, nothing).ack();
            }
            Defect::UnmarkedDuplicate => delivery.redelivered = false,
            Defect::ReplaysUnmarked => delivery.replayed = false,
            Defect::DropsHeaders => Arc::make_mut(&mut delivery.message).headers = Default::default(),
            Defect::GrowsWithoutBound => self.leaked.lock().push(delivery.message.payload.to_vec()),
            _ => {}
        }
        Some(delivery)
    }

    fn settled(&self, acker: Acker, settlement: Settlement) {
        let wrong = match (self.defect, settlement) {
            (Defect::LosesOnNack, Settlement::Release { .. }) => Settlement::Ack,
            (Defect::AcksOnDrop, Settlement::Abandon) => Settlement::Ack,
            (Defect::ForgetsTheDelay, Settlement::Release { .. }) => Settlement::Release { after: Duration::ZERO },
            (Defect::DeliversEarly, Settlement::Release { after }) => Settlement::Release { after: after / 2 },
            (_, settlement) => settlement,
        };
        settle(acker, wrong);
    }

    fn polled(&self, polled: &mut Polled) {
        match self.defect {
            Defect::ReordersWithinAKey => polled.deliveries.reverse(),
            Defect::LetsANewOwnerOvertake => {
                let holds = |notice: &Notice| matches!(notice, Notice::HoldBack { .. } | Notice::HoldBackOver { .. });
                polled.notices.retain(|notice| !holds(notice));
            }
            Defect::SwallowsGaps => polled.notices.retain(|notice| !matches!(notice, Notice::Gap { .. })),
            _ => {}
        }
    }

    fn closing(&self) -> BoxFuture<()> {
        match self.defect {
            Defect::HangsOnClose => Box::pin(std::future::pending()),
            _ => Box::pin(std::future::ready(())),
        }
    }
}

/// Settles nothing.
struct Nothing;

impl Settle for Nothing {
    fn settle(&self, _: Tag, _: Settlement) {}

    fn lease(&self, _: Tag) -> tidings::transport::Lease {
        tidings::transport::Lease::Live
    }
}
