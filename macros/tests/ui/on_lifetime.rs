use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed")]
struct OrderPlaced<'a> {
    order_id: &'a str,
}

fn main() {}
