//! Handlers: async functions whose arguments say what they subscribe to and need.

mod error;
mod extract;
mod layer;
mod outcome;

pub use error::HandlerError;
pub(crate) use error::Verdict;
pub use extract::{Attempt, Context, Delivered, Extract, Lease, Metadata, Setup, State};
pub(crate) use extract::{Scope, States};
pub(crate) use layer::Wrap;
pub use layer::{Next, Outcome, Request};
pub use outcome::{Each, IntoOutcome, Outputs};
pub(crate) use outcome::{Ended, encode};

use crate::service::worker::Worker;
use crate::transport::BoxFuture;
use crate::{Error, ErrorKind, Event, Message, Result};
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;

/// The first argument of a handler: what it subscribes to.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the first argument of a handler",
    label = "not an event",
    note = "a handler takes an event (`#[derive(Event)]`), `Batch<E>` or `RawMessage` first, by value; then what is extracted"
)]
pub trait Input: Sized + Send + 'static {
    /// What it takes.
    const ACCEPTS: Accepts;
    /// Makes it of the messages of one run: one, or for a batch at least one.
    ///
    /// # Errors
    /// [`ErrorKind::Codec`] if a payload cannot be decoded; the event is dead-lettered.
    fn decode(messages: &[&Message]) -> Result<Self>;
}

/// What a handler takes, as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Accepts {
    /// The topic and type of the event; `None` takes any, and the subscription must say its name and topics.
    pub event: Option<EventInfo>,
    /// It takes many events in one run.
    pub batch: bool,
}

/// What is known of an event's type without having one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EventInfo {
    /// [`Event::NAME`].
    pub name: &'static str,
    /// [`Event::TOPIC`].
    pub topic: &'static str,
    /// [`Event::VERSION`].
    pub version: u32,
    /// [`Event::KEYED`].
    pub keyed: bool,
}

impl EventInfo {
    const fn of<E: Event>() -> Self {
        Self { name: E::NAME, topic: E::TOPIC, version: E::VERSION, keyed: E::KEYED }
    }
}

impl<E: Event> Input for E {
    const ACCEPTS: Accepts = Accepts { event: Some(EventInfo::of::<E>()), batch: false };
    fn decode(messages: &[&Message]) -> Result<Self> {
        let message = messages.first().ok_or_else(nothing)?;
        E::decode(&message.content_type, message.version, &message.payload)
    }
}

/// Many events of one type in one run, in order: up to as many as the subscription's
/// [`batch`](crate::SubscriptionConfig::batch) says.
///
/// They end together, unless the handler returns [`Each`]: if it fails, or one of them cannot be decoded, they are
/// handled again one by one.
#[derive(Debug)]
pub struct Batch<E>(pub Vec<E>);

impl<E: Event> Input for Batch<E> {
    const ACCEPTS: Accepts = Accepts { event: Some(EventInfo::of::<E>()), batch: true };
    fn decode(messages: &[&Message]) -> Result<Self> {
        messages.iter().map(|m| E::decode(&m.content_type, m.version, &m.payload)).collect::<Result<_>>().map(Self)
    }
}

/// A message as it came, of any type, for handlers on patterns and for forwarding.
#[derive(Debug)]
pub struct RawMessage(pub Message);

impl Input for RawMessage {
    const ACCEPTS: Accepts = Accepts { event: None, batch: false };
    fn decode(messages: &[&Message]) -> Result<Self> {
        messages.first().map(|m| Self((*m).clone())).ok_or_else(nothing)
    }
}

fn nothing() -> Error {
    Error::new(ErrorKind::Internal, "a run without a message")
}

