use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", codec = "protobuf")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
