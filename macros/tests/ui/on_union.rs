use tidings::Event;

#[derive(Event)]
#[event(name = "shop.order.placed")]
union OrderPlaced {
    number: u64,
    bytes: [u8; 8],
}

fn main() {}
