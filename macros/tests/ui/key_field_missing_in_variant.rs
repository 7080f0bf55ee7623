use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.changed", key = order_id)]
enum OrderChanged {
    Paid { order_id: String },
    Lost,
}

fn main() {}
