//! The promises of the design that the foundation keeps, end to end on memory.

use std::time::Duration;
use tidings::handler::Metadata;
use tidings::prelude::*;
use tidings_tests::{Invoice, Order, Seen, bus, dead_letters, order};

#[tokio::test]
async fn what_a_handler_returns_is_published_and_linked_to_its_cause() {
    let bus = bus().await;
    let seen: Seen<(Invoice, tidings::Message)> = Seen::default();
    let billing =
        Service::new("billing").on(async |order: Order| Invoice { customer: order.customer, number: order.number });
    let crm = Service::new("crm").state(seen.clone()).on(
        async |invoice: Invoice, Metadata(message): Metadata, State(seen): State<Seen<(Invoice, tidings::Message)>>| {
            seen.push((invoice, message));
        },
    );
    let (_billing, _crm) = (billing.start(&bus).await.unwrap(), crm.start(&bus).await.unwrap());
    let id = bus.publish(&order("ada", 1)).await.unwrap();
    let (invoice, message) = seen.count(1).await.remove(0);
    assert_eq!(invoice, Invoice { customer: "ada".into(), number: 1 });
    assert_eq!((message.causation_id, message.correlation_id), (Some(id.clone()), Some(id)));
    assert_eq!(message.source, "/billing");
}

#[tokio::test(start_paused = true)]
async fn a_failing_event_is_retried_then_dead_lettered_with_all_that_came() {
    let bus = bus().await;
    let runs: Seen<(u64, u32)> = Seen::default();
    let service = Service::new("billing").state(runs.clone()).on(
        async |order: Order,
               Attempt(attempt): Attempt,
               State(runs): State<Seen<(u64, u32)>>|
               -> Result<(), HandlerError> {
            runs.push((order.number, attempt));
            if order.number == 1 { Err("the bank is closed".into()) } else { Ok(()) }
        },
    );
    let running = service.start(&bus).await.unwrap();
    let options = PublishOptions::default().with_header("x-tenant", "acme");
    bus.publish_with(&order("ada", 1), options).await.unwrap();
    bus.publish(&order("ada", 2)).await.unwrap();
    let letter = dead_letters(&bus, "billing.shop.order.placed", 1).await.remove(0);
    let runs = runs.count(6).await;
    assert_eq!(runs, [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 1)], "in order, and nothing of the key overtakes");
    let get = |name| letter.headers.get_str(name).unwrap();
    assert_eq!((get("x-tenant"), get(tidings::header::REASON)), ("acme", "exhausted"));
    assert_eq!((get(tidings::header::ATTEMPTS), get(tidings::header::ERROR)), ("5", "the bank is closed"));
    assert_eq!(&letter.payload[..], br#"{"customer":"ada","number":1}"#);
    let drained = running.drain(Duration::from_secs(1)).await;
    assert_eq!((drained.abandoned, drained.given_back), (0, 0));
}
