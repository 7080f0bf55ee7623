//! What the tests of this crate share: a folder, messages, and a reader that drives a subscription as core does.

use crate::{DirectoryConfig, DirectoryTransport};
use std::fmt::Display;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;
use tidings_core::transport::{
    Delivery, Destination, Flushed, Notice, Ordering, Polled, PublishFailure, ReplayFrom, ReplaySpec, Role, Start,
    Subscription, SubscriptionSpec, Transport, submit_and_wait,
};
use tidings_core::{Message, Result, SubscriptionName, Topic, TopicPattern};
use tokio::time::{Instant, timeout};

/// A folder of its own, removed at the end of the test.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tidings-directory-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        Self(std::env::temp_dir().join(name))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A file of the namespace.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join("_").join(name)
    }

    pub(crate) async fn connect(&self) -> Arc<DirectoryTransport> {
        DirectoryTransport::connect(DirectoryConfig { poll_ms: 5, ..DirectoryConfig::at(&self.0) }).await.unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

pub(crate) fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

pub(crate) fn name(name: &str) -> SubscriptionName {
    SubscriptionName::new(name).unwrap()
}

pub(crate) fn to(name: &str) -> Destination {
    Destination::Topic(topic(name))
}

/// A message that says `text`.
pub(crate) fn saying(topic_name: &str, key: &str, text: impl Display) -> Message {
    let message = Message::new("1".into(), "/test", "test", topic(topic_name));
    let message = message.with_payload("text/plain", text.to_string());
    if key.is_empty() { message } else { message.with_key(key) }
}

pub(crate) fn spec(subscription: &str, topics: &[&str]) -> SubscriptionSpec {
    SubscriptionSpec {
        name: name(subscription),
        topics: topics.iter().map(|t| TopicPattern::new(*t).unwrap()).collect(),
        ordering: Ordering::Key,
        start: Start::New,
        max_in_flight: 100,
        max_hold: Duration::MAX,
    }
}

pub(crate) fn replay_of(topics: &[&str], from: ReplayFrom) -> ReplaySpec {
    let topics = topics.iter().map(|t| TopicPattern::new(*t).unwrap()).collect();
    ReplaySpec { topics, from, follow: false, max_in_flight: 100 }
}

/// Submits to a destination; the future is the answer.
pub(crate) fn send(
    transport: &dyn Transport,
    to: Destination,
    message: Message,
    delay: Option<Duration>,
) -> impl Future<Output = Option<PublishFailure>> + use<> {
    let answers = submit_and_wait(&*transport.publisher(), &[(to, message, delay, false)]);
    async { answers.await.into_iter().next().map(|(_, failure)| failure) }
}

/// Publishes, and has it confirmed.
pub(crate) async fn publish(transport: &dyn Transport, topic: &str, key: &str, text: impl Display) {
    let failure = send(transport, to(topic), saying(topic, key, text), None).await;
    assert!(failure.is_none(), "{failure:?}");
}

/// Drives one subscription.
pub(crate) struct Reader {
    subscription: Box<dyn Subscription>,
    polled: Polled,
}

pub(crate) async fn open(transport: &dyn Transport, spec: SubscriptionSpec) -> Reader {
    Reader { subscription: transport.subscribe(spec).await.unwrap(), polled: Polled::default() }
}

pub(crate) async fn replay(transport: &dyn Transport, spec: ReplaySpec) -> Reader {
    Reader { subscription: transport.replay(spec).await.unwrap(), polled: Polled::default() }
}

impl Reader {
    /// One poll, to its end; whether it added anything. A lost wake-up fails it.
    pub(crate) async fn poll(&mut self, max: usize) -> Result<bool> {
        let before = (self.polled.deliveries.len(), self.polled.notices.len());
        let polling = poll_fn(|cx| self.subscription.poll_batch(cx, max, &mut self.polled));
        timeout(Duration::from_secs(10), polling).await.expect("nothing came, ever")?;
        Ok(before != (self.polled.deliveries.len(), self.polled.notices.len()))
    }

    /// What was polled.
    pub(crate) fn taken(&mut self) -> Vec<Delivery> {
        std::mem::take(&mut self.polled.deliveries)
    }

    /// The next `count` deliveries.
    pub(crate) async fn take(&mut self, count: usize) -> Vec<Delivery> {
        while self.polled.deliveries.len() < count {
            let max = count - self.polled.deliveries.len();
            assert!(self.poll(max).await.unwrap(), "it ended after {}", self.polled.deliveries.len());
        }
        self.polled.deliveries.drain(..count).collect()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        self.take(1).await.remove(0)
    }

    /// The next, which says `text`.
    pub(crate) async fn expect(&mut self, text: &str) -> Delivery {
        let delivery = self.next().await;
        assert_eq!(said(&delivery), text);
        delivery
    }

    /// That nothing comes for a while, and that it has not ended.
    pub(crate) async fn nothing(&mut self) {
        while timeout(ms(60), self.poll(1)).await.is_ok_and(|more| more.unwrap()) {
            assert!(self.polled.deliveries.is_empty(), "{:?}", self.polled.deliveries);
        }
        assert!(timeout(ms(1), self.poll(1)).await.is_err(), "it has ended");
    }

    /// That it has ended.
    pub(crate) async fn end(&mut self) {
        while self.poll(1).await.unwrap() {}
        assert!(self.polled.deliveries.is_empty(), "{:?}", self.polled.deliveries);
    }

    /// The role it is told next.
    pub(crate) async fn role(&mut self) -> Role {
        loop {
            let role = |notice| if let Notice::Role(role) = notice { Some(role) } else { None };
            if let Some(role) = self.polled.notices.drain(..).find_map(role) {
                return role;
            }
            assert!(self.poll(0).await.unwrap(), "it ended");
        }
    }

    pub(crate) fn stop(&mut self) {
        self.subscription.stop();
    }

    pub(crate) async fn close(self) -> Flushed {
        self.subscription.close(soon()).await
    }
}

pub(crate) fn said(delivery: &Delivery) -> &str {
    std::str::from_utf8(&delivery.message.payload).unwrap()
}

pub(crate) fn texts(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(said).collect()
}

pub(crate) fn ack(deliveries: impl IntoIterator<Item = Delivery>) {
    deliveries.into_iter().for_each(|delivery| delivery.acker.ack());
}
