use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", topic = "_tidings.dead.billing")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
