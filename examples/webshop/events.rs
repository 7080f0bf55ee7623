//! What the services tell each other. Every event keeps its order per order id.

use tidings::prelude::*;

use crate::orders::Order;

/// A customer has bought something.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = order.order_id)]
pub(crate) struct OrderPlaced {
    pub(crate) order: Order,
}

/// The parcel can go.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "logistics.label.printed", key = order_id)]
pub(crate) struct LabelPrinted {
    pub(crate) order_id: String,
    pub(crate) carrier: String,
    pub(crate) tracking_number: String,
    pub(crate) label: String,
}

/// There is an invoice. The event refers to the document, it does not carry it.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "billing.invoice.created", key = order_id)]
pub(crate) struct InvoiceCreated {
    pub(crate) order_id: String,
    pub(crate) number: String,
    pub(crate) total_cents: i64,
    pub(crate) currency: String,
    pub(crate) file: String,
    pub(crate) bytes: usize,
}

/// The customer will be asked how it was.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "crm.follow-up.scheduled", key = order_id)]
pub(crate) struct FollowUpScheduled {
    pub(crate) order_id: String,
    pub(crate) email: String,
    pub(crate) subject: String,
    pub(crate) days_after_order: u32,
}
