//! The events that the cases publish.

use serde::{Deserialize, Serialize};
use tidings::Event;

/// The topic of an [`Order`].
pub(crate) const ORDERS: &str = "suite.order.placed";

/// An order, keyed by its customer.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(name = "suite.order.placed", key = customer)]
pub(crate) struct Order {
    /// Whose orders keep their order.
    pub(crate) customer: String,
    /// The how-manieth of this customer.
    pub(crate) number: u64,
}

/// An invoice, returned for an [`Order`].
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(name = "suite.invoice.created", key = customer)]
pub(crate) struct Invoice {
    pub(crate) customer: String,
    pub(crate) number: u64,
}

/// Something without a key.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(name = "suite.page.viewed")]
pub(crate) struct Viewed {
    pub(crate) page: u64,
}

/// An order of `customer`.
pub(crate) fn order(customer: impl Into<String>, number: u64) -> Order {
    Order { customer: customer.into(), number }
}

/// `count` orders of one customer, numbered from 0.
pub(crate) fn orders(customer: &str, count: u64) -> Vec<Order> {
    (0..count).map(|number| order(customer, number)).collect()
}

/// The orders of these numbers of each of `keys` customers, round by round.
pub(crate) fn rounds(keys: u64, numbers: std::ops::Range<u64>) -> Vec<Order> {
    numbers.flat_map(|number| (0..keys).map(move |key| order(format!("k{key}"), number))).collect()
}

/// Publishes orders one after the other, each when the one before is confirmed, while the case goes on.
pub(crate) fn publishing(bus: &tidings_core::Bus, orders: Vec<Order>) -> tokio::task::JoinHandle<()> {
    let bus = bus.clone();
    tokio::spawn(async move {
        for order in orders {
            bus.publish(&order).await.expect("it is confirmed, if need be after repeats");
        }
    })
}