/// An async function that handles events; implemented for functions and closures of up to six arguments.
///
/// What is wrong with one is said where it is given to [`Service::on`](crate::Service::on).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler",
    label = "not a handler",
    note = "a handler is `async fn(Event, extracted arguments..) -> Result<_, HandlerError>`, with at most six arguments, \
            each owned (no references), whose future is `Send` (no `Rc` or lock guard lives across an `.await`)"
)]
pub trait Handler<A>: Send + Sync + 'static {
    /// What it returns.
    type Out;
    /// Its future.
    type Future: Future<Output = Self::Out> + Send + 'static;
    /// Starts a run.
    fn call(&self, args: A) -> Self::Future;
}

/// The arguments of a handler: an [`Input`], then what is [extracted](Extract).
pub trait Args: Sized + Send + 'static {
    /// The first argument.
    type Input: Input;
    /// Refuses what could not be extracted, before anything starts.
    ///
    /// # Errors
    /// Names what is missing.
    fn check(setup: &Setup<'_>) -> Result<()>;
    /// Makes the arguments of one run.
    ///
    /// # Errors
    /// As [`Input::decode`] and [`Extract::extract`].
    fn build(messages: &[&Message], cx: &Context<'_>) -> Result<Self>;
}

macro_rules! arity { ($($x:ident)*) => {
    impl<F, Fut, In, $($x,)*> Handler<(In, $($x,)*)> for F
    where
        F: Fn(In, $($x),*) -> Fut + Send + Sync + 'static,
        Fut: Future + Send + 'static,
    {
        type Out = Fut::Output;
        type Future = Fut;
        #[allow(non_snake_case)] // one name for the type and the value
        fn call(&self, (input, $($x,)*): (In, $($x,)*)) -> Fut { self(input, $($x),*) }
    }

    impl<In: Input, $($x: Extract,)*> Args for (In, $($x,)*) {
        type Input = In;
        fn check(_setup: &Setup<'_>) -> Result<()> { $($x::check(_setup)?;)* Ok(()) }
        fn build(messages: &[&Message], _cx: &Context<'_>) -> Result<Self> {
            Ok((In::decode(messages)?, $($x::extract(_cx)?,)*))
        }
    }
} }
arity!();
arity!(X1);
arity!(X1 X2);
arity!(X1 X2 X3);
arity!(X1 X2 X3 X4);
arity!(X1 X2 X3 X4 X5);

/// Takes what no handler takes, to dead-letter it.
pub(crate) struct Refuse;

impl Route for Refuse {
    fn accepts(&self) -> Accepts {
        Accepts { event: None, batch: false }
    }

    fn check(&self, _: &Setup<'_>) -> Result<()> {
        Ok(())
    }

    fn work(self: Arc<Self>, mut worker: Worker) -> BoxFuture<()> {
        Box::pin(async move {
            while worker.next().await {
                worker.refuse().await;
            }
        })
    }
}

/// A handler whose types are erased. What is erased is the worker's whole loop, not the call: one box
/// per worker, none per message.
pub(crate) trait Route: Send + Sync + 'static {
    fn accepts(&self) -> Accepts;
    fn check(&self, setup: &Setup<'_>) -> Result<()>;
    fn work(self: Arc<Self>, worker: Worker) -> BoxFuture<()>;
}

pub(crate) struct Routed<H, A> {
    handler: H,
    args: PhantomData<fn(A)>,
}

impl<H, A> Routed<H, A> {
    pub(crate) fn new(handler: H) -> Self {
        Self { handler, args: PhantomData }
    }
}

impl<A: Args, H: Handler<A>> Route for Routed<H, A>
where
    H::Out: IntoOutcome,
{
    fn accepts(&self) -> Accepts {
        A::Input::ACCEPTS
    }

    fn check(&self, setup: &Setup<'_>) -> Result<()> {
        A::check(setup)
    }

    fn work(self: Arc<Self>, mut worker: Worker) -> BoxFuture<()> {
        Box::pin(async move {
            while worker.next().await {
                worker.run(|messages, cx| A::build(messages, cx).map(|args| self.handler.call(args))).await;
            }
        })
    }
}
