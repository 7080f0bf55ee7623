use tidings::prelude::*;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.order.placed", key = id)]
struct Order {
    id: String,
}

async fn handle(_: Order) {
    let shared = std::rc::Rc::new(1);
    std::future::ready(()).await;
    drop(shared);
}

fn main() {
    let _ = Service::new("crm").on(handle);
}
