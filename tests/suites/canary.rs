//! No secret is shown: not by a configuration, a bus or an error, not in events or dead letters, and not in what is logged at
//! TRACE, by the clients of NATS and, where `TIDINGS_TEST_FAULTS` names it, RabbitMQ and Kafka too.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt;
use std::error::Error as StdError;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tidings::nats::NatsConfig;
use tidings::prelude::*;
use tidings::rabbitmq::RabbitMqConfig;
use tidings::transport::Health;
use tidings::{ErrorKind, EventStream, HandlerError};
use tidings_tests::server::free_port;
use tidings_tests::{Order, dead_letters, eventually, order};
use tokio::time::{sleep, timeout};

/// What servers take. Each contains what a URL must escape, and text that no encoding leaves as it is.
const PASSWORD: &str = "s3cr:et@sparrow-4711+right/%";
const TOKEN: &str = "sparrow-4712?token&right=#";
/// What they do not.
const WRONG: &str = "sparrow-4713 wrong/+%";

// ---- What was shown ----

/// All that was logged in this process.
static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Logged;

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// From now on everything is logged, of all crates.
fn log_all() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
            .with_writer(|| Logged)
            .init();
    });
}

fn logged() -> String {
    let logged = String::from_utf8_lossy(&LOGGED.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
    logged.lines().filter(|line| !is_known(line)).fold(String::new(), |text, line| text + line + "\n")
}

/// `lapin` logs each frame at TRACE, that with the credentials too. No caller can change that: `docs.md` of the transport says
/// it, and connecting warns.
fn is_known(line: &str) -> bool {
    line.contains(" TRACE ") && line.contains(" lapin::io_loop: will write to buffer ") && line.contains("(StartOk(")
}

/// The forms in which a secret would be found.
fn forms(secret: &str) -> Vec<String> {
    let mut forms =
        vec![secret.to_owned(), format!("{secret:?}"), serde_json::to_string(secret).unwrap(), escape(secret)];
    forms.push(escape(secret).to_ascii_lowercase());
    forms.push(secret.escape_default().to_string());
    // As numbers, as bytes are shown.
    forms.push(secret.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", "));
    // In base64 its letters depend on what stands before it; the first and the last mix with their neighbours.
    for before in 0..3 {
        let text = STANDARD.encode([&vec![b'x'; before][..], secret.as_bytes()].concat());
        let text = text.trim_end_matches('=');
        forms.push(text[4..text.len() - 2].to_owned());
    }
    // Without quotes: these forms are found in longer ones.
    forms.into_iter().map(|form| form.trim_matches('"').to_owned()).collect()
}

fn escape(text: &str) -> String {
    let escape =
        |byte: u8| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(escape).collect()
}

/// Checks that no secret is in `text`; a part that every form of it has is not either.
fn check(label: &str, text: &str, secrets: &[&str]) {
    let forms = secrets.iter().flat_map(|secret| forms(secret)).chain(["sparrow".into()]);
    for form in forms {
        if let Some(at) = text.find(&form) {
            let from = text[..at].rfind('\n').map_or(0, |line| line + 1);
            panic!("{label}: `{form}` is in: {}", text[from..].lines().next().unwrap_or_default());
        }
    }
}

/// A thing, and all that it is made of, as it is shown.
fn shown(error: &dyn StdError) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        text += &format!("{error}\n{error:?}\n{error:#?}\n");
        next = error.source();
    }
    text
}

fn secrets() -> [&'static str; 3] {
    [PASSWORD, TOKEN, WRONG]
}

fn is_clean(label: &str, text: &str) {
    check(label, text, &secrets());
}

// ---- Servers ----

