//! The configuration of a bus: which transport, with what settings. Data only; nothing connects here.

use crate::{BusConfig, Error, ErrorKind, Result, SubscriptionName, Topic};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_path_to_error::{Path, Segment};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path as FilePath;
use std::time::Duration;
use tidings_core::transport::TopicSpec;
use toml::{Table, Value};

/// The file that [`Config::load`] reads, unless `TIDINGS_CONFIG` names another.
const FILE: &str = "tidings.toml";
/// Transports that exist, compiled in or not: their sections may stand in any configuration.
pub(crate) const TRANSPORTS: [&str; 4] = ["memory", "nats", "rabbitmq", "kafka"];

/// Which transport a bus uses, and with what settings. The broker is configuration: nothing else in a program names it.
///
/// Read from `tidings.toml`, then from `TIDINGS_*` variables, then from `TIDINGS_URL`; each overrides what came before.
///
/// ```toml
/// transport = "memory"      # or url = "memory://shop"
/// namespace = "staging"     # prefixes all names, so that stages and tenants share a broker
///
/// [bus]                     # as in BusConfig
/// source = "/webshop"
/// codec = "json"            # or "msgpack"; short for content_type
///
/// [memory]                  # as in MemoryConfig; sections of other transports are kept unread
/// name = "shop"
///
/// [topics."shop.order.placed"]
/// slots = 4                 # spread its keys over four slots, which instances share
/// ```
///
/// Buses connected by it within one process share a memory broker, `default` unless it has a name.
///
/// A variable names the same by its path: `TIDINGS_NAMESPACE`, `TIDINGS_BUS__MAX_PAYLOAD`, `TIDINGS_MEMORY__NAME`.
///
/// # Examples
///
/// ```
/// use tidings::{Bus, Config};
/// # tokio_test(async {
/// let bus = Bus::connect(Config::from_url("memory://shop")?).await?;
/// # tidings::Result::<()>::Ok(()) }).unwrap();
/// # fn tokio_test<F: Future>(f: F) -> F::Output { tokio::runtime::Runtime::new().unwrap().block_on(f) }
/// ```
#[derive(Clone, Default, PartialEq)]
pub struct Config {
    /// The transport chosen by name.
    pub(crate) transport: Option<String>,
    /// The transport and its settings chosen by URL, which wins over the name and the section.
    pub(crate) url: Option<String>,
    pub(crate) namespace: Option<String>,
    /// What holds on any broker.
    pub bus: BusConfig,
    pub(crate) topics: Vec<TopicSpec>,
    pub(crate) sections: Table,
    /// Where it was read, for errors.
    origin: String,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TopicSection {
    slots: u32,
    retention_ms: Option<u64>,
    retained: bool,
}

impl Default for TopicSection {
    fn default() -> Self {
        Self { slots: 1, retention_ms: None, retained: false }
    }
}

impl Config {
    /// Reads `tidings.toml` (or the file named by `TIDINGS_CONFIG`) if it is there, then the `TIDINGS_*` variables.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] names the file or variable, the key and the way out.
    pub fn load() -> Result<Self> {
        Self::load_from(&std::env::vars().collect())
    }

    fn load_from(variables: &BTreeMap<String, String>) -> Result<Self> {
        let named = variables.get("TIDINGS_CONFIG");
        let path = named.map_or(FILE, String::as_str);
        let is_there = named.is_some() || FilePath::new(path).exists();
        let mut table = if is_there { read(FilePath::new(path))? } else { Table::new() };
        let mut origin = if is_there { path.to_owned() } else { String::new() };
        for (name, value) in variables {
            if let Some(key) = name.strip_prefix("TIDINGS_").filter(|key| *key != "CONFIG" && !key.starts_with("TEST_"))
            {
                overlay(&mut table, name, &key.to_ascii_lowercase(), value)?;
                if !origin.is_empty() {
                    origin.push_str(", ");
                }
                origin.push_str(name);
            }
        }
        Self::from_table(table, if origin.is_empty() { "no configuration" } else { &origin })
    }

