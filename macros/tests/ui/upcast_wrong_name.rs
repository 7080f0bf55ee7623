use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 2, upcast(from = OrderPaid))]
struct OrderPlaced {
    order_id: String,
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.paid")]
struct OrderPaid {
    order_id: String,
}

impl From<OrderPaid> for OrderPlaced {
    fn from(old: OrderPaid) -> Self {
        Self { order_id: old.order_id }
    }
}

fn main() {}
