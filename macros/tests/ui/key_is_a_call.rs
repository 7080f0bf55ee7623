use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = order_id.len())]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
