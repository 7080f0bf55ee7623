//! Runs handlers and concludes their deliveries.

use super::Subscribed;
use super::conclude::Failure;
use super::lanes::Job;
use crate::handler::{Context, IntoOutcome, Outputs};
use crate::transport::Lease;
use crate::{Error, ErrorKind, Message, Result};
use futures_util::FutureExt;
use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::time::Instant;

/// One task that runs the handler of one route, one run after another.
pub(crate) struct Worker {
    pub(super) subscribed: Arc<Subscribed>,
    route: usize,
    pub(super) outputs: Outputs,
}

/// What one call of the handler works on: one job, or for a batch at least one.
pub(crate) struct Run {
    first: Job,
    more: Vec<Job>,
}

impl Worker {
    pub(crate) fn new(subscribed: Arc<Subscribed>, route: usize) -> Self {
        let bus = &subscribed.scope.bus;
        let outputs = Outputs::new(subscribed.source.clone(), bus.content_type().clone());
        Self { subscribed, route, outputs }
    }

    /// The next run; `None` when the service stops.
    pub(crate) async fn next(&mut self) -> Option<Run> {
        let ready = Arc::clone(&self.subscribed);
        loop {
            // Made before the check, so that no wake-up is lost.
            let notified = ready.ready[self.route].notified();
            if let Some(run) = self.take() {
                return Some(run);
            }
            if self.subscribed.lanes.lock().is_stopped() {
                return None;
            }
            notified.await;
        }
    }

    /// Takes jobs whose lease is still live.
    fn take(&self) -> Option<Run> {
        let batch = self.subscribed.batch_of(self.route);
        loop {
            let (first, more) = self.subscribed.with_lanes(|lanes| {
                let first = lanes.take(self.route)?;
                let mut more = Vec::new();
                lanes.take_more(self.route, &first, batch - 1, &mut more);
                Some((first, more))
            })?;
            if more.is_empty() && first.delivery.acker.lease() == Lease::Live {
                return Some(Run { first, more });
            }
            let (live, lost): (Vec<_>, Vec<_>) =
                std::iter::once(first).chain(more).partition(|job| job.delivery.acker.lease() == Lease::Live);
            // Dropping them settles nothing: they were, or will be, handed out again.
            lost.iter().for_each(|job| drop(self.subscribed.finish(job.id)));
            let mut live = live.into_iter();
            if let Some(first) = live.next() {
                return Some(Run { first, more: live.collect() });
            }
        }
    }

    /// Runs the handler and concludes: acks after what it returned is confirmed, or retries, or dead-letters.
    ///
    /// `start` decodes, extracts and calls; it may fail or panic, as the handler's future may.
    pub(crate) async fn run<F>(&mut self, run: Run, start: impl FnOnce(&[&Message], &Context<'_>) -> Result<F>)
    where
        F: Future<Output: IntoOutcome>,
    {
        self.outputs.messages.clear();
        let result = match catch_unwind(AssertUnwindSafe(|| self.start(&run, start))) {
            Err(panic) => Err(Failure::panicked(&panic_text(&*panic))),
            Ok(Err(error)) => Err(self.not_started(&run, &error)),
            Ok(Ok(future)) => self.finish(future).await,
        };
        let Run { first, more } = run;
        if more.is_empty() {
            self.conclude(first, result).await;
        } else {
            self.conclude_batch(first, more, result).await;
        }
    }

    fn start<F>(&self, run: &Run, start: impl FnOnce(&[&Message], &Context<'_>) -> Result<F>) -> Result<F> {
        let message = &run.first.delivery.message;
        let max = self.subscribed.scope.bus.max_payload();
        let cx = Context { scope: &self.subscribed.scope, message, attempt: run.first.failures.attempts + 1 };
        if run.more.is_empty() {
            check_size(message, max)?;
            return start(&[message], &cx);
        }
        let messages: Vec<_> = std::iter::once(&run.first).chain(&run.more).map(|job| &job.delivery.message).collect();
        messages.iter().try_for_each(|message| check_size(message, max))?;
        start(&messages, &cx)
    }

    /// Awaits the handler, within its time, and takes in what it returned.
    async fn finish<F: Future<Output: IntoOutcome>>(&mut self, future: F) -> Result<(), Failure> {
        let limit = self.subscribed.config.timeout_or_forever();
        let returned = match tokio::time::timeout(limit, AssertUnwindSafe(future).catch_unwind()).await {
            Err(_) => return Err(Failure::timed_out(limit)),
            Ok(Err(panic)) => return Err(Failure::panicked(&panic_text(&*panic))),
            Ok(Ok(returned)) => returned,
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

    /// A batch ends as one; if it failed, its jobs run again one by one, and that run counts for none of them.
    async fn conclude_batch(&mut self, first: Job, more: Vec<Job>, result: Result<(), Failure>) {
        let published = match result {
            Ok(()) => self.publish_outputs(&first, &more).await,
            Err(failure) => Err(failure),
        };
        if published.is_ok() {
            std::iter::once(first).chain(more).for_each(|job| self.subscribed.ack(job));
            return;
        }
        self.subscribed.counters.failed.fetch_add(1, Relaxed);
        let now = Instant::now();
        self.subscribed.with_lanes(|lanes| {
            for mut job in std::iter::once(first).chain(more) {
                job.alone = true;
                lanes.hold(job, now);
            }
        });
        self.subscribed.pump.notify_one();
    }
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
