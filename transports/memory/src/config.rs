//! How the transport is configured.

use crate::MemoryTransport;
use crate::error::error;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{BoxFuture, Transport};
use tidings_core::{BusConfig, Connect, ErrorKind, Result};

const MIB: usize = 1024 * 1024;

/// The configuration of the memory transport; each field has a default.
///
/// # Examples
///
/// ```
/// use tidings_memory::MemoryConfig;
///
/// let config = MemoryConfig::from_url("memory://shop?capacity=1048576")?;
/// assert_eq!((config.name.as_str(), config.capacity), ("shop", 1024 * 1024));
/// # Ok::<(), tidings_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// The broker's name: transports of one name in one process share one broker, for as long as any handle to
    /// it lives. Empty (the default) is a broker of its own.
    pub name: String,
    /// Prefixes all names: topics and subscriptions of different namespaces never meet. Default: empty.
    pub namespace: String,
    /// The most bytes stored over all topics; publishing then waits for room. Default: 256 MiB.
    pub capacity: usize,
    /// The most bytes of those that keep settled events for replays and for subscriptions that start at the
    /// beginning; the oldest go first, and all go before publishing waits. Default: 16 MiB.
    pub retain: usize,
    /// How long what a dead instance left open stays away, in milliseconds. 0 (the default): it is requeued in
    /// place at once, as RabbitMQ does. More: it comes back only then, and newer events overtake it,
    /// as JetStream does after its ack wait.
    #[serde(rename = "redelivery_delay_ms", with = "millis")]
    pub redelivery_delay: Duration,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            namespace: String::new(),
            capacity: 256 * MIB,
            retain: 16 * MIB,
            redelivery_delay: Duration::ZERO,
        }
    }
}

impl MemoryConfig {
    /// The defaults, for the broker of this name.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Reads `memory://name?capacity=..&retain=..&namespace=..&redelivery_delay_ms=..`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for another scheme, an unknown key or a malformed value, each by name.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::default().with_url(url)
    }

    /// The same, with the name and the settings of `url`, as [`from_url`](Self::from_url) reads them.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    pub fn with_url(mut self, url: &str) -> Result<Self> {
        let Some(rest) = url.strip_prefix("memory://") else {
            return Err(invalid("the url must start with `memory://`"));
        };
        let (name, query) = rest.split_once('?').unwrap_or((rest, ""));
        let name = name.strip_suffix('/').unwrap_or(name);
        if name.contains(['/', '#', '@', ':']) {
            return Err(invalid("the url has a host, path or port; write `memory://name`"));
        }
        name.clone_into(&mut self.name);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            self.set(key, value)?;
        }
        Ok(self)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "namespace" => value.clone_into(&mut self.namespace),
            "capacity" => self.capacity = number(key, value)?,
            "retain" => self.retain = number(key, value)?,
            "redelivery_delay_ms" => self.redelivery_delay = Duration::from_millis(number(key, value)?),
            _ => {
                let known = "namespace, capacity, retain, redelivery_delay_ms";
                return Err(invalid(format!("unknown key `{key}` in the url; known are {known}")));
            }
        }
        Ok(())
    }
}

impl Connect for MemoryConfig {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(async move { Ok((MemoryTransport::connect(self)? as Arc<dyn Transport>, BusConfig::default())) })
    }
}

fn number<N: std::str::FromStr>(key: &str, value: &str) -> Result<N> {
    value.parse().map_err(|_| invalid(format!("`{key}` in the url must be a whole number, not `{value}`")))
}

fn invalid(why: impl Into<String>) -> tidings_core::Error {
    error(ErrorKind::Config, why).with_operation("connect")
}

mod millis {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::time::Duration;

    pub(super) fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_url_and_a_table_say_the_same() {
        let url = "memory://shop?namespace=test&capacity=1000&retain=10&redelivery_delay_ms=500";
        let config = MemoryConfig::from_url(url).unwrap();
        let table = "name = 'shop'\nnamespace = 'test'\ncapacity = 1000\nretain = 10\nredelivery_delay_ms = 500";
        assert_eq!(config, toml::from_str(table).unwrap());
        assert_eq!(config.redelivery_delay, Duration::from_millis(500));
        assert_eq!(toml::from_str::<MemoryConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
        assert_eq!(MemoryConfig::from_url("memory://").unwrap(), MemoryConfig::default());
        assert_eq!(MemoryConfig::from_url("memory://a/").unwrap(), MemoryConfig::named("a"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (url, named) in [
            ("memory://a?sizee=1", "sizee"),
            ("memory://a?capacity=", "capacity"),
            ("memory://a?retain=-1", "retain"),
            ("kafka://a", "memory://"),
            ("memory://a/b", "memory://name"),
        ] {
            let error = MemoryConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(named), "{url}: {error}");
        }
        let unknown = toml::from_str::<MemoryConfig>("capacitty = 1").unwrap_err();
        assert!(unknown.to_string().contains("capacitty"));
    }
}
