//! What only Kafka can show, and neither the conformance suite nor that of faults does; where `TIDINGS_TEST_FAULTS` names
//! `kafka`.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[cfg(feature = "kafka-tls")]
mod authority;

use base64::Engine;
use std::collections::HashMap;
use std::fmt::Debug;
#[cfg(feature = "kafka-tls")]
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tidings::handler::Delivered;
use tidings::kafka::{KafkaConfig, KafkaTransport, Provision, Sasl};
use tidings::prelude::*;
use tidings_tests::server::Server;
use tidings_tests::{Order, Seen, dead_letters, eventually, order};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_replicas_than_brokers_are_an_error_that_says_so() {
    if !is_chosen() {
        return;
    }
    let server = tokio::task::block_in_place(|| Server::shared("kafka")).unwrap();
    let mut config = KafkaConfig::from_url(server.url()).unwrap();
    (config.namespace, config.replication) = ("replicated".into(), 3);
    config.request_timeout = Duration::from_secs(2);
    let bus = Bus::new(KafkaTransport::connect(config).await.unwrap() as _, tidings::BusConfig::default()).unwrap();
    let begun = Instant::now();
    let error = Service::new("crm").on(async |_: Order| ()).start(&bus).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("replication=3"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(30), "after {:?}", begun.elapsed());
}

// ---- Logins and TLS ----

const PASSWORD: &str = "s3cr:et+/%";

/// Longer than connecting may take.
const SOON: Duration = Duration::from_secs(10);

async fn note(order: Order, State(seen): State<Seen<u64>>) {
    seen.push(order.number);
}

/// Something comes through, in both directions.
async fn works(config: KafkaConfig) {
    let bus = Bus::new(KafkaTransport::connect(config).await.unwrap() as _, tidings::BusConfig::default()).unwrap();
    let seen = Seen::<u64>::default();
    let running = Service::new("crm").state(seen.clone()).on(note).start(&bus).await.unwrap();
    bus.publish(&order("ada", 7)).await.unwrap();
    assert_eq!(seen.count(1).await, [7]);
    running.drain(SOON).await;
    bus.close(SOON).await.unwrap();
}

