use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 2, upcast(from = OrderPlacedV1))]
struct OrderPlaced {
    order_id: String,
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 1)]
struct OrderPlacedV1 {
    id: String,
}

fn main() {}
