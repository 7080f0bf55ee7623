//! What only RabbitMQ can show, and the conformance suite does not; where `TIDINGS_TEST_FAULTS` names `rabbitmq`.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod authority;

use authority::Authority;
use futures_util::future::join_all;
use lapin::types::{AMQPValue, FieldTable};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tidings::prelude::*;
use tidings_core::transport::{
    Delivery, Destination, Health, Lease, Ordering, Polled, ReplayFrom, ReplaySpec, Start, Subscription,
    SubscriptionSpec, TopicSpec, Topology, Transport, submit_and_wait,
};
use tidings_core::{BusEvent, Clock, ErrorKind, Message, MessageId, SubscriptionName, Topic};
use tidings_rabbitmq::{Provision, RabbitMqClient, RabbitMqConfig, RabbitMqTransport};
use tidings_tests::server::{Server, free_port};
use tidings_tests::{Order, eventually, order};
use tokio::sync::Semaphore;
use tokio::task::block_in_place;
use tokio::time::timeout;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(30);

fn is_chosen() -> bool {
    let transports = std::env::var("TIDINGS_TEST_FAULTS").unwrap_or_default();
    let chosen = transports.split(',').any(|transport| transport.trim() == "rabbitmq");
    if !chosen {
        println!("skipped: TIDINGS_TEST_FAULTS is `{transports}` and does not name rabbitmq");
    }
    chosen
}

