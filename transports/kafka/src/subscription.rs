//! An open subscription, or a replay: one instance, as core polls it.

use crate::client::{self, KafkaContext};
use crate::consumer::{Driver, GroupContext, Signal};
use crate::error::{client as failed, closed, error};
use crate::publisher::{KafkaPublisher, Outbox};
use crate::settle::KafkaSettle;
use crate::state::{Call, Mode, State, read_ahead};
use crate::topology::{Catalog, RUNGS, TERMS, Terms, blocking};
use parking_lot::Mutex;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::BaseRecord;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidings_core::transport::{
    BoxFuture, Destination, Flushed, Ordering, Polled, Settle, Settlement, Subscription, SubscriptionSpec, Tag,
    submit_and_wait,
};
use tidings_core::{ErrorKind, Message, Result, TopicPattern};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};

/// How long an instance that was dropped still tries to tell what was settled.
const GOODBYE: Duration = Duration::from_secs(2);

/// Who waits for a new subscription to have a position in every partition.
pub(crate) struct Opening {
    /// Topics, and how many of their partitions.
    pub(crate) expected: Vec<(String, u32)>,
    tell: oneshot::Sender<Result<()>>,
}

impl Opening {
    pub(crate) fn answer(self, result: Result<()>) {
        // Nobody may wait any more.
        let _ = self.tell.send(result);
    }
}

/// What the thread and the poller of one instance share.
pub(crate) struct Instance {
    pub(crate) catalog: Arc<Catalog>,
    outbox: Arc<Outbox>,
    pub(crate) spec: SubscriptionSpec,
    pub(crate) address: Arc<str>,
    pub(crate) later: Arc<str>,
    /// Whose owner reads the address too.
    pub(crate) anchor: Arc<str>,
    pub(crate) mode: Mode,
    pub(crate) state: Mutex<State>,
    pub(crate) signal: Arc<Signal>,
    pub(crate) opening: Mutex<Option<Opening>>,
    /// Whether the subscription is known to have been created to the end.
    is_created: AtomicBool,
    /// The broker is told exactly what was handed out, because nothing more is.
    pub(crate) is_exact: AtomicBool,
    end: Mutex<Option<std::time::Instant>>,
    has_ended: AtomicBool,
    ended: Notify,
}

impl Instance {
    pub(crate) fn new(catalog: &Arc<Catalog>, outbox: &Arc<Outbox>, spec: SubscriptionSpec, mode: Mode) -> Arc<Self> {
        let address: Arc<str> = catalog.names.address(&spec.name).into();
        Arc::new(Self {
            catalog: Arc::clone(catalog),
            outbox: Arc::clone(outbox),
            anchor: anchor(catalog, &spec).map_or_else(|| Arc::clone(&address), Arc::from),
            address,
            later: catalog.names.later(&spec.name).into(),
            state: Mutex::new(State::new(mode, spec.max_in_flight)),
            spec,
            mode,
            signal: Arc::default(),
            opening: Mutex::default(),
            is_created: AtomicBool::new(false),
            is_exact: AtomicBool::new(false),
            end: Mutex::default(),
            has_ended: AtomicBool::new(false),
            ended: Notify::new(),
        })
    }

    pub(crate) fn consumer(&self, config: &ClientConfig) -> Result<BaseConsumer<GroupContext>> {
        let context = GroupContext::new(KafkaContext::new(&self.catalog.link, &self.catalog.config));
        config.create_with_context(context).map_err(|e| failed("a client could not be created", e))
    }

    /// How many events are kept ready at the most.
    pub(crate) fn read_ahead(&self) -> usize {
        read_ahead(self.spec.max_in_flight)
    }

    /// Whether the subscription was created to the end. Blocks.
    pub(crate) fn is_created(&self) -> Result<bool> {
        if !self.is_created.load(SeqCst) && self.catalog.ends(&self.later, TERMS)?.1 > 0 {
            self.is_created.store(true, SeqCst);
        }
        Ok(self.is_created.load(SeqCst))
    }

    pub(crate) fn ends_at(&self) -> Option<std::time::Instant> {
        *self.end.lock()
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.end.lock().is_some()
    }

