//! The facts that the services tell each other. What a service publishes is what its handler returns.

use crate::orders::Order;
use tidings::prelude::*;

/// A customer has placed an order.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 1, key = order.order_id)]
pub(crate) struct OrderPlaced {
    pub(crate) order: Order,
}

/// The parcel has its label and waits for the carrier.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "logistics.label.printed", version = 1, key = order_id)]
pub(crate) struct LabelPrinted {
    pub(crate) order_id: String,
    pub(crate) carrier: String,
    pub(crate) tracking_number: String,
}

/// The invoice is made; with `--out`, `file` is where it is kept.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "billing.invoice.created", version = 1, key = order_id)]
pub(crate) struct InvoiceCreated {
    pub(crate) order_id: String,
    pub(crate) number: String,
    pub(crate) total_cents: i64,
    pub(crate) pdf_bytes: usize,
    pub(crate) file: Option<String>,
}

/// An e-mail will ask the customer how it was.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "crm.follow-up.scheduled", version = 1, key = order_id)]
pub(crate) struct FollowUpScheduled {
    pub(crate) order_id: String,
    pub(crate) email: String,
    pub(crate) days: u32,
}
