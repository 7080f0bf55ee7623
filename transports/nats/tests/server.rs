//! What only a server of its own can show: refused and wrong connections, and what is deleted under a subscription.
#![allow(clippy::unwrap_used)]

use base64::Engine;
use futures_util::StreamExt;
use std::future::poll_fn;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{
    Delivery, Destination, Fate, Ordering, Polled, Start, Subscription, SubscriptionSpec, TopicSpec, Topology,
    Transport, submit_and_wait,
};
use tidings_core::{Error, ErrorKind, Message, MessageId, SubscriptionName, Topic, TopicPattern};
use tidings_nats::{NatsConfig, NatsTransport, Provision};
use tokio::time::{Instant, sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

/// The server's program, which `scripts/brokers` installs if it is missing.
fn binary() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/brokers");
    let output = Command::new(script).args(["binary", "nats"]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

/// A server in a folder of its own, killed when it is dropped.
struct Server {
    child: Child,
    port: u16,
    dir: PathBuf,
}

impl Server {
    fn start(config: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = std::env::temp_dir().join(format!("tidings-nats-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("server.conf");
        std::fs::write(&file, config.replace("DIR/", &format!("{}/", dir.display()))).unwrap();
        let mut command = Command::new(binary());
        command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-c"]).arg(&file);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, port, dir }
    }

    fn with_streams(more: &str) -> Self {
        Self::start(&format!("jetstream {{ store_dir: \"DIR/store\" }}\n{more}"))
    }

    fn config(&self) -> NatsConfig {
        let mut config =
            NatsConfig { servers: vec![format!("nats://127.0.0.1:{}", self.port)], ..NatsConfig::default() };
        config.ack_wait = Duration::from_secs(2);
        config
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

async fn connect(config: NatsConfig) -> Arc<NatsTransport> {
    timeout(PATIENCE, NatsTransport::connect(config)).await.expect("an answer").expect("it connects")
}

async fn refused(config: NatsConfig) -> Error {
    let begun = Instant::now();
    let error = timeout(PATIENCE, NatsTransport::connect(config)).await.expect("an answer").err().expect("refused");
    assert!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("canary"), "{shown}");
    error
}

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn spec(topics: &[&str], ordering: Ordering) -> SubscriptionSpec {
    SubscriptionSpec {
        name: SubscriptionName::new("crm").unwrap(),
        topics: topics.iter().map(|topic| TopicPattern::new(*topic).unwrap()).collect(),
        ordering,
        start: Start::New,
        max_in_flight: 10,
        max_hold: Duration::from_secs(60),
    }
}

fn message(text: &str) -> Message {
    let id = MessageId::new(std::time::SystemTime::now());
    Message::new(id, "/test", "t", topic("shop.order")).with_payload("text/plain", text.to_owned()).with_key("ada")
}

async fn publish(transport: &NatsTransport, text: &str) {
    // As core does, until it is confirmed.
    let message = message(text);
    let post = [(Destination::Topic(topic("shop.order")), message, None, false)];
    let begun = Instant::now();
    loop {
        let failures = submit_and_wait(&*transport.publisher(), &post).await;
        let Some((_, failure)) = failures.first() else { return };
        assert!(failure.error.is_transient() && begun.elapsed() < PATIENCE, "{failure:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn next(subscription: &mut Box<dyn Subscription>) -> Delivery {
    let mut polled = Polled::default();
    let waiting = async {
        while polled.deliveries.is_empty() {
            poll_fn(|cx| subscription.poll_batch(cx, 1, &mut polled)).await.expect("it goes on");
        }
        polled.deliveries.remove(0)
    };
    timeout(PATIENCE, waiting).await.expect("a delivery")
}

async fn api(transport: &NatsTransport, call: &str, body: &str) -> String {
    let client = transport.native().downcast_ref::<async_nats::Client>().unwrap();
    let answer = client.request(format!("$JS.API.{call}"), body.to_owned().into()).await.unwrap();
    String::from_utf8(answer.payload.to_vec()).unwrap()
}

#[tokio::test]
async fn credentials_are_checked() {
    let pair = nkeys::KeyPair::new_user();
    let users = format!("{{ user: shop, password: \"s3:cret\" }}, {{ nkey: {} }}", pair.public_key());
    let server = Server::with_streams(&format!("authorization {{ users: [ {users} ] }}"));
    assert_eq!(refused(server.config()).await.kind(), ErrorKind::Denied);
    let with = |user: &str, password: &str| {
        let (user, password) = (Some(user.to_owned()), Some(password.into()));
        NatsConfig { user, password, ..server.config() }
    };
    assert_eq!(refused(with("shop", "canary")).await.kind(), ErrorKind::Denied);
    let transport = connect(with("shop", "s3:cret")).await;
    assert!(!format!("{:?}", with("shop", "canary")).contains("canary"));
    publish(&transport, "1").await;
    let nkey = NatsConfig { nkey: Some(pair.seed().unwrap().into()), ..server.config() };
    publish(&*connect(nkey).await, "2").await;
    let url = format!("nats://shop:s3%3Acret@127.0.0.1:{}", server.port);
    connect(NatsConfig::from_url(&url).unwrap()).await;
    let other = NatsConfig { nkey: Some(nkeys::KeyPair::new_user().seed().unwrap().into()), ..server.config() };
    assert_eq!(refused(other).await.kind(), ErrorKind::Denied);
}

/// A JWT as the server's tools write it: by `issuer`, about `subject`.
fn jwt(issuer: &nkeys::KeyPair, subject: &str, nats: &serde_json::Value) -> String {
    let encode = |text: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    let claims = serde_json::json!({ "jti": subject, "iat": 1, "iss": issuer.public_key(), "name": "test", "sub": subject, "nats": nats });
    let signed =
        [r#"{"typ":"JWT","alg":"ed25519-nkey"}"#, &claims.to_string()].map(|part| encode(part.as_bytes())).join(".");
    format!("{signed}.{}", encode(&issuer.sign(signed.as_bytes()).unwrap()))
}

/// What a `.creds` file holds.
fn credentials(account: &nkeys::KeyPair, user: &nkeys::KeyPair) -> String {
    let jwt = jwt(
        account,
        &user.public_key(),
        &serde_json::json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 }),
    );
    let seed = user.seed().unwrap();
    format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
}

#[tokio::test]
async fn a_credentials_file_is_checked() {
    let operator = nkeys::KeyPair::new_operator();
    let [system, account, other] = std::array::from_fn(|_| nkeys::KeyPair::new_account());
    let limits = serde_json::json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1,
        "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "wildcards": true });
    let about = |kind: &str, key: &nkeys::KeyPair| {
        jwt(&operator, &key.public_key(), &serde_json::json!({ "type": kind, "version": 2, "limits": limits }))
    };
    let unlimited = jwt(&operator, &system.public_key(), &serde_json::json!({ "type": "account", "version": 2 }));
    let server = Server::with_streams(&format!(
        "operator: {}\nresolver: MEMORY\nsystem_account: {}\nresolver_preload: {{ {}: {unlimited}, {}: {} }}",
        about("operator", &operator),
        system.public_key(),
        system.public_key(),
        account.public_key(),
        about("account", &account),
    ));
    let file = std::env::temp_dir().join(format!("tidings-nats-{}.creds", std::process::id()));
    let with = |by: &nkeys::KeyPair| {
        std::fs::write(&file, credentials(by, &nkeys::KeyPair::new_user())).unwrap();
        NatsConfig { credentials_file: Some(file.clone()), ..server.config() }
    };
    assert_eq!(refused(server.config()).await.kind(), ErrorKind::Denied);
    assert_eq!(refused(with(&other)).await.kind(), ErrorKind::Denied);
    publish(&*connect(with(&account)).await, "1").await;
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn a_token_is_checked() {
    let server = Server::with_streams("authorization { token: \"s3cret\" }");
    let with = |token: &str| NatsConfig { token: Some(token.into()), ..server.config() };
    assert_eq!(refused(with("canary")).await.kind(), ErrorKind::Denied);
    connect(with("s3cret")).await;
}

#[tokio::test]
async fn who_does_not_answer_is_given_up() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap();
    let at = |timeout| NatsConfig {
        servers: vec![format!("nats://{address}")],
        connect_timeout: Duration::from_millis(timeout),
        ..NatsConfig::default()
    };
    assert_eq!(refused(at(500)).await.kind(), ErrorKind::Timeout, "it takes the connection and says nothing");
    drop(nobody);
    assert_eq!(refused(at(5000)).await.kind(), ErrorKind::Connection, "nobody listens");
    let server = Server::start("");
    assert_eq!(refused(server.config()).await.kind(), ErrorKind::Unsupported, "JetStream is off");
}

/// A certificate of `ca` for this host, and its key, as files.
fn certificate(dir: &Path, name: &str, ca: &rcgen::CertifiedIssuer<'_, rcgen::KeyPair>) -> (PathBuf, PathBuf) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    let cert = params.signed_by(&key, ca).unwrap();
    let paths = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
    std::fs::write(&paths.0, cert.pem()).unwrap();
    std::fs::write(&paths.1, key.serialize_pem()).unwrap();
    paths
}

fn authority(dir: &Path, name: &str) -> (rcgen::CertifiedIssuer<'static, rcgen::KeyPair>, PathBuf) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    let path = dir.join(format!("{name}.pem"));
    std::fs::write(&path, ca.pem()).unwrap();
    (ca, path)
}

#[tokio::test]
async fn tls_is_checked_both_ways() {
    let dir = std::env::temp_dir().join(format!("tidings-nats-tls-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let ((ca, ca_file), (_, other_file)) = (authority(&dir, "ca"), authority(&dir, "other"));
    let (cert, key) = certificate(&dir, "server", &ca);
    let (client_cert, client_key) = certificate(&dir, "client", &ca);
    let tls = format!("cert_file: {cert:?}, key_file: {key:?}, ca_file: {ca_file:?}, verify: true");
    let server = Server::with_streams(&format!("tls {{ {tls} }}"));
    let with = |ca: &Path, cert: Option<(&Path, &Path)>| NatsConfig {
        tls_ca_file: Some(ca.to_owned()),
        tls_cert_file: cert.map(|(cert, _)| cert.to_owned()),
        tls_key_file: cert.map(|(_, key)| key.to_owned()),
        ..server.config()
    };
    let mutual = Some((&*client_cert, &*client_key));
    publish(&*connect(with(&ca_file, mutual)).await, "1").await;
    for wrong in [with(&other_file, mutual), with(&ca_file, None)] {
        let error = refused(wrong).await;
        assert!(matches!(error.kind(), ErrorKind::Connection | ErrorKind::Timeout), "{error:?}");
    }
    let no_tls = Server::with_streams("");
    let required = NatsConfig { tls_ca_file: Some(ca_file), ..no_tls.config() };
    let error = refused(required).await;
    assert!(matches!(error.kind(), ErrorKind::Connection | ErrorKind::Timeout), "{error:?}");
    let _ = std::fs::remove_dir_all(dir);
}

/// Waits until the server says of the consumer what is asked for.
async fn until_consumer(transport: &NatsTransport, consumer: &str, says: &str) {
    let asking = async {
        while !api(transport, &format!("CONSUMER.INFO.{consumer}"), "").await.contains(says) {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, asking).await.expect("in time");
}

#[tokio::test]
async fn what_is_deleted_under_a_subscription_is_built_again() {
    for ordering in [Ordering::Key, Ordering::None] {
        let server = Server::with_streams("");
        let transport = connect(server.config()).await;
        let mut subscription = transport.subscribe(spec(&["shop.order"], ordering)).await.unwrap();
        publish(&transport, "1").await;
        next(&mut subscription).await.acker.ack();
        api(&transport, "CONSUMER.DELETE.shop.crm", "").await;
        publish(&transport, "2").await;
        let delivery = next(&mut subscription).await;
        assert_eq!(&delivery.message.payload[..], b"2", "{ordering:?}: nothing is read twice, and nothing is missing");
        let files = server.dir.join("store/jetstream/$G/streams/shop/obs/crm/meta.inf");
        assert!(
            files.exists(),
            "{ordering:?}: the consumer was built before the server had removed the old one's files"
        );
        delivery.acker.ack();
        // An ack on its way to a consumer that is deleted with its stream is answered by nobody, and its message is gone.
        until_consumer(&transport, "shop.crm", "\"num_ack_pending\":0").await;
        assert!(api(&transport, "STREAM.DELETE.shop", "").await.contains("true"));
        publish(&transport, "3").await;
        let delivery = next(&mut subscription).await;
        assert_eq!(&delivery.message.payload[..], b"3", "{ordering:?}");
        assert!(
            server.dir.join("store/jetstream/$G/streams/shop/meta.inf").exists(),
            "{ordering:?}: as the consumer's"
        );
        delivery.acker.ack();
        let flushed = subscription.close(Instant::now() + PATIENCE).await;
        assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (3, 0, 0), "{ordering:?}");
    }
}

#[tokio::test]
async fn what_was_given_back_to_a_consumer_that_is_deleted_comes_again() {
    let server = Server::with_streams("");
    let transport = connect(server.config()).await;
    let mut subscription = transport.subscribe(spec(&["shop.order"], Ordering::None)).await.unwrap();
    publish(&transport, "1").await;
    next(&mut subscription).await.acker.release(Duration::from_secs(3600));
    publish(&transport, "2").await;
    next(&mut subscription).await.acker.ack();
    until_consumer(&transport, "shop.crm", "\"num_ack_pending\":1").await;
    api(&transport, "CONSUMER.DELETE.shop.crm", "").await;
    publish(&transport, "3").await;
    let again = next(&mut subscription).await;
    assert_eq!(&again.message.payload[..], b"1", "it was settled by nobody");
    assert!(again.redelivered);
    again.acker.ack();
    let delivery = next(&mut subscription).await;
    assert_eq!(&delivery.message.payload[..], b"3", "what was acked does not come again");
    delivery.acker.ack();
    let flushed = subscription.close(Instant::now() + PATIENCE).await;
    assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (4, 0, 0));
}

#[tokio::test]
async fn what_is_held_is_kept_when_its_consumer_is_deleted() {
    for ordering in [Ordering::Key, Ordering::None] {
        let server = Server::with_streams("");
        let transport = connect(NatsConfig { ack_wait: Duration::from_secs(10), ..server.config() }).await;
        let spec = SubscriptionSpec { max_in_flight: 1, ..spec(&["shop.order"], ordering) };
        let mut subscription = transport.subscribe(spec).await.unwrap();
        publish(&transport, "1").await;
        let held = next(&mut subscription).await;
        api(&transport, "CONSUMER.DELETE.shop.crm", "").await;
        // A full subscription asks for nothing, and looks.
        until_consumer(&transport, "shop.crm", "\"name\":\"crm\"").await;
        held.acker.ack();
        // It hears the ack when it has sent the message itself.
        until_consumer(&transport, "shop.crm", "\"ack_floor\":{\"consumer_seq\":1").await;
        let flushed = subscription.close(Instant::now() + PATIENCE).await;
        assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (1, 0, 0), "{ordering:?}");
    }
}

#[tokio::test]
async fn a_consumer_that_is_built_again_does_not_begin_before_its_subscription() {
    for ordering in [Ordering::Key, Ordering::None] {
        let server = Server::with_streams("");
        let transport = connect(server.config()).await;
        publish(&transport, "old").await;
        let mut subscription = transport.subscribe(spec(&["shop.order"], ordering)).await.unwrap();
        api(&transport, "CONSUMER.DELETE.shop.crm", "").await;
        publish(&transport, "new").await;
        assert_eq!(&next(&mut subscription).await.message.payload[..], b"new", "{ordering:?}");
    }
}

/// The subscription is full and asks for nothing, so nothing tells it of the deletion.
#[tokio::test]
async fn a_stream_that_another_has_built_again_is_not_taken_for_the_old_one() {
    for ordering in [Ordering::Key, Ordering::None] {
        let server = Server::with_streams("");
        let [transport, other] = [connect(server.config()).await, connect(server.config()).await];
        let spec = SubscriptionSpec { max_in_flight: 1, ..spec(&["shop.order"], ordering) };
        let mut subscription = transport.subscribe(spec.clone()).await.unwrap();
        publish(&transport, "1").await;
        let held = next(&mut subscription).await;
        assert!(api(&transport, "STREAM.DELETE.shop", "").await.contains("true"));
        other.provision(&Topology { topics: Vec::new(), subscriptions: vec![spec] }).await.unwrap();
        publish(&other, "2").await;
        let delivery = next(&mut subscription).await;
        assert_eq!(&delivery.message.payload[..], b"2", "{ordering:?}: at the position of what is held");
        held.acker.ack();
        delivery.acker.ack();
        let flushed = subscription.close(Instant::now() + PATIENCE).await;
        assert_eq!((flushed.applied, flushed.stale), (1, 1), "{ordering:?}: what was held is gone");
    }
}

/// As a stream does that was created before the server had removed the files of the one before.
#[tokio::test]
async fn a_stream_that_does_not_answer_is_told_in_time_and_stores_what_is_sent_again_once() {
    let server = Server::with_streams("");
    let transport = connect(NatsConfig { request_timeout: Duration::from_secs(1), ..server.config() }).await;
    publish(&transport, "1").await;
    let set_no_ack = async |no_ack: bool| {
        let info: serde_json::Value = serde_json::from_str(&api(&transport, "STREAM.INFO.shop", "").await).unwrap();
        let mut config = info["config"].clone();
        config["no_ack"] = no_ack.into();
        let updated = api(&transport, "STREAM.UPDATE.shop", &config.to_string()).await;
        assert!(!updated.contains("\"error\""), "{updated}");
    };
    set_no_ack(true).await;
    let post = [(Destination::Topic(topic("shop.order")), message("2"), None, false)];
    let failures = timeout(PATIENCE, submit_and_wait(&*transport.publisher(), &post)).await.expect("an answer");
    let failure = &failures[0].1;
    assert_eq!((failure.fate, failure.error.kind()), (Fate::PossiblyPersisted, ErrorKind::Timeout), "{failure:?}");
    assert!(failure.error.is_transient(), "core sends it again");
    set_no_ack(false).await;
    assert!(submit_and_wait(&*transport.publisher(), &post).await.is_empty());
    let info = api(&transport, "STREAM.INFO.shop", "").await;
    assert!(info.contains("\"messages\":2"), "{info}");
}

#[tokio::test]
async fn a_settlement_that_no_consumer_hears_is_not_counted_as_applied() {
    let server = Server::with_streams("");
    let creator = connect(server.config()).await;
    creator.subscribe(spec(&["shop.order"], Ordering::None)).await.unwrap().close(Instant::now() + PATIENCE).await;
    let transport = connect(NatsConfig { provision: Provision::Verify, ..server.config() }).await;
    let mut subscription = transport.subscribe(spec(&["shop.order"], Ordering::None)).await.unwrap();
    publish(&creator, "1").await;
    publish(&creator, "2").await;
    let delivery = next(&mut subscription).await;
    api(&transport, "CONSUMER.DELETE.shop.crm", "").await;
    delivery.acker.ack();
    let begun = Instant::now();
    let flushed = subscription.close(begun + PATIENCE).await;
    assert_eq!((flushed.applied, flushed.unknown), (0, 1), "it comes again when the consumer does");
    assert!(
        begun.elapsed() < PATIENCE / 2,
        "its lease ends, and what waits here is given back to nobody: {:?}",
        begun.elapsed()
    );
}

/// As one that was cut off for too long: its claim stands, it reads nothing, and it lives.
#[tokio::test]
async fn a_slot_that_its_owner_has_lost_is_handed_on() {
    let server = Server::with_streams("");
    let [one, two] = [connect(server.config()).await, connect(server.config()).await];
    let mut orders = TopicSpec::new(topic("shop.order"));
    orders.slots = 2;
    one.provision(&Topology { topics: vec![orders], subscriptions: Vec::new() }).await.unwrap();
    let client = one.native().downcast_ref::<async_nats::Client>().unwrap();
    let mut claims = client.subscribe("$KV.*.owner.crm.*").await.unwrap();
    let mut claim = async || timeout(PATIENCE, claims.next()).await.expect("a claim").unwrap();
    let _first = one.subscribe(spec(&["shop.order"], Ordering::Key)).await.unwrap();
    let lost = claim().await.payload;
    let _second = two.subscribe(spec(&["shop.order"], Ordering::Key)).await.unwrap();
    let taken = loop {
        let claim = claim().await;
        if claim.payload != lost && claim.payload != r#"{"owner":""}"# {
            break claim;
        }
    };
    client.publish(taken.subject.clone(), lost.clone()).await.unwrap();
    let mut owners = vec![];
    while owners.last() != Some(&taken.payload) {
        let claim = claim().await;
        owners.extend((claim.subject == taken.subject).then_some(claim.payload));
    }
    assert_eq!(owners[..2], [lost, r#"{"owner":""}"#.into()], "it was told that it has it, and that it has not");
}

#[tokio::test]
async fn streams_that_do_not_fit_are_refused_and_not_changed() {
    let server = Server::with_streams("");
    let transport = connect(server.config()).await;
    let create = async |name: &str, rest: &str| {
        let body = format!("{{\"name\":\"{name}\",\"storage\":\"file\",{rest}}}");
        let answer = api(&transport, &format!("STREAM.CREATE.{name}"), &body).await;
        assert!(!answer.contains("\"error\""), "{answer}");
    };
    create("part", r#""retention":"limits","subjects":["part.a"]"#).await;
    create("queue", r#""retention":"workqueue","subjects":["queue.>"]"#).await;
    create("drops", r#""retention":"limits","subjects":["drops.>"],"max_msgs":5,"discard":"old" "#).await;
    create("fits", r#""retention":"limits","subjects":["fits.>"]"#).await;
    for (pattern, named) in [("part.>", "a pattern for each stream"), ("queue.a", "retention"), ("drops.a", "discard")]
    {
        let error = transport.subscribe(spec(&[pattern], Ordering::None)).await.err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{pattern}: {error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    let error = transport.subscribe(spec(&["fits.a.*", "fits.*.b"], Ordering::None)).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let both = spec(&["fits.a", "fits.b.>", "other.a"], Ordering::None);
    transport.subscribe(both).await.expect("streams are found by their subjects, and each is read");
}

#[tokio::test]
async fn what_may_not_be_created_is_missed() {
    let server = Server::with_streams("");
    let transport = connect(NatsConfig { provision: Provision::Verify, ..server.config() }).await;
    let post = [(Destination::Topic(topic("shop.order")), message("1"), None, false)];
    let failures = submit_and_wait(&*transport.publisher(), &post).await;
    let failure = &failures[0].1;
    assert_eq!((failure.fate, failure.error.kind()), (Fate::NotPersisted, ErrorKind::NotFound), "{failure:?}");
    assert!(!failure.error.is_transient());
    let error = transport.subscribe(spec(&["shop.order"], Ordering::None)).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let limit = transport.capabilities().max_payload;
    let large = message("").with_payload("text/plain", vec![b'x'; limit + 1]);
    let failures =
        submit_and_wait(&*transport.publisher(), &[(Destination::Topic(topic("shop.order")), large, None, false)])
            .await;
    assert_eq!(failures[0].1.error.kind(), ErrorKind::TooLarge);
}
