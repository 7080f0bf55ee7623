//! One connection: how it is made, and what is known of its state.

use crate::api::Api;
use crate::config::{NatsConfig, invalid};
use crate::error::{Failure, connect, error, timed_out};
use async_nats::rustls::{ClientConfig, RootCertStore, crypto::ring};
use async_nats::{Client, ConnectOptions, Event};
use parking_lot::Mutex;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidings_core::transport::Health;
use tidings_core::{Backoff, BusEvent, ErrorKind, Events, ExposeSecret, Result, Secret};
use tokio::sync::watch;
use tokio::time::timeout;

/// The oldest server that has what this transport needs: pinned consumers and a time to live for each message.
const OLDEST: (u64, u64) = (2, 11);

/// Between attempts to connect again: what comes back must be found soon.
const RECONNECT: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));

/// How long nothing may come before the server is asked: at the third time without an answer the connection is given up. The
/// client's own minute would leave one that died without a word unnoticed for three.
const PING: Duration = Duration::from_secs(5);

/// What is known of a connection, shared with what runs on it.
pub(crate) struct Link {
    pub(crate) events: Events,
    /// How often it was connected; odd numbers do not matter, changes do.
    pub(crate) connected: watch::Sender<bool>,
    pub(crate) closed: AtomicBool,
    last_error: Mutex<Option<String>>,
}

impl Link {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            events: Events::default(),
            connected: watch::Sender::new(true),
            closed: AtomicBool::new(false),
            last_error: Mutex::new(None),
        })
    }

    pub(crate) fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn note(&self, event: &Event) {
        match event {
            Event::Connected if !self.connected.send_replace(true) => self.events.tell(BusEvent::Connected),
            Event::Disconnected if self.connected.send_replace(false) && !self.is_closed() => {
                self.events.tell(BusEvent::Disconnected { reason: "the connection to the server is lost".into() });
            }
            Event::ServerError(failed) => *self.last_error.lock() = Some(failed.to_string()),
            Event::ClientError(failed) => *self.last_error.lock() = Some(failed.to_string()),
            Event::SlowConsumer(_) => tracing::warn!("a reader of the NATS client was too slow; messages come again"),
            _ => {}
        }
    }

    pub(crate) fn health(&self) -> Health {
        if self.is_closed() {
            return Health::Down(crate::error::closed());
        }
        if self.is_connected() {
            return Health::Up;
        }
        let lost = error(ErrorKind::Connection, "the connection is lost; it is made again");
        match self.last_error.lock().clone() {
            Some(last) => Health::Down(lost.with_context("last_error", last)),
            None => Health::Down(lost),
        }
    }
}

/// Connects, and checks that the server has what is needed.
pub(crate) async fn open(config: &NatsConfig) -> Result<(Api, Arc<Link>)> {
    config.check()?;
    let link = Link::new();
    let options = options(config, &link).await?;
    let opening = options.connect(&config.servers[..]);
    let client = timeout(config.connect_timeout, opening)
        .await
        .map_err(|_| timed_out("the server did not answer in time").with_operation("connect"))?
        .map_err(connect)?;
    let api = Api::new(client, &link, config.domain.as_deref(), config.request_timeout);
    check_server(&api.impatient(config.connect_timeout)).await.map_err(|error| error.with_operation("connect"))?;
    link.events.tell(BusEvent::Connected);
    Ok((api, link))
}

async fn check_server(api: &Api) -> Result<()> {
    let info = api.client.server_info();
    let version = info.version;
    if version_of(&version).is_none_or(|version| version < OLDEST) {
        let why = format!("the server is version {version}; 2.11 or newer is needed");
        return Err(error(ErrorKind::Unsupported, why));
    }
    let Err(failure) = api.call("INFO", &Value::Null).await else { return Ok(()) };
    let off = || error(ErrorKind::Unsupported, "JetStream is off for this account; enable it on the server (`-js`)");
    let failed = match failure {
        Failure::Api(api) if api.code == 503 => return Err(off()),
        other => tidings_core::Error::from(other),
    };
    // No server of its cluster has it either.
    if failed.kind() == ErrorKind::Connection && !info.jetstream {
        return Err(off().with_source(failed));
    }
    Err(failed.with_context("needed", "JetStream, and permission to use its API"))
}

