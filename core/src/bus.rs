//! The handle that services hold.

use crate::handler::encode;
use crate::publish::{Failures, Load, Post, Sender, Terms};
use crate::transport::{BoxFuture, Capabilities, Destination, Fate, Health, PublishFailure, Transport};
use crate::{
    Clock, Error, ErrorKind, Event, EventStream, Events, Headers, Message, MessageId, Result, SubscriptionName, Text,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// A connection to one broker: publishes, and runs services. Cheap to clone; clones are the same bus.
///
/// # Examples
///
/// Services connect by configuration (`tidings::Config`); a transport author's test connects like this:
///
/// ```no_run
/// # use tidings_core::{Bus, BusConfig, Result, transport::Transport};
/// # async fn example(transport: std::sync::Arc<dyn Transport>) -> Result<()> {
/// let bus = Bus::new(transport, BusConfig::default())?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Bus(Arc<Inner>);

struct Inner {
    transport: Arc<dyn Transport>,
    sender: Sender,
    config: BusConfig,
    source: Text,
    content_type: Text,
    max_payload: usize,
    clock: Clock,
    closed: AtomicBool,
}

/// What holds for a bus on any broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BusConfig {
    /// `source` of what is published, a URI reference such as `/webshop`. Default: `/` and the program's name.
    pub source: String,
    /// Content type of events that do not name their codec. Default: `application/json`.
    pub content_type: String,
    /// The largest payload that is published or decoded, in bytes. Default: 1 MiB.
    pub max_payload: usize,
    /// How long a publish may take, repeats and waiting for room included, in milliseconds. Default: 30,000.
    pub publish_timeout_ms: u64,
    /// The most messages that are unconfirmed at a time. Default: 1,000.
    pub max_unconfirmed: usize,
    /// How long a publish waits for others to be sent with it, in milliseconds, where batches are cheaper for the broker
    /// than its client makes them anyway. Default: 0, not at all.
    pub linger_ms: u64,
}

impl Default for BusConfig {
    fn default() -> Self {
        Self {
            source: default_source(),
            content_type: "application/json".into(),
            max_payload: 1024 * 1024,
            publish_timeout_ms: 30_000,
            max_unconfirmed: 1_000,
            linger_ms: 0,
        }
    }
}

fn default_source() -> String {
    let exe = std::env::current_exe().ok();
    let name = exe.as_deref().and_then(|path| path.file_stem()).and_then(|stem| stem.to_str());
    // A URI reference: what could not stand in its path is replaced.
    let clean = |c: char| if c.is_ascii_alphanumeric() || "-._~".contains(c) { c } else { '-' };
    format!("/{}", name.unwrap_or("tidings").replace(|c| clean(c) != c, "-"))
}

/// What a bus can be connected by: a configuration that knows its transport.
///
/// # For implementors
/// The facade's `Config` and each transport's configuration implement it, so that [`Bus::connect`] takes either.
pub trait Connect: Send {
    /// Connects the transport.
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>>;
}

/// What tells, without connecting, what its transports can do.
///
/// # For implementors
/// The facade's `Config` implements it, for [`Service::check`](crate::Service::check).
pub trait Capable {
    /// What each transport that may be selected can do, by name, as far as that is known offline.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a section that cannot be read.
    fn capabilities(&self) -> Result<Vec<(&'static str, Capabilities)>>;
}

impl Capable for Bus {
    fn capabilities(&self) -> Result<Vec<(&'static str, Capabilities)>> {
        Ok(vec![(self.0.transport.name(), self.0.transport.capabilities().clone())])
    }
}

impl Bus {
    /// Connects to the broker that `config` names.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a bad configuration, [`ErrorKind::Denied`] for refused credentials,
    /// [`ErrorKind::Connection`] or [`ErrorKind::Timeout`] if the broker cannot be reached.
    pub async fn connect(config: impl Connect) -> Result<Self> {
        let (transport, config) = config.connect().await?;
        Self::new(transport, config)
    }

    /// A bus on a connected transport.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a limit of nothing or an empty source.
    pub fn new(transport: Arc<dyn Transport>, config: BusConfig) -> Result<Self> {
        Self::with_clock(transport, config, Clock::SYSTEM)
    }

