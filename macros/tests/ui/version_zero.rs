use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 0)]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
