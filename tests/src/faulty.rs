//! A transport with faults on demand, around one without.

use async_trait::async_trait;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tidings::memory::MemoryConfig;
use tidings::transport::{
    Capabilities, DeadLetter, DeadLetters, Destination, Fate, Outgoing, Publisher, Receipt, submit_and_wait,
};
use tidings::{Bus, Connect, Error, ErrorKind, Message, Result, SubscriptionName};
use tidings_testing::wrap::{Tamper, Wrapped};

/// What becomes of a message on its way to the broker.
#[derive(Debug)]
pub enum Fault {
    /// It is refused: the broker does not have it.
    Refuse(Error),
    /// The broker has it, but its answer is lost.
    LoseAnswer,
    /// Nothing answers, until it is told to.
    Silence,
}

/// Decides what becomes of a message.
pub type Faults = Box<dyn FnMut(&Destination, &Message) -> Option<Fault> + Send>;

/// Faults on demand, put around a transport.
pub struct Faulty {
    capabilities: Capabilities,
    /// What is sent to a subscription's address is refused.
    pub refuses: Arc<AtomicBool>,
    /// Dead letters cannot be removed.
    pub keeps: Arc<AtomicBool>,
    /// What happens to what is published, if not what should.
    faults: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    faults: Mutex<Option<Faults>>,
    /// Receipts that were not answered.
    silent: Mutex<Vec<Receipt>>,
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
        let (refuses, keeps, faults) = Default::default();
        let faulty = Arc::new(Self { capabilities, refuses, keeps, faults });
        (Bus::new(Wrapped::new(inner, Arc::clone(&faulty)), config).expect("the defaults are fine"), faulty)
    }
}

impl Faulty {
    /// From now on `faults` decides what becomes of what is published.
    ///
    /// # Panics
    /// If a test panicked in one.
    pub fn set(&self, faults: impl FnMut(&Destination, &Message) -> Option<Fault> + Send + 'static) {
        *self.faults.faults.lock().expect("no panic inside") = Some(Box::new(faults));
    }

    /// What was not answered is answered, as confirmed.
    ///
    /// # Panics
    /// If a test panicked in a fault.
    pub fn confirm(&self) {
        let silent = std::mem::take(&mut *self.faults.silent.lock().expect("no panic inside"));
        silent.into_iter().for_each(Receipt::confirm);
    }

    /// What was never answered is answered, with a failure.
    ///
    /// # Panics
    /// If a test panicked in a fault.
    pub fn break_silence(&self) {
        self.faults.silent.lock().expect("no panic inside").clear();
    }
}

impl std::fmt::Debug for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faulty").field("refuses", &self.refuses).field("keeps", &self.keeps).finish_non_exhaustive()
    }
}

struct FaultyPublisher(Arc<dyn Publisher>, Arc<AtomicBool>, Arc<Shared>);

struct FaultyLetters(Arc<dyn DeadLetters>, Arc<AtomicBool>);

impl FaultyPublisher {
    fn pass(&self, out: Outgoing) -> Option<Outgoing> {
        let mut faults = self.2.faults.lock().expect("no panic inside");
        match faults.as_mut().and_then(|faults| faults(&out.destination, &out.message)) {
            None => return Some(out),
            Some(Fault::Refuse(error)) => out.receipt.fail(Fate::NotPersisted, error),
            Some(Fault::LoseAnswer) => {
                let copy = [(out.destination, out.message, out.delay, out.owed)];
                drop(submit_and_wait(&*self.0, &copy));
                out.receipt.fail(Fate::PossiblyPersisted, Error::new(ErrorKind::Connection, "the answer is lost"));
            }
            Some(Fault::Silence) => self.2.silent.lock().expect("no panic inside").push(out.receipt),
        }
        None
    }
}

impl Publisher for FaultyPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        let refuses = self.1.load(SeqCst);
        // First all faults, because a fault may submit, and an iterator must not.
        let passed: Vec<_> = batch
            .filter_map(|out| match out.destination {
                Destination::Subscription(_) if refuses => {
                    out.receipt.fail(Fate::NotPersisted, Error::new(ErrorKind::Refused, "not today"));
                    None
                }
                _ => self.pass(out),
            })
            .collect();
        self.0.submit(&mut passed.into_iter());
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

impl Tamper for Faulty {
    fn capabilities(&self, can: &mut Capabilities) {
        can.clone_from(&self.capabilities);
    }

    fn publisher(&self, inner: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        Arc::new(FaultyPublisher(inner, Arc::clone(&self.refuses), Arc::clone(&self.faults)))
    }

    fn dead_letters(&self, _: &SubscriptionName, inner: Arc<dyn DeadLetters>) -> Arc<dyn DeadLetters> {
        Arc::new(FaultyLetters(inner, Arc::clone(&self.keeps)))
    }
}
