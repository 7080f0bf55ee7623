use serde::Deserialize;
use tidings::Event;

#[derive(Event, Deserialize)]
#[event(name = "shop.order.placed")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