/// The server's program, which `scripts/brokers` installs if it is missing.
fn binary() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/brokers");
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
        let port = free_port().unwrap();
        // The folder's name is shown in errors: it is none of the secrets.
        let dir = std::env::temp_dir().join(format!("tidings-secrets-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self { child: Self::spawn(&dir, port, config), port, dir }
    }

    fn spawn(dir: &Path, port: u16, config: &str) -> Child {
        let file = dir.join("server.conf");
        std::fs::write(&file, format!("jetstream {{ store_dir: {:?} }}\n{config}", dir.join("store"))).unwrap();
        let mut command = Command::new(binary());
        command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-c"]).arg(&file);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    /// The same server, killed and started with other settings.
    fn become_(&mut self, config: &str) {
        let _ = (self.child.kill(), self.child.wait());
        self.child = Self::spawn(&self.dir, self.port, config);
    }

    fn at(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn with_password(password: &str) -> String {
    format!("authorization {{ users: [ {{ user: shop, password: {} }} ] }}", serde_json::to_string(password).unwrap())
}

fn by_toml(server: &Server, rest: &str) -> Config {
    let text =
        format!("transport = 'nats'\n[nats]\nservers = ['nats://{}']\nconnect_timeout_ms = 2000\n{rest}", server.at());
    Config::from_toml(&text).unwrap()
}

/// A secret as TOML writes it.
fn quoted(secret: &str) -> String {
    serde_json::to_string(secret).unwrap()
}

// ---- Trying ----

/// Connects as configured, uses the bus, and checks all that is to be seen of it. What it said, if it was refused.
async fn attempt(label: &str, config: Config) -> Result<(), ErrorKind> {
    is_clean(label, &format!("{config:?}\n{config:#?}\n{:?}", config.clone().bus));
    match timeout(Duration::from_secs(20), Bus::connect(config)).await.expect("an answer") {
        Ok(bus) => {
            let mut events = bus.events();
            let published = bus.publish(&order("ada", 1)).await;
            let closed = bus.close(Duration::from_secs(5)).await;
            let late = bus.publish(&order("ada", 2)).await;
            let client = bus.transport().native().downcast_ref::<async_nats::Client>();
            let native =
                client.map(|client| format!("{client:?} {:?} {:?}", client.server_info(), client.statistics()));
            is_clean(label, &format!("{bus:?} {bus:#?} {:?} {closed:?} {late:?} {native:?}", bus.health()));
            is_clean(label, &told(&mut events));
            assert!(published.is_ok(), "{label}: {published:?}");
            is_clean(label, &logged());
            Ok(())
        }
        Err(error) => {
            is_clean(label, &shown(&error));
            is_clean(label, &logged());
            Err(error.kind())
        }
    }
}

fn told(events: &mut EventStream) -> String {
    let mut text = String::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        text += &format!("{event:?}\n");
    }
    text
}

const DENIED: Result<(), ErrorKind> = Err(ErrorKind::Denied);

#[test]
fn a_secret_that_is_shown_is_found() {
    log_all();
    for secret in secrets() {
        let encoded = STANDARD.encode(format!("shop:{secret}"));
        for shown in [
            secret.to_owned(),
            escape(secret),
            escape(secret).to_lowercase(),
            encoded,
            format!("{:?}", secret.as_bytes()),
        ] {
            let text = format!("a line\nand {shown} in it\n");
            let found = std::panic::catch_unwind(|| {
                let forms = forms(secret);
                assert!(forms.iter().any(|form| text.contains(form)), "{shown} of {secret} is not found in {forms:?}");
            });
            assert!(found.is_ok());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_are_never_shown() {
    log_all();
    let server = Server::start(&with_password(PASSWORD));
    let by_url =
        |password: &str| Config::from_url(&format!("nats://shop:{}@{}", escape(password), server.at())).unwrap();
    assert_eq!(attempt("by url", by_url(PASSWORD)).await, Ok(()));
    assert_eq!(attempt("wrong by url", by_url(WRONG)).await, DENIED);
    let section = |secret: &str| by_toml(&server, &format!("user = 'shop'\npassword = {secret}"));
    assert_eq!(attempt("in a section", section(&quoted(PASSWORD))).await, Ok(()));
    assert_eq!(attempt("wrong in a section", section(&quoted(WRONG))).await, DENIED);
    let file = |secret: &str| format!("{{ file = '{}' }}", server.file("secret", secret));
    assert_eq!(attempt("by file", section(&file(PASSWORD))).await, Ok(()));
    assert_eq!(attempt("wrong by file", section(&file(WRONG))).await, DENIED);
    assert_eq!(attempt("no such variable", section("{ env = 'TIDINGS_TEST_NO_SUCH' }")).await, Err(ErrorKind::Config));
    let file = server.file("secret", PASSWORD);
    let by_url = format!("nats://{}?user=shop&password_file={file}", server.at());
    assert_eq!(attempt("by file in a url", Config::from_url(&by_url).unwrap()).await, Ok(()));
    // What was looked through was the client's too.
    assert!(logged().contains("write operation: CONNECT"), "nothing of the client at TRACE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_keys_and_credentials_are_never_shown() {
    log_all();
    let server = Server::start(&format!("authorization {{ token: {} }}", quoted(TOKEN)));
    let by_url = |token: &str| Config::from_url(&format!("nats://{}@{}", escape(token), server.at())).unwrap();
    assert_eq!(attempt("token by url", by_url(TOKEN)).await, Ok(()));
    assert_eq!(attempt("wrong token by url", by_url(WRONG)).await, DENIED);
    let section = |token: &str| by_toml(&server, &format!("token = {}", quoted(token)));
    assert_eq!(attempt("token in a section", section(TOKEN)).await, Ok(()));
    assert_eq!(attempt("wrong token in a section", section(WRONG)).await, DENIED);

    let (right, other) = (nkeys::KeyPair::new_user(), nkeys::KeyPair::new_user());
    let server = Server::start(&format!("authorization {{ users: [ {{ nkey: {} }} ] }}", right.public_key()));
    for (pair, expected) in [(&right, Ok(())), (&other, DENIED)] {
        let seed = pair.seed().unwrap();
        let config = by_toml(&server, &format!("nkey = '{seed}'"));
        check("nkey", &format!("{config:?}"), &[&seed]);
        assert_eq!(attempt("nkey", config).await, expected);
        check("nkey", &logged(), &[&seed]);
    }
    assert_eq!(attempt("no nkey", by_toml(&server, &format!("nkey = {}", quoted(WRONG)))).await, DENIED);
    let creds = server.file("creds", &format!("-----BEGIN NATS USER JWT-----\n{PASSWORD}\n------END\n{WRONG}"));
    let config = by_toml(&server, &format!("credentials_file = '{creds}'"));
    assert_eq!(attempt("no credentials", config).await, Err(ErrorKind::Config));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_when_tls_fails() {
    log_all();
    let plain = Server::start(&with_password(PASSWORD));
    let tls = format!("tls://shop:{}@{}?connect_timeout_ms=2000", escape(PASSWORD), plain.at());
    let failed = attempt("a server without TLS", Config::from_url(&tls).unwrap()).await;
    assert!(matches!(failed, Err(ErrorKind::Connection | ErrorKind::Timeout)), "{failed:?}");
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap().self_signed(&key).unwrap();
    let cert_file = plain.file("cert.pem", &cert.pem());
    let key_file = plain.file("key.pem", &key.serialize_pem());
    let settings = format!("tls {{ cert_file: {cert_file:?}, key_file: {key_file:?} }}\n{}", with_password(PASSWORD));
    let server = Server::start(&settings);
    let other = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    let other = other.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
    for (ca, works) in [(cert.pem(), true), (other.pem(), false), (PASSWORD.to_owned(), false)] {
        let ca = server.file("ca.pem", &ca);
        let url = format!("tls://shop:{}@{}?connect_timeout_ms=2000&tls_ca_file={ca}", escape(PASSWORD), server.at());
        assert_eq!(attempt("TLS", Config::from_url(&url).unwrap()).await.is_ok(), works);
    }
    let ca = server.file("ca.pem", &cert.pem());
    let (cert, key) = (server.file("a.pem", PASSWORD), server.file("b.pem", WRONG));
    let url = format!("tls://{}?tls_ca_file={ca}&tls_cert_file={cert}&tls_key_file={key}", server.at());
    assert_eq!(attempt("a bad certificate", Config::from_url(&url).unwrap()).await, Err(ErrorKind::Config));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_when_a_server_does_not_take_it_any_more() {
    log_all();
    let mut server = Server::start(&with_password(PASSWORD));
    let bus = Bus::connect(by_toml(&server, &format!("user = 'shop'\npassword = {}", quoted(PASSWORD)))).await.unwrap();
    let mut events = bus.events();
    tokio::task::block_in_place(|| server.become_(&with_password(WRONG)));
    eventually("down", || async { matches!(bus.health(), Health::Down(_)) }).await;
    sleep(Duration::from_secs(1)).await;
    let (Health::Down(error) | Health::Degraded(error)) = bus.health() else { panic!("{:?}", bus.health()) };
    is_clean("health", &shown(&error));
    tokio::task::block_in_place(|| server.become_(&with_password(PASSWORD)));
    eventually("up", || async { matches!(bus.health(), Health::Up) }).await;
    bus.publish(&order("ada", 1)).await.unwrap();
    is_clean("events", &told(&mut events));
    is_clean("reconnecting", &logged());
}

/// The handler of a service that connects elsewhere, by configuration, and is refused.
async fn forward(order: Order, State(url): State<String>) -> Result<(), HandlerError> {
    let elsewhere = Bus::connect(Config::from_url(&url).map_err(HandlerError::reject)?).await;
    elsewhere.map_err(HandlerError::reject)?.publish(&order).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_in_dead_letters() {
    log_all();
    let server = Server::start(&with_password(PASSWORD));
    let right = format!("nats://shop:{}@{}", escape(PASSWORD), server.at());
    let wrong = format!("nats://shop:{}@{}", escape(WRONG), server.at());
    let bus = Bus::connect(Config::from_url(&right).unwrap()).await.unwrap();
    let mut events = bus.events();
    let malformed = format!("{wrong}/path");
    for (count, url) in [wrong, malformed].into_iter().enumerate() {
        let running = Service::new("forward").state(url).on(forward).start(&bus).await.unwrap();
        bus.publish(&order("ada", 1)).await.unwrap();
        let letters = dead_letters(&bus, "forward.shop.order.placed", count + 1).await;
        let shown = letters.iter().map(|letter| {
            let headers: Vec<_> =
                letter.headers.iter().map(|(name, value)| (name, String::from_utf8_lossy(value))).collect();
            format!("{letter:?} {headers:?} {}", String::from_utf8_lossy(&letter.payload))
        });
        let shown = shown.collect::<String>();
        assert!(shown.contains("refused the credentials"), "{shown}");
        is_clean("dead letters", &shown);
        running.drain(Duration::from_secs(5)).await;
    }
    is_clean("events", &told(&mut events));
    is_clean("services", &logged());
}

// ---- RabbitMQ ----

/// A server that knows `shop` by this password; none if it is not asked for.
fn rabbitmq(password: &str) -> Option<tidings_tests::server::Server> {
    let transports = std::env::var("TIDINGS_TEST_FAULTS").unwrap_or_default();
    if !transports.split(',').any(|transport| transport.trim() == "rabbitmq") {
        println!("skipped: TIDINGS_TEST_FAULTS is `{transports}` and does not name rabbitmq");
        return None;
    }
    let server = tidings_tests::server::Server::start("rabbitmq").unwrap();
    server.tool(&["rabbitmqctl", "add_user", "shop", password]).unwrap();
    server.tool(&["rabbitmqctl", "set_permissions", "shop", ".*", ".*", ".*"]).unwrap();
    Some(server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_those_of_rabbitmq() {
    log_all();
    let Some(server) = tokio::task::block_in_place(|| rabbitmq(PASSWORD)) else { return };
    let host = server.url().rsplit('@').next().unwrap();
    let port = host.rsplit(':').next().unwrap();
    let by_url = |password: &str, rest: &str| {
        Config::from_url(&format!("amqp://shop:{}@{host}{rest}", escape(password))).unwrap()
    };
    assert_eq!(attempt("by url", by_url(PASSWORD, "")).await, Ok(()));
    assert_eq!(attempt("wrong by url", by_url(WRONG, "")).await, DENIED);
    assert_eq!(attempt("no such virtual host", by_url(PASSWORD, "/nowhere")).await, Err(ErrorKind::NotFound));
    let tls = format!("amqps://shop:{}@{host}?timeout_ms=2000", escape(PASSWORD));
    assert!(attempt("a server without TLS", Config::from_url(&tls).unwrap()).await.is_err());
    let section = |secret: &str| {
        let at = format!("host = '127.0.0.1'\nport = {port}\nuser = 'shop'\npassword = {secret}");
        Config::from_toml(&format!("transport = 'rabbitmq'\n[rabbitmq]\n{at}")).unwrap()
    };
    assert_eq!(attempt("in a section", section(&quoted(PASSWORD))).await, Ok(()));
    assert_eq!(attempt("wrong in a section", section(&quoted(WRONG))).await, DENIED);
    let file = server.folder().join("secret");
    std::fs::write(&file, PASSWORD).unwrap();
    assert_eq!(attempt("by file", section(&format!("{{ file = {file:?} }}"))).await, Ok(()));
    let bus = Bus::connect(by_url(PASSWORD, "")).await.unwrap();
    let mut events = bus.events();
    let change = |password: &str| {
        server.tool(&["rabbitmqctl", "change_password", "shop", password]).unwrap();
        server.tool(&["rabbitmqctl", "close_all_connections", "changed"]).unwrap();
    };
    tokio::task::block_in_place(|| change(WRONG));
    let refused = || async { matches!(bus.health(), Health::Down(error) if error.to_string().contains("credentials")) };
    eventually("refused", refused).await;
    let Health::Down(error) = bus.health() else { panic!("{:?}", bus.health()) };
    is_clean("health", &shown(&error));
    tokio::task::block_in_place(|| change(PASSWORD));
    eventually("up", || async { matches!(bus.health(), Health::Up) }).await;
    is_clean("events", &told(&mut events));
    is_clean("reconnecting", &logged());
    // What was looked through was the client's too.
    assert!(logged().contains("lapin::io_loop: will write to buffer"), "nothing of the client at TRACE");
    assert!(logged().contains("credentials are logged"), "no warning");
}

// ---- Kafka ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_those_of_kafka() {
    let transports = std::env::var("TIDINGS_TEST_FAULTS").unwrap_or_default();
    if !transports.split(',').any(|transport| transport.trim() == "kafka") {
        println!("skipped: TIDINGS_TEST_FAULTS is `{transports}` and does not name kafka");
        return;
    }
    log_all();
    let start = || tidings_tests::server::Server::start_kafka_with_password(PASSWORD);
    let (_server, address) = tokio::task::block_in_place(start).unwrap();
    let by_url = |password: &str, rest: &str| {
        Config::from_url(&format!("kafka://shop:{}@{address}{rest}", escape(password))).unwrap()
    };
    assert_eq!(attempt("by url", by_url(PASSWORD, "")).await, Ok(()));
    assert_eq!(attempt("wrong by url", by_url(WRONG, "")).await, DENIED);
    // With and without TLS compiled in.
    let tls = attempt("a server without TLS", by_url(PASSWORD, "?tls=true&connect_timeout_ms=2000")).await;
    assert!(matches!(tls, Err(ErrorKind::Config | ErrorKind::Connection | ErrorKind::Timeout)), "{tls:?}");
    let scram = attempt("another login", by_url(WRONG, "?sasl=scram-sha-256")).await;
    assert!(matches!(scram, Err(ErrorKind::Config | ErrorKind::Denied)), "{scram:?}");
    let section = |secret: &str| {
        let at = format!("brokers = ['{address}']\nuser = 'shop'\npassword = {secret}");
        Config::from_toml(&format!("transport = 'kafka'\n[kafka]\n{at}")).unwrap()
    };
    assert_eq!(attempt("in a section", section(&quoted(PASSWORD))).await, Ok(()));
    assert_eq!(attempt("wrong in a section", section(&quoted(WRONG))).await, DENIED);
    let file = std::env::temp_dir().join(format!("tidings-secrets-{}-kafka", std::process::id()));
    std::fs::write(&file, PASSWORD).unwrap();
    let by_file = attempt("by file", section(&format!("{{ file = {file:?} }}"))).await;
    std::fs::remove_file(&file).unwrap();
    assert_eq!(by_file, Ok(()));
    // What was looked through was the client's too.
    assert!(logged().contains("librdkafka"), "nothing of the client at TRACE");
}

#[test]
fn nor_by_what_cannot_be_read() {
    for url in [
        "nats://shop:sparrow@",
        "nats://shop:sparrow",
        "nats://shop:sparrow@host/path",
        "nats://shop:sparrow@host:x?ack_wait=1",
        "nats://shop:sparrow%zz@host",
        "nats://shop:s3?sparrow@host",
        "nats://shop:s3?sparrow=x@host",
        "nats://shop:s3?x&sparrow&ack_wait_ms=sparrow@host",
        "nats://shop:s3#sparrow@host",
        "nats:/shop:sparrow@host",
        "nats:shop:sparrow@host",
        "shop:sparrow@host",
        "shop:sparrow@host://x",
        "natss://shop:sparrow@host",
        "kafka://shop:sparrow@host",
        "nats://sparrow@@host",
    ] {
        let read = Config::from_url(url);
        is_clean(url, &format!("{:?}", read.as_ref().ok()));
        read.err().iter().for_each(|error| is_clean(url, &shown(error)));
        let errors = [NatsConfig::from_url(url).err(), RabbitMqConfig::from_url(&url.replace("nats", "amqp")).err()];
        errors.iter().flatten().for_each(|error| is_clean(url, &shown(error)));
    }
    for text in [
        "password = sparrow",
        "password = 'sparrow",
        "password = ['sparrow']",
        "password = { fil = 'sparrow' }",
        "password = { file = 'x', env = 'y', sparrow = 'sparrow' }",
        "password = { text = 'sparrow' }",
        "password = { file = ['sparrow'] }",
        "token = { sparrow = 1 }",
        "user = ['sparrow']",
        "password = 'sparrow'\npassword = 'sparrow'",
        "password = 'sparrow'\nunknown = 1",
    ] {
        let error = match Config::from_toml(&format!("transport = 'nats'\n[nats]\n{text}")) {
            Err(error) => error,
            Ok(config) => {
                is_clean(text, &format!("{config:?}"));
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let connected = runtime.block_on(Bus::connect(config));
                connected.err().unwrap_or_else(|| panic!("{text} is accepted"))
            }
        };
        assert_eq!(error.kind(), ErrorKind::Config, "{text}: {error:?}");
        is_clean(text, &shown(&error));
    }
}

// ---- By variables: of a process of its own ----

#[test]
fn nor_by_variables() {
    let server = Server::start(&with_password(PASSWORD));
    for (password, expected) in [(PASSWORD, "Ok(())"), (WRONG, "Err(Denied)")] {
        let by_variable = |command: &mut Command| {
            command.env("TIDINGS_NATS__PASSWORD", password);
        };
        let by_name = |command: &mut Command| {
            command.env("TIDINGS_NATS__PASSWORD__ENV", "NATS_PASSWORD").env("NATS_PASSWORD", password);
        };
        let by_url = |command: &mut Command| {
            command.env("TIDINGS_URL", format!("nats://shop:{}@{}", escape(password), server.at()));
        };
        let ways: [&dyn Fn(&mut Command); 3] = [&by_variable, &by_name, &by_url];
        for way in ways {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "child", "--ignored", "--nocapture"]).current_dir(&server.dir);
            command.env("TIDINGS_URL", format!("nats://{}", server.at())).env("TIDINGS_NATS__USER", "shop");
            way(&mut command);
            let output = command.output().unwrap();
            let said =
                format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            is_clean("another process", &said);
            assert!(said.contains(&format!("child: {expected}")), "{said}");
        }
    }
}

#[tokio::test]
#[ignore = "started by another test, with variables"]
async fn child() {
    log_all();
    let config = Config::load().unwrap();
    println!("child: {:?}", attempt("by variables", config).await);
    println!("{}", logged());
}
