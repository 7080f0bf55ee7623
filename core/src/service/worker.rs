//! Runs handlers and concludes their deliveries.

use super::Subscribed;
use super::conclude::Failure;
use super::lanes::Job;
use crate::handler::{Context, Ended, IntoOutcome, Next, Outcome, Outputs, Request};
use crate::publish::Post;
use crate::time::before;
use crate::transport::Lease;
use crate::{Error, ErrorKind, Key, Message, Result, Topic};
use futures_util::FutureExt;
use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// One task that runs the handler of one route, one run after another.
pub(crate) struct Worker {
    pub(super) subscribed: Arc<Subscribed>,
    route: usize,
    /// The most jobs of one run.
    batch: usize,
    pub(super) outputs: Outputs,
    /// What the outputs are sent as, kept for its room.
    pub(super) posts: Vec<Post>,
}

/// What one call of the handler works on: one job, or for a batch at least one.
pub(crate) struct Run {
    first: Job,
    more: Vec<Job>,
    turn: Turn,
}

/// One of as many runs as may go on at a time; dropped, it goes to who waits.
struct Turn(Arc<Subscribed>);

impl Drop for Turn {
    fn drop(&mut self) {
        let Self(subscribed) = self;
        // If there were fewer, nobody was refused a turn.
        if subscribed.runs.fetch_sub(1, Relaxed) == subscribed.config.concurrency {
            subscribed.with_lanes(|_| {});
        }
    }
}

impl Worker {
    pub(crate) fn new(subscribed: Arc<Subscribed>, route: usize) -> Self {
        let bus = &subscribed.scope.bus;
        let outputs = Outputs::new(subscribed.source.clone(), bus.content_type().clone());
        let batch = subscribed.batch_of(route);
        Self { subscribed, route, batch, outputs, posts: Vec::new() }
    }

    /// The next run; `None` when the service stops.
    pub(crate) async fn next(&mut self) -> Option<Run> {
        let subscribed = Arc::clone(&self.subscribed);
        loop {
            // Made before the check, so that no wake-up is lost.
            let notified = subscribed.ready[self.route].notified();
            self.linger().await;
            if let Some(run) = self.take() {
                return Some(run);
            }
            if self.subscribed.lanes.lock().is_stopped() {
                return None;
            }
            notified.await;
        }
    }

    /// Waits for a batch to fill up, if there is something for it.
    async fn linger(&self) {
        let (size, linger) = (self.batch, self.subscribed.config.linger);
        if size == 1 || linger.is_zero() || self.subscribed.lanes.lock().ready(self.route) == 0 {
            return;
        }
        let deadline = Instant::now() + linger;
        loop {
            let more = self.subscribed.ready[self.route].notified();
            if self.subscribed.lanes.lock().ready(self.route) >= size || timeout_at(deadline, more).await.is_err() {
                return;
            }
        }
    }

    /// Takes jobs whose lease is still live.
    fn take(&self) -> Option<Run> {
        loop {
            let (first, more, should_read) = self.subscribed.with_lanes(|lanes| {
                if !self.subscribed.may_run() {
                    return None;
                }
                let first = lanes.take(self.route)?;
                let mut more = Vec::new();
                lanes.take_more(self.route, &first, self.batch - 1, &mut more);
                self.subscribed.runs.fetch_add(1, Relaxed);
                // Others have nothing to do.
                let should_read = self.subscribed.may_run() && lanes.should_read();
                Some((first, more, should_read))
            })?;
            let turn = Turn(Arc::clone(&self.subscribed));
            if should_read {
                self.subscribed.pump.notify_one();
            }
            if more.is_empty() && first.delivery.acker.lease() == Lease::Live {
                return Some(Run { first, more, turn });
            }
            let (live, lost): (Vec<_>, Vec<_>) =
                std::iter::once(first).chain(more).partition(|job| job.delivery.acker.lease() == Lease::Live);
            lost.into_iter().for_each(|job| self.subscribed.leave(job));
            let mut live = live.into_iter();
            if let Some(first) = live.next() {
                return Some(Run { first, more: live.collect(), turn });
            }
        }
    }

