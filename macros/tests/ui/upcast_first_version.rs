use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", upcast(from = OrderPlacedV0))]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
