use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = total)]
struct OrderPlaced {
    total: f64,
}

fn main() {}
