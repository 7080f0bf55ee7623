//! The events that the cases publish.

use serde::{Deserialize, Serialize};
use tidings::Event;

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