    /// Reads a file, and no variables.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_file(path: impl AsRef<FilePath>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_table(read(path)?, &path.display().to_string())
    }

    /// Reads the text of a `tidings.toml`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_toml(text: &str) -> Result<Self> {
        Self::from_table(parse(text, "configuration")?, "configuration")
    }

    /// The defaults, on the broker that `url` names, such as `memory://shop`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for an unknown scheme, or one whose transport is not compiled in.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::default().with_url(url)
    }

    /// For a test: the defaults, on the broker that the variable `TIDINGS_TEST_URL` names, or else on a memory broker of its
    /// own; in a namespace that no other test has. Nothing removes what a test leaves in its namespace on a broker.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    #[cfg(feature = "testing")]
    pub fn for_test() -> Result<Self> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let namespace = format!("test-{:x}-{:x}-{count}", since.as_millis(), std::process::id());
        let url = std::env::var("TIDINGS_TEST_URL").unwrap_or_else(|_| format!("memory://{namespace}"));
        Ok(Self::from_url(&url)?.with_namespace(namespace))
    }

    /// The same, on the broker that `url` names.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    pub fn with_url(mut self, url: &str) -> Result<Self> {
        crate::connect::scheme(url)?;
        self.url = Some(url.to_owned());
        Ok(self)
    }

    /// The same, with this prefix of all names.
    #[must_use]
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// The same, publishing as `source`, a URI reference such as `/webshop`.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<String>) -> Self {
        self.bus.source = source.into();
        self
    }

    fn from_table(mut table: Table, origin: &str) -> Result<Self> {
        let mut config = Self {
            transport: take(&mut table, "transport", origin)?,
            namespace: take(&mut table, "namespace", origin)?,
            bus: bus(&mut table, origin)?,
            topics: topics(&mut table, origin)?,
            ..Self::default()
        };
        if let Some(url) = take::<String>(&mut table, "url", origin)? {
            config = config.with_url(&url)?;
        }
        if let Some(name) = config.transport.as_deref().filter(|name| !TRANSPORTS.contains(name)) {
            return Err(invalid(
                origin,
                "transport",
                format!("unknown transport `{name}`; known are {}", TRANSPORTS.join(", ")),
            ));
        }
        if let Some((key, _)) =
            table.iter().find(|(key, value)| !TRANSPORTS.contains(&key.as_str()) || !value.is_table())
        {
            let known = "transport, url, namespace, [bus], [topics] and a section for each transport";
            return Err(invalid(origin, key, format!("unknown key `{key}`; known are {known}")));
        }
        if let Some(namespace) = &config.namespace {
            SubscriptionName::new(namespace.as_str())
                .map_err(|e| invalid(origin, "namespace", "malformed").with_source(e))?;
        }
        config.sections = table;
        config.origin = origin.to_owned();
        Ok(config)
    }

    /// The section of the selected transport, strictly.
    #[cfg(any(feature = "memory", feature = "nats", feature = "rabbitmq", feature = "kafka"))]
    pub(crate) fn section<T: DeserializeOwned + Default>(&self, name: &'static str) -> Result<T> {
        let section = self.sections.get(name).cloned();
        section.map_or_else(|| Ok(T::default()), |value| typed(value, name, &self.origin))
    }
}

fn read(path: &FilePath) -> Result<Table> {
    let origin = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|error| invalid(&origin, "", "the file cannot be read").with_source(error))?;
    parse(&text, &origin)
}

fn parse(text: &str, origin: &str) -> Result<Table> {
    // The message and not the rendered error: that would quote the line, which may hold a secret.
    text.parse::<Table>().map_err(|error| {
        let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        invalid(origin, "", format!("line {line}: {}", error.message()))
    })
}

