//! Sees all that passes between core and the transport, and all runs; and does what faults ask for.

use crate::timeline::End;
use crate::tracker::{Ident, Mishap, Submitted, Tracker};
use crate::wrap::{Intercept, Intercepted, Tamper, settle};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use tidings_core::handler::{Next, Outcome, Outputs, Request};
use tidings_core::transport::{
    Acker, BoxFuture, Delivery, Destination, Outgoing, PublishFailure, Publisher, Receipt, Settlement, Subscription,
    SubscriptionSpec, Tag, submit_and_wait,
};
use tidings_core::{HandlerError, Message, SubscriptionName, header};

/// Around the transport.
pub(crate) struct Watch {
    pub(crate) tracker: Arc<Tracker>,
    publisher: OnceLock<Arc<dyn Publisher>>,
}

impl Watch {
    pub(crate) fn new(tracker: Arc<Tracker>) -> Arc<Self> {
        Arc::new(Self { tracker, publisher: OnceLock::new() })
    }
}

impl Tamper for Watch {
    fn publisher(&self, inner: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        let tracker = Arc::clone(&self.tracker);
        let publisher: Arc<dyn Publisher> = Arc::new(WatchedPublisher { inner, tracker });
        // The bus asks for it before anything is subscribed to.
        Arc::clone(self.publisher.get_or_init(|| publisher))
    }

    fn subscription(&self, spec: &SubscriptionSpec, inner: Box<dyn Subscription>) -> Box<dyn Subscription> {
        self.tracker.watch(spec);
        let (name, tracker) = (spec.name.clone(), Arc::clone(&self.tracker));
        let watched =
            WatchedSubscription { name, tracker, publisher: self.publisher.get().cloned(), open: Mutex::default() };
        Intercepted::boxed(inner, Arc::new(watched))
    }
}

struct WatchedPublisher {
    inner: Arc<dyn Publisher>,
    tracker: Arc<Tracker>,
}

impl Publisher for WatchedPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        for out in batch.collect::<Vec<_>>() {
            let submitted = self.tracker.submitting(&out);
            let Outgoing { destination, message, delay, owed, receipt } = out;
            let answers = submit_and_wait(&*self.inner, &[(destination, message.clone(), delay, owed)]);
            let tracker = Arc::clone(&self.tracker);
            let mut answering = Box::pin(async move { answer(&tracker, submitted, receipt, answers.await) });
            // Memory has answered already; what answers later is waited for elsewhere.
            if answering.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
                tokio::spawn(answering);
            }
        }
    }
}

fn answer(tracker: &Tracker, submitted: Submitted, receipt: Receipt, failures: Vec<(usize, PublishFailure)>) {
    let failure = failures.into_iter().next().map(|(_, failure)| failure);
    tracker.answered(submitted, failure.as_ref());
    match failure {
        None => receipt.confirm(),
        Some(PublishFailure { fate, error }) => receipt.fail(fate, error),
    }
}

struct WatchedSubscription {
    name: SubscriptionName,
    tracker: Arc<Tracker>,
    /// Where duplicates are published.
    publisher: Option<Arc<dyn Publisher>>,
    open: Mutex<HashMap<Tag, Ident>>,
}

impl WatchedSubscription {
    fn duplicate(&self, delivery: &Delivery) {
        let mut message = Message::clone(&delivery.message);
        if message.headers.get(header::REPEAT).is_some() || !self.tracker.duplicates(self.name.as_str()) {
            return;
        }
        message.headers.append_unchecked(header::REPEAT, "1");
        if let Some(publisher) = &self.publisher {
            let to = Destination::Subscription(self.name.clone());
            // Nothing is un-sent when the future is dropped.
            drop(submit_and_wait(&**publisher, &[(to, message, None, true)]));
        }
    }
}

impl Intercept for WatchedSubscription {
    fn delivered(&self, delivery: Delivery) -> Option<Delivery> {
        self.duplicate(&delivery);
        Some(delivery)
    }

    fn handed_out(&self, tag: Tag, delivery: &Delivery) {
        let ident = Ident::of(&delivery.message);
        self.tracker.handed_out(self.name.as_str(), &ident);
        self.open.lock().insert(tag, ident);
    }

    fn settled_as(&self, tag: Tag, acker: Acker, settlement: Settlement) {
        let Some(ident) = self.open.lock().remove(&tag) else { return settle(acker, settlement) };
        let crashes = settlement == Settlement::Ack && self.tracker.crashes(self.name.as_str(), &ident);
        let settlement = if crashes { Settlement::Abandon } else { settlement };
        settle(acker, settlement);
        self.tracker.settled(self.name.as_str(), &ident, settlement == Settlement::Ack);
    }
}

/// Around each handler.
pub(crate) fn layer(
    tracker: Arc<Tracker>,
) -> impl tower_layer::Layer<Next, Service = WatchedRuns> + Send + Sync + 'static {
    tower_layer::layer_fn(move |inner| WatchedRuns { tracker: Arc::clone(&tracker), inner })
}

#[derive(Clone)]
pub(crate) struct WatchedRuns {
    tracker: Arc<Tracker>,
    inner: Next,
}

/// A run that goes on; dropped, it was cut off.
struct Going {
    tracker: Arc<Tracker>,
    entry: Option<usize>,
    messages: Vec<Ident>,
    end: End,
}

impl Drop for Going {
    fn drop(&mut self) {
        let end = std::mem::replace(&mut self.end, End::CutOff);
        self.tracker.ended(self.entry, &self.messages, end);
    }
}

impl tower_service::Service<Request> for WatchedRuns {
    type Response = Outputs;
    type Error = HandlerError;
    type Future = BoxFuture<Outcome>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HandlerError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let (tracker, inner) = (Arc::clone(&self.tracker), self.inner.clone());
        Box::pin(async move {
            let messages = request.messages.iter().map(|message| Ident::of(message)).collect();
            let entry = tracker.began(&request);
            let mishap = tracker.mishap(&request);
            let mut going = Going { tracker, entry, messages, end: End::CutOff };
            let outcome = run(inner, request, mishap).await;
            going.end = outcome.as_ref().map_or_else(|error| End::Failed(error.to_string()), |_| End::Succeeded);
            outcome
        })
    }
}

async fn run(mut inner: Next, request: Request, mishap: Mishap) -> Outcome {
    if !mishap.delay.is_zero() {
        tokio::time::sleep(mishap.delay).await;
    }
    if mishap.fails_before {
        return Err("fault: it failed before its handler began".into());
    }
    poll_fn(|cx| tower_service::Service::poll_ready(&mut inner, cx)).await?;
    let outcome = tower_service::Service::call(&mut inner, request).await;
    if mishap.fails_after && outcome.is_ok() {
        return Err("fault: it failed after its handler had succeeded".into());
    }
    outcome
}
