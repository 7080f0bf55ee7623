use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop..placed")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
