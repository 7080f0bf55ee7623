//! An instance that is dropped in the middle of retries: the next one takes over all that was open, held or due later.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;
use tidings::prelude::*;
use tidings_tests::{Order, Seen, bus, eventually, order};

async fn flaky(
    order: Order,
    State(runs): State<Arc<AtomicU64>>,
    State(seen): State<Seen<u64>>,
) -> Result<(), HandlerError> {
    if runs.fetch_add(1, SeqCst) % 4 == 0 {
        return Err("busy".into());
    }
    seen.push(order.number);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dropped_instance_held_for_a_retry_is_handled_by_the_next() {
    for _ in 0..5 {
        let (bus, seen, runs): (_, Seen<u64>, _) = (bus().await, Seen::default(), Arc::new(AtomicU64::new(0)));
        let retry = RetryPolicy::default().attempts(13).backoff(Duration::from_millis(20), Duration::from_millis(200));
        let config = SubscriptionConfig::default().retry(retry);
        let start = async || {
            let service = Service::new("crm").state(seen.clone()).state(runs.clone()).on_with(config.clone(), flaky);
            service.start(&bus).await.unwrap()
        };
        let (one, two) = (start().await, start().await);
        let orders: Vec<_> = (0..1_000).map(|number| order(&number.to_string(), number)).collect();
        bus.publish_all(&orders).await.unwrap();
        seen.count(300).await;
        drop(one);
        eventually(&format!("all handled, {two:?}"), || async {
            let mut all = seen.all();
            all.sort_unstable();
            all.dedup();
            all.len() == 1_000
        })
        .await;
    }
}