    /// Ends the thread, at the latest at the deadline.
    fn finish(&self, deadline: std::time::Instant) {
        let mut end = self.end.lock();
        *end = Some(end.map_or(deadline, |end| end.min(deadline)));
        drop(end);
        self.signal.raise();
    }

    /// Ends all, as a crash does.
    pub(crate) fn kill(&self) {
        self.state.lock().die();
        self.finish(std::time::Instant::now() + GOODBYE);
    }

    pub(crate) fn ended(&self) {
        self.has_ended.store(true, SeqCst);
        self.ended.notify_waiters();
    }

    async fn has_ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.has_ended.load(SeqCst) {
                return;
            }
            ended.await;
        }
    }

    /// Sends on what is due later than its partition could tell.
    fn send_on(self: &Arc<Self>, tag: Tag, due: u64, message: Arc<Message>) {
        let instance = Arc::clone(self);
        tokio::spawn(async move {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let delay = Duration::from_millis(due).saturating_sub(now);
            let to = Destination::Subscription(instance.spec.name.clone());
            let publisher = KafkaPublisher(Arc::clone(&instance.outbox));
            let failures = submit_and_wait(&publisher, &[(to, message, Some(delay), true)]).await;
            let settlement = if failures.is_empty() {
                Settlement::Ack
            } else {
                Settlement::Release { after: Duration::from_secs(1) }
            };
            KafkaSettle(Arc::downgrade(&instance)).settle(tag, settlement);
        });
    }
}

/// One instance. Dropping it without [`close`](Subscription::close) is a crash.
pub(crate) struct KafkaSubscription {
    instance: Arc<Instance>,
    settle: Arc<dyn Settle>,
    /// Until the next event is due; made when one first is.
    sleep: Option<Pin<Box<Sleep>>>,
    open: bool,
}

enum Step {
    Ready,
    Wait(Option<Instant>),
}

impl KafkaSubscription {
    pub(crate) fn new(instance: Arc<Instance>) -> Self {
        let settle = Arc::new(KafkaSettle(Arc::downgrade(&instance)));
        Self { instance, settle, sleep: None, open: true }
    }

    fn step(&self, cx: &Context<'_>, max: usize, out: &mut Polled) -> Result<Step> {
        let instance = &self.instance;
        let mut state = instance.state.lock();
        if instance.catalog.link.is_closed() {
            return Err(closed().with_operation("receive"));
        }
        if !state.notices.is_empty() {
            out.notices.append(&mut state.notices);
            return Ok(Step::Ready);
        }
        if let Some(failed) = state.failed.take() {
            return Err(failed.with_operation("receive"));
        }
        if state.stopped || state.dead || state.is_over() {
            return Ok(Step::Ready);
        }
        let (any, due, call) = state.hand_out(max, &self.settle, out);
        let further = std::mem::take(&mut state.further);
        if !any {
            state.park(cx.waker());
        }
        drop(state);
        for (tag, item) in further {
            instance.send_on(tag, item.further.unwrap_or(0), item.message);
        }
        if call == Call::Now {
            instance.signal.raise();
        }
        Ok(if any { Step::Ready } else { Step::Wait(due) })
    }

    /// Ready when `due` has come.
    fn poll_due(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if sleep.deadline() != due {
            sleep.as_mut().reset(due);
        }
        sleep.as_mut().poll(cx)
    }
}

impl Subscription for KafkaSubscription {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        loop {
            match self.step(cx, max, out)? {
                Step::Ready => return Poll::Ready(Ok(())),
                Step::Wait(None) => return Poll::Pending,
                Step::Wait(Some(due)) => std::task::ready!(self.poll_due(cx, due)),
            }
        }
    }

    fn stop(&mut self) {
        let mut state = self.instance.state.lock();
        state.stopped = true;
        state.wake();
    }

    fn close(mut self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed> {
        self.stop();
        self.open = false;
        let instance = Arc::clone(&self.instance);
        Box::pin(async move {
            // At least one try, although it may be late.
            let end = deadline.max(Instant::now() + Duration::from_millis(100));
            instance.finish(std::time::Instant::now() + (end - Instant::now()));
            let _ = timeout_at(end + Duration::from_millis(500), instance.has_ended()).await;
            let mut state = instance.state.lock();
            if !state.dead {
                state.end();
            }
            state.flushed
        })
    }
}

