//! What exists on the server: created or verified, never changed silently.

use crate::api::{Api, during, number};
use crate::config::{NatsConfig, Provision};
use crate::error::{ApiError, Failure, error, mismatch};
use crate::names::{Names, covers, overlap};
use async_nats::HeaderMap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::str::FromStr;
use std::time::Duration;
use tidings_core::transport::{Ordering, Start, SubscriptionSpec, TopicSpec, Topology};
use tidings_core::{ErrorKind, Result, SubscriptionName, Topic, TopicPattern};
use tokio::time::sleep;

/// For how long the server knows a publish again.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// For how long a name is left alone when what it named is gone. The server says so before it has removed the files: what is created
/// under the name meanwhile begins with the messages or the state of the old one, and its own files are removed with those.
const REMOVING: Duration = Duration::from_secs(1);

/// The group in which one client is pinned.
pub(crate) const GROUP: &str = "keys";

/// Streams, consumers and what is kept beside them.
pub(crate) struct Catalog {
    pub(crate) api: Api,
    pub(crate) names: Names,
    pub(crate) provision: Provision,
    pub(crate) ack_wait: Duration,
    replicas: u32,
    retention: Duration,
    max_bytes: u64,
    /// Internal streams that are known to exist.
    known: Mutex<HashSet<String>>,
    /// What was there, `stream` or `stream/consumer`: if it is missing, somebody has deleted it.
    seen: Mutex<HashSet<String>>,
}

/// The properties of a topic, as they are kept on the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Properties {
    pub(crate) slots: u32,
    pub(crate) retention_ms: Option<u64>,
    /// Whether they were asked for; else they are the defaults.
    #[serde(default)]
    pub(crate) provisioned: bool,
}

impl Properties {
    const DEFAULT: Self = Self { slots: 1, retention_ms: None, provisioned: false };

    fn of(spec: &TopicSpec) -> Self {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self { slots: spec.slots, retention_ms: spec.retention.map(millis), provisioned: true }
    }
}

/// A stream that holds topics.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) name: String,
    subjects: Vec<String>,
    last: u64,
}

impl Stream {
    fn read(answer: &Value) -> Self {
        let config = &answer["config"];
        let subjects = config["subjects"].as_array().into_iter().flatten();
        Self {
            name: config["name"].as_str().unwrap_or_default().to_owned(),
            subjects: subjects.filter_map(Value::as_str).map(str::to_owned).collect(),
            last: number(answer, "/state/last_seq"),
        }
    }

    /// The last position when it was found.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    pub(crate) fn holds(&self, subject: &str) -> bool {
        self.subjects.iter().any(|held| covers(held, subject))
    }
}

/// The part of a subscription that is read from one stream.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) stream: Stream,
    pub(crate) patterns: Vec<TopicPattern>,
}

/// One consumer of a subscription.
#[derive(Clone, Debug)]
pub(crate) struct ConsumerPlan {
    pub(crate) stream: String,
    pub(crate) name: String,
    pub(crate) filters: Vec<String>,
    pub(crate) ordering: Ordering,
    pub(crate) metadata: BTreeMap<&'static str, String>,
    /// Where it starts if it is created.
    pub(crate) start: u64,
}

/// What a subscription was created with, and must be opened with again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Terms {
    topics: String,
    ordering: &'static str,
    start: &'static str,
}

impl Terms {
    /// The order and repetition of its topics mean nothing.
    pub(crate) fn of(spec: &SubscriptionSpec) -> Self {
        let mut topics: Vec<_> = spec.topics.iter().map(TopicPattern::as_str).collect();
        topics.sort_unstable();
        topics.dedup();
        let ordering = if spec.ordering == Ordering::Key { "key" } else { "none" };
        let start = if spec.start == Start::New { "new" } else { "beginning" };
        Self { topics: topics.join(","), ordering, start }
    }

