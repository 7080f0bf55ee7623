use serde::{Deserialize, Serialize};
use tidings::Event;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed")]
struct OrderPlaced {
    order: Order,
}

#[derive(Serialize, Deserialize)]
struct Order {
    #[serde(skip)]
    cache: std::rc::Rc<str>,
}

fn main() {}
