//! A service that runs: its tasks, its numbers, its end.

use super::Subscribed;
use super::crew::{Crew, Foreman};
use super::pump::{Pumped, pump};
use crate::transport::{Flushed, Health, Role, Subscription};
use crate::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// A service that runs. Dropped, it stops without draining: what is unsettled will be delivered again.
pub struct Running {
    stop: watch::Sender<bool>,
    subscribed: Vec<Arc<Subscribed>>,
    /// After `stop`, which wakes the pumps: where one thread runs all, an instance that is dropped has lost its leases before
    /// its workers end, as one that dies.
    workers: Foreman,
    pumps: JoinSet<Pumped>,
    /// Subscriptions that have ended by themselves, still to be closed. Locked, so that this can be shared.
    ended: Mutex<Vec<Box<dyn Subscription>>>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Runs that were cut off at the deadline, or whose outcome was not confirmed by then; their events will be delivered again.
    pub abandoned: usize,
    /// Events that were here and not started; they were given back.
    pub given_back: usize,
    /// How the settlements ended at the broker.
    pub flushed: Flushed,
}

/// What a subscription has done in this instance since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Events handled and acked.
    pub handled: u64,
    /// Runs that failed.
    pub failed: u64,
    /// Failed runs that were followed by another, in order or aside.
    pub retried: u64,
    /// Events dead-lettered.
    pub dead_lettered: u64,
    /// Events of a type that no handler takes, acked.
    pub unrouted: u64,
    /// Events that handlers returned, published and confirmed.
    pub published: u64,
    /// Events here and unsettled now.
    pub in_flight: usize,
    /// Runs going on now, and those of which what they returned, a copy or a dead letter is not confirmed yet.
    pub running: usize,
    /// All recent runs failed for now: it probes with one event at a time ([`OutagePolicy`](crate::OutagePolicy)).
    pub outage: bool,
    /// It was [paused](Running::pause).
    pub paused: bool,
    /// What this instance does, once the transport has told.
    pub role: Option<Role>,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) handled: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) dead_lettered: AtomicU64,
    pub(super) unrouted: AtomicU64,
    pub(super) published: AtomicU64,
}

impl Counters {
    pub(super) fn snapshot(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        Stats {
            handled: get(&self.handled),
            failed: get(&self.failed),
            retried: get(&self.retried),
            dead_lettered: get(&self.dead_lettered),
            unrouted: get(&self.unrouted),
            published: get(&self.published),
            ..Stats::default()
        }
    }
}

impl Running {
    pub(super) fn new() -> Self {
        let stop = watch::Sender::new(false);
        Self {
            stop,
            subscribed: Vec::new(),
            pumps: JoinSet::new(),
            workers: Foreman::default(),
            ended: Mutex::default(),
        }
    }

    pub(super) fn crew(&self) -> &Arc<Crew> {
        &self.workers
    }

    pub(super) fn spawn(&mut self, subscribed: Arc<Subscribed>, subscription: Box<dyn Subscription>) {
        for route in 0..subscribed.routes.len() {
            (0..subscribed.config.concurrency).for_each(|_| subscribed.hire(route));
        }
        self.pumps.spawn(pump(subscription, Arc::clone(&subscribed), self.stop.subscribe()));
        self.subscribed.push(subscribed);
    }

    /// Its subscriptions and what they have done, in the order of their handlers.
    pub fn stats(&self) -> impl Iterator<Item = (&str, Stats)> {
        self.subscribed.iter().map(|subscribed| (subscribed.name.as_str(), subscribed.stats()))
    }

    /// Whether it works: degraded while a subscription is in an outage, paused or has ended; else as its transport is.
    #[must_use]
    pub fn health(&self) -> Health {
        let about = |subscribed: &Subscribed, why| {
            Health::Degraded(Error::new(ErrorKind::Closed, why).with_context("subscription", &subscribed.name))
        };
        for subscribed in &self.subscribed {
            let stats = subscribed.stats();
            if stats.outage {
                return about(subscribed, "an outage: all recent runs have failed, it probes");
            }
            if stats.paused {
                return about(subscribed, "it is paused");
            }
        }
        match self.subscribed.first() {
            Some(first) if self.pumps.len() < self.subscribed.len() && !first.replays => {
                about(first, "a subscription has ended for good")
            }
            Some(first) => first.scope.bus.health(),
            None => Health::Up,
        }
    }