/// Sets the value that a variable names: `bus__max_payload` is `max_payload` in `[bus]`.
fn overlay(table: &mut Table, variable: &str, key: &str, value: &str) -> Result<()> {
    match key.split_once("__") {
        None => {
            table.insert(key.to_owned(), scalar(value));
            Ok(())
        }
        Some((section, rest)) => match table.entry(section).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(inner) => overlay(inner, variable, rest, value),
            _ => Err(invalid(variable, section, "is not a section")),
        },
    }
}

/// A number only if nothing is lost by it: a password may begin with a zero.
fn scalar(text: &str) -> Value {
    let number = text.parse().ok().filter(|n: &i64| n.to_string() == text).map(Value::Integer);
    number.or_else(|| text.parse().map(Value::Boolean).ok()).unwrap_or_else(|| Value::String(text.to_owned()))
}

fn take<T: DeserializeOwned>(table: &mut Table, key: &'static str, origin: &str) -> Result<Option<T>> {
    table.remove(key).map(|value| typed(value, key, origin)).transpose()
}

/// Reads a value strictly; what is wrong is named by its whole path, such as `nats.ack_wait_ms`.
fn typed<T: DeserializeOwned>(mut value: Value, key: &str, origin: &str) -> Result<T> {
    loop {
        let error = match serde_path_to_error::deserialize(value.clone()) {
            Ok(typed) => return Ok(typed),
            Err(error) => error,
        };
        // A variable that holds nothing but digits was taken for a number.
        let is_text = error.inner().message().ends_with("expected a string");
        if is_text
            && let Some(found) = at(&mut value, error.path())
            && let Some(text) = as_text(found)
        {
            *found = Value::String(text);
            continue;
        }
        let path = error.path().to_string();
        let path = if path == "." { key.to_owned() } else { format!("{key}.{path}") };
        return Err(invalid(origin, &path, error.inner().message().to_owned()));
    }
}

fn at<'a>(value: &'a mut Value, path: &Path) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |value, segment| match segment {
        Segment::Map { key } => value.get_mut(key),
        Segment::Seq { index } => value.get_mut(index),
        _ => None,
    })
}

fn as_text(value: &Value) -> Option<String> {
    value.as_integer().map(|n| n.to_string()).or_else(|| value.as_bool().map(|b| b.to_string()))
}

fn bus(table: &mut Table, origin: &str) -> Result<BusConfig> {
    let mut section: Table = take(table, "bus", origin)?.unwrap_or_default();
    if let Some(codec) = section.remove("codec") {
        let content_type = match codec.as_str() {
            Some("json") => "application/json",
            Some("msgpack") => "application/msgpack",
            _ => return Err(invalid(origin, "bus.codec", "must be \"json\" or \"msgpack\"")),
        };
        section.insert("content_type".into(), content_type.into());
    }
    let config: BusConfig = typed(Value::Table(section), "bus", origin)?;
    let known = crate::codecs::CONTENT_TYPES;
    if known.contains(&config.content_type.as_str()) {
        return Ok(config);
    }
    let why = format!(
        "no codec for `{}` is compiled in, only for: {}; enable its feature",
        config.content_type,
        known.join(", ")
    );
    Err(invalid(origin, "bus.content_type", why))
}

fn topics(table: &mut Table, origin: &str) -> Result<Vec<TopicSpec>> {
    let sections: BTreeMap<String, TopicSection> = take(table, "topics", origin)?.unwrap_or_default();
    let spec = |(name, section): (String, TopicSection)| {
        let topic =
            Topic::new(name).map_err(|error| invalid(origin, "topics", "malformed topic").with_source(error))?;
        if section.slots == 0 {
            return Err(invalid(origin, "slots", "must be at least 1").with_context("topic", topic));
        }
        let retention = section.retention_ms.map(Duration::from_millis);
        Ok(TopicSpec { topic, slots: section.slots, retention, retained: section.retained })
    };
    sections.into_iter().map(spec).collect()
}

fn invalid(origin: &str, key: &str, why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    let error = Error::new(ErrorKind::Config, why).with_context("from", origin);
    if key.is_empty() { error } else { error.with_context("key", key) }
}

