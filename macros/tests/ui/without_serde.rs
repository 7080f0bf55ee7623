// Two derives are missing, and rustc has an error for each; it does not know that they go together.
use tidings::Event;

#[derive(Event)]
#[event(name = "shop.order.placed")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
