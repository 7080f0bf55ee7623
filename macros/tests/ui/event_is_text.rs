use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event = "shop.order.placed"]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