    fn metadata(&self) -> BTreeMap<&'static str, String> {
        let (ordering, start) = (self.ordering.to_owned(), self.start.to_owned());
        BTreeMap::from([
            ("tidings-topics", self.topics.clone()),
            ("tidings-ordering", ordering),
            ("tidings-start", start),
        ])
    }

    fn check(&self, consumer: &Value) -> Result<()> {
        let has = |name: &str| consumer["config"]["metadata"][name].as_str().unwrap_or_default().to_owned();
        let (topics, ordering, start) = (has("tidings-topics"), has("tidings-ordering"), has("tidings-start"));
        if topics != self.topics {
            return Err(mismatch("topics of the subscription", topics, &self.topics));
        }
        if ordering != self.ordering {
            return Err(mismatch("ordering of the subscription", ordering, self.ordering));
        }
        if start != self.start {
            let what = "start of the subscription, decided when it was created (`Bus::remove_subscription` lets it begin anew)";
            return Err(mismatch(what, start, self.start));
        }
        Ok(())
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Catalog {
    pub(crate) fn new(api: Api, config: &NatsConfig) -> Self {
        Self {
            api,
            names: Names::new(&config.namespace),
            provision: config.provision,
            ack_wait: config.ack_wait,
            replicas: config.replicas,
            retention: config.retention,
            max_bytes: config.max_stream_bytes,
            known: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    // ---- Streams ----

    fn topic_stream_config(&self, token: &str) -> Value {
        let max_bytes = if self.max_bytes == 0 { json!(-1) } else { json!(self.max_bytes) };
        json!({
            "name": self.names.stream(token), "subjects": self.names.stream_subjects(token),
            "retention": "limits", "storage": "file", "discard": "new", "num_replicas": self.replicas,
            "max_age": nanos(self.retention), "max_bytes": max_bytes, "max_msgs": -1, "max_consumers": -1,
            "duplicate_window": nanos(DUPLICATE_WINDOW.min(if self.retention.is_zero() { DUPLICATE_WINDOW } else { self.retention })),
            "allow_direct": true, "allow_msg_ttl": true, "metadata": { "tidings": "topics" },
        })
    }

    fn internal_stream_config(&self, name: &str, subject: &str, retention: &str) -> Value {
        json!({
            "name": name, "subjects": [subject], "retention": retention, "storage": "file", "discard": "new",
            "num_replicas": self.replicas, "max_age": 0, "max_bytes": -1, "max_msgs": -1, "max_consumers": -1,
            "duplicate_window": nanos(DUPLICATE_WINDOW), "allow_direct": true, "metadata": { "tidings": "internal" },
        })
    }

    /// Sees to it that an internal stream exists; whether it does.
    async fn internal(&self, config: Value) -> Result<bool> {
        let name = config["name"].as_str().unwrap_or_default().to_owned();
        if self.known.lock().contains(&name) {
            return Ok(true);
        }
        let found = self.api.call(&format!("STREAM.INFO.{name}"), &Value::Null).await;
        match found {
            Ok(answer) => self.verify_same(&config, &answer["config"])?,
            Err(failure) if failure.is_not_found() && self.provision == Provision::Create => {
                self.create_stream(&config).await?;
            }
            Err(failure) if failure.is_not_found() => return Ok(false),
            Err(failure) => return Err(failure.into()),
        }
        self.see(name.clone());
        self.known.lock().insert(name);
        Ok(true)
    }

    fn verify_same(&self, wanted: &Value, has: &Value) -> Result<()> {
        if self.provision == Provision::Off {
            return Ok(());
        }
        for key in ["subjects", "retention", "max_age", "max_bytes", "max_msgs", "num_replicas", "discard"] {
            if has[key] != wanted[key] {
                let error = mismatch(&format!("`{key}` of the stream"), &has[key], &wanted[key]);
                return Err(error.with_context("stream", wanted["name"].as_str().unwrap_or_default()));
            }
        }
        Ok(())
    }

    async fn create_stream(&self, config: &Value) -> Result<Value> {
        let name = config["name"].as_str().unwrap_or_default();
        let about = |error: tidings_core::Error| error.with_context("stream", name);
        self.removed(name).await;
        let answer = self.api.call(&format!("STREAM.CREATE.{name}"), config).await.map_err(|f| about(f.into()))?;
        // An old server ignores what it does not know, in silence.
        for key in ["retention", "discard", "max_age", "duplicate_window", "allow_direct", "allow_msg_ttl"] {
            if !config[key].is_null() && answer["config"][key] != config[key] && config[key] != json!(0) {
                let why = format!("the server did not take `{key}` of a stream; it may be too old");
                return Err(about(error(ErrorKind::Unsupported, why)));
            }
        }
        // Its consumers went with the old one.
        let consumers = format!("{name}/");
        self.seen.lock().retain(|seen| !seen.starts_with(&consumers));
        self.see(name.to_owned());
        Ok(answer)
    }

    pub(crate) async fn address_stream(&self) -> Result<bool> {
        let (name, subject) = (self.names.address_stream(), self.names.addresses());
        self.internal(self.internal_stream_config(&name, &subject, "workqueue")).await
    }

    pub(crate) async fn dead_stream(&self) -> Result<bool> {
        let (name, subject) = (self.names.dead_stream(), self.names.all_dead());
        self.internal(self.internal_stream_config(&name, &subject, "limits")).await
    }

    pub(crate) async fn bucket(&self) -> Result<bool> {
        let mut config = self.internal_stream_config(&self.names.bucket_stream(), &self.names.key(">"), "limits");
        config["max_msgs_per_subject"] = json!(1);
        config["allow_msg_ttl"] = json!(true);
        config["allow_rollup_hdrs"] = json!(true);
        config["discard"] = json!("old");
        self.internal(config).await
    }

    /// Forgets that internal streams exist: one did not answer.
    pub(crate) fn doubt(&self) {
        self.known.lock().clear();
    }

    fn see(&self, name: String) {
        self.seen.lock().insert(name);
    }

    /// Waits, before a name is used again, until the server has removed what had it.
    async fn removed(&self, name: &str) {
        if self.seen.lock().contains(name) {
            sleep(REMOVING).await;
        }
    }

    pub(crate) async fn stream_info(&self, name: &str) -> Result<Value, Failure> {
        self.api.call(&format!("STREAM.INFO.{name}"), &Value::Null).await
    }

    /// The stream that holds a topic or all topics of a pattern, found by subject, or else created.
    pub(crate) async fn stream_of(&self, pattern: &str, create: bool) -> Result<Option<Stream>> {
        let subject = self.names.topic(pattern);
        let list = self.api.call("STREAM.NAMES", &json!({ "subject": subject })).await;
        let list = list.map_err(during("find the stream"))?;
        let names = list["streams"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let mut partly = None;
        for name in names {
            let answer = self.stream_info(name).await.map_err(during("find the stream"))?;
            let stream = Stream::read(&answer);
            if stream.holds(&subject) {
                self.verify_topics(&answer["config"])?;
                self.see(stream.name.clone());
                return Ok(Some(stream));
            }
            partly = Some(stream);
        }
        if let Some(stream) = partly {
            let why = format!(
                "a stream holds only a part of `{subject}`, and what is published to the rest would never arrive; subscribe to a \
                 pattern for each stream"
            );
            return Err(error(ErrorKind::Mismatch, why).with_context("stream", stream.name));
        }
        if !create {
            return Ok(None);
        }
        if self.provision != Provision::Create {
            let why = format!("no stream holds `{subject}`; create one, or set `provision = \"create\"`");
            return Err(error(ErrorKind::NotFound, why));
        }
        let token = pattern.split('.').next().unwrap_or_default();
        let answer = self.create_stream(&self.topic_stream_config(token)).await?;
        Ok(Some(Stream::read(&answer)))
    }

    /// That a stream loses nothing that was not read, but by age.
    fn verify_topics(&self, has: &Value) -> Result<()> {
        if self.provision == Provision::Off {
            return Ok(());
        }
        let name = has["name"].as_str().unwrap_or_default();
        let refuse = |key: &str, asked: &str| {
            Err(mismatch(&format!("`{key}` of the stream"), &has[key], asked).with_context("stream", name))
        };
        if has["retention"] != "limits" {
            return refuse("retention", "limits");
        }
        let limited = ["max_msgs", "max_bytes", "max_msgs_per_subject"].iter().any(|key| has[*key].as_i64() > Some(0));
        if limited && has["discard"] != "new" {
            return refuse("discard", "new, so that what is unread is not dropped");
        }
        if has["sealed"] == true || has["no_ack"] == true {
            return refuse("no_ack", "a stream that takes and confirms messages");
        }
        // What this SDK created must be what this configuration asks for.
        if has["metadata"]["tidings"] == "topics" {
            let wanted = self.topic_stream_config("x");
            for key in ["max_age", "max_bytes", "num_replicas"] {
                if has[key] != wanted[key] {
                    return refuse(key, &wanted[key].to_string());
                }
            }
        }
        Ok(())
    }

    // ---- Topics ----

    pub(crate) async fn properties(&self, topic: &Topic) -> Result<Option<Properties>> {
        let key = self.names.topic_key(topic.as_str());
        let found = self.api.last_message(&self.names.bucket_stream(), &key).await?;
        Ok(found.and_then(|stored| serde_json::from_slice(&stored.payload).ok()))
    }

    /// The properties of a topic that is published to, which are settled by that.
    pub(crate) async fn settled(&self, topic: &Topic) -> Result<Properties> {
        if !self.bucket().await? {
            return Ok(Properties::DEFAULT);
        }
        if let Some(properties) = self.properties(topic).await? {
            return Ok(properties);
        }
        match self.put_properties(topic, Properties::DEFAULT, 0).await {
            Ok(()) => Ok(Properties::DEFAULT),
            Err(failure) if failure.is(ApiError::WRONG_LAST_SEQUENCE) => {
                Ok(self.properties(topic).await?.unwrap_or(Properties::DEFAULT))
            }
            Err(failure) => Err(failure.into()),
        }
    }

    async fn put_properties(&self, topic: &Topic, properties: Properties, last: u64) -> Result<(), Failure> {
        let body = serde_json::to_vec(&properties)
            .map_err(|e| error(ErrorKind::Internal, "properties cannot be written").with_source(e))?;
        self.api.store(&self.names.topic_key(topic.as_str()), expecting(last), body.into()).await.map(drop)
    }

    /// How many slots the topics that these patterns match have at the most.
    pub(crate) async fn slots(&self, patterns: &[TopicPattern]) -> Result<u32> {
        let filters: Vec<_> = patterns.iter().map(|pattern| self.names.topic_key(pattern.as_str())).collect();
        let found = match self.api.newest(&self.names.bucket_stream(), &filters).await {
            Ok(found) => found,
            Err(failure) if failure.is_not_found() => return Ok(1),
            Err(failure) => return Err(failure.into()),
        };
        let slots = found.iter().filter_map(|stored| serde_json::from_slice::<Properties>(&stored.payload).ok());
        Ok(slots.map(|properties| properties.slots).max().unwrap_or(1))
    }

    fn check_topic(spec: &TopicSpec, has: Option<Properties>) -> Result<()> {
        let about = |error: tidings_core::Error| error.with_context("topic", &spec.topic);
        if spec.slots == 0 {
            return Err(about(error(ErrorKind::Config, "a topic has at least one slot")));
        }
        if spec.retention.is_some_and(|retention| retention < Duration::from_secs(1)) {
            return Err(about(error(ErrorKind::Unsupported, "a topic's retention is at least one second on NATS")));
        }
        let (Some(has), asked) = (has, Properties::of(spec)) else { return Ok(()) };
        if has.slots != asked.slots {
            return Err(about(mismatch("slots of the topic", has.slots, asked.slots)));
        }
        if has.provisioned && has.retention_ms != asked.retention_ms {
            return Err(about(mismatch("retention (ms) of the topic", has.retention_ms, asked.retention_ms)));
        }
        Ok(())
    }

    pub(crate) async fn provision(&self, topology: &Topology) -> Result<()> {
        let kept = self.bucket().await?;
        for spec in &topology.topics {
            let has = if kept { self.properties(&spec.topic).await? } else { None };
            Self::check_topic(spec, has)?;
            if has.is_none() && self.provision != Provision::Create && Properties::of(spec).slots > 1 {
                let why = "the topic has no properties on the server; provision it with `provision = \"create\"`";
                return Err(error(ErrorKind::NotFound, why).with_context("topic", &spec.topic));
            }
        }
        for spec in &topology.subscriptions {
            self.check_subscription(spec).await?;
        }
        for spec in &topology.topics {
            self.provision_topic(spec).await.map_err(|error| error.with_context("topic", &spec.topic))?;
        }
        for spec in &topology.subscriptions {
            self.subscription(spec).await.map_err(|error| error.with_context("subscription", &spec.name))?;
        }
        Ok(())
    }

    async fn provision_topic(&self, spec: &TopicSpec) -> Result<()> {
        let stream = self.stream_of(spec.topic.as_str(), true).await?;
        if spec.slots > 1
            && let Some(stream) = stream.filter(|s| !s.holds(&self.names.slot("*", spec.topic.as_str())))
        {
            let subject = self.names.slot("*", spec.topic.as_str());
            let why = format!("the stream of a topic with slots must hold `{subject}` too");
            return Err(error(ErrorKind::Mismatch, why).with_context("stream", stream.name));
        }
        if self.provision != Provision::Create {
            return Ok(());
        }
        let key = self.names.topic_key(spec.topic.as_str());
        let asked = Properties::of(spec);
        loop {
            let found = self.api.last_message(&self.names.bucket_stream(), &key).await?;
            let last = found.as_ref().map_or(0, |stored| stored.sequence);
            let has = found.and_then(|stored| serde_json::from_slice(&stored.payload).ok());
            Self::check_topic(spec, has)?;
            if has == Some(asked) {
                return Ok(());
            }
            match self.put_properties(&spec.topic, asked, last).await {
                Err(failure) if failure.is(ApiError::WRONG_LAST_SEQUENCE) => {}
                other => return other.map_err(Into::into),
            }
        }
    }

    // ---- Subscriptions ----

    /// That it can be opened as asked, as far as that is known before.
    async fn check_subscription(&self, spec: &SubscriptionSpec) -> Result<()> {
        let about = |error: tidings_core::Error| error.with_context("subscription", &spec.name);
        if spec.max_in_flight == 0 {
            return Err(about(error(ErrorKind::Config, "max_in_flight must be at least 1")));
        }
        if spec.topics.is_empty() {
            return Err(about(error(ErrorKind::Config, "a subscription reads at least one topic")));
        }
        match self.consumer(&self.names.address_stream(), &self.names.consumer(&spec.name, 0)).await {
            Ok(found) => Terms::of(spec).check(&found).map_err(about),
            Err(failure) if failure.is_not_found() => Ok(()),
            Err(failure) => Err(about(failure.into())),
        }
    }

    pub(crate) async fn consumer(&self, stream: &str, name: &str) -> Result<Value, Failure> {
        self.api.call(&format!("CONSUMER.INFO.{stream}.{name}"), &Value::Null).await
    }

    /// Whether a subscription of this name exists.
    pub(crate) async fn exists(&self, name: &SubscriptionName) -> Result<bool> {
        match self.consumer(&self.names.address_stream(), &self.names.consumer(name, 0)).await {
            Ok(_) => Ok(true),
            Err(failure) if failure.is_not_found() => Ok(false),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Deletes a subscription; the first consumer of its address, which says that it exists and what it reads, goes last.
    pub(crate) async fn remove(&self, name: &SubscriptionName) -> Result<bool> {
        let addresses = self.names.address_stream();
        let slots = self.slots_of(name).await?;
        if slots == 0 {
            return Ok(false);
        }
        if self.provision != Provision::Create {
            let why = "nothing may be created or deleted; say `provision = \"create\"`";
            return Err(error(ErrorKind::Denied, why));
        }
        let mut streams = self.streams_of(name).await?;
        let purge = json!({ "filter": self.names.address(name, "*") });
        self.api.call(&format!("STREAM.PURGE.{addresses}"), &purge).await?;
        for key in [self.names.member_key(name, "*"), self.names.claim_key(name, "*")] {
            self.forget(&key).await?;
        }
        streams.push(addresses);
        for slot in (0..slots).rev() {
            self.remove_slot(&streams, &self.names.consumer(name, slot)).await?;
        }
        Ok(true)
    }

    /// How many slots a subscription has; 0 if it does not exist.
    async fn slots_of(&self, name: &SubscriptionName) -> Result<u32> {
        let addresses = self.names.address_stream();
        for slot in 0.. {
            match self.consumer(&addresses, &self.names.consumer(name, slot)).await {
                Ok(_) => {}
                Err(failure) if failure.is_not_found() => return Ok(slot),
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(u32::MAX)
    }

    /// Where a subscription reads, its address aside.
    async fn streams_of(&self, name: &SubscriptionName) -> Result<Vec<String>> {
        let found = self.consumer(&self.names.address_stream(), &self.names.consumer(name, 0)).await?;
        let topics = found["config"]["metadata"]["tidings-topics"].as_str().unwrap_or_default();
        let patterns = topics.split(',').map(TopicPattern::new).collect::<Result<Vec<_>>>()?;
        let parts = self.parts(&patterns, false).await?;
        Ok(parts.into_iter().map(|part| part.stream.name).collect())
    }

    async fn remove_slot(&self, streams: &[String], consumer: &str) -> Result<()> {
        for stream in streams {
            self.forget(&self.names.read_key(stream, consumer)).await?;
            match self.api.call(&format!("CONSUMER.DELETE.{stream}.{consumer}"), &Value::Null).await {
                Err(failure) if !failure.is_not_found() => return Err(failure.into()),
                // It answers when the files are removed.
                Ok(_) => drop(self.seen.lock().remove(&format!("{stream}/{consumer}"))),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// The streams of a subscription or replay, and what is read from each.
    pub(crate) async fn parts(&self, topics: &[TopicPattern], create: bool) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        for pattern in without_covered(topics)? {
            let Some(stream) = self.stream_of(pattern.as_str(), create).await? else { continue };
            match parts.iter_mut().find(|part| part.stream.name == stream.name) {
                Some(part) => part.patterns.push(pattern),
                None => parts.push(Part { stream, patterns: vec![pattern] }),
            }
        }
        Ok(parts)
    }

    /// Opens or creates all that a subscription needs, so that what is published from now on waits for it.
    pub(crate) async fn subscription(&self, spec: &SubscriptionSpec) -> Result<Vec<Part>> {
        self.check_subscription(spec).await?;
        if !self.address_stream().await? || !self.bucket().await? {
            let why = "the internal streams are missing; provision with `provision = \"create\"` first";
            return Err(error(ErrorKind::NotFound, why));
        }
        let parts = self.parts(&spec.topics, true).await?;
        let slots = if spec.ordering == Ordering::Key { self.slots(&spec.topics).await? } else { 1 };
        for part in &parts {
            for slot in 0..slots {
                let plan = self.plan(spec, part, slot).await?;
                self.ensure_consumer(&plan).await?;
            }
        }
        for slot in 0..slots {
            self.ensure_consumer(&self.address_plan(spec, slot)).await?;
        }
        Ok(parts)
    }

    /// The consumer of one slot of one stream.
    pub(crate) async fn plan(&self, spec: &SubscriptionSpec, part: &Part, slot: u32) -> Result<ConsumerPlan> {
        let start = self.start(spec, part, slot).await?;
        let mut metadata = Terms::of(spec).metadata();
        metadata.insert("tidings-start-seq", start.to_string());
        Ok(ConsumerPlan {
            stream: part.stream.name.clone(),
            name: self.names.consumer(&spec.name, slot),
            filters: self.filters(part, spec.ordering, slot),
            ordering: spec.ordering,
            metadata,
            start,
        })
    }

    /// All slots start where the first one did.
    async fn start(&self, spec: &SubscriptionSpec, part: &Part, slot: u32) -> Result<u64> {
        if slot > 0 {
            let first = self.consumer(&part.stream.name, &self.names.consumer(&spec.name, 0)).await?;
            let start = first["config"]["metadata"]["tidings-start-seq"].as_str().and_then(|start| start.parse().ok());
            return Ok(start.unwrap_or(1));
        }
        Ok(if spec.start == Start::Beginning { 1 } else { part.stream.last + 1 })
    }

    fn filters(&self, part: &Part, ordering: Ordering, slot: u32) -> Vec<String> {
        let mut filters = Vec::new();
        let token = if ordering == Ordering::Key { slot.to_string() } else { "*".into() };
        for pattern in &part.patterns {
            if slot == 0 {
                filters.push(self.names.topic(pattern.as_str()));
            }
            let slotted = self.names.slot(&token, pattern.as_str());
            filters.extend(part.stream.holds(&slotted).then_some(slotted));
        }
        filters
    }

    /// What a replay reads: all slots.
    pub(crate) fn all_filters(&self, part: &Part) -> Vec<String> {
        self.filters(part, Ordering::None, 0)
    }

    pub(crate) fn address_plan(&self, spec: &SubscriptionSpec, slot: u32) -> ConsumerPlan {
        let token = if spec.ordering == Ordering::Key { slot.to_string() } else { "*".into() };
        ConsumerPlan {
            stream: self.names.address_stream(),
            name: self.names.consumer(&spec.name, slot),
            filters: vec![self.names.address(&spec.name, &token)],
            ordering: spec.ordering,
            metadata: Terms::of(spec).metadata(),
            start: 0,
        }
    }

    /// Opens a consumer, creating it if it may be; what the server says of it.
    pub(crate) async fn ensure_consumer(&self, plan: &ConsumerPlan) -> Result<Value> {
        let name = format!("{}/{}", plan.stream, plan.name);
        let consumer = self.open_consumer(plan, &name).await;
        let consumer = consumer.and_then(|found| self.verify_consumer(plan, &found).map(|()| found));
        let consumer = consumer.map_err(|error| error.with_context("consumer", &name))?;
        self.see(name);
        Ok(consumer)
    }

    async fn open_consumer(&self, plan: &ConsumerPlan, name: &str) -> Result<Value> {
        match self.consumer(&plan.stream, &plan.name).await {
            Err(failure) if failure.is_not_found() => {}
            answer => return answer.map_err(Into::into),
        }
        if self.provision != Provision::Create {
            let why = "the consumer does not exist; create it, or set `provision = \"create\"`";
            return Err(error(ErrorKind::NotFound, why));
        }
        self.removed(name).await;
        let body = json!({ "stream_name": plan.stream, "config": self.consumer_config(plan), "action": "create" });
        match self.api.call(&format!("CONSUMER.CREATE.{}.{}", plan.stream, plan.name), &body).await {
            // Another instance was faster.
            Err(failure) if failure.is(ApiError::CONSUMER_EXISTS) || failure.is(ApiError::CONSUMER_NAME_TAKEN) => {
                self.consumer(&plan.stream, &plan.name).await.map_err(Into::into)
            }
            answer => answer.map_err(Into::into),
        }
    }

    fn consumer_config(&self, plan: &ConsumerPlan) -> Value {
        let mut config = json!({
            "durable_name": plan.name, "name": plan.name, "ack_policy": "explicit", "ack_wait": nanos(self.ack_wait),
            "max_deliver": -1, "max_ack_pending": -1, "filter_subjects": plan.filters, "replay_policy": "instant",
            "metadata": plan.metadata, "max_waiting": 2048,
        });
        if plan.start > 1 {
            config["deliver_policy"] = json!("by_start_sequence");
            config["opt_start_seq"] = json!(plan.start);
        } else {
            config["deliver_policy"] = json!("all");
        }
        if plan.ordering == Ordering::Key {
            config["priority_policy"] = json!("pinned_client");
            config["priority_groups"] = json!([GROUP]);
            config["priority_timeout"] = json!(nanos(self.ack_wait));
        }
        config
    }

    /// Filters may stand in either field, and in any order.
    fn verify_consumer(&self, plan: &ConsumerPlan, found: &Value) -> Result<()> {
        if self.provision == Provision::Off {
            return Ok(());
        }
        let (wanted, has) = (self.consumer_config(plan), &found["config"]);
        let mut filters: Vec<_> =
            has["filter_subjects"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        filters.extend(has["filter_subject"].as_str().filter(|filter| !filter.is_empty()));
        let mut asked: Vec<_> = plan.filters.iter().map(String::as_str).collect();
        filters.sort_unstable();
        asked.sort_unstable();
        if filters != asked {
            return Err(mismatch("filters of the consumer", filters, asked));
        }
        for key in ["ack_policy", "ack_wait", "priority_policy", "priority_groups", "priority_timeout"] {
            let absent = |value: &Value| value.is_null() || *value == "none" || *value == json!(0);
            if has[key] != wanted[key] && !(absent(&has[key]) && absent(&wanted[key])) {
                return Err(mismatch(&format!("`{key}` of the consumer"), &has[key], &wanted[key]));
            }
        }
        Ok(())
    }

    /// Takes the pin from whoever has it. What has none, or no longer exists, has nothing to lose.
    pub(crate) async fn unpin(&self, stream: &str, name: &str) -> Result<(), Failure> {
        let unpinned = self.api.call(&format!("CONSUMER.UNPIN.{stream}.{name}"), &json!({ "group": GROUP })).await;
        match unpinned {
            Err(Failure::Api(_)) | Ok(_) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Deletes what a key of the bucket holds.
    pub(crate) async fn forget(&self, key: &str) -> Result<(), Failure> {
        let call = format!("STREAM.PURGE.{}", self.names.bucket_stream());
        self.api.call(&call, &json!({ "filter": key })).await.map(drop)
    }
}

/// Headers of a write that must follow the write `last` of the same key.
pub(crate) fn expecting(last: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Ok(value) = async_nats::HeaderValue::from_str(&last.to_string()) {
        headers.insert("Nats-Expected-Last-Subject-Sequence", value);
    }
    headers
}

/// Patterns that no other covers. The server takes none that overlap.
fn without_covered(topics: &[TopicPattern]) -> Result<Vec<TopicPattern>> {
    let mut kept: Vec<TopicPattern> = Vec::new();
    for pattern in topics {
        if kept.iter().any(|other| covers(other.as_str(), pattern.as_str())) {
            continue;
        }
        kept.retain(|other| !covers(pattern.as_str(), other.as_str()));
        if let Some(other) = kept.iter().find(|other| overlap(other.as_str(), pattern.as_str())) {
            let why = format!(
                "`{other}` and `{pattern}` overlap, which NATS refuses; subscribe to one pattern that covers both"
            );
            return Err(error(ErrorKind::Unsupported, why));
        }
        kept.push(pattern.clone());
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(names: &[&str]) -> Vec<TopicPattern> {
        names.iter().map(|name| TopicPattern::new(*name).unwrap()).collect()
    }

    #[test]
    fn patterns_that_others_cover_are_not_read_twice() {
        let kept = without_covered(&patterns(&["a.b", "a.>", "a.*.c", "b.c", "b.c"])).unwrap();
        assert_eq!(kept, patterns(&["a.>", "b.c"]));
        let refused = without_covered(&patterns(&["a.*.c", "a.b.*"])).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
    }
}
