//! Messages as they are sent, and a reader that drives one subscription as core does.

use crate::env::{Env, PATIENCE, subscription, within};
use std::fmt::Display;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{
    Delivery, Destination, Flushed, Notice, Ordering, Polled, PublishFailure, ReplayFrom, ReplaySpec, Start,
    Subscription, SubscriptionSpec, TopicSpec, Topology, Transport, submit_and_wait,
};
use tidings_core::{Clock, Headers, Message, MessageId, Topic, TopicPattern};
use tokio::time::{Instant, timeout};

pub(crate) fn topic(name: &str) -> Topic {
    Topic::new(name).expect("a valid topic")
}

/// A message with a text as its payload; no key if `key` is empty.
pub(crate) fn saying(topic_name: &str, key: &str, text: impl Display) -> Message {
    let id = MessageId::new(Clock::SYSTEM.now());
    let message = Message::new(id, "/suite", "suite.text", topic(topic_name));
    let message = message.with_payload("text/plain", text.to_string());
    if key.is_empty() { message } else { message.with_key(key) }
}

/// What a delivery says.
pub(crate) fn said(delivery: &Delivery) -> &str {
    std::str::from_utf8(&delivery.message.payload).expect("a text")
}

/// The subscription `name` to these topics or patterns, ordered where the transport can.
pub(crate) fn spec(env: &Env, name: &str, topics: &[&str]) -> SubscriptionSpec {
    SubscriptionSpec {
        name: subscription(name),
        topics: topics.iter().map(|t| TopicPattern::new(*t).expect("a valid pattern")).collect(),
        ordering: if env.can().key_ordering { Ordering::Key } else { Ordering::None },
        start: Start::New,
        max_in_flight: 100,
        max_hold: Duration::from_secs(60),
    }
}

/// As [`spec`], without order.
pub(crate) fn unordered(env: &Env, name: &str, topics: &[&str]) -> SubscriptionSpec {
    SubscriptionSpec { ordering: Ordering::None, ..spec(env, name, topics) }
}

pub(crate) fn replay_of(topics: &[&str], from: ReplayFrom) -> ReplaySpec {
    let topics = topics.iter().map(|t| TopicPattern::new(*t).expect("a valid pattern")).collect();
    ReplaySpec { topics, from, follow: false, max_in_flight: 100 }
}

/// Creates a topic with properties, such as `|topic| topic.slots = 4`.
pub(crate) async fn provision(transport: &Arc<dyn Transport>, name: &str, set: impl FnOnce(&mut TopicSpec)) {
    let mut spec = TopicSpec::new(topic(name));
    set(&mut spec);
    let topology = Topology { topics: vec![spec], subscriptions: Vec::new() };
    within("provisioning", transport.provision(&topology)).await.expect("the topic is provisioned");
}

/// Creates topics of which nothing else is asked.
pub(crate) async fn topics(transport: &Arc<dyn Transport>, names: &[&str]) {
    for name in names {
        // Retained, for those that must be told to keep what may be replayed.
        let retained = transport.capabilities().replay;
        provision(transport, name, |topic| topic.retained = retained).await;
    }
}

/// Submits messages to one destination each and waits for the answers: what failed, by index.
pub(crate) async fn submit(
    transport: &Arc<dyn Transport>,
    posts: &[(Destination, Message, Option<Duration>, bool)],
) -> Vec<(usize, PublishFailure)> {
    within("the answers", submit_and_wait(&*transport.publisher(), posts)).await
}

/// Publishes texts to a topic, in order, and has them confirmed.
pub(crate) async fn publish(transport: &Arc<dyn Transport>, topic_name: &str, key: &str, texts: &[&str]) {
    let post = |text: &&str| {
        let message = saying(topic_name, key, text);
        (Destination::Topic(message.topic.clone()), message, None, false)
    };
    for part in texts.iter().map(post).collect::<Vec<_>>().chunks(64) {
        let failures = submit(transport, part).await;
        assert!(failures.is_empty(), "{failures:?}");
    }
}

