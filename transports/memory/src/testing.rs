//! What the tests of this crate share: messages, and a reader that drives a subscription as core does.

use crate::{MemoryBroker, MemoryConfig, MemoryTransport, Stats};
use futures_util::FutureExt;
use std::fmt::Display;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{
    Delivery, Destination, Flushed, Notice, Ordering, Polled, PublishFailure, ReplayFrom, ReplaySpec, Role, Start,
    Subscription, SubscriptionSpec, TopicSpec, Topology, Transport, submit_and_wait,
};
use tidings_core::{Message, Result, SubscriptionName, Topic, TopicPattern};
use tokio::time::{Instant, sleep};

/// Longer than anything a test waits for; virtual time, so it costs nothing.
const LONG: Duration = Duration::from_secs(3600);

pub(crate) fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

pub(crate) fn name(name: &str) -> SubscriptionName {
    SubscriptionName::new(name).unwrap()
}

pub(crate) fn message(topic_name: &str) -> Message {
    Message::new("1".into(), "/test", "test", topic(topic_name))
}

/// A message that counts `size` bytes.
pub(crate) fn message_of_size(topic: &str, size: usize) -> Message {
    let message = message(topic);
    let payload = vec![0; size - message.size()];
    message.with_payload("test/plain", payload)
}

/// A message that says `text`.
pub(crate) fn saying(topic: &str, key: &str, text: impl Display) -> Message {
    let message = message(topic).with_payload("text/plain", text.to_string());
    if key.is_empty() { message } else { message.with_key(key) }
}

pub(crate) fn connect() -> Arc<MemoryTransport> {
    MemoryTransport::connect(MemoryConfig::default()).unwrap()
}

pub(crate) fn native(transport: &MemoryTransport) -> &MemoryBroker {
    transport.native().downcast_ref().unwrap()
}

