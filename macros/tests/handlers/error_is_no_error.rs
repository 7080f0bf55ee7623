use tidings::prelude::*;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = id)]
struct Order {
    id: String,
}

async fn handle(_: Order) -> Result<(), u32> {
    Err(1)
}

fn main() {
    let _ = Service::new("crm").on(handle);
}
