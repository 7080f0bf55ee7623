//! What handlers may ask for after the event.

use crate::service::Subscribed;
use crate::service::lanes::Job;
use crate::transport::{self, Watcher};
use crate::{Bus, Error, ErrorKind, Headers, Message, Result};
use bytes::Bytes;
use foldhash::fast::RandomState;
use std::any::{Any, TypeId, type_name};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// What a handler may take after the event.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be extracted",
    label = "not an extractor",
    note = "after the event a handler may take `State<T>`, `Metadata`, `Delivered`, `Attempt`, `Lease`, `Headers` or `Bus`, by value"
)]
pub trait Extract: Sized + Send + 'static {
    /// Refuses at start what could never be extracted.
    ///
    /// # Errors
    /// Names what is missing.
    fn check(setup: &Setup<'_>) -> Result<()>;

    /// Takes it for one run.
    ///
    /// # Errors
    /// The run counts as failed.
    fn extract(cx: &Context<'_>) -> Result<Self>;
}

/// What is known when a service starts; for [`Extract::check`].
#[derive(Debug)]
pub struct Setup<'a> {
    pub(crate) states: &'a States,
    pub(crate) batch: bool,
}

impl Setup<'_> {
    /// Refuses an extractor that tells something of one message in a handler of batches.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] in a handler of batches.
    pub fn needs_one_message(&self, extractor: &'static str) -> Result<()> {
        let error =
            || Error::new(ErrorKind::Config, format!("`{extractor}` tells of one message and a batch has many"));
        if self.batch { Err(error()) } else { Ok(()) }
    }
}

/// One run of a handler; for [`Extract::extract`].
pub struct Context<'a> {
    pub(crate) subscribed: &'a Arc<Subscribed>,
    pub(crate) scope: &'a Scope,
    pub(crate) job: &'a Job,
}

impl Context<'_> {
    /// The message of the run; the first one of a batch.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.job.delivery.message
    }

    /// The state of type `T` given to the service.
    #[must_use]
    pub fn state<T: Any>(&self) -> Option<&T> {
        self.scope.states.get()
    }

    /// Which run of the handler this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.job.failures.attempts + 1
    }

    /// The bus the service runs on.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.scope.bus
    }
}

impl std::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("job", self.job).finish_non_exhaustive()
    }
}

/// What all runs of a service share.
#[derive(Debug)]
pub(crate) struct Scope {
    pub(crate) states: States,
    pub(crate) bus: Bus,
}

/// Values by type.
#[derive(Default)]
pub(crate) struct States(HashMap<TypeId, Box<dyn Any + Send + Sync>, RandomState>);

impl States {
    pub(crate) fn insert<T: Any + Send + Sync>(&mut self, state: T) {
        self.0.insert(TypeId::of::<T>(), Box::new(state));
    }

    fn get<T: Any>(&self) -> Option<&T> {
        self.0.get(&TypeId::of::<T>())?.downcast_ref()
    }
}

impl std::fmt::Debug for States {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("States").field("count", &self.0.len()).finish()
    }
}

/// A clone of the state of type `T` that was given to [`Service::state`](crate::Service::state).
#[derive(Clone, Copy, Debug)]
pub struct State<T>(pub T);

impl<T: Clone + Send + Sync + 'static> Extract for State<T> {
    fn check(setup: &Setup<'_>) -> Result<()> {
        setup.states.get::<T>().map(|_| ()).ok_or_else(missing::<T>)
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        cx.state::<T>().cloned().map(Self).ok_or_else(missing::<T>)
    }
}

fn missing<T>() -> Error {
    let name = type_name::<T>();
    Error::new(ErrorKind::Missing, format!("a handler takes `State<{name}>`; give the service one with `.state(..)`"))
}

/// Which run of the handler for this event this is, from 1: failed runs count, hand-outs by the broker do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt(pub u32);

impl Extract for Attempt {
    fn check(setup: &Setup<'_>) -> Result<()> {
        setup.needs_one_message("Attempt")
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        Ok(Self(cx.attempt()))
    }
}

/// How the event came here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Delivered {
    /// Which run of the handler for this event this is, from 1.
    pub attempt: u32,
    /// A handler may have begun or finished with it before: it was handed out again, published again without knowing
    /// whether the first had arrived, replayed, returned by a handler that was told so, or seen here lately. Not said of
    /// a retry, which has an `attempt`.
    pub possible_duplicate: bool,
    /// It was read by a replay.
    pub replayed: bool,
    /// Its place in its topic's (or slot's) order.
    pub position: u64,
    /// From its first publish until now, by the clocks of both machines; nothing if they disagree, or if another
    /// client published it without a `recordedtime`.
    pub delay: Option<Duration>,
}

impl Extract for Delivered {
    fn check(setup: &Setup<'_>) -> Result<()> {
        setup.needs_one_message("Delivered")
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        let Job { delivery, possible_duplicate, .. } = cx.job;
        let now = cx.bus().clock().now();
        Ok(Self {
            attempt: cx.attempt(),
            possible_duplicate: *possible_duplicate,
            replayed: delivery.replayed,
            position: delivery.position,
            delay: delivery.message.recorded_time.and_then(|time| now.duration_since(time).ok()),
        })
    }
}

/// The right to work on the event, which can be lost to another instance while the handler runs.
///
/// What a handler returns after that is not published, but what it did before cannot be undone: a long handler can
/// stop when it learns of it.
pub struct Lease {
    subscribed: Arc<Subscribed>,
    watcher: Watcher,
    job: usize,
}

impl Lease {
    /// Whether another instance works on the event, or may.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.watcher.lease() == transport::Lease::Lost && !self.subscribed.has_successor(self.job)
    }

    /// Waits until the lease is lost; for ever, if it is not.
    ///
    /// # Cancel safety
    /// Nothing is lost with the future.
    pub async fn lost(&self) {
        loop {
            let changed = self.subscribed.leases.notified();
            if self.is_lost() {
                return;
            }
            changed.await;
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("lost", &self.is_lost()).finish()
    }
}

impl Extract for Lease {
    fn check(setup: &Setup<'_>) -> Result<()> {
        setup.needs_one_message("Lease")
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        let watcher = cx.job.delivery.acker.watcher();
        Ok(Self { subscribed: Arc::clone(cx.subscribed), watcher, job: cx.job.id })
    }
}

/// The message without its payload: id, source, time, key, correlation and all else.
#[derive(Clone, Debug)]
pub struct Metadata(pub Message);

impl Extract for Metadata {
    fn check(setup: &Setup<'_>) -> Result<()> {
        setup.needs_one_message("Metadata")
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        let mut message = cx.message().clone();
        message.payload = Bytes::new();
        Ok(Self(message))
    }
}

impl Extract for Headers {
    fn check(setup: &Setup<'_>) -> Result<()> {
        setup.needs_one_message("Headers")
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        Ok(cx.message().headers.clone())
    }
}

impl Extract for Bus {
    fn check(_: &Setup<'_>) -> Result<()> {
        Ok(())
    }

    fn extract(cx: &Context<'_>) -> Result<Self> {
        Ok(cx.scope.bus.clone())
    }
}
