//! Events that step aside for long hold nobody up.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::time::Duration;
use tidings::memory::MemoryBroker;
use tidings::prelude::*;
use tidings_tests::{Seen, Viewed, bus, eventually};

const ASIDE: u64 = 10_000;
const OTHERS: u64 = 100_000;
const LONG: Duration = Duration::from_secs(600);

/// What the handler notes of each success: which event, in which attempt, how long after its publish.
type Note = (u64, u32, Duration);

async fn handle(view: Viewed, delivered: Delivered, State(seen): State<Seen<Note>>) -> Result<(), HandlerError> {
    if view.page < ASIDE && delivered.attempt == 1 {
        return Err(HandlerError::retry_after(LONG, "not before ten minutes have passed"));
    }
    seen.push((view.page, delivered.attempt, delivered.delay.unwrap_or_default()));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_events_aside_for_ten_minutes_change_nothing_for_others() {
    let config = tidings::memory::MemoryConfig::default();
    let transport = tidings::memory::MemoryTransport::connect(config).unwrap();
    let clock = tidings_core::Clock::of_tokio();
    let bus = Bus::with_clock(transport, tidings::BusConfig::default(), clock).unwrap();
    let seen: Seen<Note> = Seen::default();
    let config = SubscriptionConfig::default().without_outage();
    let running = Service::new("crm").state(seen.clone()).on_with(config, handle).start(&bus).await.unwrap();
    let publish = async |pages: std::ops::Range<u64>| {
        let views: Vec<_> = pages.map(|page| Viewed { page }).collect();
        for part in views.chunks(1_000) {
            bus.publish_all(part).await.unwrap();
        }
    };
    publish(0..ASIDE).await;
    eventually("all aside", || async { running.stats().all(|(_, s)| s.retried == ASIDE && s.in_flight == 0) }).await;
    let stored = || bus.transport().native().downcast_ref::<MemoryBroker>().unwrap().stats();
    let (waiting, start) = (stored().stored - stored().retained, tokio::time::Instant::now());
    publish(ASIDE..ASIDE + OTHERS).await;
    let others = seen.count(OTHERS as usize).await;
    assert!(start.elapsed() < LONG / 2, "the others wait for nothing");
    assert!(
        others
            .iter()
            .all(|(page, attempt, delay)| { *page >= ASIDE && *attempt == 1 && *delay < Duration::from_secs(1) })
    );
    let now = stored().stored - stored().retained;
    assert!(now <= waiting + waiting / 10, "what waits is what stepped aside: {waiting} bytes, now {now}");
    tokio::time::sleep(LONG).await;
    let all = seen.count((ASIDE + OTHERS) as usize).await;
    assert!(
        all[OTHERS as usize..].iter().all(|(page, attempt, delay)| *page < ASIDE && *attempt == 2 && *delay >= LONG)
    );
    assert!(running.stats().all(|(_, stats)| stats.dead_lettered == 0));
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_a_lower_bound() {
    let bus = bus().await;
    let seen: Seen<u64> = Seen::default();
    let service = Service::new("crm").state(seen.clone()).on(async |view: Viewed, State(seen): State<Seen<u64>>| {
        seen.push(view.page);
    });
    let _running = service.start(&bus).await.unwrap();
    let start = tokio::time::Instant::now();
    for (page, seconds) in [(1, 30), (2, 10), (3, 20)] {
        let options = PublishOptions::default().with_delay(Duration::from_secs(seconds));
        bus.publish_with(&Viewed { page }, options).await.unwrap();
    }
    for (count, seconds) in [(1, 10), (2, 20), (3, 30)] {
        seen.count(count).await;
        let after = start.elapsed();
        assert!((Duration::from_secs(seconds)..Duration::from_secs(seconds + 1)).contains(&after), "{after:?}");
    }
    assert_eq!(seen.all(), [2, 3, 1]);
}
