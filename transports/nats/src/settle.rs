//! Settles deliveries: acks and give-backs are sent in batches, of which the last is confirmed by the server.
//!
//! The server handles what one connection sends about one consumer in order, so the answer to the last of a batch speaks for
//! all of it, unless the connection was made anew in between.

use crate::connection::connects;
use crate::state::SourceId;
use crate::subscription::Instance;
use async_nats::{StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tidings_core::transport::{Lease, Settle, Settlement, Tag};
use tokio::sync::Notify;
use tokio::time::{Instant, interval};

/// The most settlements of which one is confirmed.
const BATCH: usize = 256;
/// After how long without an answer settlements are sent again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Something to tell the server about a message.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub(crate) source: SourceId,
    reply: Subject,
    body: Bytes,
    /// The delivery that it settles.
    pub(crate) tag: Option<u64>,
    /// When it was asked for, if it only extends.
    pub(crate) tick: Option<Instant>,
}

impl Op {
    pub(crate) fn settle(source: SourceId, reply: Subject, body: &'static [u8], tag: u64) -> Self {
        Self { source, reply, body: Bytes::from_static(body), tag: Some(tag), tick: None }
    }

    /// For what is no delivery any more.
    pub(crate) fn ack(source: SourceId, reply: Subject) -> Self {
        Self { source, reply, body: Bytes::from_static(b"+ACK"), tag: None, tick: None }
    }

    pub(crate) fn nak(source: SourceId, reply: Subject, delay: Duration) -> Self {
        let body = match delay {
            Duration::ZERO => Bytes::from_static(b"-NAK"),
            // In nanoseconds, which a signed number must hold.
            delay => format!("-NAK {{\"delay\":{}}}", delay.as_nanos().min(i64::MAX as u128 / 2)).into(),
        };
        Self { source, reply, body, tag: None, tick: None }
    }

    pub(crate) fn progress(source: SourceId, reply: Subject, tick: Instant) -> Self {
        Self { source, reply, body: Bytes::from_static(b"+WPI"), tag: None, tick: Some(tick) }
    }

    /// Whether it must be told again if it was not confirmed.
    fn is_owed(&self) -> bool {
        self.tag.is_some() || self.body.starts_with(b"-NAK")
    }

    pub(crate) fn with_tag(mut self, tag: u64) -> Self {
        self.tag = Some(tag);
        self
    }
}

/// What is to be told. Each delivery has one place in it, and what is held is extended rarely.
#[derive(Default)]
pub(crate) struct Writer {
    queue: Mutex<VecDeque<Op>>,
    queued: Notify,
    /// How many were taken from the queue and are not confirmed.
    sent: Mutex<usize>,
    idle: Notify,
}

impl Writer {
    pub(crate) fn push(&self, op: Op) {
        self.queue.lock().push_back(op);
        self.queued.notify_one();
    }

    fn take(&self) -> Vec<Op> {
        let mut queue = self.queue.lock();
        let count = queue.len().min(BATCH);
        let ops: Vec<_> = queue.drain(..count).collect();
        *self.sent.lock() += ops.len();
        ops
    }

    fn done(&self, count: usize) {
        let mut sent = self.sent.lock();
        *sent -= count;
        if *sent == 0 {
            self.idle.notify_waiters();
        }
    }

    fn is_idle(&self) -> bool {
        let queue = self.queue.lock();
        queue.is_empty() && *self.sent.lock() == 0
    }

    /// Waits until the server has confirmed all.
    pub(crate) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.is_idle() {
                return;
            }
            idle.await;
        }
    }
}

/// Sent and not confirmed.
struct Sent {
    ops: Vec<Op>,
    at: Instant,
    connects: u64,
}

/// Tells the server, until the instance is gone.
pub(crate) async fn write(instance: Arc<Instance>, inbox: String, mut answers: Subscriber) {
    let mut sent: BTreeMap<u64, Sent> = BTreeMap::new();
    let mut next = 0_u64;
    let mut again = interval(PATIENCE / 4);
    let mut connected = instance.link.connected.subscribe();
    loop {
        let writer = &instance.writer;
        let queued = writer.queued.notified();
        if *connected.borrow_and_update() {
            let ops = writer.take();
            if !ops.is_empty() {
                send(&instance, ops, &inbox, &mut next, &mut sent).await;
                // Answers may be waiting too.
                tokio::task::yield_now().await;
            }
        }
        let more = !writer.queue.lock().is_empty() && *connected.borrow();
        tokio::select! {
            biased;
            answer = answers.next() => match answer {
                Some(answer) if answer.status == Some(StatusCode::NO_RESPONDERS) => unheard(&instance, &answer.subject, &mut sent),
                Some(answer) => confirm(&instance, &answer.subject, &mut sent),
                None => return,
            },
            () = std::future::ready(()), if more => {}
            () = queued => {}
            _ = again.tick() => send_again(&instance, &mut sent),
            changed = connected.changed() => if changed.is_err() { return },
        }
    }
}

