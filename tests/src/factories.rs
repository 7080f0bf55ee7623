//! The transports of this repository, as the conformance suite takes them.

use crate::proxy::Proxy;
use crate::server::Server;
use async_trait::async_trait;
use std::sync::{Arc, Mutex, Weak};
use tidings::memory::{MemoryConfig, MemoryTransport};
use tidings::transport::Transport;
use tidings_conformance::{Broker, Factory};
use tidings_core::{Connect, Error, ErrorKind, Result};
use tidings_directory::DirectoryConfig;
use tidings_kafka::rdkafka::admin::AdminOptions;
use tidings_kafka::rdkafka::metadata::MetadataTopic;
use tidings_kafka::{GroupProtocol, KafkaClient, KafkaConfig, KafkaTransport};
use tidings_nats::{NatsConfig, NatsTransport};

/// Names a server to use in place of one of its own.
const NATS_URL: &str = "TIDINGS_TEST_NATS_URL";

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

/// NATS JetStream: a server of its own, or the one that `TIDINGS_TEST_NATS_URL` names, which is not restarted.
#[derive(Debug, Default)]
pub struct Nats {
    server: Mutex<Option<Arc<Server>>>,
}

impl Nats {
    /// The URL, and the server if it was started for this.
    fn server(&self) -> Result<(String, Option<Arc<Server>>)> {
        if let Ok(url) = std::env::var(NATS_URL) {
            return Ok((url, None));
        }
        let mut server = self.server.lock().expect("no panic inside");
        if server.is_none() {
            let started = Server::start("nats");
            let why = "no server could be started";
            *server = Some(Arc::new(started.map_err(|e| Error::new(ErrorKind::Connection, why).with_source(e))?));
        }
        let url = server.as_ref().map(|server| server.url().to_owned()).unwrap_or_default();
        Ok((url, server.clone()))
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
        let (url, started) = tokio::task::block_in_place(|| self.server())?;
        let mut config = NatsConfig::from_url(&url)?;
        namespace.clone_into(&mut config.namespace);
        // What a dead instance left open comes back soon enough for a test.
        config.ack_wait = std::time::Duration::from_secs(3);
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
        std::env::var(NATS_URL).is_ok().then_some("the server that TIDINGS_TEST_NATS_URL names is not ours to restart")
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
        if let Some(server) = &self.server {
            let restarted = tokio::task::block_in_place(|| server.kill().and_then(|()| server.up()));
            let why = "the server does not come back";
            restarted.map_err(|e| Error::new(ErrorKind::Connection, why).with_source(e))?;
        }
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

/// Kafka: a broker of its own, or the one that `TIDINGS_TEST_KAFKA_URL` names, which is neither cut off nor restarted.
#[derive(Debug, Default)]
pub struct Kafka {
    started: Mutex<Option<Arc<Started>>>,
    protocol: GroupProtocol,
}

/// Names a broker to use in place of one of its own.
const KAFKA_URL: &str = "TIDINGS_TEST_KAFKA_URL";

/// As many cases run at a time, and a few have two namespaces.
const LISTENERS: usize = 24;

/// A broker tells its clients where to connect to, so each case has a listener of its own, which tells them its proxy.
#[derive(Debug)]
struct Started {
    server: Server,
    /// The ports of listeners that no case uses, each with that of its proxy.
    free: Mutex<Vec<(u16, u16)>>,
}

impl Kafka {
    /// With the group protocol of KIP-848.
    #[must_use]
    pub fn kip_848() -> Self {
        Self { protocol: GroupProtocol::Consumer, ..Self::default() }
    }

    fn started(&self) -> Result<Arc<Started>> {
        let mut started = self.started.lock().expect("no panic inside");
        if started.is_none() {
            let why = "no broker could be started";
            let (server, free) = Server::start_proxied_kafka(LISTENERS)
                .map_err(|e| Error::new(ErrorKind::Connection, why).with_source(e))?;
            *started = Some(Arc::new(Started { server, free: Mutex::new(free) }));
        }
        Ok(Arc::clone(started.as_ref().expect("it was started")))
    }
}

struct KafkaBroker {
    config: KafkaConfig,
    /// What lies between the case and the broker, and the listener behind it; not with a broker of somebody else.
    place: Option<(Proxy, Arc<Started>, (u16, u16))>,
}

impl Drop for KafkaBroker {
    fn drop(&mut self) {
        if let Some((proxy, started, ports)) = self.place.take() {
            drop(proxy);
            started.free.lock().expect("no panic inside").push(ports);
        }
    }
}

/// A listener that no other case uses, and a proxy before it.
async fn proxied(started: Arc<Started>) -> Result<(Proxy, Arc<Started>, (u16, u16))> {
    loop {
        let ports = {
            let mut free = started.free.lock().expect("no panic inside");
            if free.is_empty() { None } else { Some(free.remove(0)) }
        };
        if let Some((port, proxy)) = ports {
            let broker = std::net::SocketAddr::from(([127, 0, 0, 1], port));
            let unreachable = |e: std::io::Error| Error::new(ErrorKind::Connection, "no proxy").with_source(e);
            return Ok((Proxy::start_at(proxy, broker).await.map_err(unreachable)?, started, (port, proxy)));
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[async_trait]
impl Factory for Kafka {
    fn name(&self) -> &'static str {
        match self.protocol {
            GroupProtocol::Classic => "kafka",
            GroupProtocol::Consumer => "kafka-848",
        }
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let (mut config, place) = match std::env::var(KAFKA_URL) {
            Ok(url) => (KafkaConfig::from_url(&url)?, None),
            Err(_) => {
                let started = tokio::task::block_in_place(|| self.started())?;
                let place = proxied(started).await?;
                (KafkaConfig::from_url(&format!("kafka://{}", place.0.address()))?, Some(place))
            }
        };
        namespace.clone_into(&mut config.namespace);
        // What a dead instance had is taken over, and what appears is read, soon enough for a test.
        config.session_timeout = std::time::Duration::from_secs(3);
        config.metadata_refresh = std::time::Duration::from_secs(1);
        config.group_protocol = self.protocol;
        Ok(Arc::new(KafkaBroker { config, place }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        let why = "the broker that TIDINGS_TEST_KAFKA_URL names tells its clients to connect to it, past any proxy";
        std::env::var(KAFKA_URL).is_ok().then_some(why)
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        std::env::var(KAFKA_URL)
            .is_ok()
            .then_some("the broker that TIDINGS_TEST_KAFKA_URL names is not ours to restart")
    }
}

impl KafkaBroker {
    fn admin(transport: &KafkaTransport) -> &KafkaClient {
        transport.native().downcast_ref::<KafkaClient>().expect("its native client")
    }
}

#[async_trait]
impl Broker for KafkaBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(KafkaTransport::connect(self.config.clone()).await?)
    }

    async fn cut(&self) -> Result<()> {
        if let Some((proxy, ..)) = &self.place {
            proxy.cut();
        }
        Ok(())
    }

    async fn cut_off(&self) -> Result<()> {
        if let Some((proxy, ..)) = &self.place {
            proxy.set(|weather| weather.refusing = true);
            proxy.cut();
            // Its partitions are the group's, and outlive a connection.
            let session = match self.config.group_protocol {
                GroupProtocol::Classic => self.config.session_timeout,
                // As `scripts/brokers` configures it.
                GroupProtocol::Consumer => std::time::Duration::from_secs(6),
            };
            tokio::time::sleep(session + std::time::Duration::from_millis(1500)).await;
            proxy.set(|weather| weather.refusing = false);
        }
        Ok(())
    }

    async fn restart(&self) -> Result<()> {
        if let Some((_, started, _)) = &self.place {
            let server = &started.server;
            let restarted = tokio::task::block_in_place(|| server.kill().and_then(|()| server.up()));
            let why = "the broker does not come back";
            restarted.map_err(|e| Error::new(ErrorKind::Connection, why).with_source(e))?;
        }
        loop {
            match KafkaTransport::connect(self.config.clone()).await {
                Ok(transport) => {
                    return transport.close(tokio::time::Instant::now() + std::time::Duration::from_secs(1)).await;
                }
                Err(error) if error.is_transient() => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn expire(&self, topic: &str) -> Result<()> {
        // The broker looks every five minutes.
        let transport = KafkaTransport::connect(self.config.clone()).await?;
        let admin = Self::admin(&transport);
        let name = format!("{}.{topic}", self.config.namespace);
        let unreachable = |e| Error::new(ErrorKind::Connection, "nothing can be deleted").with_source(e);
        let timeout = std::time::Duration::from_secs(10);
        let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(Some(&name), timeout));
        let metadata = metadata.map_err(unreachable)?;
        let mut offsets = tidings_kafka::rdkafka::TopicPartitionList::new();
        for partition in metadata.topics().iter().flat_map(MetadataTopic::partitions) {
            let end = tidings_kafka::rdkafka::Offset::End;
            offsets.add_partition_offset(&name, partition.id(), end).map_err(unreachable)?;
        }
        admin.delete_records(&offsets, &AdminOptions::new()).await.map_err(unreachable)?;
        transport.close(tokio::time::Instant::now() + std::time::Duration::from_secs(5)).await
    }

    async fn clean_up(&self) -> Result<()> {
        let transport = KafkaTransport::connect(self.config.clone()).await?;
        let admin = Self::admin(&transport);
        let unreachable = |e| Error::new(ErrorKind::Connection, "the broker does not answer").with_source(e);
        let (own, timeout) = (format!("{}.", self.config.namespace), std::time::Duration::from_secs(10));
        let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(None, timeout));
        let metadata = metadata.map_err(unreachable)?;
        let topics: Vec<&str> = metadata.topics().iter().map(MetadataTopic::name).collect();
        let topics: Vec<&str> = topics.into_iter().filter(|name| name.starts_with(&own)).collect();
        if !topics.is_empty() {
            admin.delete_topics(&topics, &AdminOptions::new()).await.map_err(unreachable)?;
        }
        transport.close(tokio::time::Instant::now() + std::time::Duration::from_secs(5)).await
    }
}
