//! Promise 1: confirmed means kept.

use super::cases;
use crate::env::{Env, PATIENCE, Seen, dead_letters, drain, start, subscription, within};
use crate::events::{Order, Viewed, order, orders};
use crate::reader::{open, publish, said, saying, spec, submit, topic, topics, unordered};
use std::future::Future;
use std::time::Duration;
use tidings::handler::State;
use tidings_core::transport::{Destination, Fate};
use tidings_core::{BusConfig, ErrorKind, PublishOptions, Service};
use tokio::time::Instant;

cases!("publish":
    confirmed_means_kept,
    confirmed_survives_a_restart_of_the_broker [Durable, Restart],
    one_publisher_keeps_its_order [KeyOrdering],
    one_batch_keeps_its_order [KeyOrdering],
    publishers_at_once_lose_nothing,
    failures_in_a_batch_are_named_by_index,
    what_is_too_large_is_refused_and_its_neighbours_are_kept,
    a_publish_that_nobody_waits_for_harms_no_other [KeyOrdering],
    publishing_where_nobody_reads_is_no_error,
    publishing_after_close_fails_at_once,
    closing_keeps_what_was_submitted,
    closing_keeps_copies_and_dead_letters_that_were_submitted,
    a_delayed_publish_is_not_early [PublishDelay],
    a_publish_through_a_cut_is_kept_or_fails [Cut],
    a_publish_through_a_restart_is_kept_or_fails [Durable, Restart],
    an_own_id_is_kept,
);

const ORDERS: &str = "suite.order.placed";

/// What was confirmed to one connection is read by another, after the first is gone.
async fn confirmed_means_kept(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    let one = env.connect().await;
    publish(&one, ORDERS, "ada", &["1", "2", "3"]).await;
    one.close(Instant::now() + Duration::from_secs(10)).await.unwrap();
    drop(one);
    let other = env.connect().await;
    open(&other, spec(&env, "crm", &[ORDERS])).await.ack_all(&["1", "2", "3"]).await;
}

async fn confirmed_survives_a_restart_of_the_broker(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    env.restart().await;
    let after = env.connect().await;
    open(&after, spec(&env, "crm", &[ORDERS])).await.ack_all(&["1", "2", "3"]).await;
}

async fn one_publisher_keeps_its_order(env: Env) {
    let (bus, seen) = (env.bus(), Seen::<u64>::default());
    let service = Service::new("crm").state(seen.clone());
    let running = start(service.on(async |order: Order, State(s): State<Seen<u64>>| s.push(order.number)), &bus).await;
    for order in orders("ada", 50) {
        bus.publish(&order).await.unwrap();
    }
    assert_eq!(seen.count(50).await, (0..50).collect::<Vec<_>>());
    drain(running).await;
}

async fn one_batch_keeps_its_order(env: Env) {
    let (bus, seen) = (env.bus(), Seen::<u64>::default());
    let service = Service::new("crm").state(seen.clone());
    let running = start(service.on(async |order: Order, State(s): State<Seen<u64>>| s.push(order.number)), &bus).await;
    let ids = bus.publish_all(&orders("ada", 500)).await.unwrap();
    let distinct: std::collections::HashSet<_> = ids.into_iter().collect();
    assert_eq!(distinct.len(), 500, "each has an id of its own");
    assert_eq!(seen.count(500).await, (0..500).collect::<Vec<_>>());
    drain(running).await;
}

async fn publishers_at_once_lose_nothing(env: Env) {
    let (bus, seen) = (env.bus(), Seen::<u64>::default());
    let service = Service::new("crm").state(seen.clone());
    let running = start(service.on(async |view: Viewed, State(s): State<Seen<u64>>| s.push(view.page)), &bus).await;
    let publishers = (0..8).map(|n| {
        let bus = bus.clone();
        tokio::spawn(async move {
            let views: Vec<_> = (n * 100..n * 100 + 100).map(|page| Viewed { page }).collect();
            bus.publish_all(&views).await.map(|ids| ids.len())
        })
    });
    for publisher in publishers.collect::<Vec<_>>() {
        assert_eq!(within("the publisher", publisher).await.unwrap().unwrap(), 100);
    }
    let mut pages = seen.count(800).await;
    pages.sort_unstable();
    assert_eq!(pages, (0..800).collect::<Vec<_>>());
    drain(running).await;
}

