//! How a delivery ends: acked after what its handler returned is confirmed, held, sent aside, or dead-lettered.

use super::Subscribed;
use super::lanes::Job;
use super::outage::Told;
use crate::dead_letter::Burial;
use crate::error::{clean_line, one_line};
use crate::handler::{Ended, Outputs, Verdict};
use crate::publish::{Post, repeat_of};
use crate::transport::{Destination, Lease};
use crate::{
    Backoff, BusEvent, DeadLetterReason, Error, ErrorKind, HandlerError, Key, Message, MessageId, Result, RetryMode,
    RetryPolicy, Topic, header,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::time::Instant;

/// Between tries to publish what settles a delivery.
const STALLED: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// Why a run failed.
#[derive(Debug)]
pub(crate) struct Failure {
    verdict: Verdict,
    /// Why it is dead-lettered, if its verdict is to reject.
    reason: DeadLetterReason,
    error: String,
    /// It was the handler that failed, so that it counts as an attempt.
    ran: bool,
}

impl Failure {
    fn transient(error: String) -> Self {
        Self { verdict: Verdict::Transient, reason: DeadLetterReason::Exhausted, error, ran: true }
    }

    fn rejected(error: String) -> Self {
        Self { verdict: Verdict::Reject, reason: DeadLetterReason::Rejected, error, ran: true }
    }

    pub(super) fn unrouted(event_type: &str) -> Self {
        let error = clean_line(&format!("no handler takes `{event_type}`"), 1024);
        Self { reason: DeadLetterReason::Unrouted, ran: false, ..Self::rejected(error) }
    }

    pub(super) fn suspect(crashes: u32) -> Self {
        let error = format!("its instance ended {crashes} times while it handled this alone");
        Self { reason: DeadLetterReason::Suspect, ran: false, ..Self::rejected(error) }
    }

    pub(super) fn panicked(text: &str) -> Self {
        Self::transient(clean_line(&format!("handler panicked: {text}"), 1024))
    }

    pub(super) fn timed_out(limit: Duration) -> Self {
        Self::transient(format!("handler took longer than {limit:?}"))
    }

    pub(super) fn handler(error: &HandlerError, policy: &RetryPolicy) -> Self {
        let line = one_line(&*error.source);
        if error.is_reject() || policy.is_final(&*error.source) {
            return Self::rejected(line);
        }
        Self { verdict: error.verdict, ..Self::transient(line) }
    }

    /// The arguments could not be made: the payload is at fault, or something that may pass.
    pub(super) fn not_started(error: &Error, newer_version: bool) -> Self {
        let reason = match error.kind() {
            ErrorKind::TooLarge => DeadLetterReason::TooLarge,
            ErrorKind::Codec | ErrorKind::Unsupported if newer_version => DeadLetterReason::NewerVersion,
            ErrorKind::Codec | ErrorKind::Unsupported => DeadLetterReason::Undecodable,
            _ => return Self::transient(one_line(error)),
        };
        Self { verdict: Verdict::Reject, reason, error: one_line(error), ran: false }
    }
}

/// What became of what a handler returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Published {
    /// It was confirmed.
    All,
    /// It was left to another instance, which has the lease.
    Nothing,
}

/// What happens after a failed run.
#[derive(Debug, PartialEq)]
enum Next {
    Hold(Duration),
    Aside(Duration),
    Bury(DeadLetterReason),
}

/// Decides by the policy; `crowded` says that the key's lane has filled its share.
fn next_step(failure: &Failure, job: &Job, policy: &RetryPolicy, mode: RetryMode, crowded: bool) -> Next {
    if failure.verdict == Verdict::Reject {
        return Next::Bury(failure.reason);
    }
    if job.failures.attempts >= policy.attempts {
        return Next::Bury(DeadLetterReason::Exhausted);
    }
    let delay = match failure.verdict {
        Verdict::RetryAfter(delay) => delay,
        _ => policy.backoff.delay(job.failures.attempts),
    };
    let left = policy.hold_at_most.saturating_sub(job.held);
    match mode {
        RetryMode::Aside => Next::Aside(delay),
        // The remaining attempts follow at once: others are not held up, and no attempt is lost.
        RetryMode::InOrder if crowded => Next::Hold(Duration::ZERO),
        RetryMode::InOrder if left.is_zero() => Next::Bury(DeadLetterReason::Exhausted),
        RetryMode::InOrder => Next::Hold(delay.min(left)),
    }
}

/// What comes of the runs of one worker, one after another.
pub(super) struct Conclusion {
    subscribed: Arc<Subscribed>,
    /// What the handler returned.
    pub(super) outputs: Outputs,
    /// What that is sent as, kept for its room.
    posts: Vec<Post>,
}

