//! Wrong input of every kind gives its documented error or dead letter; nothing aborts, hangs or is lost.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::time::Duration;
use tidings::memory::MemoryConfig;
use tidings::prelude::*;
use tidings::{BusConfig, Headers, Message, Topic, TopicPattern, header};
use tidings_tests::{Order, Seen, Viewed, bus, dead_letters, order};

/// A tree, which a payload can nest as deep as it likes.
#[derive(Debug, Event, Serialize, Deserialize)]
#[event(name = "shop.tree.grown")]
struct Tree {
    branches: Vec<Tree>,
}

/// Panics when it is read, and when it is written.
#[derive(Debug)]
struct Grenade;

impl Serialize for Grenade {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        panic!("written")
    }
}

impl<'de> Deserialize<'de> for Grenade {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        panic!("read")
    }
}

#[derive(Debug, Event, Serialize, Deserialize)]
#[event(name = "shop.grenade.thrown")]
struct Thrown {
    grenade: Grenade,
}

fn raw(event_type: &'static str, content_type: &'static str, payload: impl Into<Vec<u8>>) -> Message {
    let topic = Topic::new(event_type).unwrap();
    Message::new("1".into(), "/elsewhere", event_type, topic).with_payload(content_type, payload.into())
}

/// Publishes a message to a service of one handler; returns why it was dead-lettered.
async fn reason(service: Service, message: Message) -> (String, String) {
    let bus = bus().await;
    let name = format!("crm.{}", message.topic);
    let (id, payload) = (message.id.clone(), message.payload.clone());
    let running = service.start(&bus).await.unwrap();
    bus.publish_raw(message).await.unwrap();
    let letter = dead_letters(&bus, &name, 1).await.remove(0);
    assert_eq!((letter.id, letter.payload), (id, payload), "a dead letter has the original bytes");
    running.drain(Duration::from_secs(1)).await;
    let get = |name| letter.headers.get_str(name).unwrap().to_owned();
    (get(header::REASON), get(header::ERROR))
}