pub(crate) fn stats(transport: &MemoryTransport) -> Stats {
    native(transport).stats()
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

pub(crate) fn unordered(subscription: &str, topics: &[&str]) -> SubscriptionSpec {
    SubscriptionSpec { ordering: Ordering::None, ..spec(subscription, topics) }
}

pub(crate) fn replay_of(topics: &[&str], from: ReplayFrom) -> ReplaySpec {
    let topics = topics.iter().map(|t| TopicPattern::new(*t).unwrap()).collect();
    ReplaySpec { topics, from, follow: false, max_in_flight: 100 }
}

pub(crate) async fn slots(transport: &MemoryTransport, topic_name: &str, slots: u32) {
    let topics = vec![TopicSpec { slots, ..TopicSpec::new(topic(topic_name)) }];
    transport.provision(&Topology { topics, subscriptions: Vec::new() }).await.unwrap();
}

/// Submits to a destination; the future is the answer.
pub(crate) fn send(
    transport: &MemoryTransport,
    to: Destination,
    message: Message,
    delay: Option<Duration>,
    owed: bool,
) -> impl Future<Output = Option<PublishFailure>> + use<> {
    let answers = submit_and_wait(&*transport.publisher(), vec![(to, message, delay, owed)]);
    answers.map(|failures| failures.into_iter().next().map(|(_, failure)| failure))
}

pub(crate) fn to_topic(
    transport: &MemoryTransport,
    message: Message,
) -> impl Future<Output = Option<PublishFailure>> + use<> {
    send(transport, Destination::Topic(message.topic.clone()), message, None, false)
}

/// Publishes, and has it confirmed at once.
pub(crate) fn publish(transport: &MemoryTransport, topic: &str, key: &str, text: impl Display) {
    let answer = to_topic(transport, saying(topic, key, text)).now_or_never();
    assert!(matches!(answer, Some(None)), "{answer:?}");
}

/// Publishes later.
pub(crate) fn publish_in(transport: &MemoryTransport, delay: Duration, topic_name: &str, text: &str) {
    let to = Destination::Topic(topic(topic_name));
    let answer = send(transport, to, saying(topic_name, "", text), Some(delay), false).now_or_never();
    assert!(matches!(answer, Some(None)), "{answer:?}");
}

/// Sends to the address of a subscription, as a retry does.
pub(crate) fn send_to(transport: &MemoryTransport, subscription: &str, message: Message, delay: Option<Duration>) {
    let to = Destination::Subscription(name(subscription));
    let answer = send(transport, to, message, delay, true).now_or_never();
    assert!(matches!(answer, Some(None)), "{answer:?}");
}

/// Drives one subscription.
pub(crate) struct Reader {
    subscription: Box<dyn Subscription>,
    polled: Polled,
}

pub(crate) async fn open(transport: &MemoryTransport, spec: SubscriptionSpec) -> Reader {
    Reader { subscription: transport.subscribe(spec).await.unwrap(), polled: Polled::default() }
}

pub(crate) async fn replay(transport: &MemoryTransport, spec: ReplaySpec) -> Reader {
    Reader { subscription: transport.replay(spec).await.unwrap(), polled: Polled::default() }
}

impl Reader {
    /// One poll, to its end; whether it added anything.
    pub(crate) async fn poll(&mut self, max: usize) -> Result<bool> {
        let before = (self.polled.deliveries.len(), self.polled.notices.len());
        let polling = poll_fn(|cx| self.subscription.poll_batch(cx, max, &mut self.polled));
        // The timer first: what is only found because the timer polls again was a lost wake-up.
        tokio::select! {
            biased;
            () = sleep(LONG) => panic!("nothing came, ever"),
            polled = polling => polled?,
        }
        Ok(before != (self.polled.deliveries.len(), self.polled.notices.len()))
    }

    /// Polls without waiting; whether it added anything.
    pub(crate) fn poll_now(&mut self, max: usize) -> bool {
        self.poll(max).now_or_never().is_some_and(|added| added.unwrap())
    }

    /// The notices of those polls.
    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.polled.notices)
    }

    /// The next, acked by the caller, until the transport is closed.
    pub(crate) async fn next_or_end(&mut self) -> Option<Delivery> {
        while self.polled.deliveries.is_empty() {
            self.poll(8).await.ok()?;
        }
        self.taken()
    }

    /// The first of those that were polled.
    pub(crate) fn taken(&mut self) -> Option<Delivery> {
        (!self.polled.deliveries.is_empty()).then(|| self.polled.deliveries.remove(0))
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

    /// All that is there now, acked, as text.
    pub(crate) fn drain(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let more = self.poll_now(1000);
            let some = self.polled.deliveries.is_empty();
            all.extend(self.polled.deliveries.drain(..).map(|d| {
                let text = said(&d).to_owned();
                d.acker.ack();
                text
            }));
            if !more && some {
                return all;
            }
        }
    }

    /// That there is nothing now, and that it has not ended.
    pub(crate) fn nothing(&mut self) {
        while self.poll_now(1) && self.polled.deliveries.is_empty() {}
        let said: Vec<_> = self.polled.deliveries.iter().map(said).collect();
        assert!(said.is_empty(), "there is {said:?}");
        assert!(self.poll(1).now_or_never().is_none(), "it has ended");
    }

    /// That it has ended.
    pub(crate) async fn end(&mut self) {
        while self.poll(1).await.unwrap() {}
        assert!(self.polled.deliveries.is_empty(), "{:?}", self.polled.deliveries);
    }

    /// What there is to notice now.
    pub(crate) fn notices(&mut self) -> Vec<Notice> {
        self.poll_now(0);
        std::mem::take(&mut self.polled.notices)
    }

    /// The last role it was told.
    pub(crate) fn role(&mut self) -> Option<Role> {
        let role = |notice| if let Notice::Role(role) = notice { Some(role) } else { None };
        self.notices().into_iter().filter_map(role).next_back()
    }

    pub(crate) fn slots(&mut self) -> Vec<u32> {
        match self.role() {
            Some(Role::Active { slots }) => slots,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn stop(&mut self) {
        self.subscription.stop();
    }

    pub(crate) async fn close(self) -> Flushed {
        self.subscription.close(Instant::now()).await
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

pub(crate) const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
