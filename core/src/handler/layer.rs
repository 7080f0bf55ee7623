//! Layers around handlers: `tower` middleware for tracing, limits, metrics, time-outs of one's own.

use super::Outputs;
use crate::transport::BoxFuture;
use crate::{HandlerError, Message, SubscriptionName};
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower_layer::Layer;
use tower_service::Service;

/// What a run of a handler ends with.
pub type Outcome = Result<Outputs, HandlerError>;

/// One run of a handler, as layers see it: what it works on, and the run itself, which has not begun.
///
/// The arguments are made already. What cannot be decoded reaches no layer, and a run that a layer drops has failed.
#[non_exhaustive]
pub struct Request {
    /// The subscription.
    pub subscription: SubscriptionName,
    /// The messages: one, or those of a batch.
    pub messages: Vec<Arc<Message>>,
    /// Which run for the first of them this is, from 1.
    pub attempt: u32,
    pub(crate) run: BoxFuture<Outcome>,
}

/// The layers within, and in the end the handler.
#[derive(Clone)]
pub struct Next(Arc<dyn Call>);

/// A layer, given to a service; the layers within are its argument.
pub(crate) type Wrap = Box<dyn Fn(Next) -> Next + Send + Sync>;

trait Call: Send + Sync {
    fn call(&self, request: Request) -> BoxFuture<Outcome>;
}

/// The innermost: begins the run.
struct Begin;

impl Call for Begin {
    fn call(&self, request: Request) -> BoxFuture<Outcome> {
        request.run
    }
}

struct Layered<S>(S);

impl<S> Call for Layered<S>
where
    S: Service<Request, Response = Outputs, Error = HandlerError> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    fn call(&self, request: Request) -> BoxFuture<Outcome> {
        let mut service = self.0.clone();
        Box::pin(async move {
            poll_fn(|cx| service.poll_ready(cx)).await?;
            service.call(request).await
        })
    }
}

impl Next {
    /// The layers, the first of which is the outermost; `None` if there are none.
    pub(crate) fn stack(layers: &[Wrap]) -> Option<Self> {
        let begin = Self(Arc::new(Begin));
        (!layers.is_empty()).then(|| layers.iter().rev().fold(begin, |next, wrap| wrap(next)))
    }

    pub(crate) fn wrap<L>(layer: L) -> Wrap
    where
        L: Layer<Self> + Send + Sync + 'static,
        L::Service: Service<Request, Response = Outputs, Error = HandlerError> + Clone + Send + Sync + 'static,
        <L::Service as Service<Request>>::Future: Send,
    {
        Box::new(move |next| Self(Arc::new(Layered(layer.layer(next)))))
    }
}

impl Service<Request> for Next {
    type Response = Outputs;
    type Error = HandlerError;
    type Future = BoxFuture<Outcome>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), HandlerError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        self.0.call(request)
    }
}

impl fmt::Debug for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Next")
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Request");
        f.field("subscription", &self.subscription).field("attempt", &self.attempt).finish_non_exhaustive()
    }
}
