//! From a configuration to a connected transport: the only place that knows all transports.

use crate::config::TRANSPORTS;
use crate::{BusConfig, Config, Error, ErrorKind, Result};
use std::sync::Arc;
use tidings_core::transport::{BoxFuture, Capabilities, Topology, Transport};
use tidings_core::{Capable, Connect};

/// URL schemes, the transport each belongs to, and the feature that compiles it in.
const SCHEMES: [(&str, &str); 6] = [
    ("memory", "memory"),
    ("nats", "nats"),
    ("tls", "nats"),
    ("amqp", "rabbitmq"),
    ("amqps", "rabbitmq"),
    ("kafka", "kafka"),
];

/// The transport that a URL belongs to, if it is compiled in.
pub(crate) fn scheme(url: &str) -> Result<&'static str> {
    // Never the URL itself: it may hold a password.
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    let Some((_, transport)) = SCHEMES.into_iter().find(|(known, _)| *known == scheme) else {
        let known: Vec<_> = SCHEMES.into_iter().map(|(scheme, _)| format!("{scheme}://")).collect();
        let is_scheme = scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
        let named = if is_scheme { format!("unknown scheme `{scheme}`") } else { "no scheme".into() };
        let why = format!("{named} in the url; known are {}", known.join(", "));
        return Err(Error::new(ErrorKind::Config, why).with_operation("connect"));
    };
    compiled_in(transport)
}

fn compiled_in(transport: &'static str) -> Result<&'static str> {
    match transport {
        #[cfg(feature = "memory")]
        "memory" => Ok(transport),
        #[cfg(feature = "nats")]
        "nats" => Ok(transport),
        #[cfg(feature = "rabbitmq")]
        "rabbitmq" => Ok(transport),
        #[cfg(feature = "kafka")]
        "kafka" => Ok(transport),
        _ => {
            let why =
                format!("transport `{transport}` is not compiled in; enable the feature `{transport}` of `tidings`");
            Err(Error::new(ErrorKind::Config, why).with_operation("connect"))
        }
    }
}

impl Config {
    fn selected(&self) -> Result<&'static str> {
        if let Some(url) = &self.url {
            return scheme(url);
        }
        let known = |name: &String| SCHEMES.into_iter().find(|(_, transport)| transport == name).map(|(_, t)| t);
        match self.transport.as_ref().and_then(known) {
            Some(transport) => compiled_in(transport),
            None => {
                let why =
                    "no transport is chosen; set `transport` in tidings.toml, or TIDINGS_URL, such as memory://shop";
                Err(Error::new(ErrorKind::Config, why).with_operation("connect"))
            }
        }
    }

    async fn transport(&self) -> Result<Arc<dyn Transport>> {
        match self.selected()? {
            #[cfg(feature = "memory")]
            "memory" => self.memory(),
            #[cfg(feature = "nats")]
            "nats" => Ok(tidings_nats::NatsTransport::connect(self.nats()?).await?),
            #[cfg(feature = "rabbitmq")]
            "rabbitmq" => Ok(tidings_rabbitmq::RabbitMqTransport::connect(self.rabbitmq()?).await?),
            #[cfg(feature = "kafka")]
            "kafka" => Ok(tidings_kafka::KafkaTransport::connect(self.kafka()?).await?),
            other => Err(Error::new(ErrorKind::Internal, format!("transport `{other}` has no connector"))),
        }
    }
}

/// Of each transport: its section, then the URL, then the namespace, each over what came before.
impl Config {
    #[cfg(feature = "memory")]
    fn memory(&self) -> Result<Arc<dyn Transport>> {
        let mut config: tidings_memory::MemoryConfig = self.section("memory")?;
        if let Some(url) = &self.url {
            config = config.with_url(url)?;
        }
        if config.name.is_empty() {
            // Buses of one configuration meet, as on any broker.
            config.name = "default".into();
        }
        if let Some(namespace) = &self.namespace {
            config.namespace.clone_from(namespace);
        }
        Ok(tidings_memory::MemoryTransport::connect(config)?)
    }

    #[cfg(feature = "nats")]
    fn nats(&self) -> Result<tidings_nats::NatsConfig> {
        let mut config: tidings_nats::NatsConfig = self.section("nats")?;
        if let Some(url) = &self.url {
            config = config.with_url(url)?;
        }
        if let Some(namespace) = &self.namespace {
            config.namespace.clone_from(namespace);
        }
        Ok(config)
    }

    #[cfg(feature = "rabbitmq")]
    fn rabbitmq(&self) -> Result<tidings_rabbitmq::RabbitMqConfig> {
        let mut config: tidings_rabbitmq::RabbitMqConfig = self.section("rabbitmq")?;
        if let Some(url) = &self.url {
            config = config.with_url(url)?;
        }
        if let Some(namespace) = &self.namespace {
            config.namespace.clone_from(namespace);
        }
        Ok(config)
    }

    #[cfg(feature = "kafka")]
    fn kafka(&self) -> Result<tidings_kafka::KafkaConfig> {
        let mut config: tidings_kafka::KafkaConfig = self.section("kafka")?;
        if let Some(url) = &self.url {
            config = config.with_url(url)?;
        }
        if let Some(namespace) = &self.namespace {
            config.namespace.clone_from(namespace);
        }
        Ok(config)
    }
}

impl Config {
    /// `None` for a transport that is not compiled in; its section is read strictly otherwise.
    fn capabilities_of(&self, name: &'static str) -> Result<Option<Capabilities>> {
        match name {
            #[cfg(feature = "memory")]
            "memory" => {
                self.section::<tidings_memory::MemoryConfig>(name)?;
                Ok(Some(tidings_memory::capabilities()))
            }
            #[cfg(feature = "nats")]
            "nats" => {
                self.section::<tidings_nats::NatsConfig>(name)?;
                Ok(Some(tidings_nats::capabilities()))
            }
            #[cfg(feature = "rabbitmq")]
            "rabbitmq" => Ok(Some(tidings_rabbitmq::capabilities(&self.section(name)?))),
            #[cfg(feature = "kafka")]
            "kafka" => {
                self.section::<tidings_kafka::KafkaConfig>(name)?;
                Ok(Some(tidings_kafka::capabilities()))
            }
            _ => Ok(None),
        }
    }
}

impl Capable for Config {
    /// Of the selected transport, and of each that has a section and is compiled in.
    fn capabilities(&self) -> Result<Vec<(&'static str, Capabilities)>> {
        let selected = self.selected().ok();
        let mut all = Vec::new();
        for name in TRANSPORTS {
            if selected == Some(name) || self.sections.contains_key(name) {
                all.extend(self.capabilities_of(name)?.map(|can| (name, can)));
            }
        }
        if all.is_empty() {
            // Nothing checked is nothing proven.
            let why = "no configured transport is compiled in; set `transport`, or add a section";
            return Err(Error::new(ErrorKind::Config, why).with_operation("check"));
        }
        Ok(all)
    }
}

impl Connect for Config {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(async move {
            let transport = self.transport().await?;
            if !self.topics.is_empty() {
                let topology = Topology { topics: self.topics, subscriptions: Vec::new() };
                transport.provision(&topology).await?;
            }
            Ok((transport, self.bus))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_compiled_in_says_by_which_feature_it_is() {
        let error = compiled_in("pulsar").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("feature `pulsar`"), "{error}");
    }
}
