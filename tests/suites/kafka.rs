//! What only Kafka can show, and neither the conformance suite nor that of faults does; where `TIDINGS_TEST_FAULTS` names
//! `kafka`.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tidings::handler::Delivered;
use tidings::kafka::{KafkaConfig, KafkaTransport, Provision};
use tidings::prelude::*;
use tidings_tests::server::Server;
use tidings_tests::{Order, dead_letters, eventually, order};

fn is_chosen() -> bool {
    let transports = std::env::var("TIDINGS_TEST_FAULTS").unwrap_or_default();
    let is_chosen = transports.split(',').any(|transport| transport.trim() == "kafka");
    if !is_chosen {
        println!("skipped: TIDINGS_TEST_FAULTS is `{transports}` and does not name kafka");
    }
    is_chosen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_missing_is_an_error_where_nothing_is_created() {
    if !is_chosen() {
        return;
    }
    let server = tokio::task::block_in_place(|| Server::shared("kafka")).unwrap();
    for provision in [Provision::Off, Provision::Verify] {
        let mut config = KafkaConfig::from_url(server.url()).unwrap();
        config.namespace = format!("missing-{provision:?}").to_lowercase();
        config.provision = provision;
        let transport = KafkaTransport::connect(config).await.unwrap();
        let bus = Bus::new(transport as _, tidings::BusConfig::default()).unwrap();
        let begun = Instant::now();
        let error = bus.publish(&order("ada", 1)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && !error.is_transient(), "{error:?}");
        assert!(error.to_string().contains("shop.order.placed"), "{error}");
        let error = Service::new("crm").on(async |_: Order| ()).start(&bus).await.unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("crm"), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(30), "after {:?}", begun.elapsed());
    }
}

// ---- One in a hundred fails ----

const EVENTS: u64 = 10_000;
const WINDOW: usize = 512;

#[derive(Default)]
struct Seen {
    handled: u64,
    /// Of those that fail, by number.
    attempts: HashMap<u64, Vec<u32>>,
}

#[derive(Clone, Default)]
struct Attempts(Arc<Mutex<Seen>>);

/// Those of a `poison..` fail always.
async fn handle(order: Order, told: Delivered, State(attempts): State<Attempts>) -> Result<(), HandlerError> {
    let mut attempts = attempts.0.lock().unwrap();
    if order.customer.starts_with("poison") {
        attempts.attempts.entry(order.number).or_default().push(told.attempt);
        return Err("no".into());
    }
    attempts.handled += 1;
    Ok(())
}

/// How long it takes until all that do not fail are handled; and checks how those end that do.
async fn handled_in(server: &Server, namespace: &str, policy: RetryPolicy, failing: u64) -> Duration {
    let url = format!("{}/?namespace={namespace}", server.url());
    let bus = Bus::connect(Config::from_url(&url).unwrap()).await.unwrap();
    let settings = || SubscriptionConfig::default().max_in_flight(WINDOW).retry(policy.clone());
    let attempts = Attempts::default();
    let service = || Service::new("billing").state(attempts.clone()).on_with(settings(), handle);
    service().provision(&bus).await.unwrap();
    let failing_key = |n: u64| failing > 0 && n.is_multiple_of(100);
    let orders = (0..EVENTS).map(|n| order(&format!("{}{n}", if failing_key(n) { "poison" } else { "k" }), n));
    bus.publish_all(&orders.collect::<Vec<_>>()).await.unwrap();
    let begun = Instant::now();
    let running = service().start(&bus).await.unwrap();
    eventually("all others are handled", || async { attempts.0.lock().unwrap().handled == EVENTS - failing }).await;
    let took = begun.elapsed();
    let letters = dead_letters(&bus, "billing.shop.order.placed", usize::try_from(failing).unwrap()).await;
    assert_eq!(letters.len() as u64, failing);
    for letter in letters {
        let told = letter.headers.get_str(tidings::header::ATTEMPTS);
        assert_eq!((letter.headers.get_str(tidings::header::REASON), told), (Some("exhausted"), Some("5")));
    }
    for (number, runs) in &attempts.0.lock().unwrap().attempts {
        assert_eq!(runs, &[1, 2, 3, 4, 5], "the attempts of {number}");
    }
    running.drain(Duration::from_secs(10)).await;
    took
}

/// 5 attempts, from 50 ms to 1 s. How fast the others go is printed: no test can judge that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_always_fails_is_dead_lettered_after_exact_attempts() {
    if !is_chosen() {
        return;
    }
    let server = tokio::task::block_in_place(|| Server::shared("kafka")).unwrap();
    let policy = || RetryPolicy::default().attempts(5).backoff(Duration::from_millis(50), Duration::from_secs(1));
    let clean = handled_in(&server, "clean", policy(), 0).await;
    let in_order = handled_in(&server, "held", policy().in_order(), EVENTS / 100).await;
    let aside = handled_in(&server, "aside", policy().aside(), EVENTS / 100).await;
    let ratio = |took: Duration| clean.as_secs_f64() / took.as_secs_f64();
    println!(
        "{EVENTS} events, max_in_flight {WINDOW}: {clean:.2?} without failures; with 1 % that always fail the others took \
         {in_order:.2?} in order ({:.2}x) and {aside:.2?} aside ({:.2}x)",
        ratio(in_order),
        ratio(aside)
    );
}
