use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = 1)]
struct OrderPlaced(String);

fn main() {}
