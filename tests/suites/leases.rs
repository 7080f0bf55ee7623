//! A lease that is lost while its handler runs.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::time::Duration;
use tidings::memory::MemoryBroker;
use tidings::prelude::*;
use tidings::{Running, SubscriptionName};
use tidings_tests::{Invoice, Order, Seen, bus, eventually, order};
use tokio::sync::Notify;

fn cut_off(bus: &Bus) {
    let broker = bus.transport().native().downcast_ref::<MemoryBroker>().unwrap();
    broker.lose_leases(&SubscriptionName::new("billing.shop.order.placed").unwrap()).unwrap();
}

/// Waits to be told before it returns its invoice.
async fn slow(
    order: Order,
    State(go): State<Arc<Notify>>,
    State(runs): State<Seen<(u64, bool)>>,
    lease: Lease,
) -> Invoice {
    runs.push((order.number, false));
    tokio::select! {
        () = go.notified() => {}
        () = lease.lost() => runs.push((order.number, true)),
    }
    Invoice { customer: order.customer, number: order.number }
}

async fn start(bus: &Bus, go: &Arc<Notify>, runs: &Seen<(u64, bool)>) -> Running {
    Service::new("billing").state(go.clone()).state(runs.clone()).on(slow).start(bus).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_running_handlers_result_is_applied_to_the_redelivered_copy_instead_of_running_it_twice() {
    let (bus, go, runs): (_, _, Seen<(u64, bool)>) = (bus().await, Arc::new(Notify::new()), Seen::default());
    let running = start(&bus, &go, &runs).await;
    bus.publish_all(&[order("ada", 1), order("ada", 2)]).await.unwrap();
    runs.count(1).await;
    let invoices: Seen<u64> = Seen::default();
    let crm = Service::new("crm").state(invoices.clone());
    let crm = crm.on(async |invoice: Invoice, State(seen): State<Seen<u64>>| seen.push(invoice.number));
    let _crm = crm.start(&bus).await.unwrap();
    cut_off(&bus);
    // The only instance is handed both again; it holds the lane meanwhile.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(runs.all(), [(1, false)], "neither run twice, nor overtaken, nor told that it was lost");
    go.notify_one();
    runs.count(2).await;
    go.notify_one();
    eventually("both handled", || async { running.stats().all(|(_, stats)| stats.handled == 2) }).await;
    assert_eq!((runs.all(), invoices.count(2).await), (vec![(1, false), (2, false)], vec![1, 2]));
    let drained = running.drain(Duration::from_secs(1)).await;
    assert_eq!((drained.abandoned, drained.given_back), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_handler_learns_that_another_instance_has_taken_over_and_what_it_returns_is_not_published() {
    let (bus, go, runs): (_, _, Seen<(u64, bool)>) = (bus().await, Arc::new(Notify::new()), Seen::default());
    let one = start(&bus, &go, &runs).await;
    let two = start(&bus, &go, &runs).await;
    bus.publish(&order("ada", 1)).await.unwrap();
    runs.count(1).await;
    cut_off(&bus);
    // The one that was cut off comes back behind the other, which runs it anew.
    let seen = runs.count(3).await;
    assert!(seen.contains(&(1, true)), "{seen:?}");
    go.notify_one();
    let published = |running: &Running| running.stats().map(|(_, stats)| stats.published).sum::<u64>();
    eventually("published once", || async { published(&one) + published(&two) == 1 }).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((published(&one), published(&two)), (0, 1));
}

/// Found by the simulation, seed 755: the copy that had come here counted although its own lease was lost.
#[tokio::test(start_paused = true)]
async fn a_handler_learns_that_the_copy_that_came_here_is_lost_too() {
    let (bus, go, runs): (_, _, Seen<(u64, bool)>) = (bus().await, Arc::new(Notify::new()), Seen::default());
    let one = start(&bus, &go, &runs).await;
    bus.publish(&order("ada", 1)).await.unwrap();
    runs.count(1).await;
    cut_off(&bus);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(runs.all(), [(1, false)], "the copy is here");
    let two = start(&bus, &go, &runs).await;
    cut_off(&bus);
    let seen = runs.count(3).await;
    assert!(seen.contains(&(1, true)), "{seen:?}");
    go.notify_one();
    let published = |running: &Running| running.stats().map(|(_, stats)| stats.published).sum::<u64>();
    eventually("published", || async { published(&two) == 1 }).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((published(&one), published(&two)), (0, 1));
}
