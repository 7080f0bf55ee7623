use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 2, upcast(from = OrderPlacedV2))]
struct OrderPlaced {
    order_id: String,
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 2)]
struct OrderPlacedV2 {
    order_id: String,
}

impl From<OrderPlacedV2> for OrderPlaced {
    fn from(old: OrderPlacedV2) -> Self {
        Self { order_id: old.order_id }
    }
}

fn main() {}