impl Drop for KafkaSubscription {
    fn drop(&mut self) {
        if self.open {
            self.instance.kill();
        }
    }
}

/// The topic whose first partition is read by who reads the address: the same for all instances. With patterns there may be
/// none, or another later: then the address is shared among the instances as a topic is.
fn anchor(catalog: &Catalog, spec: &SubscriptionSpec) -> Option<String> {
    let topics: Option<Vec<_>> = spec.topics.iter().map(TopicPattern::as_topic).collect();
    topics?.iter().min().map(|topic| catalog.names.topic(topic))
}

/// Opens a subscription; when it is new, every partition has its position before this returns.
pub(crate) async fn open(
    catalog: &Arc<Catalog>,
    outbox: &Arc<Outbox>,
    spec: SubscriptionSpec,
) -> Result<Arc<Instance>> {
    let named = |error: tidings_core::Error| error.with_context("subscription", &spec.name);
    let exists = catalog.check_subscription(&spec).await.map_err(named)?;
    catalog.prepare(&spec, exists).await.map_err(named)?;
    let mode = if spec.ordering == Ordering::Key { Mode::Keyed } else { Mode::Shared };
    let instance = Instance::new(catalog, outbox, spec.clone(), mode);
    let guard = KafkaSubscription::new(Arc::clone(&instance));
    let created = if exists { None } else { Some(expect(&instance).await.map_err(named)?) };
    join(&instance).map_err(named)?;
    if let Some(positions) = created {
        let deadline = Instant::now() + catalog.config.request_timeout.max(Duration::from_secs(30));
        let why = "the group has given no position to every partition in time";
        let told = timeout_at(deadline, positions).await;
        told.map_err(|_| named(error(ErrorKind::Timeout, why)))?.unwrap_or_else(|_| Err(closed())).map_err(named)?;
        finish_creation(&instance).await.map_err(named)?;
    }
    instance.is_created.store(true, SeqCst);
    instance.state.lock().is_open = true;
    let mut guard = guard;
    guard.open = false;
    Ok(instance)
}

/// Has the thread tell when every partition that there is now has a position.
async fn expect(instance: &Arc<Instance>) -> Result<oneshot::Receiver<Result<()>>> {
    let topics = instance.spec.topics.clone();
    let mut expected = blocking(&instance.catalog, move |catalog| catalog.matching(&topics)).await?;
    expected.push((instance.address.to_string(), 1));
    expected.push((instance.later.to_string(), RUNGS));
    let (tell, told) = oneshot::channel();
    *instance.opening.lock() = Some(Opening { expected, tell });
    Ok(told)
}

fn join(instance: &Arc<Instance>) -> Result<()> {
    let (catalog, spec) = (&instance.catalog, &instance.spec);
    let consumer = instance.consumer(&client::member(&catalog.config, &catalog.names.group(&spec.name))?)?;
    let mut topics: Vec<String> = spec.topics.iter().map(|topic| catalog.names.subscribed(topic)).collect();
    if instance.anchor == instance.address {
        topics.push(instance.address.to_string());
    }
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    consumer.subscribe(&topics).map_err(|e| failed("the group cannot be joined", e))?;
    Driver::start(consumer, instance)
}

/// Writes down what the subscription was created with, unless another instance did before, with the same.
async fn finish_creation(instance: &Arc<Instance>) -> Result<()> {
    let terms = Terms::of(&instance.spec);
    let encoded = serde_json::to_vec(&terms);
    let encoded = encoded.map_err(|e| error(ErrorKind::Internal, "terms cannot be written").with_source(e))?;
    let record = BaseRecord::to(&instance.later).partition(TERMS).payload(&encoded[..]).key(&[][..]);
    instance.outbox.write(record).await?;
    let name = instance.spec.name.clone();
    let first = blocking(&instance.catalog, move |catalog| catalog.terms(&name)).await?;
    first.map_or(Ok(()), |first| first.check(&terms))
}
