//! How the transport is configured.

use crate::KafkaTransport;
use crate::error::error;
use crate::names::MAX_NAMESPACE;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{BoxFuture, Transport};
use tidings_core::{BusConfig, Connect, ErrorKind, Result, Secret};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// The configuration of the Kafka transport; each field has a default.
///
/// # Examples
///
/// ```
/// use tidings_kafka::KafkaConfig;
///
/// let config = KafkaConfig::from_url("kafka://shop:s3cret@localhost:9092,localhost:9093?namespace=prod")?;
/// assert_eq!((config.brokers[1].as_str(), config.namespace.as_str()), ("localhost:9093", "prod"));
/// assert!(!format!("{config:?}").contains("s3cret"));
/// # Ok::<(), tidings_core::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaConfig {
    /// Some brokers of the cluster, `host:port`; the others are found by these. Default: `127.0.0.1:9092`.
    pub brokers: Vec<String>,
    /// Prefixes all names: topics and subscriptions of different namespaces never meet. One token of at most 30 letters a-z,
    /// digits and `-`; it should not be the first token of a topic of somebody who has none. Default: empty.
    pub namespace: String,
    /// What becomes of topics and subscriptions that are missing. Default: they are created.
    pub provision: Provision,
    /// On how many brokers topics that are created are kept; 0 for the cluster's own default. Default: 0.
    pub replication: u32,
    /// How long topics that are created keep what was published, in milliseconds; 0 is for ever. Default: 7 days.
    #[serde(rename = "retention_ms", with = "millis")]
    pub retention: Duration,
    /// Encrypt. Default: yes, unless all brokers are on this host or `allow_plaintext` is set. Needs the feature `tls`.
    pub tls: Option<bool>,
    /// Certificates (PEM) of authorities to trust instead of the system's. Default: none.
    pub tls_ca_file: Option<PathBuf>,
    /// The client's certificate (PEM) for mutual TLS, with `tls_key_file`. Default: none.
    pub tls_cert_file: Option<PathBuf>,
    /// The client's private key (PEM) for mutual TLS. Default: none.
    pub tls_key_file: Option<PathBuf>,
    /// Talk in plain text to hosts other than this one. Default: false.
    pub allow_plaintext: bool,
    /// How to log in. Default: `plain` if there is a user, else not at all.
    pub sasl: Option<Sasl>,
    /// The user's name. Default: none.
    pub user: Option<String>,
    /// The user's password: itself, or the file or variable that holds it. Default: none.
    pub password: Option<Secret>,
    /// The token for `oauthbearer`, likewise; it is read anew for each connection. Default: none.
    pub token: Option<Secret>,
    /// How instances of a subscription agree on who reads which partition. Default: `classic`.
    pub group_protocol: GroupProtocol,
    /// After how long without a sign of life an instance loses its partitions, in milliseconds: 1,000 to 300,000, within
    /// what the cluster allows. Handlers may take longer. Not with `group_protocol = "consumer"`, where it is the
    /// cluster's. Default: 10,000.
    #[serde(rename = "session_timeout_ms", with = "millis")]
    pub session_timeout: Duration,
    /// How long a partition that goes to another instance waits for handlers that run, in milliseconds; what runs longer
    /// comes again there. Default: 30,000.
    #[serde(rename = "revoke_timeout_ms", with = "millis")]
    pub revoke_timeout: Duration,
    /// How long it may take at most until a pattern reads a topic that appeared, in milliseconds. Default: 10,000.
    #[serde(rename = "metadata_refresh_ms", with = "millis")]
    pub metadata_refresh: Duration,
    /// How long connecting may take, in milliseconds. Default: 5,000.
    #[serde(rename = "connect_timeout_ms", with = "millis")]
    pub connect_timeout: Duration,
    /// How long the cluster may take to answer a request, in milliseconds. Default: 10,000.
    #[serde(rename = "request_timeout_ms", with = "millis")]
    pub request_timeout: Duration,
    /// The largest record that the cluster takes, in bytes: `message.max.bytes` of the brokers. Default: 1,048,588.
    pub max_message_bytes: u32,
    /// About how much a subscription reads ahead, in bytes. Default: 4 MiB.
    pub read_ahead_bytes: u32,
    /// `none`, `gzip`, `snappy` or `lz4`. Default: `lz4`.
    pub compression: String,
    /// Properties of librdkafka by name, for tuning: of sockets, fetching, batching and reconnecting. Those on which the
    /// promises of this SDK rest are refused. Default: none.
    pub properties: BTreeMap<String, String>,
}

