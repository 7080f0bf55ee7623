use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = order.id)]
struct OrderPlaced {
    order: Order,
}

#[derive(Serialize, Deserialize)]
struct Order {
    number: u64,
}

fn main() {}
