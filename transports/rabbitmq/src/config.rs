//! How the transport is configured.

use crate::RabbitMqTransport;
use crate::error::error;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};

use serde::Deserialize;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{BoxFuture, Transport};
use tidings_core::{BusConfig, Connect, ErrorKind, ExposeSecret, Result, Secret, SubscriptionName, Topic};

const MIB: usize = 1024 * 1024;

/// What may be done to what is missing on the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provision {
    /// It is created; what exists with other settings is an error.
    #[default]
    Create,
    /// It must exist; nothing is created.
    Verify,
    /// Nothing is created, and nothing looked for before it is used.
    Off,
}

/// The configuration of the RabbitMQ transport; each field has a default.
///
/// # Examples
///
/// ```
/// use tidings_rabbitmq::RabbitMqConfig;
///
/// let config = RabbitMqConfig::from_url("amqps://shop:secret@mq.example.com/orders?heartbeat_s=15")?;
/// assert_eq!((config.host.as_str(), config.vhost.as_str(), config.heartbeat_s), ("mq.example.com", "orders", 15));
/// assert!(!format!("{config:?}").contains("secret@"));
/// # Ok::<(), tidings_core::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RabbitMqConfig {
    /// The server's name or address. Default: `localhost`.
    pub host: String,
    /// Its port. Default: 5671 with TLS, 5672 without.
    pub port: Option<u16>,
    /// The virtual host. Default: `/`.
    pub vhost: String,
    /// Who connects. Default: `guest`, whom a server lets in from its own machine only.
    pub user: String,
    /// The user's password. Default: `guest`; none is sent with `external`.
    pub password: Secret,
    /// Prefixes all names: topics and subscriptions of different namespaces never meet. Default: empty.
    pub namespace: String,
    /// Encrypts, and verifies the server's certificate and name. Default: false.
    pub tls: bool,
    /// Lets the connection go unencrypted to another machine. Default: false.
    pub allow_plaintext: bool,
    /// Certificates, in PEM, of the authorities that are trusted beside the system's. Default: none.
    pub tls_ca_file: Option<PathBuf>,
    /// The certificate chain, in PEM, that this client shows. Default: none.
    pub tls_cert_file: Option<PathBuf>,
    /// The key of that certificate, in PEM (PKCS 8). Default: none.
    pub tls_key: Option<Secret>,
    /// Who connects is told by the client's certificate (SASL EXTERNAL), not by name and password. Default: false.
    pub external: bool,
    /// After twice this long without a sign of the server the connection is dead, in seconds, 1 to 60. Default: 10.
    pub heartbeat_s: u16,
    /// How long a connection, or an answer of the server, may take, in milliseconds. Default: 10,000.
    pub timeout_ms: u64,
    /// What may be created. Default: `create`.
    pub provision: Provision,
    /// Over how many channels publishes are spread, by topic and key, 1 to 64. Default: 4.
    pub publish_channels: u16,
    /// The most unconfirmed publishes on each of them. Default: 512.
    pub publish_window: usize,
    /// The largest message that the server takes (its `max_message_size`), in bytes. Default: 16 MiB.
    pub max_message_size: usize,
    /// How long the server lets a delivery stay unsettled, in milliseconds: queues are created with it as their
    /// `x-consumer-timeout`, in place of the server's own half an hour. Default: 86,400,000, a day.
    pub consumer_timeout_ms: u64,
    /// Topics to which publishing fails while nobody has subscribed. Default: none.
    pub required: Vec<String>,
}

impl Default for RabbitMqConfig {
    fn default() -> Self {
        Self {
            host: "localhost".into(),
            port: None,
            vhost: "/".into(),
            user: "guest".into(),
            password: "guest".into(),
            namespace: String::new(),
            tls: false,
            allow_plaintext: false,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key: None,
            external: false,
            heartbeat_s: 10,
            timeout_ms: 10_000,
            provision: Provision::Create,
            publish_channels: 4,
            publish_window: 512,
            max_message_size: 16 * MIB,
            consumer_timeout_ms: 86_400_000,
            required: Vec::new(),
        }
    }
}