/// It is an error of this kind, in time, that says this.
async fn is_refused(config: KafkaConfig, kind: ErrorKind, says: &str) {
    let begun = Instant::now();
    let error = KafkaTransport::connect(config).await.err().expect("refused");
    assert!(error.kind() == kind && error.to_string().contains(says), "{error:?}");
    assert!(begun.elapsed() < SOON, "after {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_each_login_only_who_is_known_gets_in() {
    if !is_chosen() {
        return;
    }
    let (_server, address) = tokio::task::block_in_place(|| Server::start_kafka_with_password(PASSWORD)).unwrap();
    let config = |sasl: Sasl, password: &str| KafkaConfig {
        brokers: vec![address.to_string()],
        namespace: format!("{sasl:?}").to_lowercase(),
        sasl: Some(sasl),
        user: Some("shop".into()),
        password: Some(password.to_owned().into()),
        ..KafkaConfig::default()
    };
    let by_password: &[Sasl] = match cfg!(feature = "kafka-tls") {
        true => &[Sasl::Plain, Sasl::ScramSha256, Sasl::ScramSha512],
        false => &[Sasl::Plain],
    };
    for sasl in by_password {
        works(config(*sasl, PASSWORD)).await;
        is_refused(config(*sasl, "another"), ErrorKind::Denied, "refused").await;
    }
    let by_token = |token: String| KafkaConfig {
        token: Some(token.into()),
        provision: Provision::Off,
        ..config(Sasl::OAuthBearer, "")
    };
    if !cfg!(feature = "kafka-tls") {
        println!("skipped: SCRAM and OAUTHBEARER need the feature `kafka-tls`");
        return is_refused(by_token(token(3_600)), ErrorKind::Config, "compiled").await;
    }
    // What is there already, because nothing can be created so.
    works(KafkaConfig { namespace: "oauthbearer".into(), ..config(Sasl::Plain, PASSWORD) }).await;
    works(by_token(token(3_600))).await;
    let creates = KafkaConfig { provision: Provision::Create, ..by_token(token(3_600)) };
    is_refused(creates, ErrorKind::Config, "provision").await;
    is_refused(by_token(token(-3_600)), ErrorKind::Denied, "refused").await;
}

/// A token that nobody signed, good for so many seconds.
fn token(lasts: i64) -> String {
    let encode = |json: String| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
    let claims = format!(r#"{{"sub":"shop","iat":{},"exp":{}}}"#, now.min(now + lasts) - 1, now + lasts);
    format!("{}.{}.", encode(r#"{"alg":"none"}"#.into()), encode(claims))
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_tls_only_a_trusted_server_and_only_a_known_client() {
    use authority::Authority;
    if !is_chosen() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("tidings-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (cert, key) = authority.sign("the server");
    file("server.pem", &format!("{key}{cert}"));
    let (ca, other) = (file("ca.pem", &authority.pem()), file("other.pem", &stranger.pem()));
    let start = || Server::start_kafka_with_tls(&folder);
    let (_server, port) = tokio::task::block_in_place(start).unwrap();
    let signed = |by: &Authority, name: &str| {
        let (cert, key) = by.sign("shop");
        (file(&format!("{name}.pem"), &cert), file(&format!("{name}-key.pem"), &key))
    };
    let (shop, forged) = (signed(&authority, "shop"), signed(&stranger, "forged"));
    let config = |host: &str, ca: &Path, client: Option<&(PathBuf, PathBuf)>| KafkaConfig {
        brokers: vec![format!("{host}:{port}")],
        tls: Some(true),
        tls_ca_file: Some(ca.into()),
        tls_cert_file: client.map(|(cert, _)| cert.clone()),
        tls_key_file: client.map(|(_, key)| key.clone()),
        ..KafkaConfig::default()
    };
    works(config("127.0.0.1", &ca, Some(&shop))).await;
    is_refused(config("127.0.0.1", &other, Some(&shop)), ErrorKind::Connection, "certificate verify failed").await;
    // The server's certificate is for 127.0.0.1.
    is_refused(config("localhost", &ca, Some(&shop)), ErrorKind::Connection, "certificate verify failed").await;
    // The server hangs up on them without a word that the client tells.
    is_refused(config("127.0.0.1", &ca, None), ErrorKind::Connection, "no broker can be reached").await;
    is_refused(config("127.0.0.1", &ca, Some(&forged)), ErrorKind::Connection, "no broker can be reached").await;
    std::fs::remove_dir_all(&folder).unwrap();
}

// ---- One in a hundred fails ----

/// `TIDINGS_TEST_EVENTS=500000` with `--release` is for a run by hand that lasts long enough to compare.
fn events() -> u64 {
    given("TIDINGS_TEST_EVENTS", 10_000)
}

/// One in a hundred that waits for its attempts takes a place so long: the faster the others go, the more are needed
/// (`TIDINGS_TEST_IN_FLIGHT`).
fn window() -> usize {
    given("TIDINGS_TEST_IN_FLIGHT", 4_096)
}

fn given<T: FromStr<Err: Debug>>(name: &str, else_this: T) -> T {
    std::env::var(name).map_or(else_this, |text| text.parse().unwrap())
}

/// How often each is measured.
const ROUNDS: usize = 3;

#[derive(Default)]
struct Runs {
    handled: u64,
    /// Of those that fail, by number.
    attempts: HashMap<u64, Vec<u32>>,
}

#[derive(Clone, Default)]
struct Attempts(Arc<Mutex<Runs>>);

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
    let settings = || SubscriptionConfig::default().max_in_flight(window()).retry(policy.clone());
    let attempts = Attempts::default();
    let service = || Service::new("billing").state(attempts.clone()).on_with(settings(), handle);
    service().provision(&bus).await.unwrap();
    let failing_key = |n: u64| failing > 0 && n.is_multiple_of(100);
    let orders = (0..events()).map(|n| order(&format!("{}{n}", if failing_key(n) { "poison" } else { "k" }), n));
    bus.publish_all(&orders.collect::<Vec<_>>()).await.unwrap();
    let begun = Instant::now();
    let running = service().start(&bus).await.unwrap();
    eventually("all others are handled", || async { attempts.0.lock().unwrap().handled == events() - failing }).await;
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
    let mut took = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        let name = |what| format!("{what}-{round}");
        took[0].push(handled_in(&server, &name("clean"), policy(), 0).await);
        took[1].push(handled_in(&server, &name("held"), policy().in_order(), events() / 100).await);
        took[2].push(handled_in(&server, &name("aside"), policy().aside(), events() / 100).await);
    }
    let [clean, in_order, aside] = took.map(|mut took| {
        took.sort_unstable();
        took[ROUNDS / 2]
    });
    let ratio = |took: Duration| clean.as_secs_f64() / took.as_secs_f64();
    println!(
        "{} events, max_in_flight {}: {clean:.2?} without failures; with 1 % that always fail the others took \
         {in_order:.2?} in order ({:.2}x) and {aside:.2?} aside ({:.2}x); medians of {ROUNDS}",
        events(),
        window(),
        ratio(in_order),
        ratio(aside)
    );
}