/// A message in the middle that the broker cannot take fails alone, by its index.
async fn failures_in_a_batch_are_named_by_index(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let limit = env.can().max_payload;
    // Where the transport has no limit, what is sent to no subscription that was ever created is refused.
    let post = |n: usize| {
        let mut message = saying(ORDERS, "ada", n);
        let mut to = Destination::Topic(topic(ORDERS));
        if n == 2 && limit < 64 * 1024 * 1024 {
            message.payload = vec![b'x'; limit + 1].into();
        } else if n == 2 {
            to = Destination::Subscription(crate::env::subscription("nobody.has.subscribed"));
        }
        (to, message, None, false)
    };
    let failures = submit(env.transport(), &(0..5).map(post).collect::<Vec<_>>()).await;
    let named: Vec<_> = failures.iter().map(|(index, failure)| (*index, failure.fate)).collect();
    assert_eq!(named, [(2, Fate::NotPersisted)], "{failures:?}");
    assert!(!failures[0].1.error.is_transient(), "sending it again would not help: {:?}", failures[0].1.error);
    reader.ack_all(&["0", "1", "3", "4"]).await;
}

async fn what_is_too_large_is_refused_and_its_neighbours_are_kept(env: Env) {
    let config = BusConfig { max_payload: 1000, ..BusConfig::default() };
    let bus = env.bus_with(env.connect().await, config);
    let error = bus.publish(&order("x".repeat(2000), 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    let errors = bus.publish_all(&[order("ada", 1), order("x".repeat(2000), 2)]).await.unwrap_err();
    assert_eq!(errors.failures()[0].0, 1, "{errors}");
    bus.publish(&order("ada", 3)).await.unwrap();
}

/// Dropping the future of a publish un-sends nothing and blocks nothing.
async fn a_publish_that_nobody_waits_for_harms_no_other(env: Env) {
    let (bus, seen) = (env.bus(), Seen::<u64>::default());
    let service = Service::new("crm").state(seen.clone());
    let running = start(service.on(async |order: Order, State(s): State<Seen<u64>>| s.push(order.number)), &bus).await;
    for number in 0..100 {
        let order = order("ada", number);
        if number % 2 == 0 {
            let _ = tokio::time::timeout(Duration::ZERO, bus.publish(&order)).await;
        } else {
            bus.publish(&order).await.unwrap();
        }
    }
    let awaited = |seen: &[u64]| seen.iter().filter(|n| **n % 2 == 1).count() == 50;
    crate::env::eventually("all that were awaited", || async { awaited(&seen.all()) }).await;
    assert!(seen.all().is_sorted(), "{:?}", seen.all());
    drain(running).await;
}

async fn publishing_where_nobody_reads_is_no_error(env: Env) {
    let bus = env.bus();
    topics(env.transport(), &[ORDERS]).await;
    bus.publish(&order("ada", 1)).await.unwrap();
    bus.publish_all(&orders("ada", 10)).await.unwrap();
}

async fn publishing_after_close_fails_at_once(env: Env) {
    let bus = env.another_bus().await;
    topics(bus.transport(), &[ORDERS]).await;
    bus.publish(&order("ada", 1)).await.unwrap();
    bus.close(PATIENCE).await.unwrap();
    let error = within("an answer", bus.publish(&order("ada", 2))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    let transport = bus.transport();
    let failures = submit(transport, &[(Destination::Topic(topic(ORDERS)), saying(ORDERS, "", 1), None, false)]).await;
    assert_eq!((failures.len(), failures[0].1.error.kind()), (1, ErrorKind::Closed));
    let error = transport.subscribe(spec(&env, "crm", &[ORDERS])).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
}

async fn closing_keeps_what_was_submitted(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let other = env.connect().await;
    let posts: Vec<_> =
        (0..60).map(|n| (Destination::Topic(topic(ORDERS)), saying(ORDERS, "ada", n), None, false)).collect();
    let answers = tidings_core::transport::submit_and_wait(&*other.publisher(), &posts);
    within("closing", other.close(Instant::now() + PATIENCE)).await.unwrap();
    let failures = within("the answers", answers).await;
    let kept = (0..60).filter(|n| failures.iter().all(|(index, _)| index != n)).map(|n| n.to_string());
    let kept: Vec<_> = kept.collect();
    assert_eq!(kept.len(), 60, "what was submitted before is flushed: {failures:?}");
    reader.ack_all(&kept.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

/// A transport may have them wait for others like them; not when it closes.
async fn closing_keeps_copies_and_dead_letters_that_were_submitted(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), unordered(&env, "crm", &[ORDERS])).await;
    let (other, crm) = (env.connect().await, subscription("crm"));
    let owed = |to, text, delay| (to, saying(ORDERS, "ada", text), delay, true);
    let soon = Some(Duration::from_millis(20));
    let copies = (0..10).map(|n| owed(Destination::Subscription(crm.clone()), n, soon));
    let letters = (10..15).map(|n| owed(Destination::DeadLetter(crm.clone()), n, None));
    let posts: Vec<_> = copies.chain(letters).collect();
    let answers = tidings_core::transport::submit_and_wait(&*other.publisher(), &posts);
    within("closing", other.close(Instant::now() + PATIENCE)).await.unwrap();
    let failures = within("the answers", answers).await;
    assert!(failures.is_empty(), "what was submitted before is flushed: {failures:?}");
    let mut came = reader.texts(10).await;
    came.sort();
    assert_eq!(came, (0..10).map(|n| n.to_string()).collect::<Vec<_>>());
    dead_letters(env.transport(), "crm", 5).await;
}

async fn a_delayed_publish_is_not_early(env: Env) {
    let bus = env.bus();
    let seen = Seen::<(u64, Instant)>::default();
    let handler = async |view: Viewed, State(s): State<Seen<(u64, Instant)>>| s.push((view.page, Instant::now()));
    let running = start(Service::new("crm").state(seen.clone()).on(handler), &bus).await;
    let (delay, sent) = (Duration::from_secs(5), Instant::now());
    bus.publish_with(&Viewed { page: 1 }, PublishOptions::default().with_delay(delay)).await.unwrap();
    bus.publish(&Viewed { page: 2 }).await.unwrap();
    let seen = seen.count(2).await;
    assert_eq!((seen[0].0, seen[1].0), (2, 1), "the delay holds nothing else up");
    assert!(seen[1].1 - sent >= delay, "it came after {:?}", seen[1].1 - sent);
    drain(running).await;
}

async fn a_publish_through_a_cut_is_kept_or_fails(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    through(&env, async { env.cut().await }).await;
}

async fn a_publish_through_a_restart_is_kept_or_fails(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    through(&env, async { env.restart().await }).await;
}

/// Publishes while the fault happens: what was confirmed is read, in order but for marked repeats.
async fn through(env: &Env, fault: impl Future<Output = ()>) {
    let bus = env.bus();
    let publishing = tokio::spawn(async move {
        let mut confirmed = Vec::new();
        for order in orders("ada", 300) {
            if bus.publish(&order).await.is_ok() {
                confirmed.push(order.number);
            }
        }
        confirmed
    });
    fault.await;
    let confirmed = within("the publishes end", publishing).await.unwrap();
    assert!(confirmed.len() >= 200, "it goes on by itself: {} of 300", confirmed.len());
    let after = env.bus_on(env.connect().await);
    let mut reader = open(after.transport(), spec(env, "crm", &[ORDERS])).await;
    let mut missing = confirmed;
    while !missing.is_empty() {
        let delivery = reader.next().await;
        let number = said(&delivery).split(':').next_back().and_then(|n| n.trim_end_matches('}').parse::<u64>().ok());
        missing.retain(|n| Some(*n) != number);
        delivery.acker.ack();
    }
}

async fn an_own_id_is_kept(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let ids = ["order-4711", "01890a5d-ac96-774b-bcce-b302099a8057", "Ω/ø id"];
    for id in ids {
        env.bus().publish_with(&order("ada", 1), PublishOptions::default().with_id(id)).await.unwrap();
        let delivery = reader.next().await;
        assert_eq!(delivery.message.id.to_string(), id);
        delivery.acker.ack();
    }
}