/// Sends all; the last of each consumer asks for an answer.
async fn send(instance: &Instance, ops: Vec<Op>, inbox: &str, next: &mut u64, sent: &mut BTreeMap<u64, Sent>) {
    let mut by_source: BTreeMap<SourceId, Vec<Op>> = BTreeMap::new();
    ops.into_iter().for_each(|op| by_source.entry(op.source).or_default().push(op));
    let client = &instance.catalog.api.client;
    for ops in by_source.into_values() {
        *next += 1;
        let (at, connects) = (Instant::now(), connects(client));
        let Some((last, others)) = ops.split_last() else { continue };
        let mut failed = false;
        for op in others {
            failed |= client.publish(op.reply.clone(), op.body.clone()).await.is_err();
        }
        let answer = Subject::from(format!("{inbox}.{next}"));
        failed |= client.publish_with_reply(last.reply.clone(), answer, last.body.clone()).await.is_err();
        if failed {
            // The connection is closed for good.
            instance.writer.done(ops.len());
        } else {
            sent.insert(*next, Sent { ops, at, connects });
        }
    }
}

/// Which batch an answer is about.
fn number(subject: &str) -> Option<u64> {
    subject.rsplit('.').next().and_then(|number| number.parse().ok())
}

/// The consumer is gone, or has no leader now. Settlements stay, and are sent again until their leases end; what is given back
/// comes again without that, from a consumer that is built again.
fn unheard(instance: &Instance, subject: &str, sent: &mut BTreeMap<u64, Sent>) {
    let Some((number, batch)) = number(subject).and_then(|number| Some((number, sent.get_mut(&number)?))) else {
        return;
    };
    let count = batch.ops.len();
    batch.ops.retain(|op| op.tag.is_some());
    let left = batch.ops.len();
    if left == 0 {
        sent.remove(&number);
    }
    instance.writer.done(count - left);
}

fn confirm(instance: &Instance, subject: &str, sent: &mut BTreeMap<u64, Sent>) {
    let Some(batch) = number(subject).and_then(|number| sent.remove(&number)) else { return };
    let count = batch.ops.len();
    if batch.connects == connects(&instance.catalog.api.client) {
        let mut state = instance.state.lock();
        batch.ops.iter().for_each(|op| state.applied(op));
        drop(state);
        instance.changed();
    } else {
        requeue(instance, batch.ops);
    }
    instance.writer.done(count);
}

/// Sends again what was not confirmed, if it is still to be settled.
fn send_again(instance: &Instance, sent: &mut BTreeMap<u64, Sent>) {
    let current = connects(&instance.catalog.api.client);
    let late = |batch: &Sent| batch.at.elapsed() >= PATIENCE || batch.connects != current;
    let over: Vec<u64> = sent.iter().filter(|(_, batch)| late(batch)).map(|(number, _)| *number).collect();
    for batch in over.into_iter().filter_map(|number| sent.remove(&number)) {
        let count = batch.ops.len();
        requeue(instance, batch.ops);
        instance.writer.done(count);
    }
}

fn requeue(instance: &Instance, ops: Vec<Op>) {
    let mut state = instance.state.lock();
    let open: Vec<_> = ops.into_iter().filter(|op| op.is_owed() && state.unheard(op)).collect();
    drop(state);
    instance.changed();
    open.into_iter().for_each(|op| instance.writer.push(op));
}

/// Settles what one instance was handed. It outlives the instance.
pub(crate) struct NatsSettle(pub(crate) Weak<Instance>);

impl Settle for NatsSettle {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        if let Some(instance) = self.0.upgrade() {
            instance.state.lock().settle(tag, settlement, &instance.writer);
            if settlement != Settlement::Ack || instance.is_replay() {
                instance.changed();
            }
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        self.0.upgrade().map_or(Lease::Lost, |instance| instance.state.lock().lease(tag))
    }
}
