//! Clients of librdkafka: how they are configured, what they tell.

use crate::config::{GroupProtocol, KafkaConfig, Sasl};
use crate::error::error;
use parking_lot::Mutex;
use rdkafka::ClientConfig;
use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode as Code;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidings_core::transport::Health;
use tidings_core::{BusEvent, ErrorKind, Events, ExposeSecret, Result, Secret};
use tokio::sync::watch;

/// How long a token is taken to be good, if nothing says otherwise: it is read anew before.
const TOKEN_LIFE: Duration = Duration::from_secs(300);

/// What can be wrong with a connection for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Login,
    Tls,
}

/// Whether the cluster can be reached, for all clients of one transport.
pub(crate) struct Link {
    pub(crate) events: Events,
    pub(crate) closed: AtomicBool,
    /// Why it cannot, since when it cannot.
    down: Mutex<Option<String>>,
    /// The last refusal of our credentials, or of the other side's by us.
    denied: Mutex<Option<(Refusal, String)>>,
    pub(crate) up: watch::Sender<bool>,
}

impl Link {
    pub(crate) fn new() -> Arc<Self> {
        let up = watch::Sender::new(true);
        Arc::new(Self {
            events: Events::default(),
            closed: AtomicBool::new(false),
            down: Mutex::default(),
            denied: Mutex::default(),
            up,
        })
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    pub(crate) fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// What was refused, if that is why nothing can be reached.
    pub(crate) fn denied(&self) -> Option<(Refusal, String)> {
        self.denied.lock().clone()
    }

    /// No broker can be reached.
    pub(crate) fn lose(&self, reason: &str) {
        let first = self.down.lock().replace(reason.to_owned()).is_none();
        if first && !self.is_closed() {
            self.up.send_replace(false);
            self.events.tell(BusEvent::Disconnected { reason: reason.to_owned().into() });
        }
    }

    /// A broker has answered.
    pub(crate) fn recover(&self) {
        if self.down.lock().take().is_some() {
            *self.denied.lock() = None;
            self.up.send_replace(true);
            self.events.tell(BusEvent::Connected);
        }
    }

    pub(crate) fn health(&self) -> Health {
        if self.is_closed() {
            return Health::Down(crate::error::closed());
        }
        match &*self.down.lock() {
            None => Health::Up,
            Some(reason) => Health::Down(error(ErrorKind::Connection, format!("no broker can be reached: {reason}"))),
        }
    }
}

/// What a client of this transport is created with; opaque.
#[derive(Clone)]
pub struct KafkaContext {
    pub(crate) link: Arc<Link>,
    token: Option<Secret>,
    /// Whether what it says of the brokers is heeded: one client speaks for all.
    speaks: bool,
}

impl KafkaContext {
    pub(crate) fn new(link: &Arc<Link>, config: &KafkaConfig) -> Self {
        Self { link: Arc::clone(link), token: config.token.clone(), speaks: false }
    }

    pub(crate) fn speaking(self) -> Self {
        Self { speaks: true, ..self }
    }
}

impl ClientContext for KafkaContext {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn log(&self, level: RDKafkaLogLevel, facility: &str, said: &str) {
        match level {
            RDKafkaLogLevel::Debug => tracing::trace!(target: "librdkafka", facility, "{said}"),
            _ => tracing::debug!(target: "librdkafka", facility, "{said}"),
        }
    }

    fn error(&self, failed: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", "{failed}: {reason}");
        match failed.rdkafka_error_code() {
            Some(Code::Authentication | Code::SaslAuthenticationFailed | Code::UnsupportedSASLMechanism) => {
                *self.link.denied.lock() = Some((Refusal::Login, reason.to_owned()));
            }
            Some(Code::SSL) => *self.link.denied.lock() = Some((Refusal::Tls, reason.to_owned())),
            Some(Code::AllBrokersDown) if self.speaks => self.link.lose(reason),
            _ => {}
        }
    }

    fn generate_oauth_token(&self, _: Option<&str>) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        let token = self.token.as_ref().ok_or("no token is configured")?.read()?;
        let until = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + TOKEN_LIFE;
        Ok(OAuthToken {
            token: token.expose_secret().to_owned(),
            principal_name: "tidings".into(),
            lifetime_ms: i64::try_from(until.as_millis()).unwrap_or(i64::MAX),
        })
    }
}

impl ConsumerContext for KafkaContext {}

/// Has a client find out who leads the topics that it was just told to read. By itself it looks once a second for those that it has not heard
/// of, and reads none of them until then. If nobody answers, that is how it goes on. Blocks for a moment.
pub(crate) fn acquaint<'a, C: ConsumerContext>(consumer: &BaseConsumer<C>, topics: impl IntoIterator<Item = &'a str>) {
    for topic in topics {
        if let Err(error) = consumer.fetch_metadata(Some(topic), Duration::from_secs(1)) {
            return tracing::debug!(%error, topic, "who leads a topic is not known yet");
        }
    }
}

