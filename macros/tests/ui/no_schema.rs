// Without a schema it is an event all the same; only asking for the schema is a mistake.
use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed")]
struct OrderPlaced {
    order_id: String,
}

fn main() {
    let _ = OrderPlaced::json_schema();
}
