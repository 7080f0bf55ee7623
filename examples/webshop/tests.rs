//! The services under test, as they are, on a test bus: no broker, and no waiting, however long a retry is.

use std::time::Duration;

use tidings::DeadLetterReason;
use tidings::testing::{Faults, Harness, Test};

use super::*;
use crate::events::{Channel, FollowUpScheduled, InvoiceCreated, LabelPrinted, OrderPlaced};
use crate::orders::NOWHERE;
use crate::orders::tests::order;

fn placed(id: &str) -> OrderPlaced {
    OrderPlaced { order: order(id) }
}

#[tokio::test]
async fn an_order_becomes_an_invoice() {
    let test = Harness::memory().start([billing::service(Archive(None), &Journal::default())]).await;
    test.publish(&placed("W-1")).await; // returns when all that it causes has settled
    let invoice = test.published::<InvoiceCreated>().one();
    assert_eq!((invoice.order_id.as_str(), invoice.currency.as_str()), ("W-1", "PLN"));
    test.handled::<OrderPlaced>("billing.shop.order.placed").once();
    test.dead_letters().none();
}

#[tokio::test]
async fn an_order_that_cannot_be_taxed_is_a_dead_letter_at_once() {
    let test = Harness::memory().start([billing::service(Archive(None), &Journal::default())]).await;
    let mut poisoned = placed("W-1");
    NOWHERE.clone_into(&mut poisoned.order.customer.country);
    test.publish(&poisoned).await;
    let letter = test.dead_letters().of("billing.shop.order.placed").one();
    assert_eq!((letter.reason, letter.attempts), (Some(DeadLetterReason::Rejected), 1));
    assert_eq!(letter.error, "order W-1: no tax law for country ZZ");
    test.published::<InvoiceCreated>().none();
}

#[tokio::test]
async fn invoices_wait_for_a_disk_with_room() {
    let nowhere = std::env::temp_dir().join(format!("webshop-{}", std::process::id()));
    let test = Harness::memory().start([billing::service(Archive(Some(nowhere.clone())), &Journal::default())]).await;
    test.bus().publish(&placed("W-1")).await.unwrap();
    while test.retried("billing.shop.order.placed").all().is_empty() {
        test.advance(Duration::from_millis(1)).await;
    }
    std::fs::create_dir_all(&nowhere).unwrap();
    test.settle().await;
    test.handled::<OrderPlaced>("billing.shop.order.placed").once();
    std::fs::remove_dir_all(nowhere).unwrap();
}

#[tokio::test]
async fn a_flaky_carrier_is_asked_again_until_each_label_is_printed() {
    let test = Harness::memory().start([logistics::service(Carrier::new(0.5, 1), &Journal::default())]).await;
    let orders: Vec<_> = (0..50).map(|n| placed(&format!("W-{n}"))).collect();
    test.publish_all(&orders).await;
    test.published::<LabelPrinted>().times(50);
    let retries = test.retried("logistics.shop.order.placed").all();
    assert!(!retries.is_empty() && retries.iter().all(|retry| retry.error == "the carrier does not answer"));
    test.dead_letters().none();
}

/// All services, and this many orders placed with them.
async fn shop_with_orders(harness: Harness, count: usize) -> (Test, Ledger) {
    let (ledger, journal) = (Ledger::default(), Journal::default());
    let services = [
        shop::service(&ledger, &journal),
        logistics::service(Carrier::new(0.0, 1), &journal),
        billing::service(Archive(None), &journal),
        crm::service(&journal),
    ];
    let test = harness.start(services).await;
    for n in 0..count {
        let (id, order_id) = (format!("{n}"), format!("W-{n}"));
        ledger.open(id.as_str().into(), order_id.clone(), false);
        test.publish_with(&placed(&order_id), PublishOptions::default().with_id(id)).await;
    }
    (test, ledger)
}

#[tokio::test]
async fn an_order_runs_through_all_services() {
    let (test, ledger) = shop_with_orders(Harness::memory(), 1).await;
    let Channel::Email { address, .. } = test.published::<FollowUpScheduled>().one().channel else {
        panic!("CRM writes e-mails");
    };
    assert_eq!(address, "lukasz@example.com");
    test.handled::<FollowUpScheduled>("shop.crm.follow-up.scheduled").once();
    assert_eq!(ledger.balance().as_expected, 1, "{}", test.timeline());
    test.dead_letters().none();
}

#[tokio::test]
async fn duplicates_crashes_and_failures_change_nothing() {
    let faults = Faults::from_env().duplicate(0.3).crash_after_handle(0.3).fail_first(1).delay(Duration::from_secs(60));
    let (test, ledger) = shop_with_orders(Harness::memory().faults(faults), 20).await;
    test.published::<InvoiceCreated>().times(20); // what is published again has the id that it had
    test.published::<LabelPrinted>().times(20);
    assert_eq!(ledger.balance().as_expected, 20, "{}", test.timeline());
    test.dead_letters().none();
}