    /// Starts and reads nothing in a subscription until it is [resumed](Self::resume): what runs goes on, and what
    /// waits here stays. Other instances are not paused.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a name that is not among its [`stats`](Self::stats).
    pub fn pause(&self, subscription: &str) -> Result<()> {
        self.set_paused(subscription, true)
    }

    /// Goes on with a paused subscription.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn resume(&self, subscription: &str) -> Result<()> {
        self.set_paused(subscription, false)
    }

    fn set_paused(&self, subscription: &str, paused: bool) -> Result<()> {
        let Some(subscribed) = self.subscribed.iter().find(|subscribed| subscribed.name.as_str() == subscription)
        else {
            let known: Vec<_> = self.subscribed.iter().map(|subscribed| subscribed.name.as_str()).collect();
            let why = format!("no subscription `{subscription}` here; there are {}", known.join(", "));
            return Err(Error::new(ErrorKind::NotFound, why));
        };
        subscribed.with_lanes(|lanes| lanes.pause(paused));
        subscribed.pump.notify_one();
        Ok(())
    }

    /// Waits for a subscription to end for good, which none does by itself while its broker can be repaired.
    ///
    /// # Cancel safety
    /// The error is not lost: the subscription stays ended.
    pub async fn failed(&mut self) -> Error {
        match self.all_ended().await {
            Err(error) => error,
            Ok(()) => std::future::pending().await,
        }
    }

    /// Waits for all subscriptions to end.
    async fn all_ended(&mut self) -> Result<()> {
        while let Some(pumped) = self.pumps.join_next().await {
            match pumped {
                Ok(Pumped { subscription, ended }) => {
                    self.ended.get_mut().push(subscription);
                    ended?;
                }
                Err(panic) => {
                    let why = "reading a subscription panicked";
                    return Err(Error::new(ErrorKind::Internal, why).with_source(panic));
                }
            }
        }
        Ok(())
    }

    /// Waits until a [replay](super::Service::replay) has handled everything, then closes it; its
    /// [`stats`](Self::stats) stay. A service that is no replay never finishes.
    ///
    /// # Errors
    /// What ended a subscription for good. The others go on.
    ///
    /// # Cancel safety
    /// The replay goes on; waiting again is fine.
    pub async fn finished(&mut self) -> Result<()> {
        self.all_ended().await?;
        while let Some(subscription) = self.ended.get_mut().pop() {
            subscription.close(Instant::now() + super::DRAIN).await;
        }
        Ok(())
    }

    /// Stops reading, lets what runs finish within `deadline`, gives the rest back, flushes the settlements.
    ///
    /// # Cancel safety
    /// The service stops nevertheless; what is unsettled will be delivered again.
    pub async fn drain(mut self, deadline: Duration) -> Drained {
        let deadline = Instant::now() + deadline;
        let mut drained = Drained::default();
        self.stop.send_replace(true);
        for subscribed in &self.subscribed {
            subscribed.lanes.lock().stop();
            subscribed.ready.iter().for_each(tokio::sync::Notify::notify_waiters);
        }
        let mut subscriptions = std::mem::take(self.ended.get_mut());
        while let Some(pumped) = self.pumps.join_next().await {
            subscriptions.extend(pumped.ok().map(|pumped| pumped.subscription));
        }
        let _ = timeout_at(deadline, self.workers.finished()).await;
        drained.abandoned = self.subscribed.iter().map(|subscribed| subscribed.lanes.lock().running()).sum();
        self.workers.end();
        self.workers.finished().await;
        for subscribed in &self.subscribed {
            let rest = subscribed.lanes.lock().clear();
            drained.given_back += rest.len();
            rest.into_iter().for_each(super::lanes::Job::give_back);
        }
        for subscription in subscriptions {
            let flushed = subscription.close(deadline).await;
            drained.flushed.applied += flushed.applied;
            drained.flushed.stale += flushed.stale;
            drained.flushed.unknown += flushed.unknown;
        }
        drained
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.stats()).finish()
    }
}

/// Tasks share what tells of a service.
const _: fn(&Running) -> &(dyn Send + Sync) = |running| running;

/// Waits for SIGINT or, on Unix, SIGTERM.
pub(super) async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => return,
                interrupted = tokio::signal::ctrl_c() => if interrupted.is_ok() { return },
            }
        }
    }
    if tokio::signal::ctrl_c().await.is_err() {
        // Without signals there is nothing to wait for.
        std::future::pending::<()>().await;
    }
}