#[tokio::test(start_paused = true)]
async fn a_payload_that_cannot_be_decoded_is_dead_lettered_at_once() {
    let deep = 100_000;
    for (event_type, content_type, payload) in [
        ("shop.order.placed", "application/json", b"{".to_vec()),
        ("shop.order.placed", "application/json", b"".to_vec()),
        ("shop.order.placed", "application/json", br#"{"customer":1,"number":2}"#.to_vec()),
        ("shop.order.placed", "application/json", br#"{"customer":"a","number":2} trailing"#.to_vec()),
        ("shop.order.placed", "application/msgpack", vec![0xc1]),
        ("shop.order.placed", "application/xml", b"<order/>".to_vec()),
        ("shop.order.placed", "application/json", vec![b'['; deep]),
        ("shop.order.placed", "application/msgpack", vec![0x91; deep]),
        ("shop.tree.grown", "application/json", br#"{"branches":["#.repeat(deep / 2)),
        ("shop.tree.grown", "application/msgpack", b"\x81\xa8branches\x91".repeat(deep / 2)),
    ] {
        let service = Service::new("crm").on_with(SubscriptionConfig::named("shop.order.placed"), async |_: Order| ());
        let service =
            if event_type == "shop.tree.grown" { Service::new("crm").on(async |_: Tree| ()) } else { service };
        let shown = String::from_utf8_lossy(&payload[..payload.len().min(20)]).into_owned();
        let (reason, _) = reason(service, raw(event_type, content_type, payload)).await;
        assert_eq!(reason, "undecodable", "{content_type}: {shown}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_newer_version_is_tried_and_named_if_it_fails() {
    let mut newer = raw("shop.order.placed", "application/json", br#"{"client":"ada"}"#.to_vec());
    newer.version = 2;
    let (reason, _) = reason(Service::new("crm").on(async |_: Order| ()), newer).await;
    assert_eq!(reason, "newer_version");

    let (bus, seen): (_, Seen<u64>) = (bus().await, Seen::default());
    let service = Service::new("crm").state(seen.clone()).on(async |order: Order, State(seen): State<Seen<u64>>| {
        seen.push(order.number);
    });
    let _running = service.start(&bus).await.unwrap();
    let mut newer = raw("shop.order.placed", "application/json", br#"{"customer":"a","number":7,"more":1}"#.to_vec());
    newer.version = 2;
    bus.publish_raw(newer).await.unwrap();
    assert_eq!(seen.count(1).await, [7]);
}

#[tokio::test(start_paused = true)]
async fn what_panics_is_a_failure_and_not_the_end() {
    let handler = Service::new("crm").on_with(
        SubscriptionConfig::default().retry(RetryPolicy::none()),
        async |_: Order| -> Result<(), HandlerError> { panic!("a bug on line\n7") },
    );
    let order = raw("shop.order.placed", "application/json", br#"{"customer":"a","number":1}"#.to_vec());
    let (why, error) = reason(handler, order.clone()).await;
    assert_eq!((why.as_str(), error.as_str()), ("exhausted", "handler panicked: a bug on line 7"));

    let config = || SubscriptionConfig::default().retry(RetryPolicy::none());
    let reads = Service::new("crm").on_with(config(), async |_: Thrown| ());
    let thrown = raw("shop.grenade.thrown", "application/json", br#"{"grenade":1}"#.to_vec());
    assert_eq!(reason(reads, thrown).await.1, "handler panicked: read");

    let returns = Service::new("crm").on_with(config(), async |_: Order| Thrown { grenade: Grenade });
    assert_eq!(reason(returns, order).await.1, "handler panicked: written");
}

#[tokio::test(start_paused = true)]
async fn what_is_too_large_is_refused_before_publish_and_dead_lettered_when_read() {
    let config = BusConfig { max_payload: 100, ..BusConfig::default() };
    let transport = tidings::memory::MemoryTransport::connect(MemoryConfig::default()).unwrap();
    let small = Bus::new(transport.clone(), config).unwrap();
    let error = small.publish(&order(&"x".repeat(100), 1)).await.unwrap_err();
    assert_eq!((error.kind(), error.is_transient(), error.possibly_persisted()), (ErrorKind::TooLarge, false, false));
    let orders = [order("ada", 1), order(&"x".repeat(100), 2)];
    let errors = small.publish_all(&orders).await.unwrap_err();
    assert_eq!((errors.failures()[0].0, errors.confirmed()), (1, 0), "checked before the first is sent");

    let _running = Service::new("crm").on(async |_: Order| ()).start(&small).await.unwrap();
    let large = Bus::new(transport, BusConfig::default()).unwrap();
    large.publish(&order(&"x".repeat(100), 1)).await.unwrap();
    let letter = dead_letters(&small, "crm.shop.order.placed", 1).await.remove(0);
    assert_eq!(letter.headers.get_str(header::REASON), Some("too_large"));
}

#[tokio::test]
async fn wrong_names_and_headers_are_refused_by_name() {
    let bus = bus().await;
    let kind = |error: tidings::Error| error.kind();
    assert_eq!(kind(Topic::new("Shop").unwrap_err()), ErrorKind::InvalidName);
    assert_eq!(kind(TopicPattern::new(">").unwrap_err()), ErrorKind::InvalidName);
    assert_eq!(kind(Headers::new().append("Nats-Msg-Id", "1").unwrap_err()), ErrorKind::InvalidName);
    for (name, value) in [("CC", "other"), ("a b", "v"), ("traceparent", "00"), ("tidings-attempts", "9")] {
        let options = PublishOptions::default().with_header(name, value);
        let error = bus.publish_with(&order("ada", 1), options).await.unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidName && error.to_string().contains(name), "{error}");
    }
    let options = PublishOptions::default().with_header("x-large", vec![0; 20_000]);
    assert_eq!(kind(bus.publish_with(&order("ada", 1), options).await.unwrap_err()), ErrorKind::TooLarge);
    let error = bus.publish_with(&order("ada", 1), PublishOptions::default().with_id("")).await.unwrap_err();
    assert_eq!(kind(error), ErrorKind::InvalidName);
}

#[tokio::test]
async fn a_service_that_could_not_work_does_not_start() {
    async fn takes(_: Order) {}
    async fn needs(_: Order, State(_): State<String>) {}
    async fn many(_: Batch<Order>, _: Attempt) {}
    async fn any(_: RawMessage) {}
    let config = SubscriptionConfig::default;
    let named = SubscriptionConfig::named;
    let slow = RetryPolicy::default().attempts(20).in_order();
    for (service, kind, named) in [
        (Service::new("crm"), ErrorKind::Config, "without handlers"),
        (Service::new("Crm!").on(takes), ErrorKind::InvalidName, "Crm!"),
        (Service::new("crm").on(takes).on(takes), ErrorKind::Duplicate, "name the second"),
        (Service::new("crm").on_with(named("a"), takes).on_with(named("a"), takes), ErrorKind::Duplicate, "crm.a"),
        (Service::new("crm").on_with(named("A b"), takes), ErrorKind::InvalidName, "A b"),
        (Service::new("crm").on(needs), ErrorKind::Missing, "String"),
        (Service::new("crm").on(many), ErrorKind::Config, "Attempt"),
        (Service::new("crm").on(any), ErrorKind::Config, "named"),
        (Service::new("crm").on_with(named("all"), any), ErrorKind::Config, "topics"),
        (Service::new("crm").on_with(named("all").topics([">"]), any), ErrorKind::InvalidName, "first token"),
        (Service::new("crm").on_with(config().concurrency(0), takes), ErrorKind::Config, "concurrency"),
        (Service::new("crm").on_with(config().max_in_flight(4), takes), ErrorKind::Config, "max_in_flight"),
        (Service::new("crm").on_with(config().retry(slow), takes), ErrorKind::Config, "hold_at_most"),
        (Service::new(&*"x".repeat(300)).on(takes), ErrorKind::InvalidName, "200 bytes"),
    ] {
        let error = service.start(&bus().await).await.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(named), "{named}: {error}");
    }
}

#[tokio::test]
async fn wrong_configuration_is_refused_by_name() {
    for (url, named) in [
        ("", "unknown scheme"),
        ("shop", "unknown scheme"),
        ("pulsar://user:secret@host", "pulsar"),
        ("redis://user:secret@host", "redis"),
    ] {
        let error = Config::from_url(url).unwrap_err();
        assert!(error.kind() == ErrorKind::Config && error.to_string().contains(named), "{url}: {error}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
    for (text, named) in [
        ("", "no transport is chosen"),
        ("transport = 'pulsar'", "pulsar"),
        ("transport = 'memory'\n[memory]\ncapacitty = 1", "capacitty"),
        ("url = 'memory://x?size=1'", "size"),
    ] {
        let connected = async { Bus::connect(Config::from_toml(text)?).await }.await;
        let error = connected.unwrap_err();
        assert!(error.kind() == ErrorKind::Config && error.to_string().contains(named), "{text}: {error}");
    }
    for config in [
        BusConfig { max_unconfirmed: 0, ..BusConfig::default() },
        BusConfig { max_payload: 0, ..BusConfig::default() },
        BusConfig { source: "a b".into(), ..BusConfig::default() },
    ] {
        let transport = tidings::memory::MemoryTransport::connect(MemoryConfig::default()).unwrap();
        assert_eq!(Bus::new(transport, config).unwrap_err().kind(), ErrorKind::Config);
    }
}

#[tokio::test]
async fn what_is_used_after_close_says_so() {
    let bus = bus().await;
    bus.close(Duration::from_secs(1)).await.unwrap();
    bus.close(Duration::from_secs(1)).await.unwrap();
    assert_eq!(bus.publish(&order("ada", 1)).await.unwrap_err().kind(), ErrorKind::Closed);
    let error = Service::new("crm").on(async |_: Viewed| ()).start(&bus).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_service_is_checked_against_every_configured_transport_without_one() {
    struct Poor;
    impl tidings::Capable for Poor {
        fn capabilities(&self) -> tidings::Result<Vec<(&'static str, tidings::transport::Capabilities)>> {
            let rich = Config::from_url("memory://x")?.capabilities()?.remove(0).1;
            let mut short = rich.clone();
            short.max_hold = Some(Duration::from_secs(60));
            Ok(vec![("rich", rich), ("poor", tidings::transport::Capabilities::NONE), ("short", short)])
        }
    }
    let keyed = Service::new("crm").on(async |_: Order| ());
    keyed.check(&Config::from_toml("[memory]").unwrap()).unwrap();
    let error = keyed.check(&Poor).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().starts_with("poor"), "{error}");
    let error = Service::new("crm").on(async |_: Viewed| ()).check(&Poor).unwrap_err();
    assert!(error.to_string().starts_with("short") && error.to_string().contains("lower max_in_flight"), "{error}");
    assert_eq!(
        keyed.check(&Config::from_toml("").unwrap()).unwrap_err().kind(),
        ErrorKind::Config,
        "nothing is proven"
    );
    keyed.check(&Config::from_toml("[memory]\n[nats]\n[rabbitmq]\n[kafka]").unwrap()).unwrap();
}