impl RabbitMqConfig {
    /// Reads `amqp://user:password@host:port/vhost?key=value..`, or `amqps://..` with TLS; the keys are those fields that
    /// are numbers, names or flags. Everything may be left out, and is percent-decoded.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for another scheme, an unknown key or a malformed value, each by name, and never by its value.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::default().with_url(url)
    }

    /// The same, on the server and with the settings that `url` names, as [`from_url`](Self::from_url) reads them.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    pub fn with_url(mut self, url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("", ""));
        let tls = match scheme {
            "amqp" => false,
            "amqps" => true,
            _ => return Err(invalid("the url must start with `amqp://` or `amqps://`")),
        };
        self.tls = tls;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, vhost) = rest.split_once('/').unwrap_or((rest, ""));
        if !vhost.is_empty() {
            self.vhost = decoded("vhost", vhost)?;
        }
        let (user, address) =
            authority.rsplit_once('@').map_or((None, authority), |(user, address)| (Some(user), address));
        if let Some(user) = user {
            self.set_user(user)?;
        }
        self.set_address(address)?;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            self.set(key, &decoded("query", value)?)?;
        }
        Ok(self)
    }

    fn set_user(&mut self, user: &str) -> Result<()> {
        let (name, password) = user.split_once(':').map_or((user, None), |(name, password)| (name, Some(password)));
        self.user = decoded("user", name)?;
        if let Some(password) = password {
            self.password = decoded("password", password)?.into();
        }
        Ok(())
    }

    fn set_address(&mut self, address: &str) -> Result<()> {
        let bare = address.rsplit_once(':').filter(|(_, port)| !port.contains(']'));
        let (host, port) = bare.map_or((address, None), |(host, port)| (host, Some(port)));
        if let Some(port) = port {
            self.port = Some(number("port", port)?);
        }
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if !host.is_empty() {
            self.host = decoded("host", host)?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "namespace" => value.clone_into(&mut self.namespace),
            "allow_plaintext" => self.allow_plaintext = flag(key, value)?,
            "external" => self.external = flag(key, value)?,
            "tls_ca_file" => self.tls_ca_file = Some(value.into()),
            "tls_cert_file" => self.tls_cert_file = Some(value.into()),
            "tls_key_file" => self.tls_key = Some(Secret::from_file(value)),
            "heartbeat_s" => self.heartbeat_s = number(key, value)?,
            "timeout_ms" => self.timeout_ms = number(key, value)?,
            "publish_channels" => self.publish_channels = number(key, value)?,
            "publish_window" => self.publish_window = number(key, value)?,
            "max_message_size" => self.max_message_size = number(key, value)?,
            "consumer_timeout_ms" => self.consumer_timeout_ms = number(key, value)?,
            "provision" => {
                self.provision = match value {
                    "create" => Provision::Create,
                    "verify" => Provision::Verify,
                    "off" => Provision::Off,
                    _ => return Err(invalid("`provision` in the url must be create, verify or off")),
                }
            }
            _ => {
                let known = "namespace, allow_plaintext, external, tls_ca_file, tls_cert_file, tls_key_file, heartbeat_s, \
                             timeout_ms, provision, publish_channels, publish_window, max_message_size, consumer_timeout_ms";
                let shown = key.chars().take(40).filter(|c| !c.is_control()).collect::<String>();
                return Err(invalid(format!("unknown key `{shown}` in the url; known are {known}")));
            }
        }
        Ok(())
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Whether an event of a topic must be taken by a queue.
    pub(crate) fn requires(&self, topic: &str) -> bool {
        self.required.iter().any(|name| name == topic)
    }

    /// The largest payload that surely fits, with what is sent beside it.
    pub(crate) fn max_payload(&self) -> usize {
        self.max_message_size
    }

    pub(crate) fn consumer_timeout(&self) -> Duration {
        Duration::from_millis(self.consumer_timeout_ms)
    }

    /// Refuses what cannot work, before anything connects.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |key: &'static str, why: &str| Err(invalid(why.to_owned()).with_context("key", key));
        if !self.namespace.is_empty() {
            SubscriptionName::new(self.namespace.as_str())
                .map_err(|error| invalid("malformed namespace").with_source(error))?;
        }
        self.required.iter().try_for_each(|topic| Topic::new(topic.as_str()).map(|_| ()))?;
        if !(1..=60).contains(&self.heartbeat_s) {
            return refuse("heartbeat_s", "must be 1 to 60 seconds");
        }
        if !(1..=64).contains(&self.publish_channels) {
            return refuse("publish_channels", "must be 1 to 64");
        }
        if self.publish_window == 0 || self.timeout_ms == 0 || self.consumer_timeout_ms == 0 {
            return refuse("publish_window, timeout_ms, consumer_timeout_ms", "must be at least 1");
        }
        if !self.tls && !self.allow_plaintext && !is_loopback(&self.host) {
            let why = "the connection to another machine would not be encrypted; use amqps://, or say `allow_plaintext = true`";
            return refuse("tls", why);
        }
        if !self.tls && (self.external || self.tls_ca_file.is_some() || self.tls_cert_file.is_some()) {
            return refuse("tls", "certificates need TLS; use amqps://");
        }
        if self.tls_cert_file.is_some() != self.tls_key.is_some() {
            return refuse("tls_key", "a client's certificate needs its key, and a key its certificate");
        }
        if self.external && self.tls_cert_file.is_none() {
            return refuse("external", "needs `tls_cert_file` and `tls_key`");
        }
        Ok(())
    }

    /// Where to connect to, with the credentials as they are now. Never print it.
    pub(crate) fn uri(&self) -> Result<AMQPUri> {
        let scheme = if self.tls { AMQPScheme::AMQPS } else { AMQPScheme::AMQP };
        let port = self.port.unwrap_or(if self.tls { 5671 } else { 5672 });
        let password = if self.external { String::new() } else { self.password.read()?.expose_secret().to_owned() };
        let userinfo = AMQPUserInfo { username: self.user.clone(), password };
        let mechanism = if self.external { SASLMechanism::External } else { SASLMechanism::Plain };
        let query = AMQPQueryString {
            heartbeat: Some(self.heartbeat_s),
            connection_timeout: Some(self.timeout_ms),
            auth_mechanism: Some(mechanism),
            ..AMQPQueryString::default()
        };
        let authority = AMQPAuthority { userinfo, host: self.host.clone(), port };
        Ok(AMQPUri { scheme, authority, vhost: self.vhost.clone(), query })
    }

    /// What is trusted, and what this client shows.
    pub(crate) fn tls_config(&self) -> Result<OwnedTLSConfig> {
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|error| {
                invalid("the file cannot be read").with_context("file", path.display()).with_source(error)
            })
        };
        let cert_chain = self.tls_ca_file.as_ref().map(read).transpose()?;
        let identity = match (&self.tls_cert_file, &self.tls_key) {
            (Some(cert), Some(key)) => {
                let key = key.read()?.expose_secret().as_bytes().to_vec();
                Some(OwnedIdentity::PKCS8 { pem: read(cert)?.into_bytes(), key })
            }
            _ => None,
        };
        Ok(OwnedTLSConfig { identity, cert_chain })
    }
}

