//! RabbitMQ, as the conformance suite takes it.

use crate::proxy::Proxy;
use crate::server::{OnDemand, Server, kill_and_restart};
use async_trait::async_trait;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tidings::transport::Transport;
use tidings_conformance::{Broker, Factory};
use tidings_core::{Error, ErrorKind, Result};
use tidings_rabbitmq::{RabbitMqClient, RabbitMqConfig, RabbitMqTransport};
use tokio::time::Instant;

/// RabbitMQ; each case has a namespace, and a proxy to be cut off by.
#[derive(Debug)]
pub struct RabbitMq(OnDemand);

impl Default for RabbitMq {
    fn default() -> Self {
        Self(OnDemand::new("rabbitmq"))
    }
}

struct RabbitMqBroker {
    server: Option<Arc<Server>>,
    config: RabbitMqConfig,
    direct: RabbitMqConfig,
    proxy: Proxy,
    restarted: AtomicBool,
}

#[async_trait]
impl Factory for RabbitMq {
    fn name(&self) -> &'static str {
        "rabbitmq"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let (url, server) = self.0.get()?;
        let mut direct = RabbitMqConfig::from_url(&url)?;
        direct.namespace = namespace.into();
        // A server with little of the machine is slow, not gone.
        direct.timeout_ms = 30_000;
        let broken =
            |error: std::io::Error| Error::new(ErrorKind::Connection, "the proxy does not start").with_source(error);
        let address = format!("{}:{}", direct.host, direct.port.unwrap_or(5672));
        let address = tokio::net::lookup_host(address).await.map_err(broken)?.find(SocketAddr::is_ipv4);
        let address = address.ok_or_else(|| Error::new(ErrorKind::Config, "the host has no address"))?;
        let proxy = Proxy::start(address).await.map_err(broken)?;
        let mut config = direct.clone();
        (config.host, config.port) = (proxy.address().ip().to_string(), Some(proxy.address().port()));
        Ok(Arc::new(RabbitMqBroker { server, config, direct, proxy, restarted: AtomicBool::new(false) }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        None
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        self.0.cannot_restart()
    }
}

#[async_trait]
impl Broker for RabbitMqBroker {
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(RabbitMqTransport::connect(self.config.clone()).await?)
    }

    async fn cut(&self) -> Result<()> {
        self.proxy.cut();
        Ok(())
    }

    async fn restart(&self) -> Result<()> {
        self.restarted.store(true, SeqCst);
        kill_and_restart(self.server.as_ref())
    }

    async fn clean_up(&self) -> Result<()> {
        // A queue that is deleted as it becomes a leader again leaves its dead-letter worker behind (`rabbit_fifo_dlx_worker`,
        // 4.0.5), which fails a hundred times and takes all queues of the server with it. It goes with the server.
        if self.restarted.load(SeqCst) {
            return Ok(());
        }
        let transport = RabbitMqTransport::connect(self.direct.clone()).await?;
        let client = transport.native().downcast_ref::<RabbitMqClient>().expect("its native client");
        client.remove_namespace(&self.direct.namespace).await?;
        transport.close(Instant::now() + Duration::from_secs(5)).await
    }
}