/// Sends to a subscription's address, as a retry that steps aside does.
pub(crate) async fn send_to(transport: &Arc<dyn Transport>, name: &str, message: Message, delay: Option<Duration>) {
    let failures = submit(transport, &[(Destination::Subscription(subscription(name)), message, delay, true)]).await;
    assert!(failures.is_empty(), "{failures:?}");
}

/// Drives one subscription.
pub(crate) struct Reader {
    subscription: Box<dyn Subscription>,
    polled: Polled,
}

/// Opens a subscription.
pub(crate) async fn open(transport: &Arc<dyn Transport>, spec: SubscriptionSpec) -> Reader {
    let subscription = within("subscribing", transport.subscribe(spec)).await.expect("it is subscribed");
    Reader { subscription, polled: Polled::default() }
}

/// Opens a replay.
pub(crate) async fn replay(transport: &Arc<dyn Transport>, spec: ReplaySpec) -> Reader {
    let subscription = within("the replay begins", transport.replay(spec)).await.expect("a replay");
    Reader { subscription, polled: Polled::default() }
}

impl Reader {
    /// One poll; whether it added anything.
    async fn poll(&mut self, max: usize) -> tidings_core::Result<bool> {
        let before = (self.polled.deliveries.len(), self.polled.notices.len());
        poll_fn(|cx| self.subscription.poll_batch(cx, max, &mut self.polled)).await?;
        Ok(before != (self.polled.deliveries.len(), self.polled.notices.len()))
    }

    /// The next delivery; `None` if it has ended.
    pub(crate) async fn next_or_end(&mut self) -> Option<Delivery> {
        while self.polled.deliveries.is_empty() {
            let more = within("a delivery or the end", self.poll(8)).await.expect("the subscription goes on");
            if !more {
                return None;
            }
        }
        Some(self.polled.deliveries.remove(0))
    }

    /// The next delivery.
    pub(crate) async fn next(&mut self) -> Delivery {
        within("the next delivery", self.next_or_end()).await.expect("the subscription has not ended")
    }

    /// The next `count` deliveries.
    pub(crate) async fn take(&mut self, count: usize) -> Vec<Delivery> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            taken.push(self.next().await);
        }
        taken
    }

    /// The next, which says `text`.
    pub(crate) async fn expect(&mut self, text: &str) -> Delivery {
        let delivery = self.next().await;
        assert_eq!(said(&delivery), text);
        delivery
    }

    /// What comes within `time`; for what must *not* come, which nothing else can show.
    pub(crate) async fn next_within(&mut self, time: Duration) -> Option<Delivery> {
        timeout(time, self.next_or_end()).await.ok().flatten()
    }

    /// That all texts come, in any order, each acked; how often something came that had come before, and whether it was
    /// marked.
    pub(crate) async fn ack_all(&mut self, texts: &[&str]) {
        let mut missing: Vec<_> = texts.iter().map(|text| (*text).to_owned()).collect();
        while !missing.is_empty() {
            let delivery = self.next().await;
            let text = said(&delivery).to_owned();
            assert!(delivery.redelivered || missing.contains(&text), "`{text}` is an unmarked duplicate or a stranger");
            missing.retain(|other| *other != text);
            delivery.acker.ack();
        }
    }

    /// The notices of the polls so far.
    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.polled.notices)
    }

    /// Waits for a notice; deliveries that come before it are kept.
    pub(crate) async fn notice<T>(&mut self, what: &str, mut wanted: impl FnMut(&Notice) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.take_notices().iter().find_map(&mut wanted) {
                return found;
            }
            let more = tokio::time::timeout_at(deadline, self.poll(8)).await;
            let more = more.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
            assert!(more.expect("the subscription goes on"), "it has ended before: {what}");
        }
    }

    pub(crate) fn stop(&mut self) {
        self.subscription.stop();
    }

    /// That it ends, and hands nothing out before.
    pub(crate) async fn end(&mut self) {
        let next = self.next_or_end().await;
        assert!(next.is_none(), "{next:?} came, where it should have ended");
    }

    pub(crate) async fn close(self) -> Flushed {
        let Self { subscription, polled } = self;
        // What was polled and not looked at is given back in order.
        for delivery in polled.deliveries {
            delivery.acker.release(Duration::ZERO);
        }
        within("closing", subscription.close(Instant::now() + Duration::from_secs(30))).await
    }

    /// Why it has ended for good; `None` if it only stopped.
    pub(crate) async fn failure(&mut self) -> Option<tidings_core::Error> {
        within("it ends", async {
            loop {
                match self.poll(1).await {
                    Err(error) => return Some(error),
                    Ok(false) => return None,
                    Ok(true) => {}
                }
            }
        })
        .await
    }
}

