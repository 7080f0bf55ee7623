use serde::Serialize;
use tidings::Event;

#[derive(Event, Serialize)]
#[event(name = "shop.order.placed")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
