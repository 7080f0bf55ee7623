//! The transports of this repository, as the conformance suite takes them.

pub use crate::kafka::Kafka;
use crate::proxy::Proxy;
pub use crate::rabbitmq::RabbitMq;
use crate::server::{OnDemand, Server, kill_and_restart};
use async_trait::async_trait;
use std::sync::{Arc, Mutex, Weak};
use tidings::memory::{MemoryConfig, MemoryTransport};
use tidings::transport::Transport;
use tidings_conformance::{Broker, Factory};
use tidings_core::{Connect, Error, ErrorKind, Result};
use tidings_directory::DirectoryConfig;
use tidings_nats::{NatsConfig, NatsTransport};

/// The example of a transport: a directory of files for each case.
#[derive(Clone, Debug, Default)]
pub struct Directory;

struct DirectoryBroker {
    config: DirectoryConfig,
}

#[async_trait]
impl Factory for Directory {
    fn name(&self) -> &'static str {
        "directory"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let path = std::env::temp_dir().join("tidings-directory").join(namespace);
        Ok(Arc::new(DirectoryBroker { config: DirectoryConfig { path, ..DirectoryConfig::default() } }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        Some("there is no connection to a directory")
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        Some("there is no server behind a directory")
    }
}

#[async_trait]
impl Broker for DirectoryBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(self.config.clone().connect().await?.0)
    }

    async fn clean_up(&self) -> Result<()> {
        // What a case left behind may still write.
        let mut tries = 0;
        loop {
            match std::fs::remove_dir_all(&self.config.path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound && tries == 100 => {
                    return Err(Error::new(ErrorKind::Internal, "the directory cannot be removed").with_source(error));
                }
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => tries += 1,
                _ => return Ok(()),
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// The memory transport: one broker for each case.
#[derive(Clone, Debug, Default)]
pub struct Memory;

struct MemoryBroker {
    config: MemoryConfig,
    /// A broker ends with its last handle.
    _keeps: Arc<MemoryTransport>,
    connected: Mutex<Vec<Weak<MemoryTransport>>>,
}

#[async_trait]
impl Factory for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let config = MemoryConfig::named(namespace);
        let keeps = MemoryTransport::connect(config.clone())?;
        Ok(Arc::new(MemoryBroker { config, _keeps: keeps, connected: Mutex::default() }))
    }

    fn in_process(&self) -> bool {
        true
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        None
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        Some("it ends with its process: `durable: false`")
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        let transport = MemoryTransport::connect(self.config.clone())?;
        self.connected.lock().expect("no panic inside").push(Arc::downgrade(&transport));
        Ok(transport)
    }

    async fn cut(&self) -> Result<()> {
        for transport in self.connected.lock().expect("no panic inside").iter().filter_map(Weak::upgrade) {
            let broker = transport.native().downcast_ref::<tidings::memory::MemoryBroker>();
            broker.expect("its native client").cut();
        }
        Ok(())
    }

    async fn clean_up(&self) -> Result<()> {
        Ok(())
    }
}

/// NATS JetStream.
#[derive(Debug)]
pub struct Nats(OnDemand);

impl Default for Nats {
    fn default() -> Self {
        Self(OnDemand::new("nats"))
    }
}

struct NatsBroker {
    config: NatsConfig,
    server: Option<Arc<Server>>,
    /// What lies between the case and the server.
    proxy: Proxy,
}

#[async_trait]
impl Factory for Nats {
    fn name(&self) -> &'static str {
        "nats"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let (url, started) = self.0.get()?;
        let mut config = NatsConfig::from_url(&url)?;
        namespace.clone_into(&mut config.namespace);
        // What a dead instance left open comes back soon enough for a test, and one on a loaded machine is not taken for dead.
        config.ack_wait = std::time::Duration::from_secs(5);
        config.request_timeout = std::time::Duration::from_secs(15);
        config.connect_timeout = config.request_timeout;
        let unreachable = |e: std::io::Error| Error::new(ErrorKind::Connection, "no proxy").with_source(e);
        let server = config.servers[0].trim_start_matches("nats://").parse();
        let server = server.map_err(|_| Error::new(ErrorKind::Config, "the url has no ip address and port"))?;
        let proxy = Proxy::start(server).await.map_err(unreachable)?;
        config.servers = vec![format!("nats://{}", proxy.address())];
        Ok(Arc::new(NatsBroker { config, server: started, proxy }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        None
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        self.0.cannot_restart()
    }
}

#[async_trait]
impl Broker for NatsBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(NatsTransport::connect(self.config.clone()).await?)
    }

    async fn cut(&self) -> Result<()> {
        self.proxy.cut();
        Ok(())
    }

    async fn cut_off(&self) -> Result<()> {
        self.proxy.set(|weather| weather.refusing = true);
        self.proxy.cut();
        // Its leases are the server's, and outlive a connection.
        tokio::time::sleep(self.config.ack_wait + std::time::Duration::from_secs(1)).await;
        self.proxy.set(|weather| weather.refusing = false);
        Ok(())
    }

    async fn restart(&self) -> Result<()> {
        kill_and_restart(self.server.as_ref())?;
        loop {
            match NatsTransport::connect(self.config.clone()).await {
                Ok(transport) => {
                    return transport.close(tokio::time::Instant::now() + std::time::Duration::from_secs(1)).await;
                }
                Err(error) if error.is_transient() => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn clean_up(&self) -> Result<()> {
        let transport = NatsTransport::connect(self.config.clone()).await?;
        let client = transport.native().downcast_ref::<async_nats::Client>().expect("its native client");
        let unreachable = |e| Error::new(ErrorKind::Connection, "the server does not answer").with_source(e);
        let request = |subject: String| async move {
            let answer = client.request(subject, "".into()).await.map_err(unreachable)?;
            let answer = serde_json::from_slice::<serde_json::Value>(&answer.payload);
            answer.map_err(|e| Error::new(ErrorKind::Internal, "the answer cannot be read").with_source(e))
        };
        // Consumers go with their streams. No other namespace begins so.
        let (own, bucket) = (format!("{}__", self.config.namespace), format!("KV_{}__", self.config.namespace));
        loop {
            let names = request("$JS.API.STREAM.NAMES".into()).await?;
            let names = names["streams"].as_array().into_iter().flatten().filter_map(|name| name.as_str());
            let names: Vec<_> = names.filter(|name| name.starts_with(&own) || name.starts_with(&bucket)).collect();
            let Some(name) = names.first() else { break };
            request(format!("$JS.API.STREAM.DELETE.{name}")).await?;
        }
        transport.close(tokio::time::Instant::now() + std::time::Duration::from_secs(5)).await
    }
}
