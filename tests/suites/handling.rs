//! What happens to an event in a service: retries, order, sharing, drain.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings::handler::Metadata;
use tidings::prelude::*;
use tidings::{BusEvent, MessageId, header};
use tidings_tests::{Invoice, Order, Seen, Viewed, bus, dead_letters, eventually, order};
use tokio::time::Instant;

/// Which event, in which attempt, when.
type Run = (u64, u32, Instant);

async fn fails_one(order: Order, Attempt(attempt): Attempt, State(runs): State<Seen<Run>>) -> Result<(), HandlerError> {
    runs.push((order.number, attempt, Instant::now()));
    if order.number == 1 { Err("not now".into()) } else { Ok(()) }
}

async fn with_policy(policy: RetryPolicy) -> (Bus, Seen<Run>, tidings::Running) {
    let (bus, runs): (_, Seen<Run>) = (bus().await, Seen::default());
    let config = SubscriptionConfig::default().retry(policy);
    let running = Service::new("crm").state(runs.clone()).on_with(config, fails_one).start(&bus).await.unwrap();
    (bus, runs, running)
}

#[tokio::test(start_paused = true)]
async fn a_retry_in_order_holds_its_key_and_no_other() {
    let policy =
        RetryPolicy::default().attempts(3).backoff(Duration::from_secs(1), Duration::from_secs(1)).without_jitter();
    let (bus, runs, running) = with_policy(policy.in_order()).await;
    let start = Instant::now();
    bus.publish_all(&[order("ada", 1), order("ada", 2), order("bob", 3)]).await.unwrap();
    let runs = runs.count(5).await;
    let order: Vec<_> = runs.iter().map(|(number, attempt, _)| (*number, *attempt)).collect();
    assert_eq!(order, [(1, 1), (3, 1), (1, 2), (1, 3), (2, 1)]);
    assert!(runs[1].2 == start && runs[2].2 >= start + Duration::from_secs(1));
    assert!(runs[4].2 >= start + Duration::from_secs(2), "behind all that was held");
    assert!(running.stats().all(|(_, stats)| stats.retried == 2 && stats.dead_lettered == 1));
}

#[tokio::test(start_paused = true)]
async fn a_retry_aside_holds_nothing_and_counts_its_attempts_through_copies() {
    let policy =
        RetryPolicy::default().attempts(3).backoff(Duration::from_secs(20), Duration::from_secs(20)).without_jitter();
    let (bus, runs, _running) = with_policy(policy.aside()).await;
    let start = Instant::now();
    bus.publish_all(&[order("ada", 1), order("ada", 2)]).await.unwrap();
    let runs = runs.count(4).await;
    let order: Vec<_> = runs.iter().map(|(number, attempt, _)| (*number, *attempt)).collect();
    assert_eq!(order, [(1, 1), (2, 1), (1, 2), (1, 3)]);
    assert!(runs[1].2 == start && runs[3].2 >= start + Duration::from_secs(40));
    let letter = dead_letters(&bus, "crm.shop.order.placed", 1).await.remove(0);
    assert_eq!(letter.headers.get_str(header::ATTEMPTS), Some("3"));
}

