use tidings::prelude::*;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = id)]
struct Order {
    id: String,
}

async fn handle() {}

fn main() {
    let _ = Service::new("crm").on(handle);
}
