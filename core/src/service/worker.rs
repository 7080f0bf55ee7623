//! Runs handlers and concludes their deliveries.

use super::Subscribed;
use super::conclude::{Conclusion, Failure};
use super::lanes::Job;
use crate::handler::{Context, IntoOutcome, Next, Outcome, Request};
use crate::time::before;
use crate::transport::Lease;
use crate::{Error, ErrorKind, Message, Result};
use futures_util::FutureExt;
use std::any::Any;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// One task that runs the handler of one route, one run after another.
pub(crate) struct Worker {
    pub(super) subscribed: Arc<Subscribed>,
    route: usize,
    /// The most jobs of one run.
    batch: usize,
    run: Run,
    conclusion: Conclusion,
}

/// What one call of the handler works on: one job, or for a batch at least one. Kept in its worker, because moving it from
/// call to call costs more than most of these do.
#[derive(Default)]
struct Run {
    first: Option<Job>,
    more: Vec<Job>,
    /// It is one of as many runs as may go on at a time.
    goes_on: bool,
}

impl Run {
    fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.first.iter().chain(&self.more)
    }

    /// Another run may begin in the place of this one, if one waits for that.
    fn end_turn(&mut self, subscribed: &Subscribed) {
        if std::mem::take(&mut self.goes_on) {
            subscribed.end_turn();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end_turn();
    }
}

impl Worker {
    pub(crate) fn new(subscribed: Arc<Subscribed>, route: usize) -> Self {
        let (batch, conclusion) = (subscribed.batch_of(route), Conclusion::new(Arc::clone(&subscribed)));
        Self { subscribed, route, batch, run: Run::default(), conclusion }
    }