impl Conclusion {
    pub(super) fn new(subscribed: Arc<Subscribed>) -> Self {
        let outputs = Outputs::new(subscribed.source.clone(), subscribed.scope.bus.content_type().clone());
        Self { subscribed, outputs, posts: Vec::new() }
    }

    /// Ends a run of one job, or of a batch.
    pub(super) async fn conclude_run(&mut self, first: Job, more: Vec<Job>, result: Result<(), Failure>) {
        if more.is_empty() {
            let result = result.and_then(|()| self.of_one());
            let _settled = self.conclude(first, result).await;
        } else {
            self.conclude_batch(first, more, result).await;
        }
    }

    /// Ends a run of one job, and says whether that settled it: if not, it runs again, here or where its lease is.
    async fn conclude(&mut self, job: Job, result: Result<(), Failure>) -> bool {
        let published = match result {
            Ok(()) => self.publish_outputs(&job, &[]).await,
            Err(failure) => Err(failure),
        };
        match published {
            Ok(published) => {
                self.subscribed.settle(job, published);
                published == Published::All
            }
            Err(failure) => self.fail(job, failure).await,
        }
    }

    /// Publishes what the handler returned, all of it checked before the first is sent. `others` were handled together
    /// with `job`, and take part in the ids.
    async fn publish_outputs(&mut self, job: &Job, others: &[Job]) -> Result<Published, Failure> {
        let subscribed = &self.subscribed;
        let lost = |job: &Job| job.delivery.acker.lease() == Lease::Lost && !subscribed.has_successor(job.id);
        if self.outputs.messages.is_empty() {
            return Ok(Published::All);
        }
        // Where the lease of all is lost, another instance handles them and publishes the same ids.
        if std::iter::once(job).chain(others).all(lost) {
            return Ok(Published::Nothing);
        }
        let bus = &subscribed.scope.bus;
        let now = bus.clock().now();
        link(&mut self.outputs.messages, &job.delivery.message, others, subscribed.name.as_str());
        self.posts.clear();
        let repeated = std::iter::once(job).chain(others).any(|job| job.possible_duplicate);
        let mut checked = Ok(());
        for mut message in self.outputs.messages.drain(..) {
            if repeated {
                mark_as_repeat(&mut message);
            }
            checked = checked.and_then(|()| bus.post(message, None, now).map(|post| self.posts.push(post)));
        }
        let sent = match checked {
            Err(error) => Err(error),
            Ok(()) => self.owe(&self.posts, false).await,
        };
        let refused = |error| format!("what the handler returned was refused: {}", one_line(&error));
        let count = sent.map_err(|error| Failure::rejected(clean_line(&refused(error), 1024)))?;
        self.subscribed.counters.published.fetch_add(count, Relaxed);
        Ok(Published::All)
    }

    async fn fail(&mut self, mut job: Job, failure: Failure) -> bool {
        let subscribed = &self.subscribed;
        subscribed.counters.failed.fetch_add(1, Relaxed);
        if failure.verdict != Verdict::Reject && self.is_outage(&job, &failure) {
            // Not counted: it is what the handler depends on that failed.
            self.hold_for_now(job);
            return false;
        }
        if failure.ran {
            job.failures.count(subscribed.scope.bus.clock().now());
        }
        let crowded = subscribed.lanes.lock().is_crowded(job.id);
        match next_step(&failure, &job, &subscribed.config.retry, subscribed.retry_mode, crowded) {
            Next::Hold(delay) => {
                self.hold(job, delay, failure);
                return false;
            }
            Next::Aside(delay) => self.step_aside(job, delay, failure).await,
            Next::Bury(reason) => self.dead_letter(job, reason, failure).await,
        }
        true
    }

    /// Notes a failure that may pass, and says whether it is part of an outage.
    fn is_outage(&self, job: &Job, failure: &Failure) -> bool {
        let subscribed = &self.subscribed;
        let (event, again) = (&job.delivery.message.id, job.failures.attempts > 0);
        let told = subscribed.lanes.lock().outage.failed(event, again, Instant::now());
        if told == Told::Began {
            let (subscription, error) = (subscribed.name.clone(), failure.error.as_str().into());
            subscribed.scope.bus.tell().tell(BusEvent::OutageBegan { subscription, error });
        }
        matches!(told, Told::Began | Told::GoesOn)
    }

    /// Puts the job back, to be run again when it is its turn to probe.
    fn hold_for_now(&self, job: Job) {
        self.subscribed.with_lanes(|lanes| lanes.hold(job, Instant::now()));
        self.subscribed.pump.notify_one();
    }