impl Reader {
    /// Ends this instance as a crash does: what it holds is neither settled nor given back.
    pub(crate) fn crash(self, held: Vec<Delivery>) {
        drop(self);
        // Too late to settle anything.
        drop(held);
    }

    /// What one poll adds that asks for `max`.
    pub(crate) async fn poll_for(&mut self, max: usize) -> Vec<Delivery> {
        while self.polled.deliveries.is_empty() {
            assert!(within("a delivery", self.poll(max)).await.expect("the subscription goes on"), "it has ended");
        }
        std::mem::take(&mut self.polled.deliveries)
    }

    /// The next `count` texts, sorted, each acked.
    pub(crate) async fn texts(&mut self, count: usize) -> Vec<String> {
        let mut texts = Vec::with_capacity(count);
        while texts.len() < count {
            let delivery = self.next().await;
            texts.push(said(&delivery).to_owned());
            delivery.acker.ack();
        }
        texts.sort_unstable();
        texts
    }
}

/// A message that has everything that a message can have.
pub(crate) fn full(topic_name: &str) -> Message {
    let mut message = saying(topic_name, "ada", "all of it");
    message.id = "order-4711".into();
    message.source = "/shops/1?of=2".into();
    message.event_type = "com.example.someone.elses".into();
    message.version = 7;
    message.time = Some(SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456));
    message.recorded_time = Some(SystemTime::UNIX_EPOCH + Duration::from_micros(1_764_000_000_000_001));
    message.content_type = "text/plain; charset=utf-8".into();
    message.correlation_id = Some("flow-1".into());
    message.causation_id = Some("01890a5d-ac96-774b-bcce-b302099a8057".into());
    let attributes = [("subject", "orders/4711"), ("dataschema", "https://example.com/v7"), ("tenantid", "acme")];
    message.attributes = attributes.map(|(name, value)| (name.into(), value.into())).to_vec();
    message.headers.append("X-Tenant", "acme").expect("a valid header");
    message.headers.append("x-bytes", &b"\0\xff\r\n"[..]).expect("a valid header");
    message.headers.append_unchecked("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    message
}

/// That a message came as it was sent; only headers and attributes of different names may have changed places.
pub(crate) fn assert_same(came: &Message, sent: &Message) {
    let sizes = (came.payload.len(), sent.payload.len());
    assert!(came.payload == sent.payload, "the payload of {} bytes is not that of {}", sizes.0, sizes.1);
    let comparable = |message: &Message| {
        let mut message = message.clone();
        message.payload = bytes::Bytes::new();
        message.attributes.sort();
        let mut headers: Vec<_> = message.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        headers.sort_by_key(|(name, _)| name.to_ascii_lowercase());
        message.headers = Headers::new();
        headers.into_iter().for_each(|(name, value)| message.headers.append_unchecked(name, value));
        message
    };
    assert_eq!(comparable(came), comparable(sent));
}

/// Publishes messages to their topics, in order, and has them confirmed.
pub(crate) async fn publish_messages(transport: &Arc<dyn Transport>, messages: &[Message]) {
    let post = |message: &Message| (Destination::Topic(message.topic.clone()), message.clone(), None, false);
    for part in messages.chunks(64) {
        let failures = submit(transport, &part.iter().map(post).collect::<Vec<_>>()).await;
        assert!(failures.is_empty(), "{failures:?}");
    }
}