/// Neither the URL nor what stands in the sections, which may hold secrets.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.url.as_deref().and_then(|url| url.split_once("://")).map(|(scheme, _)| scheme);
        f.debug_struct("Config")
            .field("transport", &self.transport)
            .field("url", &scheme.map(|scheme| format!("{scheme}://..")))
            .field("namespace", &self.namespace)
            .field("bus", &self.bus)
            .field("topics", &self.topics)
            .field("sections", &self.sections.keys().collect::<Vec<_>>())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn variables_override_the_file_and_the_url_wins() {
        let dir = std::env::temp_dir().join(format!("tidings-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("a.toml");
        std::fs::write(&file, "transport = 'memory'\nnamespace = 'a'\n[bus]\nmax_payload = 10\n[nats]\nanything = 1")
            .unwrap();
        let file = file.to_str().unwrap();
        let vars = env(&[
            ("TIDINGS_CONFIG", file),
            ("TIDINGS_BUS__MAX_PAYLOAD", "20"),
            ("TIDINGS_URL", "memory://x"),
            ("PATH", "/"),
        ]);
        let config = Config::load_from(&vars).unwrap();
        assert_eq!((config.bus.max_payload, config.namespace.as_deref()), (20, Some("a")));
        assert_eq!((config.transport.as_deref(), config.url.as_deref()), (Some("memory"), Some("memory://x")));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_text_of_digits_is_a_text_where_one_is_expected() {
        let vars =
            env(&[("TIDINGS_NAMESPACE", "42"), ("TIDINGS_BUS__SOURCE", "true"), ("TIDINGS_BUS__LINGER_MS", "7")]);
        let config = Config::load_from(&vars).unwrap();
        assert_eq!((config.namespace.as_deref(), config.bus.source.as_str()), (Some("42"), "true"));
        assert_eq!(config.bus.linger_ms, 7);
        #[cfg(feature = "memory")]
        {
            let config = Config::load_from(&env(&[("TIDINGS_MEMORY__NAME", "007"), ("TIDINGS_MEMORY__RETAIN", "7")]));
            let memory: crate::memory::MemoryConfig = config.unwrap().section("memory").unwrap();
            assert_eq!((memory.name.as_str(), memory.retain), ("007", 7));
        }
    }

    #[cfg(feature = "testing")]
    #[tokio::test]
    async fn each_test_has_a_namespace_of_its_own() {
        let [one, other] = [Config::for_test().unwrap(), Config::for_test().unwrap()];
        assert_ne!(one.namespace, other.namespace);
        for config in [one, other] {
            SubscriptionName::new(config.namespace.clone().unwrap()).unwrap();
            crate::testing::Harness::on(config).start([]).await.stop().await;
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, named) in [
            ("transprot = 'memory'", "transprot"),
            ("transport = 'memroy'", "memroy"),
            ("[bus]\nmax_payloda = 1", "max_payloda"),
            ("[bus]\ncodec = 'xml'", "bus.codec"),
            ("[bus]\ncontent_type = 'text/xml'", "text/xml"),
            ("url = 'amqq://x'", "amqq"),
            ("namespace = 'A B'", "namespace"),
            ("[topics.\"Shop\"]", "topics"),
            ("[topics.shop]\nslots = 0", "slots"),
            ("transport = ", "line 1"),
        ] {
            let error = Config::from_toml(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{text}");
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
        let error = Config::load_from(&env(&[("TIDINGS_BUS__MAX_PAYLOAD", "many")])).unwrap_err().to_string();
        assert!(error.contains("TIDINGS_BUS__MAX_PAYLOAD") && error.contains("key=bus.max_payload"), "{error}");
        let error = Config::load_from(&env(&[("TIDINGS_TRANSPROT", "memory")])).unwrap_err();
        assert!(error.to_string().contains("transprot"), "{error}");
        let error = Config::load_from(&env(&[("TIDINGS_CONFIG", "/nowhere.toml")])).unwrap_err();
        assert!(error.to_string().contains("/nowhere.toml"), "{error}");
    }
}