    fn hold(&self, mut job: Job, delay: Duration, failure: Failure) {
        self.tell_retry(&job, delay, failure);
        job.held += delay;
        let until = Instant::now() + delay;
        self.subscribed.with_lanes(|lanes| lanes.hold(job, until));
        self.subscribed.pump.notify_one();
    }

    /// Sends a copy to the subscription's address; the original is acked when that is confirmed.
    async fn step_aside(&self, job: Job, delay: Duration, failure: Failure) {
        let mut message = Message::clone(&job.delivery.message);
        job.failures.write(&mut message);
        if job.possible_duplicate {
            mark_as_repeat(&mut message);
        }
        let destination = Destination::Subscription(self.subscribed.name.clone());
        match self.owe(&[Post { destination, message: message.into(), delay: Some(delay) }], false).await {
            Ok(_) => {
                self.tell_retry(&job, delay, failure);
                self.subscribed.ack_replaced(job, false);
            }
            Err(error) => {
                let error = format!("{}; and it could not step aside: {}", failure.error, one_line(&error));
                let failure = Failure::transient(clean_line(&error, 1024));
                self.dead_letter(job, DeadLetterReason::Exhausted, failure).await;
            }
        }
    }

    /// Publishes the dead letter, for as long as that takes; the original stays until it is confirmed.
    async fn dead_letter(&self, job: Job, reason: DeadLetterReason, failure: Failure) {
        let subscribed = &self.subscribed;
        let mut message = Message::clone(&job.delivery.message);
        let now = subscribed.scope.bus.clock().now();
        let (subscription, error, failures) = (&subscribed.name, failure.error.as_str(), &job.failures);
        Burial { subscription, reason, error, failures, now }.write(&mut message);
        if job.delivery.replayed {
            message.headers.set(header::REPLAYED, "true");
        }
        let destination = Destination::DeadLetter(subscribed.name.clone());
        let post = Post { destination, message: message.into(), delay: None };
        if self.owe(&[post], true).await.is_ok() {
            subscribed.counters.dead_lettered.fetch_add(1, Relaxed);
            let (subscription, id) = (subscribed.name.clone(), job.delivery.message.id.clone());
            let error = failure.error.as_str().into();
            subscribed.scope.bus.tell().tell(BusEvent::DeadLettered { subscription, id, reason, error });
            // What was rejected by its handler shows that what the handler depends on is there.
            subscribed.ack_replaced(job, failure.verdict == Verdict::Reject);
        }
    }

    /// Publishes what settles a delivery again and again until all of it is confirmed, and says how many that were.
    /// A refusal that is final ends it, unless it is `stubborn`.
    async fn owe(&self, posts: &[Post], stubborn: bool) -> Result<u64> {
        let bus = &self.subscribed.scope.bus;
        let mut failures = bus.send(posts, bus.terms(true)).await;
        let mut rest: Vec<Post> = Vec::new();
        for round in 1.. {
            let Some((_, first)) = failures.first() else { break };
            let error = one_line(&first.error).into();
            bus.tell().tell(BusEvent::PublishStalled { subscription: self.subscribed.name.clone(), error });
            let open = if rest.is_empty() { posts } else { &rest };
            let mut again = Vec::with_capacity(failures.len());
            for (index, failure) in failures {
                if !failure.error.is_transient() && !stubborn {
                    return Err(failure.error);
                }
                again.push(repeat_of(&open[index], &failure, round));
            }
            rest = again;
            tokio::time::sleep(STALLED.delay(round)).await;
            failures = bus.send(&rest, bus.terms(true)).await;
        }
        Ok(posts.len() as u64)
    }

    fn tell_retry(&self, job: &Job, delay: Duration, failure: Failure) {
        self.subscribed.counters.retried.fetch_add(1, Relaxed);
        let (subscription, id) = (self.subscribed.name.clone(), job.delivery.message.id.clone());
        let (attempts, error) = (job.failures.attempts, failure.error.into());
        self.subscribed.scope.bus.tell().tell(BusEvent::Retry { subscription, id, attempts, delay, error });
    }

    /// The result of the only event of a batch, if its handler returned one for each.
    fn of_one(&mut self) -> Result<(), Failure> {
        let Some(mut each) = self.outputs.each.take() else { return Ok(()) };
        match (each.pop(), each.len()) {
            (Some((_, result)), 0) => result.map_err(|error| Failure::handler(&error, &self.subscribed.config.retry)),
            (last, before) => {
                let count = before + usize::from(last.is_some());
                let error = format!("the handler returned {count} results for one event").into();
                Err(Failure::handler(&error, &self.subscribed.config.retry))
            }
        }
    }

