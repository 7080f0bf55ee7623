//! RabbitMQ, as the conformance suite takes it.

use crate::proxy::Proxy;
use async_trait::async_trait;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidings::transport::Transport;
use tidings_conformance::{Broker, Factory};
use tidings_core::{Error, ErrorKind, Result};
use tidings_rabbitmq::{RabbitMqClient, RabbitMqConfig, RabbitMqTransport};
use tokio::process::Command;
use tokio::time::Instant;

/// RabbitMQ, at `TIDINGS_TEST_RABBITMQ_URL`; each case has a namespace, and a proxy to be cut off by.
#[derive(Clone, Debug, Default)]
pub struct RabbitMq;

/// Where the server is.
const RABBITMQ_URL: &str = "TIDINGS_TEST_RABBITMQ_URL";
/// What kills it and starts it again, if it is not the `scripts/brokers` of this repository.
const BROKERS: &str = "TIDINGS_TEST_BROKERS";

struct RabbitMqBroker {
    config: RabbitMqConfig,
    direct: RabbitMqConfig,
    proxy: Proxy,
}

fn brokers() -> Option<PathBuf> {
    let of_this_repository = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/brokers");
    let script = std::env::var_os(BROKERS).map_or_else(of_this_repository, PathBuf::from);
    script.exists().then_some(script)
}

async fn script(command: &str, broker: &str) -> Result<()> {
    let failed = |why: String| Error::new(ErrorKind::Internal, why).with_context("command", command);
    let script = brokers().ok_or_else(|| failed("no script for brokers".into()))?;
    let output = Command::new(script).args([command, broker]).output().await;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() { Ok(()) } else { Err(failed(String::from_utf8_lossy(&output.stderr).into_owned())) }
}

#[async_trait]
impl Factory for RabbitMq {
    fn name(&self) -> &'static str {
        "rabbitmq"
    }

    async fn open(&self, namespace: &str) -> Result<Arc<dyn Broker>> {
        let url = std::env::var(RABBITMQ_URL).map_err(|error| {
            Error::new(ErrorKind::Config, "no server; `scripts/brokers url rabbitmq` tells").with_source(error)
        })?;
        let mut direct = RabbitMqConfig::from_url(&url)?;
        direct.namespace = namespace.into();
        let broken =
            |error: std::io::Error| Error::new(ErrorKind::Connection, "the proxy does not start").with_source(error);
        let address = format!("{}:{}", direct.host, direct.port.unwrap_or(5672));
        let address = tokio::net::lookup_host(address).await.map_err(broken)?.find(SocketAddr::is_ipv4);
        let address = address.ok_or_else(|| Error::new(ErrorKind::Config, "the host has no address"))?;
        let proxy = Proxy::start(address).await.map_err(broken)?;
        let mut config = direct.clone();
        (config.host, config.port) = (proxy.address().ip().to_string(), Some(proxy.address().port()));
        Ok(Arc::new(RabbitMqBroker { config, direct, proxy }))
    }

    fn cannot_cut(&self) -> Option<&'static str> {
        None
    }

    fn cannot_restart(&self) -> Option<&'static str> {
        if brokers().is_some() { None } else { Some("there is no script for brokers; set TIDINGS_TEST_BROKERS") }
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
        script("kill", "rabbitmq").await?;
        script("up", "rabbitmq").await
    }

    async fn clean_up(&self) -> Result<()> {
        let transport = RabbitMqTransport::connect(self.direct.clone()).await?;
        let client = transport.native().downcast_ref::<RabbitMqClient>().expect("its native client");
        client.remove_namespace(&self.direct.namespace).await?;
        transport.close(Instant::now() + Duration::from_secs(5)).await
    }
}
