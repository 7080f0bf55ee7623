use tidings::Event;

#[derive(Event)]
#[event(name = "shop.order.placed")]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
