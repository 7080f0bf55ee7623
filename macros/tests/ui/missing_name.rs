use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(version = 1, key = order_id)]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