    /// A batch ends as one, unless it has a result for each event; if it failed, its jobs run again one by one, and that
    /// run counts for none of them.
    async fn conclude_batch(&mut self, first: Job, more: Vec<Job>, result: Result<(), Failure>) {
        let each = self.outputs.each.take();
        let jobs: Vec<_> = std::iter::once(first).chain(more).collect();
        let published = match (result, each, jobs.split_first()) {
            (Ok(()), Some(each), _) if each.len() == jobs.len() => return self.conclude_each(jobs, each).await,
            (Ok(()), None, Some((first, more))) => self.publish_outputs(first, more).await.ok(),
            _ => None,
        };
        if let Some(published) = published {
            return jobs.into_iter().for_each(|job| self.subscribed.settle(job, published));
        }
        self.subscribed.counters.failed.fetch_add(1, Relaxed);
        self.put_back(jobs, true);
    }

    /// Each job ends by its own result; those behind one that is to run again, in its lane, run again after it.
    async fn conclude_each(&mut self, jobs: Vec<Job>, each: Vec<Ended>) {
        let mut outputs = std::mem::take(&mut self.outputs.messages).into_iter();
        let (mut behind, mut start) = (Vec::new(), 0);
        let mut waiting: Vec<(Topic, Key)> = Vec::new();
        for (job, (end, result)) in jobs.into_iter().zip(each) {
            // What the one before has left unpublished, for want of its lease, is not this one's.
            self.outputs.messages.clear();
            self.outputs.messages.extend(outputs.by_ref().take(end - start));
            start = end;
            let Message { topic, key, .. } = &*job.delivery.message;
            let lane = key.as_ref().filter(|_| self.subscribed.keeps_order).map(|key| (topic.clone(), key.clone()));
            if lane.as_ref().is_some_and(|lane| waiting.contains(lane)) {
                behind.push(job);
                continue;
            }
            let result = result.map_err(|error| Failure::handler(&error, &self.subscribed.config.retry));
            let settled = self.conclude(job, result).await;
            waiting.extend(lane.filter(|_| !settled));
        }
        self.put_back(behind, false);
    }

    /// Puts jobs back into their lanes, to be run again; `alone` if a batch with them has failed.
    fn put_back(&self, jobs: Vec<Job>, alone: bool) {
        let now = Instant::now();
        self.subscribed.with_lanes(|lanes| {
            for mut job in jobs {
                job.alone |= alone;
                lanes.hold(job, now);
            }
        });
        self.subscribed.pump.notify_one();
    }
}

/// A message like this one may be there already: what leads to it was perhaps handled before.
fn mark_as_repeat(message: &mut Message) {
    if message.headers.get(header::REPEAT).is_none() {
        message.headers.set(header::REPEAT, "1");
    }
}

/// Links what was returned to its cause: trace, correlation, causation, and ids that a repeated run repeats.
fn link(outputs: &mut [Message], cause: &Message, others: &[Job], subscription: &str) {
    let mut equals: HashMap<MessageId, u64> = HashMap::new();
    let several = outputs.len() > 1;
    for message in outputs {
        message.correlation_id = Some(cause.correlation_id.as_ref().unwrap_or(&cause.id).clone());
        message.causation_id = Some(cause.id.clone());
        for name in ["traceparent", "tracestate"] {
            if let Some(value) = cause.headers.get(name) {
                message.headers.set(name, value.clone());
            }
        }
        message.id = output_id(message, cause, others, subscription, 0);
        if several {
            let ordinal = equals.entry(message.id.clone()).or_insert(0);
            if *ordinal > 0 {
                message.id = output_id(message, cause, others, subscription, *ordinal);
            }
            *ordinal += 1;
        }
    }
}

/// A hash of subscription, cause, type, key, payload and ordinal among equals.
fn output_id(message: &Message, cause: &Message, others: &[Job], subscription: &str, ordinal: u64) -> MessageId {
    let key = message.key.as_ref().map_or(&[][..], |key| key.as_bytes());
    let ordinal = ordinal.to_be_bytes();
    cause.id.with_str(|cause_id| {
        let others: Vec<_> = others.iter().map(|job| job.delivery.message.id.to_string()).collect();
        let parts = [subscription, &cause.source, cause_id, &message.event_type].map(str::as_bytes);
        let parts = parts.into_iter().chain([key, &message.payload[..], &ordinal[..]]);
        MessageId::derived(parts.chain(others.iter().map(String::as_bytes)))
    })
}
