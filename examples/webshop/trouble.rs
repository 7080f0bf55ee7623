//! Trouble on request: something that a service depends on is down for a while.

use std::task::{Context, Poll};
use std::time::Duration;

use tidings::handler::{Next, Outcome, Outputs, Request};
use tidings::prelude::*;
use tidings::transport::BoxFuture;
use tokio::time::Instant;

/// A layer that fails each run for now, until its time is over.
pub(crate) fn down_for(
    time: Duration,
) -> impl tower_layer::Layer<Next, Service = Down> + Clone + Send + Sync + 'static {
    let until = Instant::now() + time;
    tower_layer::layer_fn(move |inner| Down { until, inner })
}

#[derive(Clone)]
pub(crate) struct Down {
    until: Instant,
    inner: Next,
}

impl tower_service::Service<Request> for Down {
    type Response = Outputs;
    type Error = HandlerError;
    type Future = BoxFuture<Outcome>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HandlerError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        if Instant::now() < self.until {
            return Box::pin(async { Err(HandlerError::from("the database is down")) });
        }
        self.inner.call(request)
    }
}