impl Connect for RabbitMqConfig {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(
            async move { Ok((RabbitMqTransport::connect(self).await? as Arc<dyn Transport>, BusConfig::default())) },
        )
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn number<N: std::str::FromStr>(key: &str, value: &str) -> Result<N> {
    value.parse().map_err(|_| invalid(format!("`{key}` in the url must be a whole number")))
}

fn flag(key: &str, value: &str) -> Result<bool> {
    value.parse().map_err(|_| invalid(format!("`{key}` in the url must be true or false")))
}

fn decoded(part: &'static str, text: &str) -> Result<String> {
    let malformed = || invalid(format!("the {part} in the url is malformed; percent-encode what is special in it"));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16)).ok_or_else(malformed);
        // Two hexadecimal digits, which fit.
        bytes.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(bytes).map_err(|_| malformed())
}

fn invalid(why: impl Into<String>) -> tidings_core::Error {
    error(ErrorKind::Config, why).with_operation("connect")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_url_is_read_whole() {
        let url = "amqps://sh%40p:p%2fw@[::1]:1234/a%2fb?namespace=test&provision=verify&timeout_ms=5&external=false";
        let config = RabbitMqConfig::from_url(url).unwrap();
        assert_eq!((config.host.as_str(), config.port, config.vhost.as_str()), ("::1", Some(1234), "a/b"));
        assert_eq!((config.user.as_str(), config.tls), ("sh@p", true));
        assert_eq!(config.password.read().unwrap().expose_secret(), "p/w");
        assert_eq!((config.namespace.as_str(), config.provision), ("test", Provision::Verify));
        let config = RabbitMqConfig::from_url("amqp://").unwrap();
        assert_eq!((config.host.as_str(), config.port, config.vhost.as_str()), ("localhost", None, "/"));
        assert_eq!(RabbitMqConfig::from_url("amqp://h:1/").unwrap().vhost, "/");
    }

    #[test]
    fn what_is_wrong_is_named_and_no_secret_is_shown() {
        for (url, named) in [
            ("amqp://h?heartbaet=1", "heartbaet"),
            ("amqp://h:x", "port"),
            ("kafka://h", "amqp://"),
            ("amqp://u:hunter2%zz@h", "password"),
            ("amqp://u:hunter2@h?external=maybe", "external"),
        ] {
            let error = RabbitMqConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(named), "{url}: {error}");
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
        let config = RabbitMqConfig::from_url("amqp://u:hunter2@localhost").unwrap();
        assert!(!format!("{config:?} {config:#?}").contains("hunter2"));
    }

    #[test]
    fn what_is_not_encrypted_stays_on_this_machine() {
        let check = |url: &str| RabbitMqConfig::from_url(url).unwrap().check();
        for fine in
            ["amqp://localhost", "amqp://127.0.0.1", "amqp://[::1]", "amqps://mq", "amqp://mq?allow_plaintext=true"]
        {
            check(fine).unwrap();
        }
        for bad in ["amqp://mq", "amqp://10.0.0.1", "amqps://mq?external=true", "amqp://localhost?tls_cert_file=x"] {
            assert_eq!(check(bad).unwrap_err().kind(), ErrorKind::Config, "{bad}");
        }
        assert!(check("amqp://localhost?namespace=A").is_err());
    }

    #[test]
    fn a_table_is_strict() {
        let table = "host = 'mq'\npassword = { env = 'MQ_PASSWORD' }\nrequired = ['shop.order.placed']";
        assert_eq!(toml::from_str::<RabbitMqConfig>(table).unwrap().required.len(), 1);
        assert!(toml::from_str::<RabbitMqConfig>("hots = 'mq'").unwrap_err().to_string().contains("hots"));
    }
}
