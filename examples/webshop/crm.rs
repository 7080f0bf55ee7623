//! CRM: a follow-up e-mail for each order.

use tidings::prelude::*;

use crate::events::{FollowUpScheduledV1, OrderPlaced};
use crate::journal::{Journal, Noted};

pub(crate) fn service(journal: &Journal) -> Service {
    Service::new("crm").state(journal.at("crm")).on(schedule_follow_up)
}

// What cannot fail need not return a `Result`.
async fn schedule_follow_up(OrderPlaced { order }: OrderPlaced, _: Noted) -> FollowUpScheduledV1 {
    let first_name = order.customer.name.split_whitespace().next().unwrap_or("you");
    FollowUpScheduledV1 {
        subject: format!("{first_name}, how do you like it?"),
        order_id: order.order_id,
        email: order.customer.email,
        days_after_order: 14,
    }
}