#[tokio::test(start_paused = true)]
async fn holds_end_at_their_limit() {
    let policy =
        RetryPolicy::default().attempts(3).backoff(Duration::from_secs(4), Duration::from_secs(4)).without_jitter();
    let (bus, runs): (_, Seen<Run>) = (bus().await, Seen::default());
    let config = SubscriptionConfig::default().retry(policy.hold_at_most(Duration::from_secs(10)));
    let service = Service::new("crm").state(runs.clone()).on_with(
        config,
        async |order: Order, Attempt(attempt): Attempt, State(runs): State<Seen<Run>>| -> Result<(), HandlerError> {
            runs.push((order.number, attempt, Instant::now()));
            Err(HandlerError::retry_after(Duration::from_secs(9), "later"))
        },
    );
    let start = Instant::now();
    let _running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    let after: Vec<_> = runs.count(3).await.iter().map(|(.., at)| at.duration_since(start).as_secs()).collect();
    assert_eq!(after, [0, 9, 10], "as the handler said, but 10 s in all");
    assert_eq!(dead_letters(&bus, "crm.shop.order.placed", 1).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_fails_takes_no_more_than_its_share() {
    let policy = RetryPolicy::default().backoff(Duration::from_secs(5), Duration::from_secs(5)).without_jitter();
    let (bus, runs): (_, Seen<Run>) = (bus().await, Seen::default());
    let config = SubscriptionConfig::default().retry(policy).max_in_flight(40);
    let service = Service::new("crm").state(runs.clone()).on_with(
        config,
        async |order: Order, Attempt(attempt): Attempt, State(runs): State<Seen<Run>>| -> Result<(), HandlerError> {
            runs.push((order.number, attempt, Instant::now()));
            if order.customer == "hot" && order.number == 0 { Err("not now".into()) } else { Ok(()) }
        },
    );
    let running = service.start(&bus).await.unwrap();
    let start = Instant::now();
    let mut orders: Vec<_> = (0..100).map(|number| order("hot", number)).collect();
    orders.extend((0..100).map(|number| order("other", 1_000 + number)));
    bus.publish_all(&orders).await.unwrap();
    eventually("all handled", || async { running.stats().all(|(_, s)| s.handled == 199 && s.dead_lettered == 1) })
        .await;
    assert!(start.elapsed() < Duration::from_secs(5), "the first holds 40, so its attempts follow at once");
    let attempts: Vec<_> = runs.all().into_iter().filter(|run| run.0 == 0).map(|run| run.1).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5], "and none is lost");
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_takes_too_long_has_failed() {
    let bus = bus().await;
    let config = SubscriptionConfig::default().timeout(Duration::from_secs(2)).retry(RetryPolicy::none());
    let service = Service::new("crm").on_with(config, async |_: Order| std::future::pending::<()>().await);
    let _running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    let letter = dead_letters(&bus, "crm.shop.order.placed", 1).await.remove(0);
    assert_eq!(letter.headers.get_str(header::ERROR), Some("handler took longer than 2s"));
}

#[tokio::test(start_paused = true)]
async fn errors_are_final_if_the_policy_says_so() {
    let (bus, runs): (_, Seen<u32>) = (bus().await, Seen::default());
    let config = SubscriptionConfig::default().retry(RetryPolicy::default().reject_on::<std::num::ParseIntError>());
    let service = Service::new("crm").state(runs.clone()).on_with(
        config,
        async |order: Order, Attempt(attempt): Attempt, State(runs): State<Seen<u32>>| -> Result<(), HandlerError> {
            runs.push(attempt);
            order.customer.parse::<u64>()?;
            Ok(())
        },
    );
    let _running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    let letter = dead_letters(&bus, "crm.shop.order.placed", 1).await.remove(0);
    assert_eq!((letter.headers.get_str(header::REASON), runs.all()), (Some("rejected"), vec![1]));
}

#[tokio::test(start_paused = true)]
async fn events_of_a_key_keep_their_order_among_many_workers() {
    let (bus, seen): (_, Seen<(String, u64)>) = (bus().await, Seen::default());
    let service =
        Service::new("crm").state(seen.clone()).on(async |order: Order, State(seen): State<Seen<(String, u64)>>| {
            let pause = Duration::from_millis(order.number % 7);
            tokio::time::sleep(pause).await;
            seen.push((order.customer, order.number));
        });
    let _running = service.start(&bus).await.unwrap();
    let orders: Vec<_> = (0..5_000).map(|n| order(&format!("k{}", n % 200), n / 200)).collect();
    let start = Instant::now();
    bus.publish_all(&orders).await.unwrap();
    let seen = seen.count(5_000).await;
    let mut last = std::collections::HashMap::new();
    assert!(seen.into_iter().all(|(key, number)| last.insert(key, number).is_none_or(|before| before + 1 == number)));
    assert!(start.elapsed() < Duration::from_secs(5), "other keys ran meanwhile: {:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn never_more_run_or_are_in_flight_than_allowed() {
    let bus = bus().await;
    let (running_now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let config = SubscriptionConfig::default().concurrency(3).max_in_flight(5);
    let state = (running_now, Arc::clone(&most));
    let service = Service::new("crm").state(state).on_with(
        config,
        async |_: Viewed, State((now, most)): State<(Arc<AtomicUsize>, Arc<AtomicUsize>)>| {
            most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            tokio::time::sleep(Duration::from_millis(10)).await;
            now.fetch_sub(1, SeqCst);
        },
    );
    let running = service.start(&bus).await.unwrap();
    let views: Vec<_> = (0..100).map(|page| Viewed { page }).collect();
    bus.publish_all(&views).await.unwrap();
    let mut in_flight = 0;
    eventually("all handled", || {
        let stats = running.stats().next().unwrap().1;
        in_flight = in_flight.max(stats.in_flight);
        async move { stats.handled == 100 }
    })
    .await;
    assert_eq!((most.load(SeqCst), in_flight), (3, 5));
}

#[tokio::test(start_paused = true)]
async fn every_subscription_gets_every_event_its_instances_share_them_and_what_is_offline_is_waited_for() {
    let (bus, crm, audit): (_, Seen<u64>, Seen<u64>) = (bus().await, Seen::default(), Seen::default());
    async fn note(view: Viewed, State(seen): State<Seen<u64>>) {
        tokio::task::yield_now().await;
        seen.push(view.page);
    }
    let service = || Service::new("crm").state(crm.clone()).on(note);
    let offline = || Service::new("audit").state(audit.clone()).on(note);
    let (one, two) = (service().start(&bus).await.unwrap(), service().start(&bus).await.unwrap());
    offline().provision(&bus).await.unwrap();
    let views: Vec<_> = (0..1_000).map(|page| Viewed { page }).collect();
    bus.publish_all(&views).await.unwrap();
    let mut handled = crm.count(1_000).await;
    handled.sort_unstable();
    assert!(handled.into_iter().eq(0..1_000), "each once");
    assert!([&one, &two].iter().all(|running| running.stats().all(|(_, stats)| stats.handled > 0)), "shared");
    assert!(audit.all().is_empty());
    let _audit = offline().start(&bus).await.unwrap();
    assert_eq!(audit.count(1_000).await.len(), 1_000);
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_what_runs_gives_back_the_rest_and_loses_nothing() {
    let (bus, seen): (_, Seen<u64>) = (bus().await, Seen::default());
    async fn slow(order: Order, State(seen): State<Seen<u64>>) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        seen.push(order.number);
    }
    let service = || Service::new("crm").state(seen.clone()).on(slow);
    let running = service().start(&bus).await.unwrap();
    let orders: Vec<_> = (0..100).map(|n| order(&n.to_string(), n)).collect();
    bus.publish_all(&orders).await.unwrap();
    eventually("16 run", || async { running.stats().all(|(_, stats)| stats.running == 16) }).await;
    let drained = running.drain(Duration::from_secs(5)).await;
    assert_eq!((drained.abandoned, seen.all().len()), (0, 16));
    assert_eq!(drained.given_back, 84);
    let running = service().start(&bus).await.unwrap();
    eventually("16 run", || async { running.stats().all(|(_, stats)| stats.running == 16) }).await;
    let drained = running.drain(Duration::from_millis(1)).await;
    assert_eq!((drained.abandoned, seen.all().len()), (16, 16), "the deadline cuts off");
    let _running = service().start(&bus).await.unwrap();
    let mut all = seen.count(100).await;
    all.sort_unstable();
    assert!(all.into_iter().eq(0..100), "each once");
}

#[tokio::test(start_paused = true)]
async fn a_repeated_run_publishes_the_same_ids() {
    let (bus, ids): (_, Seen<MessageId>) = (bus().await, Seen::default());
    let hang = Arc::new(AtomicUsize::new(0));
    async fn bill(order: Order, State(hang): State<Arc<AtomicUsize>>) -> (Invoice, Invoice, Viewed) {
        let invoice = Invoice { customer: order.customer, number: order.number };
        hang.fetch_add(1, SeqCst);
        (invoice.clone(), invoice, Viewed { page: 1 })
    }
    let crm = Service::new("crm").state(ids.clone()).on(
        async |_: Invoice, Metadata(m): Metadata, State(ids): State<Seen<MessageId>>| {
            ids.push(m.id);
        },
    );
    let _crm = crm.start(&bus).await.unwrap();
    let _billing = Service::new("billing").state(hang).on(bill).start(&bus).await.unwrap();
    let publish = || bus.publish_with(order_ref(), PublishOptions::default().with_id("W-1"));
    publish().await.unwrap();
    publish().await.unwrap();
    let ids = ids.count(4).await;
    assert_ne!(ids[0], ids[1], "equal events of one run are two");
    assert_eq!(ids[..2], ids[2..], "and a run of the same cause repeats both ids");
}

fn order_ref() -> &'static Order {
    Box::leak(Box::new(order("ada", 1)))
}

#[tokio::test(start_paused = true)]
async fn types_share_a_topic_a_second_handler_has_a_name_and_raw_messages_a_pattern() {
    #[derive(Event, Serialize, Deserialize)]
    #[event(name = "shop.order.cancelled", topic = "shop.order.placed", key = customer)]
    struct Cancelled {
        customer: String,
    }
    let (bus, seen): (_, Seen<String>) = (bus().await, Seen::default());
    let mut events = bus.events();
    let service = Service::new("crm")
        .state(seen.clone())
        .on(async |_: Order, State(seen): State<Seen<String>>| seen.push("placed".into()))
        .on(async |_: Cancelled, State(seen): State<Seen<String>>| seen.push("cancelled".into()))
        .on_with(SubscriptionConfig::named("audit"), async |_: Order, State(seen): State<Seen<String>>| {
            seen.push("audited".into());
        })
        .on_with(
            SubscriptionConfig::named("archive").topics(["shop.>"]),
            async |RawMessage(message): RawMessage, State(seen): State<Seen<String>>| {
                seen.push(format!("archived {}", message.event_type));
            },
        );
    let running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    bus.publish(&Cancelled { customer: "ada".into() }).await.unwrap();
    let mut all = seen.count(5).await;
    all.sort_unstable();
    assert_eq!(all, ["archived shop.order.cancelled", "archived shop.order.placed", "audited", "cancelled", "placed"]);
    // Nobody routes cancellations in `crm.audit`.
    let unrouted = async {
        loop {
            if let Some(BusEvent::Unrouted { subscription, event_type, .. }) = events.next().await {
                return (subscription.to_string(), event_type.to_string());
            }
        }
    };
    assert_eq!(unrouted.await, ("crm.audit".to_owned(), "shop.order.cancelled".to_owned()));
    let stats: Vec<_> = running.stats().map(|(name, stats)| (name.to_owned(), stats.unrouted)).collect();
    assert!(stats.contains(&("crm.audit".to_owned(), 1)), "{stats:?}");
}

#[tokio::test(start_paused = true)]
async fn a_batch_ends_together_and_runs_one_by_one_if_it_fails() {
    let (bus, runs): (_, Seen<usize>) = (bus().await, Seen::default());
    let config = SubscriptionConfig::default().batch(50).concurrency(1).linger(Duration::from_millis(10));
    let service = Service::new("crm").state(runs.clone()).on_with(
        config.retry(RetryPolicy::none()),
        async |Batch(orders): Batch<Order>, State(runs): State<Seen<usize>>| -> Result<(), HandlerError> {
            runs.push(orders.len());
            if orders.iter().any(|order| order.number == 3) { Err("three".into()) } else { Ok(()) }
        },
    );
    let running = service.start(&bus).await.unwrap();
    let orders: Vec<_> = (0..10).map(|number| order("ada", number)).collect();
    bus.publish_all(&orders).await.unwrap();
    let topic = tidings::Topic::new("shop.order.placed").unwrap();
    let broken =
        tidings::Message::new("x".into(), "/s", "shop.order.placed", topic).with_payload("application/json", "{");
    bus.publish_raw(broken.with_key("ada")).await.unwrap();
    let letters = dead_letters(&bus, "crm.shop.order.placed", 2).await;
    let reasons: Vec<_> = letters.iter().map(|l| l.headers.get_str(header::REASON).unwrap()).collect();
    assert_eq!(reasons, ["exhausted", "undecodable"]);
    eventually("the others", || async { running.stats().all(|(_, stats)| stats.handled == 9) }).await;
    assert_eq!(runs.all(), [1; 10], "the batch of 11 could not be decoded, so each ran alone");
}
