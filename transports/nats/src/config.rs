//! How the transport is configured.

use crate::NatsTransport;
use crate::error::error;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{BoxFuture, Transport};
use tidings_core::{BusConfig, Connect, ErrorKind, Result, Secret};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// The configuration of the NATS transport; each field has a default.
///
/// # Examples
///
/// ```
/// use tidings_nats::NatsConfig;
///
/// let config = NatsConfig::from_url("nats://shop:s3cret@localhost:4222?namespace=prod&ack_wait_ms=5000")?;
/// assert_eq!((config.servers[0].as_str(), config.namespace.as_str()), ("nats://localhost:4222", "prod"));
/// assert!(!format!("{config:?}").contains("s3cret"));
/// # Ok::<(), tidings_core::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsConfig {
    /// The servers, of one cluster: `nats://host:port`, or `tls://host:port` for TLS in any case. Default:
    /// `nats://127.0.0.1:4222`.
    pub servers: Vec<String>,
    /// Prefixes all names: topics and subscriptions of different namespaces never meet. One token of letters a-z, digits
    /// and `-`; it should not be the first token of a topic of somebody who has none. Default: empty.
    pub namespace: String,
    /// What becomes of streams and consumers that are missing. Default: they are created.
    pub provision: Provision,
    /// The user's name. Default: none.
    pub user: Option<String>,
    /// The user's password: itself, or the file or variable that holds it. Default: none.
    pub password: Option<Secret>,
    /// A token, likewise. Default: none.
    pub token: Option<Secret>,
    /// The seed of an nkey (`SU..`), likewise. Default: none.
    pub nkey: Option<Secret>,
    /// A credentials file (`.creds`): a JWT and the seed of its nkey. Default: none.
    pub credentials_file: Option<PathBuf>,
    /// Certificates (PEM) of authorities to trust instead of the system's. Default: none.
    pub tls_ca_file: Option<PathBuf>,
    /// The client's certificate (PEM) for mutual TLS, with `tls_key_file`. Default: none.
    pub tls_cert_file: Option<PathBuf>,
    /// The client's private key (PEM) for mutual TLS. Default: none.
    pub tls_key_file: Option<PathBuf>,
    /// Talk in plain text to hosts other than this one. Default: false; TLS is then required.
    pub allow_plaintext: bool,
    /// The JetStream domain, for leaf nodes. Default: none.
    pub domain: Option<String>,
    /// How long connecting may take, in milliseconds. Default: 5,000.
    #[serde(rename = "connect_timeout_ms", with = "millis")]
    pub connect_timeout: Duration,
    /// How long the server may take to answer a request or to confirm a message before it is sent again, in
    /// milliseconds. Default: 5,000.
    #[serde(rename = "request_timeout_ms", with = "millis")]
    pub request_timeout: Duration,
    /// How long what a dead instance had stays away, in milliseconds: what is held here is extended three times as
    /// often, so handlers may take longer. 1,000 to 600,000. The same in all instances of a subscription. Default: 10,000.
    #[serde(rename = "ack_wait_ms", with = "millis")]
    pub ack_wait: Duration,
    /// On how many servers streams that are created are kept. Default: 1.
    pub replicas: u32,
    /// How long streams that are created keep what was published, in milliseconds; 0 is for ever. Default: 7 days.
    #[serde(rename = "retention_ms", with = "millis")]
    pub retention: Duration,
    /// The most bytes of a stream that is created; a publish over it is refused until something expires. 0 is no limit.
    /// Default: 0.
    pub max_stream_bytes: u64,
}

/// What becomes of streams and consumers that are missing.
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

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            servers: vec!["nats://127.0.0.1:4222".into()],
            namespace: String::new(),
            provision: Provision::default(),
            user: None,
            password: None,
            token: None,
            nkey: None,
            credentials_file: None,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            allow_plaintext: false,
            domain: None,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
            ack_wait: Duration::from_secs(10),
            replicas: 1,
            retention: 7 * DAY,
            max_stream_bytes: 0,
        }
    }
}