/// The server, and a namespace of this test on it.
fn server(name: &str) -> Option<(Arc<Server>, RabbitMqConfig)> {
    if !is_chosen() {
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

async fn delivery(subscription: &mut Box<dyn Subscription>) -> Delivery {
    let mut polled = Polled::default();
    let came = async {
        loop {
            poll_fn(|cx| subscription.poll_batch(cx, 1, &mut polled)).await.unwrap();
            if let Some(delivery) = polled.deliveries.pop() {
                return delivery;
            }
        }
    };
    let patience = Duration::from_millis(longest() * 11 / 10) + PATIENCE;
    timeout(patience, came).await.expect("a delivery")
}

async fn next(subscription: &mut Box<dyn Subscription>) -> String {
    let delivery = delivery(subscription).await;
    delivery.acker.ack();
    String::from_utf8(delivery.message.payload.to_vec()).unwrap()
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
    let mut late = Vec::new();
    // What is late once may be the machine's fault.
    for _ in 0..3 {
        late = delayed(&transport, &mut subscription, &to).await;
        if late.is_empty() {
            break;
        }
    }
    assert_eq!(late, Vec::<String>::new());
    remove(&transport, &config).await;
}

/// On a server that has nothing of theirs yet, each creates what all need, and what only it needs.
#[tokio::test]
async fn many_may_be_the_first_at_once() {
    let Some((_server, config)) = server("first") else { return };
    let topic = |number: usize| TopicSpec::new(Topic::new(format!("test.{number}")).unwrap());
    let first = async |number| {
        let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
        transport.provision(&Topology { topics: vec![topic(number)], subscriptions: Vec::new() }).await.unwrap();
        let _subscription = transport.subscribe(spec()).await.unwrap();
        let delayed = (Destination::Subscription(spec().name), message("1"), Some(Duration::from_secs(60)), true);
        let failed = submit_and_wait(&*transport.publisher(), &[delayed]).await;
        assert!(failed.is_empty(), "{failed:?}");
        transport
    };
    let transports = join_all((0..24).map(first)).await;
    // It creates nothing: what it does not find fails.
    let verifying = RabbitMqConfig { provision: Provision::Verify, ..config.clone() };
    let verifying = RabbitMqTransport::connect(verifying).await.unwrap();
    verifying.provision(&Topology { topics: (0..24).map(topic).collect(), subscriptions: Vec::new() }).await.unwrap();
    remove(&transports[0], &config).await;
}

/// A consumer and its channel end together, and the server closes a connection on which a cancel comes behind that.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_locks_reads_and_replays_ends_without_breaking_its_connection() {
    let Some((_server, config)) = server("ends") else { return };
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let mut events = transport.events().listen();
    let retained = TopicSpec { retained: true, ..TopicSpec::new(Topic::new("test.a").unwrap()) };
    transport.provision(&Topology { topics: vec![retained], subscriptions: Vec::new() }).await.unwrap();
    let dead = (Destination::DeadLetter(spec().name), message("1"), None, true);
    assert!(submit_and_wait(&*transport.publisher(), &[dead]).await.is_empty());
    let replay = ReplaySpec { topics: spec().topics, from: ReplayFrom::Beginning, follow: true, max_in_flight: 8 };
    let letters = transport.dead_letters(&spec().name).await.unwrap();
    for round in 0..200 {
        drop(transport.replay(replay.clone()).await.unwrap());
        // Cut off somewhere, or not.
        let _ = timeout(Duration::from_millis(round / 8), letters.page(None, 8)).await;
        let back = async { while letters.count().await.unwrap() == 0 {} };
        timeout(PATIENCE, back).await.expect("what was cut off is given back");
    }
    transport.events().tell(BusEvent::Connected);
    let told = events.next().await;
    assert!(matches!(told, Some(BusEvent::Connected)), "nothing was told before: {told:?}");
    remove(&transport, &config).await;
}

/// Which of mixed delays were late; none may be early.
async fn delayed(transport: &RabbitMqTransport, from: &mut Box<dyn Subscription>, to: &Destination) -> Vec<String> {
    let delays = [3_000, 200, 1_000, 450, 2_000, 700, 5_000];
    let sent = Instant::now();
    let posts = delays.map(|ms| (to.clone(), message(&ms.to_string()), Some(Duration::from_millis(ms)), true));
    assert!(submit_and_wait(&*transport.publisher(), &posts).await.is_empty());
    let mut late = Vec::new();
    for _ in delays {
        let delay: u64 = next(from).await.parse().unwrap();
        let came = sent.elapsed().as_millis() as u64;
        assert!(came >= delay, "{delay} ms came after {came} ms");
        if came > delay + (delay / 10).max(250) {
            late.push(format!("{delay} ms came after {came} ms"));
        }
    }
    late
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

/// Whoever created the delays may have ended in the middle: then the register does not know them yet.
#[tokio::test]
async fn delays_that_were_not_created_to_the_end_are_created_by_the_next() {
    let Some((_server, config)) = server("undone") else { return };
    let to = Destination::Subscription(spec().name);
    let post = |text: &str| (to.clone(), message(text), Some(Duration::from_millis(200)), true);
    let first = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let mut subscription = first.subscribe(spec()).await.unwrap();
    let client = first.native().downcast_ref::<RabbitMqClient>().unwrap();
    let channel = client.publishing().await.unwrap().create_channel().await.unwrap();
    // What a crash may leave: the last queue, as it is created, but not what leads there.
    let named = |level| format!("{}:_tidings.delay.{level:02}", config.namespace);
    let mut arguments = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(50 << 10));
    arguments.insert("x-dead-letter-exchange".into(), text(&named(9)));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    let durable = lapin::options::QueueDeclareOptions::durable();
    channel.queue_declare(named(10).as_str().into(), durable, arguments).await.unwrap();
    assert!(submit_and_wait(&*first.publisher(), &[post("1")]).await.is_empty());
    assert_eq!(next(&mut subscription).await, "1");
    remove(&first, &config).await;
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

// ---- What the server refuses ----

/// Runs one of the server's own tools.
fn tool(server: &Server, command: &[&str]) {
    block_in_place(|| server.tool(command)).unwrap();
}

fn ctl(server: &Server, command: &[&str]) {
    tool(server, &[&["rabbitmqctl", "--quiet"], command].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_may_not_do_is_denied_and_says_what_to_grant() {
    let Some((server, config)) = server("denied") else { return };
    let owner = RabbitMqTransport::connect(config.clone()).await.unwrap();
    owner.provision(&Topology { topics: Vec::new(), subscriptions: vec![spec()] }).await.unwrap();
    let user = format!("clerk-{}", config.namespace);
    ctl(&server, &["add_user", &user, "sparrow"]);
    let may = |[configure, write, read]: [&str; 3]| {
        ctl(&server, &["set_permissions", "--vhost", "/", &user, configure, write, read]);
    };
    let connect = async |provision, vhost: &str| {
        let vhost = vhost.to_owned();
        let (user, password) = (user.clone(), "sparrow".into());
        RabbitMqTransport::connect(RabbitMqConfig { user, password, provision, vhost, ..config.clone() }).await
    };
    let denied = |error: tidings_core::Error| {
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
        assert!(!error.is_transient() && !format!("{error:?}").contains("sparrow"), "{error:?}");
        error.to_string()
    };
    denied(connect(Provision::Create, "/").await.err().expect("no access to the virtual host"));
    may(["^$", ".*", ".*"]);
    let why = denied(connect(Provision::Create, "/").await.err().expect("nothing may be created"));
    assert!(why.contains("configure access") && why.contains("grant"), "{why}");
    may([".*", "^$", "^$"]);
    let clerk = connect(Provision::Off, "/").await.unwrap();
    let post = (Destination::Topic(Topic::new("test.a").unwrap()), message("x"), None, false);
    let (_, failure) = submit_and_wait(&*clerk.publisher(), &[post]).await.pop().expect("it may not publish");
    assert!(denied(failure.error).contains("write access"));
    may([".*", &format!("^{}:tidings$", config.namespace), "^$"]);
    let (name, password) = (user.clone(), "sparrow".into());
    let (provision, publish_channels) = (Provision::Off, 1);
    let one = RabbitMqConfig { user: name, password, provision, publish_channels, ..config.clone() };
    let narrow = RabbitMqTransport::connect(one).await.unwrap();
    let address = Destination::Subscription(spec().name);
    let event = || (Destination::Topic(Topic::new("test.a").unwrap()), message("x"), None, false);
    let posts = [event(), (address, message("x"), None, false), event()];
    let mut failures: HashMap<_, _> = submit_and_wait(&*narrow.publisher(), &posts).await.into_iter().collect();
    assert!(denied(failures.remove(&1).expect("it may not publish there").error).contains("_tidings.to"));
    let other = &failures.get(&2).expect("the channel was closed before it").error;
    assert!(other.is_transient() && other.kind() == ErrorKind::Connection, "{other:?}");
    assert!(denied(clerk.subscribe(spec()).await.err().expect("it may not read")).contains("read access"));
    remove(&owner, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_without_their_plug_in_are_refused_with_the_command() {
    let Some((server, config)) = server("plugin") else { return };
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let topic = TopicSpec { slots: 4, ..TopicSpec::new(Topic::new("test.a").unwrap()) };
    transport.provision(&Topology { topics: vec![topic], subscriptions: Vec::new() }).await.unwrap();
    let spec = || SubscriptionSpec { ordering: Ordering::Key, ..spec() };
    tool(&server, &["rabbitmq-plugins", "disable", "rabbitmq_consistent_hash_exchange"]);
    let error = transport.subscribe(spec()).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    let text = error.to_string();
    let command = text.split('`').nth(1).expect("a command").split(' ').collect::<Vec<_>>();
    assert_eq!(command, ["rabbitmq-plugins", "enable", "rabbitmq_consistent_hash_exchange"]);
    tool(&server, &command);
    drop(transport.subscribe(spec()).await.expect("what it says helps"));
    remove(&transport, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_mebibytes_are_refused_or_taken_as_the_server_is_set() {
    let Some((server, mut config)) = server("large") else { return };
    config.max_message_size = 32 << 20;
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let mut subscription = transport.subscribe(spec()).await.unwrap();
    let to = || Destination::Topic(Topic::new("test.a").unwrap());
    let large = || (to(), message(&"x".repeat(20 << 20)), None, false);
    let (_, failure) = submit_and_wait(&*transport.publisher(), &[large()]).await.pop().expect("refused");
    assert_eq!(failure.error.kind(), ErrorKind::TooLarge, "{failure:?}");
    assert!(failure.error.to_string().contains("16777216") && !failure.error.is_transient(), "{failure:?}");
    // Its channel was closed for it; the next one takes what is smaller.
    assert!(submit_and_wait(&*transport.publisher(), &[(to(), message("small"), None, false)]).await.is_empty());
    assert_eq!(next(&mut subscription).await, "small");
    ctl(&server, &["eval", "persistent_term:put(max_message_size, 33554432)."]);
    // A connection keeps the limit that it was made under.
    let again = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let failures = submit_and_wait(&*again.publisher(), &[large()]).await;
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(next(&mut subscription).await.len(), 20 << 20);
    remove(&transport, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stays_unsettled_for_too_long_is_refused_at_start_or_comes_again() {
    let Some((server, mut config)) = server("timeout") else { return };
    // How often the server looks, of channels that are opened from now on; by default once a minute.
    ctl(&server, &["eval", "application:set_env(rabbit, channel_tick_interval, 500)."]);
    config.consumer_timeout_ms = 1_000;
    let transport = RabbitMqTransport::connect(config.clone()).await.unwrap();
    let held = |max_hold| SubscriptionSpec { max_hold, ..spec() };
    let error = transport.subscribe(held(Duration::from_millis(1_001))).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    assert!(error.to_string().contains("consumer_timeout_ms"), "{error}");
    let mut subscription = transport.subscribe(held(Duration::from_millis(1_000))).await.unwrap();
    let mut events = transport.events().listen();
    let post = (Destination::Topic(Topic::new("test.a").unwrap()), message("slow"), None, false);
    assert!(submit_and_wait(&*transport.publisher(), &[post]).await.is_empty());
    let first = delivery(&mut subscription).await;
    let closed = async {
        loop {
            if let Some(BusEvent::Disconnected { reason }) = events.next().await {
                return reason;
            }
        }
    };
    let reason = timeout(PATIENCE, closed).await.expect("the server takes `x-consumer-timeout`");
    assert!(reason.contains("timeout"), "{reason}");
    let again = delivery(&mut subscription).await;
    assert!(again.redelivered && again.message.id == first.message.id && first.acker.lease() == Lease::Lost);
    first.acker.ack();
    again.acker.ack();
    let flushed = subscription.close(tokio::time::Instant::now() + PATIENCE).await;
    assert_eq!((flushed.applied, flushed.stale), (1, 1));
    ctl(&server, &["eval", "application:set_env(rabbit, channel_tick_interval, 60000)."]);
    remove(&transport, &config).await;
}

// ---- A server that takes nothing ----

async fn wait_at(_order: Order, State(gate): State<Arc<Semaphore>>) {
    gate.acquire().await.unwrap().forget();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_alarm_ends_in_the_deadline_stops_no_ack_and_passes() {
    if !is_chosen() {
        return;
    }
    let server = block_in_place(|| Server::start("rabbitmq")).unwrap();
    let mut config = Config::from_url(server.url()).unwrap();
    config.bus.publish_timeout_ms = 2_000;
    let bus = Bus::connect(config).await.unwrap();
    let gate = Arc::new(Semaphore::new(0));
    let running = Service::new("billing").state(Arc::clone(&gate)).on(wait_at).start(&bus).await.unwrap();
    let orders: Vec<_> = (0..20).map(|number| order("ada", number)).collect();
    bus.publish_all(&orders).await.unwrap();
    ctl(&server, &["set_vm_memory_high_watermark", "absolute", "1MB"]);
    let begun = Instant::now();
    let error = timeout(PATIENCE, bus.publish(&order("ada", 20))).await.expect("no hang").unwrap_err();
    let took = begun.elapsed();
    assert!(error.is_transient() && [ErrorKind::Timeout, ErrorKind::Full].contains(&error.kind()), "{error:?}");
    assert!((2_000..4_000).contains(&took.as_millis()), "{took:?}");
    let Health::Degraded(reason) = bus.health() else { panic!("{:?}", bus.health()) };
    assert!(reason.to_string().contains("takes no publishes"), "{reason}");
    gate.add_permits(100);
    let list = ["rabbitmqctl", "--quiet", "list_queues", "--no-table-headers", "name", "messages"];
    let left = || async { block_in_place(|| server.tool(&list)).unwrap() };
    let acked = async || left().await.lines().any(|line| line == "billing.shop.order.placed\t0");
    eventually("what is handled is acked meanwhile", acked).await;
    ctl(&server, &["set_vm_memory_high_watermark", "absolute", "1GB"]);
    let begun = Instant::now();
    while let Err(error) = bus.publish(&order("ada", 21)).await {
        assert!(error.is_transient() && begun.elapsed() < PATIENCE, "{error:?}");
    }
    eventually("up", || async { matches!(bus.health(), Health::Up) }).await;
    let handled = || async { running.stats().next().is_some_and(|(_, stats)| stats.handled > 20) };
    eventually("what was published since is handled", handled).await;
    let drained = running.drain(PATIENCE).await;
    assert!(drained.abandoned == 0 && drained.flushed.applied > 20, "{drained:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_starts_during_a_memory_alarm_is_told_of_it_in_time() {
    if !is_chosen() {
        return;
    }
    let server = block_in_place(|| Server::start("rabbitmq")).unwrap();
    let url = format!("{}?timeout_ms=2000", server.url());
    let start =
        async |bus: &Bus| Service::new("billing").state(Arc::new(Semaphore::new(1))).on(wait_at).start(bus).await;
    ctl(&server, &["set_vm_memory_high_watermark", "absolute", "1MB"]);
    let begun = Instant::now();
    let bus = timeout(PATIENCE, Bus::connect(Config::from_url(&url).unwrap())).await.expect("no hang").unwrap();
    let error = timeout(PATIENCE, start(&bus)).await.expect("no hang").expect_err("it cannot start");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(error.kind() == ErrorKind::Timeout && error.is_transient(), "{error:?}");
    assert!(error.to_string().contains("takes no publishes"), "{error}");
    ctl(&server, &["set_vm_memory_high_watermark", "absolute", "1GB"]);
    eventually("it starts once that is over", || async { start(&bus).await.is_ok() }).await;
}

// ---- TLS ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_tls_only_a_trusted_server_and_by_certificate_only_a_known_client() {
    if !is_chosen() {
        return;
    }
    let server = block_in_place(|| Server::start("rabbitmq")).unwrap();
    let file = |name: &str, text: &str| {
        let path = server.folder().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (authority, stranger) = (Authority::new(), Authority::new());
    let ((cert, key), port) = (authority.sign("the server"), free_port().unwrap());
    let (ca, other) = (file("ca.pem", &authority.pem()), file("other.pem", &stranger.pem()));
    file("cert.pem", &cert);
    file("key.pem", &key);
    let here = "/var/lib/rabbitmq";
    let settings = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {here}/ca.pem\nssl_options.certfile = {here}/cert.pem\n\
         ssl_options.keyfile = {here}/key.pem\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = false\n\
         auth_mechanisms.1 = PLAIN\nauth_mechanisms.2 = EXTERNAL\nssl_cert_login_from = common_name\n"
    );
    file("extra.conf", &settings);
    block_in_place(|| server.restart()).unwrap();
    ctl(&server, &["add_user", "clerk", "no password is asked for"]);
    ctl(&server, &["set_permissions", "clerk", ".*", ".*", ".*"]);
    let url = format!("amqps://guest:guest@127.0.0.1:{port}");
    let config = |ca: &Path| RabbitMqConfig { tls_ca_file: Some(ca.into()), ..RabbitMqConfig::from_url(&url).unwrap() };
    works(config(&ca)).await;
    for untrusted in [config(&other), RabbitMqConfig::from_url(&url).unwrap()] {
        let error = RabbitMqTransport::connect(untrusted).await.err().expect("not trusted");
        assert!(error.kind() == ErrorKind::Connection && !error.is_transient(), "{error:?}");
        assert!(error.to_string().contains("TLS"), "{error}");
    }
    let by_certificate = |(cert, key): (String, String)| RabbitMqConfig {
        tls_cert_file: Some(file("client.pem", &cert)),
        tls_key: Some(key.into()),
        external: true,
        ..config(&ca)
    };
    works(by_certificate(authority.sign("clerk"))).await;
    let error = RabbitMqTransport::connect(by_certificate(authority.sign("nobody"))).await.err().expect("not known");
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    let error = RabbitMqTransport::connect(by_certificate(stranger.sign("clerk"))).await.err().expect("not signed");
    assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
}

/// Something comes through.
async fn works(config: RabbitMqConfig) {
    let transport = RabbitMqTransport::connect(config).await.unwrap();
    let mut subscription = transport.subscribe(spec()).await.unwrap();
    let post = (Destination::Topic(Topic::new("test.a").unwrap()), message("secretly"), None, false);
    assert!(submit_and_wait(&*transport.publisher(), &[post]).await.is_empty());
    assert_eq!(next(&mut subscription).await, "secretly");
}

// ---- Delays that outlive who asked for them ----

/// From 0.2 s to `longest`, mixed, in milliseconds.
fn delays(longest: u64) -> Vec<u64> {
    let shares = [1_000, 20, 500, 170, 770, 60, 330, 250];
    let mut delays: Vec<_> = shares.map(|share| longest * share / 1_000).into();
    delays.extend([200, 3_000, 450, 1_500]);
    delays
}

fn longest() -> u64 {
    std::env::var("TIDINGS_TEST_LONGEST_DELAY_S").map_or(30, |text| text.parse::<u64>().unwrap()) * 1_000
}

fn now_ms() -> u64 {
    Clock::SYSTEM.now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// `TIDINGS_TEST_LONGEST_DELAY_S=600` is for a run by hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delays_survive_the_kill_of_service_and_broker() {
    if !is_chosen() {
        return;
    }
    let server = block_in_place(|| Server::start("rabbitmq")).unwrap();
    let mut service = Command::new(std::env::current_exe().unwrap());
    service.args(["--exact", "service", "--ignored", "--nocapture"]).env("TIDINGS_TEST_SERVER", server.url());
    let mut service = service.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(service.stdout.take().unwrap()).lines().map(Result::unwrap);
    let sent = block_in_place(|| lines.find_map(|line| line.strip_prefix("sent ").map(str::to_owned)));
    service.kill().and_then(|()| service.wait()).unwrap();
    let sent: u64 = sent.expect("it has sent them").parse().unwrap();
    block_in_place(|| server.kill().and_then(|()| server.up())).unwrap();
    let transport = RabbitMqTransport::from_url(server.url()).await.unwrap();
    let mut subscription = transport.subscribe(spec()).await.unwrap();
    let ready = now_ms() - sent;
    let (mut missing, mut came) = (delays(longest()), Vec::new());
    while !missing.is_empty() {
        let delay: u64 = next(&mut subscription).await.parse().unwrap();
        // What was on its way between two queues may come twice.
        if missing.contains(&delay) {
            came.push((delay, now_ms() - sent));
            missing.retain(|other| *other != delay);
        }
    }
    println!("ready again after {ready} ms; (delay, came after) in ms: {came:?}");
    for (delay, came) in came {
        assert!(came >= delay, "{delay} ms came after {came} ms");
        // What became due while the server was down, or had just come up, comes then.
        let late = came - delay.max(ready + 5_000).min(came);
        assert!(
            late <= (delay / 10).max(250),
            "{delay} ms came after {came} ms, the server was ready after {ready} ms"
        );
    }
}

#[tokio::test]
#[ignore = "started by another test, and killed"]
async fn service() {
    let transport = RabbitMqTransport::from_url(&std::env::var("TIDINGS_TEST_SERVER").unwrap()).await.unwrap();
    let _subscription = transport.subscribe(spec()).await.unwrap();
    let to = Destination::Subscription(spec().name);
    let posts: Vec<_> = delays(longest())
        .into_iter()
        .map(|ms| (to.clone(), message(&ms.to_string()), Some(Duration::from_millis(ms)), true))
        .collect();
    // Creates the chain, to be remembered by the server.
    let chain = [(to, message("200"), Some(Duration::from_millis(longest())), true)];
    assert!(submit_and_wait(&*transport.publisher(), &chain).await.is_empty());
    let sent = now_ms();
    assert!(submit_and_wait(&*transport.publisher(), &posts).await.is_empty());
    println!("sent {sent}");
    std::future::pending::<()>().await;
}
