//! An outage is not a poison.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tidings::prelude::*;
use tidings::{BusEvent, SubscriptionName};
use tidings_tests::{Order, Seen, bus, eventually, order};

/// Something that handlers depend on, and that can be down.
#[derive(Clone, Default)]
struct Database(Arc<AtomicBool>);

async fn store(order: Order, State(db): State<Database>, State(seen): State<Seen<u64>>) -> Result<(), HandlerError> {
    if db.0.load(SeqCst) {
        return Err("the database is down".into());
    }
    seen.push(order.number);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn an_outage_leaves_no_dead_letters_behind_and_is_over_within_a_second() {
    for policy in [RetryPolicy::default().in_order(), RetryPolicy::default().aside()] {
        let (bus, db, seen): (_, _, Seen<u64>) = (bus().await, Database::default(), Seen::default());
        let mut events = bus.events();
        let config = SubscriptionConfig::default().retry(policy);
        let running =
            Service::new("crm").state(db.clone()).state(seen.clone()).on_with(config, store).start(&bus).await.unwrap();
        db.0.store(true, SeqCst);
        let orders: Vec<_> = (0..2000).map(|n| order(&format!("customer-{}", n % 100), n)).collect();
        bus.publish_all(&orders).await.unwrap();
        while !matches!(events.next().await, Some(BusEvent::OutageBegan { .. })) {}
        assert!(running.stats().all(|(_, stats)| stats.outage));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(seen.all().is_empty(), "an hour without a success");
        db.0.store(false, SeqCst);
        let back = tokio::time::Instant::now();
        while !matches!(events.next().await, Some(BusEvent::OutageOver { .. })) {}
        assert!(back.elapsed() < Duration::from_secs(1), "{:?}", back.elapsed());
        let mut all = seen.count(2000).await;
        all.sort_unstable();
        assert!(all.into_iter().eq(0..2000), "each once");
        let name = SubscriptionName::new("crm.shop.order.placed").unwrap();
        assert_eq!(bus.transport().dead_letters(&name).await.unwrap().count().await.unwrap(), 0);
        assert!(!running.stats().any(|(_, stats)| stats.outage));
    }
}

#[tokio::test(start_paused = true)]
async fn a_few_poisoned_events_are_no_outage() {
    let bus = bus().await;
    let service = Service::new("crm").on(async |order: Order| -> Result<(), HandlerError> {
        if order.number < 4 { Err("never".into()) } else { Ok(()) }
    });
    let running = service.start(&bus).await.unwrap();
    let orders: Vec<_> = (0..4).map(|n| order(&n.to_string(), n)).collect();
    bus.publish_all(&orders).await.unwrap();
    eventually("4 dead letters", || async { running.stats().all(|(_, stats)| stats.dead_lettered == 4) }).await;
    assert!(running.stats().all(|(_, stats)| stats.failed == 20 && !stats.outage));
}

#[tokio::test(start_paused = true)]
async fn two_thousand_events_a_second_are_caught_up_with_within_a_second_of_its_end() {
    let (bus, db, seen): (_, Database, Seen<u64>) = (bus().await, Database::default(), Seen::default());
    let running = Service::new("crm").state(db.clone()).state(seen.clone()).on(store).start(&bus).await.unwrap();
    let mut events = bus.events();
    let publisher = bus.clone();
    let publishing = tokio::spawn(async move {
        let mut pace = tokio::time::interval(Duration::from_micros(500));
        for number in 0..14_000 {
            pace.tick().await;
            publisher.publish(&order(&format!("customer-{}", number % 500), number)).await.unwrap();
        }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    db.0.store(true, SeqCst);
    while !matches!(events.next().await, Some(BusEvent::OutageBegan { .. })) {}
    assert!(matches!(running.health(), tidings::transport::Health::Degraded(_)), "health tells");
    tokio::time::sleep(Duration::from_secs(5)).await;
    db.0.store(false, SeqCst);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(running.stats().all(|(_, s)| !s.outage && s.in_flight < 20), "caught up: {running:?}");
    publishing.await.unwrap();
    seen.count(14_000).await;
    assert!(running.stats().all(|(_, stats)| stats.dead_lettered == 0));
}