/// What becomes of topics and subscriptions that are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provision {
    /// They are created; what exists is verified.
    #[default]
    Create,
    /// It is an error; what exists is verified.
    Verify,
    /// It is an error; what exists is taken as it is.
    Off,
}

/// How to log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Sasl {
    /// User and password as they are.
    #[serde(rename = "plain")]
    Plain,
    /// Proof of the password. Needs the feature `tls`.
    #[serde(rename = "scram-sha-256")]
    ScramSha256,
    /// Proof of the password. Needs the feature `tls`.
    #[serde(rename = "scram-sha-512")]
    ScramSha512,
    /// A token. Needs the feature `tls`, and `provision = "off"`: what creates and verifies topics cannot log in so.
    #[serde(rename = "oauthbearer")]
    OAuthBearer,
}

impl Sasl {
    pub(crate) fn mechanism(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
            Self::OAuthBearer => "OAUTHBEARER",
        }
    }
}

/// How instances of a subscription agree on who reads which partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupProtocol {
    /// Among themselves, cooperative and sticky.
    #[default]
    Classic,
    /// The cluster says (KIP-848, brokers of version 4.0 or newer).
    Consumer,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            brokers: vec!["127.0.0.1:9092".into()],
            namespace: String::new(),
            provision: Provision::default(),
            replication: 0,
            retention: 7 * DAY,
            tls: None,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            allow_plaintext: false,
            sasl: None,
            user: None,
            password: None,
            token: None,
            group_protocol: GroupProtocol::default(),
            session_timeout: Duration::from_secs(10),
            revoke_timeout: Duration::from_secs(30),
            metadata_refresh: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            max_message_bytes: 1_048_588,
            read_ahead_bytes: 4 * 1024 * 1024,
            compression: "lz4".into(),
            properties: BTreeMap::new(),
        }
    }
}

/// Properties that may be passed through, by how their names begin: none of these changes what is promised.
const TUNING: [&str; 22] = [
    "client.id",
    "client.rack",
    "client.dns.lookup",
    "broker.address.family",
    "broker.address.ttl",
    "socket.",
    "reconnect.backoff.",
    "retry.backoff.",
    "connections.max.idle.ms",
    "log.connection.close",
    "metadata.max.age.ms",
    "topic.metadata.refresh.fast.",
    "topic.metadata.propagation.max.ms",
    "fetch.",
    "max.partition.fetch.bytes",
    "queued.min.messages",
    "receive.message.max.bytes",
    "batch.",
    "linger.ms",
    "queue.buffering.max.ms",
    "compression.level",
    "sticky.partitioning.linger.ms",
];

