//! What the suites share: events, buses of their own, and waiting for a thing with a deadline.

pub mod broken;
pub mod factories;
pub mod faulty;
mod kafka;
pub mod proxy;
mod rabbitmq;
pub mod server;
pub mod sim;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tidings::memory::MemoryConfig;
use tidings::prelude::*;

/// How long a test waits for what it expects; a test under paused time waits no time.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// An order, keyed by its customer.
#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = customer)]
pub struct Order {
    /// Whose orders keep their order.
    pub customer: String,
    /// The how-manieth of this customer.
    pub number: u64,
}

/// An invoice, returned for an [`Order`].
#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "shop.invoice.created", key = customer)]
pub struct Invoice {
    /// Whose.
    pub customer: String,
    /// For which order.
    pub number: u64,
}

/// Something without a key.
#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "shop.page.viewed")]
pub struct Viewed {
    /// Which page.
    pub page: u64,
}

/// An order of `customer`.
#[must_use]
pub fn order(customer: &str, number: u64) -> Order {
    Order { customer: customer.into(), number }
}

/// A bus on a memory broker of its own.
///
/// # Panics
/// If the memory transport refuses its defaults.
pub async fn bus() -> Bus {
    Bus::connect(MemoryConfig::default()).await.expect("memory connects")
}

/// Waits until `condition` holds, asking again whenever other tasks had their turn.
///
/// # Panics
/// After the [`DEADLINE`], naming `what`.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, waiting).await.is_ok(), "not within {DEADLINE:?}: {what}");
}

/// A list that handlers write to, as a state.
#[derive(Debug)]
pub struct Seen<T>(Arc<std::sync::Mutex<Vec<T>>>);

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
    /// Adds one.
    ///
    /// # Panics
    /// If a test panicked while it held the list.
    pub fn push(&self, seen: T) {
        self.0.lock().expect("no panic inside").push(seen);
    }

    /// What was seen so far.
    ///
    /// # Panics
    /// If a test panicked while it held the list.
    #[must_use]
    pub fn all(&self) -> Vec<T> {
        self.0.lock().expect("no panic inside").clone()
    }

    /// Waits for this many.
    pub async fn count(&self, count: usize) -> Vec<T> {
        eventually(&format!("{count} seen"), || async { self.all().len() >= count }).await;
        self.all()
    }
}

/// The dead letters of a subscription, once there are `count`.
///
/// # Panics
/// If they do not come within the [`DEADLINE`].
pub async fn dead_letters(bus: &Bus, subscription: &str, count: usize) -> Vec<tidings::Message> {
    let name = tidings::SubscriptionName::new(subscription).expect("a valid name");
    let letters = bus.transport().dead_letters(&name).await.expect("dead letters open");
    let page = || async { letters.page(None, 10_000).await.expect("dead letters can be read") };
    eventually(&format!("{count} dead letters"), || async { page().await.len() >= count }).await;
    page().await.into_iter().map(|letter| letter.message).collect()
}
