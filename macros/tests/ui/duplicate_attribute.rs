use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", name = "shop.order.paid")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