impl KafkaConfig {
    /// Reads `kafka://user:password@host:port,host:port?namespace=..&session_timeout_ms=..`. What may follow are the fields
    /// of this struct; instead of secrets, files that hold them: `password_file`, `token_file`. Any other key with a dot
    /// in it is one of the [`properties`](Self::properties).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for another scheme, an unknown key or a malformed value, each by name.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::default().with_url(url)
    }

    /// The same, on the brokers and with the settings that `url` names, as [`from_url`](Self::from_url) reads them.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    pub fn with_url(mut self, url: &str) -> Result<Self> {
        // The url may hold a password.
        let rest = url.strip_prefix("kafka://").ok_or_else(|| invalid("the url must start with `kafka://`"))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let place = place.strip_suffix('/').unwrap_or(place);
        let (login, hosts) = place.rsplit_once('@').map_or((None, place), |(login, hosts)| (Some(login), hosts));
        if hosts.is_empty() || hosts.contains(['/', '#', '@']) || hosts.split(',').any(str::is_empty) {
            return Err(invalid("the url has no host, or a path; write `kafka://host:port`"));
        }
        self.brokers = hosts.split(',').map(with_port).collect();
        if let Some(login) = login {
            let Some((user, password)) = login.split_once(':') else {
                self.user = Some(unescape(login)?);
                return self.with_query(query);
            };
            (self.user, self.password) = (Some(unescape(user)?), Some(unescape(password)?.into()));
        }
        self.with_query(query)
    }

    fn with_query(mut self, query: &str) -> Result<Self> {
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            self.set(key, &unescape(value)?)?;
        }
        Ok(self)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let path = || Some(PathBuf::from(value));
        match key {
            "namespace" => value.clone_into(&mut self.namespace),
            "provision" => self.provision = named(key, value)?,
            "replication" => self.replication = parsed(key, value)?,
            "retention_ms" => self.retention = Duration::from_millis(parsed(key, value)?),
            "tls" => self.tls = Some(parsed(key, value)?),
            "tls_ca_file" => self.tls_ca_file = path(),
            "tls_cert_file" => self.tls_cert_file = path(),
            "tls_key_file" => self.tls_key_file = path(),
            "allow_plaintext" => self.allow_plaintext = parsed(key, value)?,
            "sasl" => self.sasl = Some(named(key, value)?),
            "user" => self.user = Some(value.to_owned()),
            "password_file" => self.password = Some(Secret::from_file(value)),
            "token_file" => self.token = Some(Secret::from_file(value)),
            "group_protocol" => self.group_protocol = named(key, value)?,
            "session_timeout_ms" => self.session_timeout = Duration::from_millis(parsed(key, value)?),
            "revoke_timeout_ms" => self.revoke_timeout = Duration::from_millis(parsed(key, value)?),
            "metadata_refresh_ms" => self.metadata_refresh = Duration::from_millis(parsed(key, value)?),
            "connect_timeout_ms" => self.connect_timeout = Duration::from_millis(parsed(key, value)?),
            "request_timeout_ms" => self.request_timeout = Duration::from_millis(parsed(key, value)?),
            "max_message_bytes" => self.max_message_bytes = parsed(key, value)?,
            "read_ahead_bytes" => self.read_ahead_bytes = parsed(key, value)?,
            "compression" => value.clone_into(&mut self.compression),
            property if property.contains('.') => drop(self.properties.insert(property.to_owned(), value.to_owned())),
            _ => {
                let known = "namespace, provision, replication, retention_ms, tls, tls_ca_file, tls_cert_file, \
                    tls_key_file, allow_plaintext, sasl, user, password_file, token_file, group_protocol, \
                    session_timeout_ms, revoke_timeout_ms, metadata_refresh_ms, connect_timeout_ms, \
                    request_timeout_ms, max_message_bytes, read_ahead_bytes, compression";
                return Err(invalid(format!("unknown key `{key}` in the url; known are {known}")));
            }
        }
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |key: &str, why: &'static str| Err(invalid(why).with_context("key", key));
        if self.brokers.is_empty() {
            return refuse("brokers", "at least one broker is needed");
        }
        let token = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if self.namespace.len() > MAX_NAMESPACE || !self.namespace.bytes().all(token) {
            return refuse("namespace", "must be at most 30 of a-z, 0-9 and `-`");
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(300)).contains(&self.session_timeout) {
            return refuse("session_timeout_ms", "must be 1,000 to 300,000");
        }
        if self.revoke_timeout > Duration::from_secs(3600) {
            return refuse("revoke_timeout_ms", "must be at most 3,600,000");
        }
        if [self.connect_timeout, self.request_timeout, self.metadata_refresh].iter().any(Duration::is_zero) {
            return refuse("request_timeout_ms", "timeouts must be more than 0");
        }
        if !(64 * 1024..=1_000_000_000).contains(&self.max_message_bytes) {
            return refuse("max_message_bytes", "must be 65,536 to 1,000,000,000");
        }
        if !(64 * 1024..=1_000_000_000).contains(&self.read_ahead_bytes) {
            return refuse("read_ahead_bytes", "must be 65,536 to 1,000,000,000");
        }
        if !["none", "gzip", "snappy", "lz4"].contains(&self.compression.as_str()) {
            return refuse("compression", "must be none, gzip, snappy or lz4");
        }
        if self.tls_cert_file.is_some() != self.tls_key_file.is_some() {
            return refuse("tls_cert_file", "a certificate and its key (`tls_key_file`) are needed together");
        }
        if let Some(property) = self.properties.keys().find(|name| !TUNING.iter().any(|known| name.starts_with(known)))
        {
            return refuse(property, "this property cannot be passed through: promises rest on it, or it is unknown");
        }
        self.check_security()
    }

    fn check_security(&self) -> Result<()> {
        let refuse = |key: &str, why: &'static str| Err(invalid(why).with_context("key", key));
        if self.tls == Some(false) && !self.allow_plaintext && !self.is_local() {
            return refuse("tls", "plain text to other hosts is only with `allow_plaintext = true`");
        }
        if self.encrypts() && !cfg!(feature = "tls") {
            return refuse(
                "tls",
                "TLS is needed for other hosts: build with the feature `tls` (`kafka-tls` of `tidings`), or `allow_plaintext = true`",
            );
        }
        match self.mechanism() {
            None => {}
            Some(Sasl::OAuthBearer) if self.token.is_none() => return refuse("token", "`oauthbearer` needs a token"),
            Some(Sasl::Plain) if self.user.is_none() || self.password.is_none() => {
                return refuse("password", "`plain` needs a user and a password");
            }
            Some(mechanism) if mechanism != Sasl::Plain && !cfg!(feature = "tls") => {
                return refuse(
                    "sasl",
                    "this login is not compiled in: build with the feature `tls` (`kafka-tls` of `tidings`)",
                );
            }
            Some(Sasl::OAuthBearer) if self.provision != Provision::Off => {
                return refuse(
                    "provision",
                    "`oauthbearer` needs `provision = \"off\"`: rdkafka's client that creates and verifies cannot log in by token",
                );
            }
            Some(Sasl::OAuthBearer) => {}
            Some(_) if self.user.is_none() || self.password.is_none() => {
                return refuse("password", "this login needs a user and a password");
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// How it logs in, if it does.
    pub(crate) fn mechanism(&self) -> Option<Sasl> {
        self.sasl.or_else(|| self.user.is_some().then_some(Sasl::Plain))
    }

    pub(crate) fn encrypts(&self) -> bool {
        self.tls.unwrap_or_else(|| !self.allow_plaintext && !self.is_local())
    }

    /// Whether all brokers are on this host.
    fn is_local(&self) -> bool {
        let local = |broker: &String| {
            let host = broker.rsplit_once(':').map_or(broker.as_str(), |(host, _)| host);
            let host = host.trim_start_matches('[').trim_end_matches(']');
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        };
        self.brokers.iter().all(local)
    }
}

impl Connect for KafkaConfig {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(async move { Ok((KafkaTransport::connect(self).await? as Arc<dyn Transport>, BusConfig::default())) })
    }
}

fn with_port(host: &str) -> String {
    let after_address = host.rsplit_once(']').map_or(host, |(_, after)| after);
    if after_address.contains(':') { host.to_owned() } else { format!("{host}:9092") }
}

/// One of the names that serde knows.
fn named<T: for<'de> Deserialize<'de>>(key: &str, value: &str) -> Result<T> {
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error as ValueError, StrDeserializer};
    let name: StrDeserializer<'_, ValueError> = value.into_deserializer();
    T::deserialize(name).map_err(|wrong| invalid(format!("`{key}` in the url: {wrong}")))
}

