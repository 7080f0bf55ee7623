use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
// The place of `tidings` counts though it stands behind the mistake.
#[event(name = 5, crate = elsewhere)]
struct OrderPlaced {
    order_id: String,
}

mod elsewhere {
    pub use ::tidings::{Event, Key, Result, codecs};
}

fn main() {}