    /// A bus that takes the time of day from `clock`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_clock(transport: Arc<dyn Transport>, config: BusConfig, clock: Clock) -> Result<Self> {
        let refuse = |key, why: &'static str| Err(Error::new(ErrorKind::Config, why).with_context("key", key));
        if config.max_unconfirmed == 0 || config.max_unconfirmed > 1_000_000 {
            return refuse("max_unconfirmed", "must be 1 to 1,000,000");
        }
        if config.max_payload == 0 {
            return refuse("max_payload", "must be at least 1 byte");
        }
        if config.source.is_empty() || config.source.contains(|c: char| c.is_control() || c == ' ') {
            return refuse("source", "must be a URI reference, such as `/webshop`");
        }
        let capabilities = transport.capabilities();
        let linger = Duration::from_millis(config.linger_ms);
        Ok(Self(Arc::new(Inner {
            sender: Sender::new(transport.publisher(), config.max_unconfirmed, capabilities.ordered_repeats, linger),
            max_payload: config.max_payload.min(capabilities.max_payload),
            source: config.source.as_str().into(),
            content_type: config.content_type.as_str().into(),
            config,
            transport,
            clock,
            closed: AtomicBool::new(false),
        })))
    }

    /// Publishes an event to its topic; `Ok` with its id when the broker has confirmed it.
    ///
    /// # Errors
    /// Nothing is sent when the event cannot be encoded ([`ErrorKind::Codec`]) or is too large
    /// ([`ErrorKind::TooLarge`]). What fails for now is sent again, with the same id, until
    /// `publish_timeout_ms` has passed. [`Error::possibly_persisted`] says whether the broker may have it all the same.
    ///
    /// # Cancel safety
    /// Once polled, the event may be published even if the future is dropped; it is not sent again then.
    pub async fn publish<E: Event>(&self, event: &E) -> Result<MessageId> {
        let post = self.prepare(event, PublishOptions::default())?;
        self.publish_post(&post).await?;
        Ok(post.message.id)
    }

