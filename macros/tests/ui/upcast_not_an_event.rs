use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 2, upcast(from = OrderPlacedV1))]
struct OrderPlaced {
    order_id: String,
}

#[derive(Serialize, Deserialize)]
struct OrderPlacedV1 {
    order_id: String,
}

impl From<OrderPlacedV1> for OrderPlaced {
    fn from(old: OrderPlacedV1) -> Self {
        Self { order_id: old.order_id }
    }
}

fn main() {}