/// Undoes percent-encoding. The value may be a secret, so the error does not show it.
fn unescape(text: &str) -> Result<String> {
    let wrong = || invalid("a percent-encoded part of the url cannot be decoded; write `%25` for `%`");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if *first != b'%' {
            bytes.push(*first);
            rest = after;
            continue;
        }
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()).ok_or_else(wrong)?;
        bytes.push(u8::from_str_radix(hex, 16).map_err(|_| wrong())?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

fn parsed<N: std::str::FromStr>(key: &str, value: &str) -> Result<N> {
    value.parse().map_err(|_| invalid(format!("`{key}` in the url cannot be `{value}`")))
}

pub(crate) fn invalid(why: impl Into<std::borrow::Cow<'static, str>>) -> tidings_core::Error {
    error(ErrorKind::Config, why).with_operation("connect")
}

mod millis {
    use serde::{Deserialize, Deserializer};
    use std::time::Duration;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidings_core::ExposeSecret;

    #[test]
    fn an_url_and_a_table_say_the_same() {
        let url = "kafka://u%40x:p%3A@localhost,[::1]:2?namespace=n&provision=verify&session_timeout_ms=2000\
            &sasl=plain&group_protocol=consumer&fetch.min.bytes=7";
        let url = KafkaConfig::from_url(url).unwrap();
        let table = "brokers = ['localhost:9092', '[::1]:2']\nnamespace = 'n'\nprovision = 'verify'\n\
            session_timeout_ms = 2000\nuser = 'u@x'\npassword = 'p:'\nsasl = 'plain'\ngroup_protocol = 'consumer'\n\
            properties = { 'fetch.min.bytes' = '7' }";
        let table = toml::from_str::<KafkaConfig>(table).unwrap();
        assert_eq!(format!("{url:?}"), format!("{table:?}"));
        url.check().unwrap();
        assert_eq!(url.password.unwrap().read().unwrap().expose_secret(), "p:");
    }

    #[test]
    fn what_is_wrong_is_named_and_secrets_are_not() {
        for (url, named) in [
            ("kafka://a?namespacee=1", "namespacee"),
            ("kafka://a?session_timeout_ms=x", "session_timeout_ms"),
            ("kafka://a?provision=canaryy", "provision"),
            ("nats://u:canary@a", "kafka://"),
            ("kafka://u:canary%@a", "%25"),
            ("kafka://u:canary@", "host"),
            ("kafka://u:canary@a/b", "path"),
        ] {
            let error = KafkaConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(named), "{url}: {error}");
            assert!(!format!("{error:?} {error}").contains("canary:") && !error.to_string().contains("u:canary"));
        }
        assert!(toml::from_str::<KafkaConfig>("namespacee = 1").is_err());
    }

    #[test]
    fn plain_text_stays_on_this_host_unless_allowed() {
        let check = |url: &str| KafkaConfig::from_url(url).unwrap().check();
        for url in ["kafka://localhost", "kafka://127.0.0.2:1,[::1]", "kafka://other?allow_plaintext=true"] {
            check(url).unwrap();
        }
        assert!(check("kafka://localhost,other?tls=false").unwrap_err().to_string().contains("allow_plaintext"));
        if !cfg!(feature = "tls") {
            assert!(check("kafka://other").unwrap_err().to_string().contains("feature `tls`"));
        }
    }

    #[test]
    fn no_property_breaks_a_promise() {
        for property in [
            "acks",
            "enable.idempotence",
            "enable.auto.commit",
            "enable.ssl.certificate.verification",
            "group.instance.id",
        ] {
            let mut config = KafkaConfig::default();
            config.properties.insert(property.into(), "0".into());
            let error = config.check().unwrap_err();
            assert!(error.to_string().contains(property) || format!("{error:?}").contains(property), "{error:?}");
        }
        for name in ["ssl.endpoint.identification.algorithm", "plugin.library.paths", "security.protocol"] {
            assert!(!TUNING.iter().any(|known| name.starts_with(known)), "{name}");
        }
    }
}
