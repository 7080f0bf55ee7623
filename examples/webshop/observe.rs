//! What is observed of the flow, from the messages themselves: a layer around each service's handlers.

use crate::report::{Delays, Hop};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tidings::handler::{Next, Outcome, Outputs, Request};
use tidings::prelude::*;
use tidings::transport::BoxFuture;

/// Who handled what from whom, and how long after it was published.
#[derive(Clone, Default)]
pub(crate) struct Observed(Arc<Mutex<Book>>);

#[derive(Default)]
struct Book {
    /// In the order in which each was seen first.
    hops: Vec<Hop>,
    delays: BTreeMap<String, Vec<Duration>>,
}

impl Observed {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handled(&self, event: &str, from: String, to: String, delay: Option<Duration>) {
        let mut book = self.book();
        book.delays.entry(event.to_owned()).or_default().extend(delay);
        match book.hops.iter_mut().find(|hop| hop.event == event && hop.from == from && hop.to == to) {
            Some(hop) => hop.count += 1,
            None => book.hops.push(Hop { event: event.to_owned(), from, to, count: 1 }),
        }
    }

    pub(crate) fn hops(&self) -> Vec<Hop> {
        self.book().hops.clone()
    }

    pub(crate) fn delays(&self) -> Vec<Delays> {
        let delays = self.book().delays.clone();
        delays.into_iter().map(|(event, delays)| Delays { event, delays }).collect()
    }

    /// The layer that observes one service.
    pub(crate) fn layer(&self) -> impl tower_layer::Layer<Next, Service = Observe> + Send + Sync + 'static {
        let observed = self.clone();
        tower_layer::layer_fn(move |inner| Observe { observed: observed.clone(), inner })
    }
}

#[derive(Clone)]
pub(crate) struct Observe {
    observed: Observed,
    inner: Next,
}

impl tower_service::Service<Request> for Observe {
    type Response = Outputs;
    type Error = HandlerError;
    type Future = BoxFuture<Outcome>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HandlerError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let (observed, messages) = (self.observed.clone(), request.messages.clone());
        let to = name_of(request.subscription.as_str());
        let run = self.inner.call(request);
        Box::pin(async move {
            let outcome = run.await;
            for message in messages.iter().filter(|_| outcome.is_ok()) {
                let delay = message.recorded_time.and_then(|time| SystemTime::now().duration_since(time).ok());
                observed.handled(
                    &message.event_type,
                    name_of(message.source.trim_start_matches('/')),
                    to.clone(),
                    delay,
                );
            }
            outcome
        })
    }
}

/// `billing.shop.order.placed` and `billing` are of Billing.
pub(crate) fn name_of(subscription: &str) -> String {
    let service = subscription.split('.').next().unwrap_or(subscription);
    let mut letters = service.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
