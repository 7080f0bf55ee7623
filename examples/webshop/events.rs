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

/// The customer will be asked how it was. CRM still publishes it as it was at first.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "crm.follow-up.scheduled", version = 1, key = order_id)]
pub(crate) struct FollowUpScheduledV1 {
    pub(crate) order_id: String,
    pub(crate) email: String,
    pub(crate) subject: String,
    pub(crate) days_after_order: u32,
}

/// Its second version, which the shop reads already: there are other ways to ask than by e-mail.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "crm.follow-up.scheduled", version = 2, key = order_id, upcast(from = FollowUpScheduledV1))]
pub(crate) struct FollowUpScheduled {
    pub(crate) order_id: String,
    pub(crate) channel: Channel,
    pub(crate) days_after_order: u32,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum Channel {
    Email { address: String, subject: String },
    Call { number: String },
}

impl From<FollowUpScheduledV1> for FollowUpScheduled {
    fn from(old: FollowUpScheduledV1) -> Self {
        let channel = Channel::Email { address: old.email, subject: old.subject };
        Self { order_id: old.order_id, channel, days_after_order: old.days_after_order }
    }
}
