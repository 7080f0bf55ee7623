// That `OrderPlaced` has a mistake is said once, however often it is used as an event.
use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", version = 0)]
struct OrderPlaced {
    order_id: String,
}

fn publish<E: Event>(event: E) {
    let _ = event.key();
}

fn main() {
    publish(OrderPlaced { order_id: String::new() });
    let _ = OrderPlaced::NAME;
}