/// What all clients have in common.
pub(crate) fn common(config: &KafkaConfig) -> Result<ClientConfig> {
    let mut client = ClientConfig::new();
    client.set("client.id", "tidings");
    client.set("socket.keepalive.enable", "true");
    client.set("socket.nagle.disable", "true");
    // A connection that says nothing for so long is given up; the client's own default is a minute.
    client.set("socket.timeout.ms", config.request_timeout.as_millis().max(2_000).to_string());
    client.set("reconnect.backoff.ms", "50").set("reconnect.backoff.max.ms", "1000");
    client.set("topic.metadata.refresh.fast.interval.ms", "50");
    let refresh = config.metadata_refresh.as_millis().to_string();
    client.set("topic.metadata.refresh.interval.ms", refresh);
    client.set("log.connection.close", "false");
    for (name, value) in &config.properties {
        client.set(name, value);
    }
    client.set("bootstrap.servers", config.brokers.join(","));
    secure(&mut client, config)?;
    Ok(client)
}

fn secure(client: &mut ClientConfig, config: &KafkaConfig) -> Result<()> {
    let mechanism = config.mechanism();
    let protocol = match (config.encrypts(), mechanism.is_some()) {
        (false, false) => "plaintext",
        (false, true) => "sasl_plaintext",
        (true, false) => "ssl",
        (true, true) => "sasl_ssl",
    };
    client.set("security.protocol", protocol);
    if config.encrypts() {
        client.set("enable.ssl.certificate.verification", "true");
        client.set("ssl.endpoint.identification.algorithm", "https");
        let files = [
            ("ssl.ca.location", &config.tls_ca_file),
            ("ssl.certificate.location", &config.tls_cert_file),
            ("ssl.key.location", &config.tls_key_file),
        ];
        for (name, file) in files {
            if let Some(file) = file {
                client.set(name, file.display().to_string());
            }
        }
    }
    let Some(mechanism) = mechanism else { return Ok(()) };
    client.set("sasl.mechanism", mechanism.mechanism());
    if mechanism != Sasl::OAuthBearer {
        let password = config.password.as_ref().map(Secret::read).transpose()?;
        client.set("sasl.username", config.user.as_deref().unwrap_or_default());
        client.set("sasl.password", password.as_ref().map_or("", |password| password.expose_secret()));
    }
    Ok(())
}

/// A client that writes.
pub(crate) fn producer(config: &KafkaConfig) -> Result<ClientConfig> {
    let mut client = common(config)?;
    client.set("linger.ms", config.properties.get("linger.ms").map_or("0", String::as_str));
    client.set("enable.idempotence", "true").set("acks", "all");
    client.set("partitioner", "murmur2_random");
    client.set("compression.type", &config.compression);
    client.set("message.max.bytes", config.max_message_bytes.to_string());
    // It is repeated until nobody waits any more, or the transport is closed.
    client.set("message.timeout.ms", "0");
    client.set("request.timeout.ms", config.request_timeout.as_millis().to_string());
    // The limits are our own, so that nothing is refused here.
    client.set("queue.buffering.max.messages", "0").set("queue.buffering.max.kbytes", "2097151");
    Ok(client)
}

/// A client that reads what it is told to, as no member of any group.
pub(crate) fn reader(config: &KafkaConfig, group: Option<&str>) -> Result<ClientConfig> {
    let mut client = common(config)?;
    // A slow reader would otherwise be stalled for a second whenever its queue was full.
    client.set("fetch.queue.backoff.ms", "10");
    client.set("fetch.error.backoff.ms", "50");
    client.set("fetch.wait.max.ms", "100");
    for (name, value) in &config.properties {
        client.set(name, value);
    }
    client.set("bootstrap.servers", config.brokers.join(","));
    client.set("queued.max.messages.kbytes", (config.read_ahead_bytes / 1024).to_string());
    client.set("enable.auto.commit", "false").set("enable.auto.offset.store", "false");
    client.set("allow.auto.create.topics", "false");
    client.set("isolation.level", "read_committed");
    client.set("check.crcs", "true");
    // Where it begins is ours to say; where it cannot, it says so.
    client.set("auto.offset.reset", "error");
    if let Some(group) = group {
        client.set("group.id", group);
    }
    Ok(client)
}

/// A member of a group.
pub(crate) fn member(config: &KafkaConfig, group: &str) -> Result<ClientConfig> {
    let mut client = reader(config, Some(group))?;
    let poll = config.revoke_timeout + Duration::from_secs(60).max(config.session_timeout);
    client.set("max.poll.interval.ms", poll.as_millis().to_string());
    match config.group_protocol {
        GroupProtocol::Classic => {
            let session = config.session_timeout.as_millis();
            client.set("group.protocol", "classic");
            client.set("partition.assignment.strategy", "cooperative-sticky");
            client.set("session.timeout.ms", session.to_string());
            client.set("heartbeat.interval.ms", (session / 10).max(100).to_string());
        }
        GroupProtocol::Consumer => {
            client.set("group.protocol", "consumer");
        }
    }
    Ok(client)
}