impl NatsConfig {
    /// Reads `nats://user:password@host:port,host:port?namespace=..&ack_wait_ms=..`, or `tls://` for TLS in any case. One
    /// name without a password is a token. What may follow are the fields of this struct; instead of secrets,
    /// files that hold them: `password_file`, `token_file`, `nkey_file`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for another scheme, an unknown key or a malformed value, each by name.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::default().with_url(url)
    }

    /// The same, on the servers and with the settings that `url` names, as [`from_url`](Self::from_url) reads them.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    pub fn with_url(mut self, url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").filter(|(scheme, _)| matches!(*scheme, "nats" | "tls")).ok_or_else(
            // The url may hold a password.
            || invalid("the url must start with `nats://` or `tls://`"),
        )?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let place = place.strip_suffix('/').unwrap_or(place);
        let (login, hosts) = place.rsplit_once('@').map_or((None, place), |(login, hosts)| (Some(login), hosts));
        if hosts.is_empty() || hosts.contains(['/', '#', '@']) {
            return Err(invalid("the url has no host, or a path; write `nats://host:port`"));
        }
        self.servers = hosts.split(',').map(|host| format!("{scheme}://{host}")).collect();
        if let Some(login) = login {
            self.log_in(login)?;
        }
        if query.contains('@') && login.is_none() {
            // Part of a password is not taken for settings, which would be named.
            return Err(invalid(
                "in the url, `?` in a user, password or token is written `%3F`, and `@` behind it `%40`",
            ));
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            self.set(key, &unescape(value)?)?;
        }
        Ok(self)
    }

    fn log_in(&mut self, login: &str) -> Result<()> {
        match login.split_once(':') {
            Some((user, password)) => {
                (self.user, self.password) = (Some(unescape(user)?), Some(unescape(password)?.into()));
            }
            None => self.token = Some(unescape(login)?.into()),
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let path = || Some(PathBuf::from(value));
        match key {
            "namespace" => value.clone_into(&mut self.namespace),
            "provision" => {
                self.provision = match value {
                    "create" => Provision::Create,
                    "verify" => Provision::Verify,
                    "off" => Provision::Off,
                    _ => return Err(invalid("`provision` in the url must be create, verify or off")),
                }
            }
            "user" => self.user = Some(value.to_owned()),
            "password_file" => self.password = Some(Secret::from_file(value)),
            "token_file" => self.token = Some(Secret::from_file(value)),
            "nkey_file" => self.nkey = Some(Secret::from_file(value)),
            "credentials_file" => self.credentials_file = path(),
            "tls_ca_file" => self.tls_ca_file = path(),
            "tls_cert_file" => self.tls_cert_file = path(),
            "tls_key_file" => self.tls_key_file = path(),
            "allow_plaintext" => self.allow_plaintext = parsed(key, value)?,
            "domain" => self.domain = Some(value.to_owned()),
            "connect_timeout_ms" => self.connect_timeout = Duration::from_millis(parsed(key, value)?),
            "request_timeout_ms" => self.request_timeout = Duration::from_millis(parsed(key, value)?),
            "ack_wait_ms" => self.ack_wait = Duration::from_millis(parsed(key, value)?),
            "replicas" => self.replicas = parsed(key, value)?,
            "retention_ms" => self.retention = Duration::from_millis(parsed(key, value)?),
            "max_stream_bytes" => self.max_stream_bytes = parsed(key, value)?,
            _ => {
                let known = "namespace, provision, user, password_file, token_file, nkey_file, credentials_file, \
                    tls_ca_file, tls_cert_file, tls_key_file, allow_plaintext, domain, connect_timeout_ms, \
                    request_timeout_ms, ack_wait_ms, replicas, retention_ms, max_stream_bytes";
                return Err(invalid(format!("unknown key `{key}` in the url; known are {known}")));
            }
        }
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |key, why: &'static str| Err(invalid(why).with_context("key", key));
        if self.servers.is_empty() {
            return refuse("servers", "at least one server is needed");
        }
        let token = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if self.namespace.len() > 40 || !self.namespace.bytes().all(token) {
            return refuse("namespace", "must be at most 40 of a-z, 0-9 and `-`");
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(600)).contains(&self.ack_wait) {
            return refuse("ack_wait_ms", "must be 1,000 to 600,000");
        }
        if !(1..=5).contains(&self.replicas) {
            return refuse("replicas", "must be 1 to 5");
        }
        if self.tls_cert_file.is_some() != self.tls_key_file.is_some() {
            return refuse("tls_cert_file", "a certificate and its key (`tls_key_file`) are needed together");
        }
        if self.connect_timeout.is_zero() || self.request_timeout.is_zero() {
            return refuse("request_timeout_ms", "timeouts must be more than 0");
        }
        Ok(())
    }
}

impl Connect for NatsConfig {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(async move { Ok((NatsTransport::connect(self).await? as Arc<dyn Transport>, BusConfig::default())) })
    }
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
        let url =
            NatsConfig::from_url("nats://u%40x:p%3A@a:1,b:2?namespace=n&provision=verify&ack_wait_ms=2000").unwrap();
        let table = "servers = ['nats://a:1', 'nats://b:2']\nnamespace = 'n'\nprovision = 'verify'\nack_wait_ms = 2000\n\
            user = 'u@x'\npassword = 'p:'";
        let table = toml::from_str::<NatsConfig>(table).unwrap();
        assert_eq!(format!("{url:?}"), format!("{table:?}"));
        assert_eq!(url.password.unwrap().read().unwrap().expose_secret(), "p:");
        let token = NatsConfig::from_url("tls://abc@host").unwrap();
        assert_eq!(
            (token.token.unwrap().read().unwrap().expose_secret(), token.servers[0].as_str()),
            ("abc", "tls://host")
        );
    }

    #[test]
    fn what_is_wrong_is_named_and_secrets_are_not() {
        for (url, named) in [
            ("nats://a?namespacee=1", "namespacee"),
            ("nats://a?ack_wait_ms=x", "ack_wait_ms"),
            ("kafka://u:canary@a", "nats://"),
            ("nats://u:canary%@a", "%25"),
            ("nats://u:canary@", "host"),
            ("nats://u:canary@a/b", "path"),
            ("nats://u:s3?canary@a", "%3F"),
        ] {
            let error = NatsConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(named), "{url}: {error}");
            assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        }
        assert!(toml::from_str::<NatsConfig>("ackwait = 1").unwrap_err().to_string().contains("ackwait"));
        let config = NatsConfig { namespace: "A.b".into(), ..NatsConfig::default() };
        assert!(config.check().unwrap_err().to_string().contains("namespace"));
    }
}