    /// Runs the handler and concludes: acks after what it returned is confirmed, or retries, or dead-letters.
    ///
    /// `start` decodes, extracts and calls; it may fail or panic, as the handler's future may.
    pub(crate) async fn run<F>(&mut self, run: Run, start: impl FnOnce(&[&Message], &Context<'_>) -> Result<F>)
    where
        F: Future<Output: IntoOutcome> + Send + 'static,
    {
        self.outputs.messages.clear();
        self.outputs.each = None;
        if run.first.crashes() > self.subscribed.config.max_deliveries {
            let crashes = run.first.crashes() - 1;
            let _settled = self.conclude(run.first, Err(Failure::suspect(crashes))).await;
            return;
        }
        let result = match catch_unwind(AssertUnwindSafe(|| self.start(&run, start))) {
            Err(panic) => Err(Failure::panicked(&panic_text(&*panic))),
            Ok(Err(error)) => Err(self.not_started(&run, &error)),
            Ok(Ok(future)) => match self.subscribed.layers.clone() {
                None => self.finish(future).await,
                Some(layers) => self.finish(through(layers, self.request(&run, future))).await,
            },
        };
        let Run { first, more, turn: _turn } = run;
        if more.is_empty() {
            let result = result.and_then(|()| self.of_one());
            let _settled = self.conclude(first, result).await;
        } else {
            self.conclude_batch(first, more, result).await;
        }
    }

    fn start<F>(&self, run: &Run, start: impl FnOnce(&[&Message], &Context<'_>) -> Result<F>) -> Result<F> {
        let message = &run.first.delivery.message;
        let max = self.subscribed.scope.bus.max_payload();
        let cx = Context { subscribed: &self.subscribed, scope: &self.subscribed.scope, job: &run.first };
        if run.more.is_empty() {
            check_size(message, max)?;
            return start(&[message], &cx);
        }
        let messages: Vec<_> = std::iter::once(&run.first).chain(&run.more).map(|job| &*job.delivery.message).collect();
        messages.iter().try_for_each(|message| check_size(message, max))?;
        start(&messages, &cx)
    }

    /// The run as layers see it.
    fn request<F: Future<Output: IntoOutcome> + Send + 'static>(&self, run: &Run, future: F) -> Request {
        let mut outputs = self.outputs.fresh();
        let jobs = std::iter::once(&run.first).chain(&run.more);
        Request {
            subscription: self.subscribed.name.clone(),
            messages: jobs.map(|job| Arc::clone(&job.delivery.message)).collect(),
            attempt: run.first.failures.attempts + 1,
            run: Box::pin(async move { future.await.into_outcome(&mut outputs).map(|()| outputs) }),
        }
    }

    /// Awaits the handler, within its time, and takes in what it returned.
    async fn finish<F: Future<Output: IntoOutcome>>(&mut self, future: F) -> Result<(), Failure> {
        let limit = self.subscribed.config.timeout_or_forever();
        // The future is dropped inside, because that may panic too.
        let in_time = async { before(|| Instant::now() + limit, future).await };
        let returned = match AssertUnwindSafe(in_time).catch_unwind().await {
            Err(panic) => return Err(Failure::panicked(&panic_text(&*panic))),
            Ok(None) => return Err(Failure::timed_out(limit)),
            Ok(Some(returned)) => returned,
        };
        let outputs = &mut self.outputs;
        match catch_unwind(AssertUnwindSafe(|| returned.into_outcome(outputs))) {
            Err(panic) => Err(Failure::panicked(&panic_text(&*panic))),
            Ok(Err(error)) => Err(Failure::handler(&error, &self.subscribed.config.retry)),
            Ok(Ok(())) => Ok(()),
        }
    }

    fn not_started(&self, run: &Run, error: &Error) -> Failure {
        let newest = self.subscribed.routes[self.route].accepts().event.map_or(u32::MAX, |event| event.version);
        Failure::not_started(error, run.first.delivery.message.version > newest)
    }

    /// Dead-letters what no handler takes.
    pub(crate) async fn refuse(&mut self, run: Run) {
        let failure = Failure::unrouted(&run.first.delivery.message.event_type);
        let _settled = self.conclude(run.first, Err(failure)).await;
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

async fn through(mut layers: Next, request: Request) -> Outcome {
    tower_service::Service::call(&mut layers, request).await
}

fn check_size(message: &Message, max: usize) -> Result<()> {
    if message.payload.len() <= max {
        return Ok(());
    }
    let why = format!("payload of {} bytes, allowed are {max}; raise max_payload", message.payload.len());
    Err(Error::new(ErrorKind::TooLarge, why))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no text)").to_owned()
}

/// So that a handler without a time limit can be awaited like the others.
pub(super) const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600 * 30);
