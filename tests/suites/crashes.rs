//! An event that ends its process each time is found out, and takes no other with it.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::time::Duration;
use tidings::prelude::*;
use tidings_tests::{Seen, Viewed, bus, dead_letters, eventually};
use tokio::sync::mpsc;

#[derive(Clone)]
struct Crash(mpsc::UnboundedSender<()>);

/// Event 500 ends the instance in the middle of its handler.
async fn handle(
    event: Viewed,
    Attempt(attempt): Attempt,
    State(crash): State<Crash>,
    State(seen): State<Seen<(u64, u32)>>,
) {
    if event.page == 500 {
        crash.0.send(()).unwrap();
        std::future::pending::<()>().await;
    }
    seen.push((event.page, attempt));
}

#[tokio::test(start_paused = true)]
async fn an_event_that_ends_its_process_ends_as_one_dead_letter_and_its_neighbours_lose_no_attempt() {
    let (bus, seen): (_, Seen<(u64, u32)>) = (bus().await, Seen::default());
    let (crash, mut crashed) = mpsc::unbounded_channel();
    let start = async || {
        let config = SubscriptionConfig::default().max_in_flight(1_000);
        Service::new("crm")
            .state(Crash(crash.clone()))
            .state(seen.clone())
            .on_with(config, handle)
            .start(&bus)
            .await
            .unwrap()
    };
    let mut instance = start().await;
    let views: Vec<_> = (0..1_001).map(|page| Viewed { page }).collect();
    bus.publish_all(&views).await.unwrap();
    let mut crashes = 0;
    let letter = loop {
        tokio::select! {
            letter = dead_letters(&bus, "crm.shop.page.viewed", 1) => break letter,
            _ = crashed.recv() => {
                crashes += 1;
                drop(instance);
                instance = start().await;
            }
        }
    };
    assert_eq!(crashes, 3 + 1 + 5, "3 are forgiven, then it runs alone, 5 times more");
    assert_eq!(letter.len(), 1);
    assert_eq!(letter[0].headers.get_str(tidings::header::REASON), Some("suspect"));
    let mut all = seen.count(1_000).await;
    all.sort_unstable();
    all.dedup();
    let expected: Vec<_> = (0..1_001).filter(|page| *page != 500).map(|page| (page, 1)).collect();
    assert_eq!(all, expected, "every other event was handled in its first attempt");
    eventually("nothing left", || async { instance.stats().all(|(_, stats)| stats.in_flight == 0) }).await;
    instance.drain(Duration::from_secs(1)).await;
}