    /// Publishes an event with an id, headers, a time or a delay of your own.
    ///
    /// # Errors
    /// As [`publish`](Self::publish); and [`ErrorKind::InvalidName`] for a bad header,
    /// [`ErrorKind::Unsupported`] for a delay where the transport has none.
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish).
    pub async fn publish_with<E: Event>(&self, event: &E, options: PublishOptions) -> Result<MessageId> {
        let post = self.prepare(event, options)?;
        self.publish_post(&post).await?;
        Ok(post.message.id)
    }

    /// Not async, so that the future that is awaited holds the message once.
    fn prepare<E: Event>(&self, event: &E, options: PublishOptions) -> Result<Post> {
        let PublishOptions { id, headers, time, delay, correlation_id, trace } = options;
        let now = self.0.clock.now();
        let id = id.unwrap_or_else(|| MessageId::new(now));
        let mut message = encode(event, id, self.0.source.clone(), &self.0.content_type)?;
        message.headers = headers?;
        for (name, value) in trace {
            message.headers.set(name, value);
        }
        message.time = time;
        message.correlation_id = correlation_id;
        self.post(message, delay, now)
    }

    /// Publishes events in order, many on their way at a time; `Ok` with their ids when all are confirmed.
    ///
    /// # Errors
    /// All are encoded and checked before the first is sent. [`PublishErrors`] names those that were not
    /// confirmed; the others were.
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish), for each.
    pub async fn publish_all<'a, E: Event>(
        &self,
        events: impl IntoIterator<Item = &'a E>,
    ) -> Result<Vec<MessageId>, PublishErrors> {
        let now = self.0.clock.now();
        let encoded = events.into_iter().enumerate().map(|(index, event)| {
            let message = encode(event, MessageId::new(now), self.0.source.clone(), &self.0.content_type);
            message
                .and_then(|message| self.post(message, None, now))
                .map_err(|error| PublishErrors::before_sending(index, error))
        });
        let posts = encoded.collect::<Result<Vec<_>, _>>()?;
        let failures = self.send(&posts, self.terms(false)).await;
        if failures.is_empty() {
            return Ok(posts.into_iter().map(|post| post.message.id).collect());
        }
        Err(PublishErrors { sent: posts.len(), failures })
    }

    /// Publishes a message as it is, for bridges and other codecs. Its recorded time is set if it has none.
    ///
    /// # Errors
    /// As [`publish`](Self::publish); and [`ErrorKind::InvalidName`] for empty or malformed attributes.
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish).
    pub async fn publish_raw(&self, message: Message) -> Result<MessageId> {
        let post = self.post(message, None, self.0.clock.now())?;
        self.publish_post(&post).await?;
        Ok(post.message.id)
    }

    async fn publish_post(&self, post: &Post) -> Result<()> {
        let load = Load::new(std::slice::from_ref(post), self.terms(false));
        let mut failures = match self.closed(1) {
            Some(failures) => failures,
            None => self.0.sender.send(&load).await,
        };
        failures.pop().map_or(Ok(()), |(_, failure)| Err(failure.into_error(self.0.transport.name())))
    }

    /// The message on its way to its topic, checked.
    pub(crate) fn post(&self, mut message: Message, delay: Option<Duration>, now: SystemTime) -> Result<Post> {
        let here = |error: Error| error.with_operation("publish").with_transport(self.0.transport.name());
        message.check(self.0.max_payload).map_err(here)?;
        if delay.is_some() && !self.0.transport.capabilities().publish_delay {
            let why = "this transport cannot delay what is published to a topic; publish it when it is due";
            return Err(here(Error::new(ErrorKind::Unsupported, why)));
        }
        message.time.get_or_insert(now);
        message.recorded_time.get_or_insert(now);
        Ok(Post { destination: Destination::Topic(message.topic.clone()), message, delay })
    }

    /// Sends posts and returns what was not confirmed.
    pub(crate) async fn send(&self, posts: &[Post], terms: Terms) -> Failures {
        match self.closed(posts.len()) {
            Some(failures) => failures,
            None => self.0.sender.send(&Load::new(posts, terms)).await,
        }
    }

    /// How `count` publishes fail if the bus is closed.
    fn closed(&self, count: usize) -> Option<Failures> {
        let failure =
            || PublishFailure { fate: Fate::NotPersisted, error: Error::new(ErrorKind::Closed, "the bus is closed") };
        let is_closed = self.0.closed.load(Ordering::Acquire);
        is_closed.then(|| (0..count).map(|index| (index, failure())).collect())
    }

    /// Until when one publish may take.
    pub(crate) fn terms(&self, owed: bool) -> Terms {
        Terms { owed, deadline: Instant::now() + Duration::from_millis(self.0.config.publish_timeout_ms) }
    }

    /// Deletes a subscription that is no longer wanted, or that is to begin anew with other settings: its position, and all
    /// that waits for it, retries included. Other subscriptions, topics and its dead letters stay. Returns whether there
    /// was one.
    ///
    /// Stop its instances before: one that runs ends with an error, or creates it anew.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] where this is not allowed; those of a broker that cannot be reached.
    ///
    /// # Cancel safety
    /// It may be deleted in part; call it again.
    pub async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        self.0.transport.remove_subscription(subscription).await
    }

    /// Whether the broker can be used now; answers at once.
    #[must_use]
    pub fn health(&self) -> Health {
        self.0.transport.health()
    }

    /// What happens to this bus, its transport and the services on it, from now on.
    #[must_use]
    pub fn events(&self) -> EventStream {
        self.0.transport.events().listen()
    }

    /// The transport, for what it can do and for its native client.
    #[must_use]
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.0.transport
    }

    /// The largest payload that is published or decoded, in bytes.
    #[must_use]
    pub fn max_payload(&self) -> usize {
        self.0.max_payload
    }

    pub(crate) fn tell(&self) -> &Events {
        self.0.transport.events()
    }

    pub(crate) fn clock(&self) -> Clock {
        self.0.clock
    }

    pub(crate) fn content_type(&self) -> &Text {
        &self.0.content_type
    }

    /// Flushes what was submitted and disconnects, within `deadline`. Drain services before; what is
    /// published afterwards fails with [`ErrorKind::Closed`]. Closing again does nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if not all could be flushed; the connection is closed nevertheless.
    ///
    /// # Cancel safety
    /// The bus stays closed, but may not have flushed.
    pub async fn close(&self, deadline: Duration) -> Result<()> {
        self.0.closed.store(true, Ordering::Release);
        self.0.transport.close(Instant::now() + deadline).await
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus")
            .field("transport", &self.0.transport.name())
            .field("source", &self.0.source)
            .finish_non_exhaustive()
    }
}

