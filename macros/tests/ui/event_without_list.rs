use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
