//! What only RabbitMQ can show, and the conformance suite does not; where `TIDINGS_TEST_TRANSPORTS` names `rabbitmq`.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidings_core::transport::{
    Destination, Ordering, Polled, Start, Subscription, SubscriptionSpec, Topology, Transport, submit_and_wait,
};
use tidings_core::{Clock, ErrorKind, Message, MessageId, SubscriptionName, Topic};
use tidings_rabbitmq::{Provision, RabbitMqClient, RabbitMqConfig, RabbitMqTransport};
use tidings_tests::server::Server;

/// The server, and a namespace of this test on it.
fn server(name: &str) -> Option<(Arc<Server>, RabbitMqConfig)> {
    let transports = std::env::var("TIDINGS_TEST_TRANSPORTS").unwrap_or_default();
    if !transports.split(',').any(|transport| transport.trim() == "rabbitmq") {
        println!("skipped: TIDINGS_TEST_TRANSPORTS is `{transports}` and does not name rabbitmq");
        return None;
    }
    let server = Server::shared("rabbitmq").unwrap();
    let mut config = RabbitMqConfig::from_url(server.url()).unwrap();
    config.namespace = format!("t{}-{name}", std::process::id());
    Some((server, config))
}

fn message(text: &str) -> Message {
    let id = MessageId::new(Clock::SYSTEM.now());
    Message::new(id, "/test", "test.text", Topic::new("test.a").unwrap()).with_payload("text/plain", text.to_owned())
}

fn spec() -> SubscriptionSpec {
    SubscriptionSpec {
        name: SubscriptionName::new("crm").unwrap(),
        topics: vec![Topic::new("test.a").unwrap().into()],
        ordering: Ordering::None,
        start: Start::New,
        max_in_flight: 100,
        max_hold: Duration::from_secs(60),
    }
}

async fn remove(transport: &RabbitMqTransport, config: &RabbitMqConfig) {
    let client = transport.native().downcast_ref::<RabbitMqClient>().unwrap();
    client.remove_namespace(&config.namespace).await.unwrap();
}

async fn next(subscription: &mut Box<dyn Subscription>) -> String {
    let mut polled = Polled::default();
    loop {
        poll_fn(|cx| subscription.poll_batch(cx, 1, &mut polled)).await.unwrap();
        if let Some(delivery) = polled.deliveries.pop() {
            delivery.acker.ack();
            return String::from_utf8(delivery.message.payload.to_vec()).unwrap();
        }
    }
}

#[tokio::test]
async fn what_is_refused_says_why_and_shows_no_secret() {
    let Some((_server, config)) = server("refused") else { return };
    let connect = async |change: fn(&mut RabbitMqConfig)| {
        let mut config = config.clone();
        change(&mut config);
        RabbitMqTransport::connect(config).await.err().expect("refused")
    };
    let denied = connect(|config| config.password = "hunter2".into()).await;
    assert_eq!(denied.kind(), ErrorKind::Denied, "{denied:?}");
    assert!(!format!("{denied:?}").contains("hunter2"), "{denied:?}");
    let vhost = connect(|config| config.vhost = "nowhere".into()).await;
    assert_eq!(vhost.kind(), ErrorKind::NotFound, "{vhost:?}");
    let nobody = connect(|config| config.port = Some(1)).await;
    assert_eq!(nobody.kind(), ErrorKind::Connection, "{nobody:?}");
    assert!(nobody.is_transient());
    let missing = connect(|config| config.provision = Provision::Verify).await;
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing:?}");
}

#[tokio::test]
async fn delays_are_neither_early_nor_blocked() {
    let Some((_server, config)) = server("delays") else { return };
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let mut subscription = transport.subscribe(spec()).await.unwrap();
    let to = Destination::Subscription(spec().name);
    // Creates the chain.
    submit_and_wait(&*transport.publisher(), &[(to.clone(), message("1"), Some(Duration::from_millis(1)), true)]).await;
    assert_eq!(next(&mut subscription).await, "1");
    let delays = [3_000, 200, 1_000, 450, 2_000, 700, 5_000];
    let sent = Instant::now();
    let posts = delays.map(|ms| (to.clone(), message(&ms.to_string()), Some(Duration::from_millis(ms)), true));
    assert!(submit_and_wait(&*transport.publisher(), &posts).await.is_empty());
    let mut came = BTreeMap::new();
    for _ in delays {
        let delay: u64 = next(&mut subscription).await.parse().unwrap();
        came.insert(delay, sent.elapsed().as_millis() as u64);
    }
    for (delay, came) in came {
        assert!((delay..=delay + (delay / 10).max(250)).contains(&came), "{delay} ms came after {came} ms");
    }
    remove(&transport, &config).await;
}

#[tokio::test]
async fn a_queue_deleted_under_its_consumer_comes_back() {
    let Some((_server, config)) = server("deleted") else { return };
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let mut subscription = transport.subscribe(spec()).await.unwrap();
    let client = transport.native().downcast_ref::<RabbitMqClient>().unwrap();
    let channel = client.publishing().await.unwrap().create_channel().await.unwrap();
    let queue = format!("{}:crm", config.namespace);
    let mut events = transport.events().listen();
    channel.queue_delete(queue.as_str().into(), lapin::options::QueueDeleteOptions::default()).await.unwrap();
    let told = async { while !matches!(events.next().await, Some(tidings_core::BusEvent::Connected)) {} };
    tokio::time::timeout(Duration::from_secs(20), told).await.expect("it says that it is back");
    let post = (Destination::Topic(Topic::new("test.a").unwrap()), message("again"), None, false);
    assert!(submit_and_wait(&*transport.publisher(), &[post]).await.is_empty());
    assert_eq!(next(&mut subscription).await, "again");
    remove(&transport, &config).await;
}

#[tokio::test]
async fn where_nobody_reads_is_counted_or_refused() {
    let Some((_server, mut config)) = server("required") else { return };
    config.required = vec!["test.a".into()];
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let post = |topic: &str| (Destination::Topic(Topic::new(topic).unwrap()), message("x"), None, false);
    let failures = submit_and_wait(&*transport.publisher(), &[post("test.a"), post("test.b"), post("test.a")]).await;
    let mut refused: Vec<_> = failures.iter().map(|(index, failure)| (*index, failure.error.kind())).collect();
    refused.sort_unstable_by_key(|(index, _)| *index);
    assert_eq!(refused, [(0, ErrorKind::NotFound), (2, ErrorKind::NotFound)]);
    assert_eq!(transport.native().downcast_ref::<RabbitMqClient>().unwrap().unrouted(), 1);
    transport.provision(&Topology { topics: Vec::new(), subscriptions: vec![spec()] }).await.unwrap();
    assert!(submit_and_wait(&*transport.publisher(), &[post("test.a")]).await.is_empty());
    remove(&transport, &config).await;
}
