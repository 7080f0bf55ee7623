use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
// There is no #[event(..)].
struct OrderPlaced {
    order_id: String,
}

fn main() {}