fn version_of(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

async fn options(config: &NatsConfig, link: &Arc<Link>) -> Result<ConnectOptions> {
    let options = ConnectOptions::new();
    let link = Arc::clone(link);
    let options = log_in(options, config).await?;
    let secure = needs_tls(config)?;
    let options = options
        .name("tidings")
        .connection_timeout(config.connect_timeout)
        .request_timeout(Some(config.request_timeout))
        .max_reconnects(None)
        .ping_interval(PING)
        .reconnect_delay_callback(|attempts| RECONNECT.delay(u32::try_from(attempts).unwrap_or(u32::MAX)))
        .event_callback(move |event| {
            link.note(&event);
            std::future::ready(())
        })
        .require_tls(secure);
    // What a server on this host tells of others must not lead to a connection in plain text.
    let options = if secure || config.allow_plaintext { options } else { options.ignore_discovered_servers() };
    let tls = secure || config.tls_ca_file.is_some() || config.tls_cert_file.is_some();
    Ok(if tls { options.tls_client_config(tls_config(config)?) } else { options })
}

/// Whether TLS is required: off this host, unless plain text is allowed, and where a server's address asks for it.
fn needs_tls(config: &NatsConfig) -> Result<bool> {
    let mut required = config.tls_ca_file.is_some() || config.tls_cert_file.is_some();
    for server in &config.servers {
        // The address is not shown: somebody may have put a password into it.
        let (scheme, rest) = server.split_once("://").unwrap_or(("nats", server));
        if !matches!(scheme, "nats" | "tls") || rest.contains('@') {
            let why = "a server is `nats://host:port` or `tls://host:port`; user and password are fields of their own";
            return Err(invalid(why).with_context("key", "servers"));
        }
        required |= scheme == "tls" || !(config.allow_plaintext || is_local(rest));
    }
    Ok(required)
}

fn is_local(host: &str) -> bool {
    let host = match host.strip_prefix('[') {
        Some(six) => six.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn log_in(options: ConnectOptions, config: &NatsConfig) -> Result<ConnectOptions> {
    let mut options = options;
    let password = secret("password", config.password.as_ref())?;
    match (&config.user, password) {
        (Some(user), Some(password)) => options = options.user_and_password(user.clone(), password),
        (None, None) => {}
        _ => return Err(invalid("a user needs a password, and a password a user").with_context("key", "user")),
    }
    if let Some(token) = secret("token", config.token.as_ref())? {
        options = options.token(token);
    }
    if let Some(seed) = secret("nkey", config.nkey.as_ref())? {
        options = options.nkey(seed);
    }
    if let Some(path) = &config.credentials_file {
        let credentials = secret("credentials_file", Some(&Secret::from_file(path)))?.unwrap_or_default();
        // The client wants the last line ended, which a secret's is not. What is wrong with it is not said: it would quote it.
        options = options
            .credentials(&format!("{credentials}\n"))
            .map_err(|_| invalid("the credentials file cannot be read").with_context("file", path.display()))?;
    }
    Ok(options)
}

/// The client takes, and keeps, a plain string.
fn secret(key: &'static str, given: Option<&Secret>) -> Result<Option<String>> {
    let read = |secret: &Secret| secret.read().map(|text| text.expose_secret().to_owned());
    given.map(read).transpose().map_err(|error| error.with_context("key", key).with_operation("connect"))
}

/// Made here, with a provider of our own: two in one program would make the client's own choice panic.
fn tls_config(config: &NatsConfig) -> Result<ClientConfig> {
    let refuse = |key: &'static str, e: Box<dyn std::error::Error + Send + Sync>| {
        invalid("a certificate or key cannot be used").with_context("key", key).with_source(e)
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| refuse("tls", e.into()))?
        .with_root_certificates(roots(config)?);
    let (Some(cert), Some(key)) = (&config.tls_cert_file, &config.tls_key_file) else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect);
    let chain: Vec<_> = chain.map_err(|e| refuse("tls_cert_file", e.into()))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|e| refuse("tls_key_file", e.into()))?;
    builder.with_client_auth_cert(chain, key).map_err(|e| refuse("tls_cert_file", e.into()))
}

fn roots(config: &NatsConfig) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let Some(path) = &config.tls_ca_file else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return Ok(roots);
    };
    let refuse = || invalid("no authority's certificate can be read from it").with_context("key", "tls_ca_file");
    for cert in CertificateDer::pem_file_iter(path).map_err(|e| refuse().with_source(e))? {
        let cert = cert.map_err(|e| refuse().with_source(e))?;
        roots.add(cert).map_err(|e| refuse().with_source(e))?;
    }
    if roots.is_empty() { Err(refuse()) } else { Ok(roots) }
}

/// How often this client was connected: what was sent before a change may never have arrived.
pub(crate) fn connects(client: &Client) -> u64 {
    client.statistics().connects.load(Ordering::SeqCst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_stays_on_this_host_unless_it_is_allowed() {
        let needs = |server: &str, allow_plaintext| {
            needs_tls(&NatsConfig { servers: vec![server.into()], allow_plaintext, ..NatsConfig::default() })
        };
        for local in ["nats://127.0.0.1:4222", "nats://localhost", "nats://[::1]:4222"] {
            assert!(!needs(local, false).unwrap(), "{local}");
        }
        assert!(needs("nats://broker:4222", false).unwrap());
        assert!(!needs("nats://broker:4222", true).unwrap());
        assert!(needs("tls://127.0.0.1", true).unwrap());
        assert!(needs("nats://localhost.evil.example:4222", false).unwrap());
        let error = needs("nats://u:canary@host", false).unwrap_err();
        assert!(!format!("{error:?}").contains("canary"));
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(version_of("2.9.10").unwrap() < OLDEST);
        assert!(version_of("2.11.0-dev").unwrap() >= OLDEST);
        assert_eq!(version_of("x"), None);
    }
}