/// What to publish an event with, beside itself.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tidings_core::PublishOptions;
///
/// let options = PublishOptions::default().with_header("x-tenant", "acme").with_delay(Duration::from_secs(5));
/// ```
#[derive(Debug)]
pub struct PublishOptions {
    id: Option<MessageId>,
    headers: Result<Headers>,
    time: Option<SystemTime>,
    delay: Option<Duration>,
    correlation_id: Option<MessageId>,
    trace: Vec<(&'static str, Bytes)>,
}

impl Default for PublishOptions {
    fn default() -> Self {
        let headers = Ok(Headers::new());
        Self { id: None, headers, time: None, delay: None, correlation_id: None, trace: Vec::new() }
    }
}

impl PublishOptions {
    /// An id of your own. Publishing with the same id again says that it is the same event.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<MessageId>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Adds a header; a bad one fails the publish.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<Text>, value: impl Into<Bytes>) -> Self {
        if let Ok(headers) = &mut self.headers
            && let Err(error) = headers.append(name, value)
        {
            self.headers = Err(error.with_operation("publish"));
        }
        self
    }

    /// When what the event tells happened; by default, now.
    #[must_use]
    pub fn with_time(mut self, time: SystemTime) -> Self {
        self.time = Some(time);
        self
    }

    /// Not delivered before `delay` has passed, where the transport can.
    #[must_use]
    pub fn with_delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// What all messages of one flow share; what handlers return inherits it.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<MessageId>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// The trace it belongs to (W3C Trace Context, `traceparent` and `tracestate`); what handlers return inherits it.
    #[must_use]
    pub fn with_trace(mut self, traceparent: impl Into<Bytes>, tracestate: impl Into<Bytes>) -> Self {
        let state = tracestate.into();
        self.trace = vec![("traceparent", traceparent.into())];
        if !state.is_empty() {
            self.trace.push(("tracestate", state));
        }
        self
    }
}

impl PublishFailure {
    fn into_error(self, transport: &'static str) -> Error {
        self.error.with_fate(self.fate).with_operation("publish").with_transport(transport)
    }
}

/// Which events of a [`publish_all`](Bus::publish_all) were not confirmed, and what is known of them.
#[derive(Debug)]
pub struct PublishErrors {
    sent: usize,
    failures: Failures,
}

impl PublishErrors {
    fn before_sending(index: usize, error: Error) -> Self {
        Self { sent: 0, failures: vec![(index, PublishFailure { fate: Fate::NotPersisted, error })] }
    }

    /// The failures by index in what was given, ascending.
    #[must_use]
    pub fn failures(&self) -> &[(usize, PublishFailure)] {
        &self.failures
    }

    /// How many were confirmed.
    #[must_use]
    pub fn confirmed(&self) -> usize {
        self.sent.saturating_sub(self.failures.len())
    }
}

impl fmt::Display for PublishErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "publish: {} of {} events not confirmed", self.failures.len(), self.sent.max(self.failures.len()))?;
        self.failures.first().map_or(Ok(()), |(index, first)| write!(f, ", first at index {index}: {}", first.error))
    }
}

impl std::error::Error for PublishErrors {}

impl From<PublishErrors> for Error {
    fn from(errors: PublishErrors) -> Self {
        let kind = errors.failures.first().map_or(ErrorKind::Internal, |(_, first)| first.error.kind());
        let possibly = errors.failures.iter().any(|(_, f)| f.fate == Fate::PossiblyPersisted);
        let fate = if possibly { Fate::PossiblyPersisted } else { Fate::NotPersisted };
        Self::new(kind, errors.to_string()).with_fate(fate)
    }
}
