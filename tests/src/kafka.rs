//! Kafka, as the conformance suite takes it.

use crate::proxy::Proxy;
use crate::server::{Server, kill_and_restart};
use async_trait::async_trait;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tidings::transport::Transport;
use tidings_conformance::{Broker, Factory};
use tidings_core::{Error, ErrorKind, Result};
use tidings_kafka::rdkafka::admin::AdminOptions;
use tidings_kafka::rdkafka::metadata::MetadataTopic;
use tidings_kafka::rdkafka::{Offset, TopicPartitionList};
use tidings_kafka::{GroupProtocol, KafkaClient, KafkaConfig, KafkaTransport};
use tokio::time::{Instant, sleep};

/// Kafka: a broker of its own, or the one that `TIDINGS_TEST_KAFKA_URL` names, which is neither cut off nor restarted.
#[derive(Debug, Default)]
pub struct Kafka {
    started: Mutex<Option<Arc<Started>>>,
    protocol: GroupProtocol,
}

/// As many cases run at a time, and a few have two namespaces.
const LISTENERS: usize = 32;

/// How long the broker that `scripts/brokers` starts gives members by the protocol of KIP-848.
const SESSION_848: Duration = Duration::from_secs(6);

/// How long the broker may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// A broker tells its clients where to connect to, so each case has a listener of its own, which tells them its proxy.
#[derive(Debug)]
struct Started {
    server: Arc<Server>,
    /// The ports of listeners that no case uses, each with that of its proxy; the longest unused first, because clients that a case
    /// left behind go on for a while.
    free: Mutex<VecDeque<(u16, u16)>>,
}

fn named() -> Option<String> {
    std::env::var("TIDINGS_TEST_KAFKA_URL").ok()
}

fn unreachable(source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Connection, "the broker does not answer").with_source(source)
}

impl Kafka {
    /// With the group protocol of KIP-848.
    #[must_use]
    pub fn kip_848() -> Self {
        Self { protocol: GroupProtocol::Consumer, ..Self::default() }
    }

    fn started(&self) -> Result<Arc<Started>> {
        let mut started = self.started.lock().expect("no panic inside");
        if let Some(started) = &*started {
            return Ok(Arc::clone(started));
        }
        let (server, free) = Server::start_proxied_kafka(LISTENERS).map_err(unreachable)?;
        let new = Arc::new(Started { server: Arc::new(server), free: Mutex::new(free.into()) });
        *started = Some(Arc::clone(&new));
        Ok(new)
    }
}

/// What lies between a case and the broker.
struct Place {
    proxy: Option<Proxy>,
    /// Its listener's port, and the proxy's.
    ports: (u16, u16),
    /// The suite's alone: what a case leaves behind keeps no broker running.
    started: Weak<Started>,
}

impl Place {
    /// Waits for a listener that no other case uses.
    async fn take(started: &Arc<Started>) -> Result<Self> {
        loop {
            let free = started.free.lock().expect("no panic inside").pop_front();
            if let Some(ports) = free {
                let proxy = Proxy::start_at(ports.1, SocketAddr::from(([127, 0, 0, 1], ports.0))).await;
                let proxy = Some(proxy.map_err(unreachable)?);
                return Ok(Self { proxy, ports, started: Arc::downgrade(started) });
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().expect("only drop takes it")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The port is free again before another case may have it.
        drop(self.proxy.take());
        if let Some(started) = self.started.upgrade() {
            started.free.lock().expect("no panic inside").push_back(self.ports);
        }
    }
}

struct KafkaBroker {
    config: KafkaConfig,
    /// Not with a broker of somebody else.
    place: Option<Place>,
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
        let (mut config, place) = if let Some(url) = named() {
            (KafkaConfig::from_url(&url)?, None)
        } else {
            let started = tokio::task::block_in_place(|| self.started())?;
            let place = Place::take(&started).await?;
            (KafkaConfig::from_url(&format!("kafka://{}", place.proxy().address()))?, Some(place))
        };
        namespace.clone_into(&mut config.namespace);
        // What a dead instance had is taken over, and what appears is read, soon enough for a test.
        config.session_timeout = Duration::from_secs(5);
        config.metadata_refresh = Duration::from_secs(1);
        // A broker with little of the machine is slow, not gone.
        (config.connect_timeout, config.request_timeout) = (Duration::from_secs(30), Duration::from_secs(30));
        config.group_protocol = self.protocol;
        Ok(Arc::new(KafkaBroker { config, place }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        named().map(|_| "the broker that the environment names tells its clients to connect to it, past any proxy")
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        named().map(|_| "the broker that the environment names is not ours to restart")
    }
}

fn client(transport: &KafkaTransport) -> &KafkaClient {
    transport.native().downcast_ref::<KafkaClient>().expect("its native client")
}

#[async_trait]
impl Broker for KafkaBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(KafkaTransport::connect(self.config.clone()).await?)
    }

    async fn cut(&self) -> Result<()> {
        let Some(place) = &self.place else { return Ok(()) };
        place.proxy().cut();
        Ok(())
    }

    async fn cut_off(&self) -> Result<()> {
        let Some(place) = &self.place else { return Ok(()) };
        place.proxy().set(|weather| weather.refusing = true);
        place.proxy().cut();
        // Its partitions are the group's, and outlive a connection.
        let session = match self.config.group_protocol {
            GroupProtocol::Classic => self.config.session_timeout,
            GroupProtocol::Consumer => SESSION_848,
        };
        sleep(session + Duration::from_millis(1500)).await;
        place.proxy().set(|weather| weather.refusing = false);
        Ok(())
    }

    async fn restart(&self) -> Result<()> {
        let started = self.place.as_ref().and_then(|place| place.started.upgrade());
        kill_and_restart(started.as_ref().map(|started| &started.server))?;
        loop {
            match KafkaTransport::connect(self.config.clone()).await {
                Ok(transport) => return transport.close(Instant::now() + Duration::from_secs(1)).await,
                Err(error) if error.is_transient() => sleep(Duration::from_millis(20)).await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn expire(&self, topic: &str) -> Result<()> {
        // The broker looks every five minutes.
        let transport = KafkaTransport::connect(self.config.clone()).await?;
        let (name, admin) = (format!("{}.{topic}", self.config.namespace), client(&transport));
        let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(Some(&name), ANSWER));
        let mut offsets = TopicPartitionList::new();
        for partition in metadata.map_err(unreachable)?.topics().iter().flat_map(MetadataTopic::partitions) {
            offsets.add_partition_offset(&name, partition.id(), Offset::End).map_err(unreachable)?;
        }
        admin.delete_records(&offsets, &AdminOptions::new()).await.map_err(unreachable)?;
        transport.close(Instant::now() + Duration::from_secs(5)).await
    }

    async fn clean_up(&self) -> Result<()> {
        let transport = KafkaTransport::connect(self.config.clone()).await?;
        let (own, admin) = (format!("{}.", self.config.namespace), client(&transport));
        let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(None, ANSWER));
        let metadata = metadata.map_err(unreachable)?;
        let topics = metadata.topics().iter().map(MetadataTopic::name);
        let topics: Vec<&str> = topics.filter(|name| name.starts_with(&own)).collect();
        if !topics.is_empty() {
            admin.delete_topics(&topics, &AdminOptions::new()).await.map_err(unreachable)?;
        }
        transport.close(Instant::now() + Duration::from_secs(5)).await
    }
}