    /// Waits for what is to be run next; `false` when the service stops.
    pub(crate) async fn next(&mut self) -> bool {
        if self.batch == 1 && self.take() {
            return true;
        }
        let subscribed = Arc::clone(&self.subscribed);
        loop {
            // Made before the check, so that no wake-up is lost.
            let notified = subscribed.ready[self.route].notified();
            self.linger().await;
            if self.take() {
                return true;
            }
            if self.subscribed.lanes.lock().is_stopped() {
                return false;
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

    /// Takes jobs whose lease is still live, if there are any.
    fn take(&mut self) -> bool {
        while self.take_any() {
            let lost = |job: &Job| job.delivery.acker.lease() != Lease::Live;
            if self.run.more.is_empty() && !self.run.first.as_ref().is_some_and(lost) {
                return true;
            }
            let all = self.run.first.take().into_iter().chain(std::mem::take(&mut self.run.more));
            let (lost, live): (Vec<_>, Vec<_>) = all.partition(lost);
            lost.into_iter().for_each(|job| self.subscribed.leave(job));
            let mut live = live.into_iter();
            self.run.first = live.next();
            self.run.more.extend(live);
            if self.run.first.is_some() {
                return true;
            }
            self.end_turn();
        }
        false
    }

    fn take_any(&mut self) -> bool {
        let Self { subscribed, run, .. } = self;
        let should_read = subscribed.with_lanes(|lanes| {
            if !subscribed.may_run() {
                return None;
            }
            run.first = lanes.take(self.route);
            lanes.take_more(self.route, run.first.as_ref()?, self.batch - 1, &mut run.more);
            subscribed.runs.fetch_add(1, Relaxed);
            run.goes_on = true;
            // Others have nothing to do.
            Some(subscribed.may_run() && lanes.should_read())
        });
        if should_read == Some(true) {
            subscribed.pump.notify_one();
        }
        should_read.is_some()
    }

    fn end_turn(&mut self) {
        self.run.end_turn(&self.subscribed);
    }

    /// Runs the handler and concludes: acks after what it returned is confirmed, or retries, or dead-letters.
    ///
    /// `start` decodes, extracts and calls; it may fail or panic, as the handler's future may.
    pub(crate) async fn run<F>(&mut self, start: impl FnOnce(&[&Message], &Context<'_>) -> Result<F>)
    where
        F: Future<Output: IntoOutcome> + Send + 'static,
    {
        self.conclusion.outputs.messages.clear();
        self.conclusion.outputs.each = None;
        let result = match (self.suspected(), self.subscribed.layers.clone()) {
            (Some(failure), _) => Err(failure),
            (None, None) => {
                // The handler's future may be large: it is moved as little as can be.
                let mut future = pin!(None);
                match self.begin(|first| self.start(first, start).map(|started| future.set(Some(started)))) {
                    Ok(()) => self.finish(future).await,
                    Err(failure) => Err(failure),
                }
            }
            (None, Some(layers)) => {
                match self.begin(|first| self.start(first, start).map(|future| self.request(first, future))) {
                    Ok(request) => self.finish(pin!(Some(through(layers, request)))).await,
                    Err(failure) => Err(failure),
                }
            }
        };
        // By itself, because most runs end so.
        if result.is_ok() && self.is_plain() {
            if let Some(job) = self.run.first.take() {
                self.subscribed.settle_plain(job);
            }
            return self.end_turn();
        }
        self.end_run(result).await;
    }

    /// Why the next run must not begin: its event has ended too many instances.
    fn suspected(&self) -> Option<Failure> {
        let crashes = self.run.first.as_ref().map_or(0, Job::crashes);
        (crashes > self.subscribed.config.max_deliveries).then(|| Failure::suspect(crashes - 1))
    }

    /// Makes what `start` makes, if it neither fails nor panics.
    fn begin<T>(&self, start: impl FnOnce(&Job) -> Result<T>) -> Result<T, Failure> {
        let Some(first) = &self.run.first else { return Err(Failure::panicked("a run without a job")) };
        match catch_unwind(AssertUnwindSafe(|| start(first))) {
            Err(panic) => Err(Failure::panicked(&panic_text(&*panic))),
            Ok(Err(error)) => Err(self.not_started(first, &error)),
            Ok(Ok(started)) => Ok(started),
        }
    }

    /// Concludes a run. While that waits for a confirmation, another worker may run the next: each would else cost a round trip to the broker.
    /// What is published is nevertheless in the order in which runs end.
    async fn end_run(&mut self, result: Result<(), Failure>) {
        let Some(first) = self.run.first.take() else { return self.end_turn() };
        let more = std::mem::take(&mut self.run.more);
        let Self { subscribed, route, run, conclusion, .. } = self;
        let mut concluded = pin!(conclusion.conclude_run(first, more, result));
        let at_once = poll_fn(|cx| Poll::Ready(concluded.as_mut().poll(cx).is_ready())).await;
        run.end_turn(subscribed);
        if !at_once {
            subscribed.relieve(*route);
            concluded.await;
            subscribed.relieved(*route);
        }
    }

    /// Whether a run that has not failed is over: of one event, for which nothing was returned.
    fn is_plain(&self) -> bool {
        self.run.more.is_empty()
            && self.conclusion.outputs.each.is_none()
            && self.conclusion.outputs.messages.is_empty()
    }

    fn start<F>(&self, first: &Job, start: impl FnOnce(&[&Message], &Context<'_>) -> Result<F>) -> Result<F> {
        let message = &first.delivery.message;
        let max = self.subscribed.scope.bus.max_payload();
        let cx = Context { subscribed: &self.subscribed, scope: &self.subscribed.scope, job: first };
        if self.run.more.is_empty() {
            check_size(message, max)?;
            return start(&[message], &cx);
        }
        let messages: Vec<_> = self.run.jobs().map(|job| &*job.delivery.message).collect();
        messages.iter().try_for_each(|message| check_size(message, max))?;
        start(&messages, &cx)
    }

    /// The run as layers see it.
    fn request<F: Future<Output: IntoOutcome> + Send + 'static>(&self, first: &Job, future: F) -> Request {
        let mut outputs = self.conclusion.outputs.fresh();
        Request {
            subscription: self.subscribed.name.clone(),
            messages: self.run.jobs().map(|job| Arc::clone(&job.delivery.message)).collect(),
            attempt: first.failures.attempts + 1,
            run: Box::pin(async move { future.await.into_outcome(&mut outputs).map(|()| outputs) }),
        }
    }

    /// Awaits the handler, within its time, and takes in what it returned.
    async fn finish<F>(&mut self, mut future: Pin<&mut Option<F>>) -> Result<(), Failure>
    where
        F: Future<Output: IntoOutcome>,
    {
        let limit = self.subscribed.config.timeout_or_forever();
        let run = poll_fn(|cx| future.as_mut().as_pin_mut().map_or(Poll::Pending, |future| future.poll(cx)));
        let returned = AssertUnwindSafe(before(|| Instant::now() + limit, run)).catch_unwind().await;
        // That may panic too.
        let dropped = catch_unwind(AssertUnwindSafe(|| future.set(None)));
        match (returned, dropped) {
            (Err(panic), _) | (_, Err(panic)) => Err(Failure::panicked(&panic_text(&*panic))),
            (Ok(None), _) => Err(Failure::timed_out(limit)),
            (Ok(Some(returned)), _) => self.take_in(returned),
        }
    }

    fn take_in(&mut self, returned: impl IntoOutcome) -> Result<(), Failure> {
        let outputs = &mut self.conclusion.outputs;
        match catch_unwind(AssertUnwindSafe(|| returned.into_outcome(outputs))) {
            Err(panic) => Err(Failure::panicked(&panic_text(&*panic))),
            Ok(Err(error)) => Err(Failure::handler(&error, &self.subscribed.config.retry)),
            Ok(Ok(())) => Ok(()),
        }
    }

    fn not_started(&self, first: &Job, error: &Error) -> Failure {
        let newest = self.subscribed.routes[self.route].accepts().event.map_or(u32::MAX, |event| event.version);
        Failure::not_started(error, first.delivery.message.version > newest)
    }

    /// Dead-letters what no handler takes.
    pub(crate) async fn refuse(&mut self) {
        let Some(first) = &self.run.first else { return };
        let failure = Failure::unrouted(&first.delivery.message.event_type);
        self.end_run(Err(failure)).await;
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
