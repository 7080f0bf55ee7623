//! An open subscription, or a replay: one instance, its tasks and its end.

use crate::connection::Link;
use crate::error::{closed, error};
use crate::ownership;
use crate::settle::{NatsSettle, Writer, write};
use crate::source::{Driver, drive};
use crate::state::{Kind, Mode, Source, SourceId, State};
use crate::topology::{Catalog, ConsumerPlan, Part};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tidings_core::transport::{BoxFuture, Flushed, Ordering, Polled, Role, Subscription, SubscriptionSpec};
use tidings_core::{Error, ErrorKind, Result};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, Sleep, interval, sleep_until, timeout_at};

/// What the tasks of one instance share.
pub(crate) struct Instance {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) link: Arc<Link>,
    pub(crate) spec: SubscriptionSpec,
    pub(crate) state: Mutex<State>,
    pub(crate) writer: Writer,
    /// Something was settled, polled or stopped: there may be something to ask for.
    changed: Notify,
    /// It is being closed: ownership ends.
    pub(crate) closing: Notify,
    replay: bool,
    drivers: Mutex<HashMap<SourceId, Running>>,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// A task that reads one consumer.
struct Running {
    stop: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Instance {
    pub(crate) async fn start(
        catalog: &Arc<Catalog>,
        link: &Arc<Link>,
        spec: SubscriptionSpec,
        mode: Mode,
    ) -> Result<Arc<Self>> {
        let state = State::new(mode, spec.max_in_flight, catalog.ack_wait);
        let instance = Arc::new(Self {
            catalog: Arc::clone(catalog),
            link: Arc::clone(link),
            spec,
            state: Mutex::new(state),
            writer: Writer::default(),
            changed: Notify::new(),
            closing: Notify::new(),
            replay: mode == Mode::Replay,
            drivers: Mutex::default(),
            tasks: Mutex::default(),
        });
        let client = &catalog.api.client;
        let inbox = client.new_inbox();
        let answers = client.subscribe(format!("{inbox}.*")).await;
        let answers = answers.map_err(|e| error(ErrorKind::Connection, "cannot listen for answers").with_source(e))?;
        instance.spawn(write(Arc::clone(&instance), inbox, answers));
        if mode != Mode::Replay {
            instance.spawn(extend(Arc::clone(&instance)));
        }
        Ok(instance)
    }

    pub(crate) fn is_replay(&self) -> bool {
        self.replay
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().push(tokio::spawn(task).abort_handle());
    }

    pub(crate) fn changed(&self) {
        self.changed.notify_waiters();
    }

    pub(crate) fn change(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    /// Begins to read a consumer.
    pub(crate) fn read(
        self: &Arc<Self>,
        source: Source,
        plan: ConsumerPlan,
        pattern: Option<String>,
        end: Option<u64>,
    ) -> SourceId {
        let id = self.state.lock().open(source);
        let stop = Arc::new(Notify::new());
        let driver = Driver::new(Arc::clone(self), id, plan, pattern, end);
        let task = tokio::spawn(drive(driver, Arc::clone(&stop)));
        self.drivers.lock().insert(id, Running { stop, task });
        id
    }

    /// Ends the reading of a consumer; what was on its way is taken in before.
    pub(crate) async fn stop_reading(&self, id: SourceId) {
        let running = self.drivers.lock().remove(&id);
        if let Some(Running { stop, task }) = running {
            stop.notify_one();
            // A panic in it is logged by the runtime.
            let _ = task.await;
        }
    }

    /// Ends the reading of a consumer at once.
    pub(crate) fn abandon(&self, id: SourceId) {
        if let Some(running) = self.drivers.lock().remove(&id) {
            running.task.abort();
        }
        self.state.lock().lose(id);
    }

    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.state.lock();
        state.failed = Some(error);
        state.wake();
    }

    /// Ends all, as a crash does.
    pub(crate) fn kill(&self) {
        self.state.lock().die();
        self.drivers.lock().drain().for_each(|(_, running)| running.task.abort());
        self.tasks.lock().drain(..).for_each(|task| task.abort());
    }

    /// Waits until the server has confirmed what was settled.
    async fn flush(&self) {
        loop {
            let change = self.change();
            if self.state.lock().settling() == 0 {
                return;
            }
            change.await;
        }
    }

    /// Stops reading and gives back what is not settled, in order.
    pub(crate) async fn give_back(&self, ids: &[SourceId]) {
        for id in ids {
            self.stop_reading(*id).await;
        }
        {
            let mut state = self.state.lock();
            ids.iter().for_each(|id| state.give_back_all(*id, &self.writer));
        }
        self.writer.idle().await;
    }

    async fn end(&self) {
        self.flush().await;
        if self.spec.ordering == Ordering::Key && !self.replay {
            self.closing.notify_one();
            loop {
                let change = self.change();
                if self.state.lock().sources.is_empty() {
                    break;
                }
                change.await;
            }
        } else {
            let ids: Vec<_> = self.state.lock().sources.keys().copied().collect();
            self.give_back(&ids).await;
        }
    }
}

/// Tells the server, three times in the time it waits, that what is held is still being handled.
async fn extend(instance: Arc<Instance>) {
    let mut tick = interval(instance.catalog.ack_wait / 3);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        instance.state.lock().extend(&instance.writer);
        instance.changed();
    }
}

/// One instance. Dropping it without [`close`](Subscription::close) is a crash.
pub(crate) struct NatsSubscription {
    instance: Arc<Instance>,
    settle: Arc<NatsSettle>,
    /// Until the next event is due; made when one first is.
    sleep: Option<Pin<Box<Sleep>>>,
    open: bool,
}

enum Step {
    Ready,
    Wait(Option<Instant>),
}

impl NatsSubscription {
    pub(crate) fn new(instance: Arc<Instance>) -> Self {
        let settle = Arc::new(NatsSettle(Arc::downgrade(&instance)));
        Self { instance, settle, sleep: None, open: true }
    }

    fn step(&self, cx: &Context<'_>, max: usize, out: &mut Polled) -> Result<Step> {
        let mut state = self.instance.state.lock();
        if self.instance.link.is_closed() {
            return Err(closed().with_operation("receive"));
        }
        state.polled();
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
        if state.hand_out(max, &self.settle, &self.instance.catalog.names, out) {
            return Ok(Step::Ready);
        }
        state.park(cx.waker());
        Ok(Step::Wait(state.next_due()))
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

impl Subscription for NatsSubscription {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        loop {
            let step = self.step(cx, max, out);
            match step? {
                Step::Ready => return Poll::Ready(Ok(())),
                Step::Wait(due) => {
                    self.instance.changed();
                    match due {
                        None => return Poll::Pending,
                        Some(due) => std::task::ready!(self.poll_due(cx, due)),
                    }
                }
            }
        }
    }

    fn stop(&mut self) {
        let mut state = self.instance.state.lock();
        state.stopped = true;
        if state.mode == Mode::Shared {
            let ids: Vec<_> = state.sources.keys().copied().collect();
            ids.into_iter().for_each(|id| state.give_back_waiting(id, &self.instance.writer));
        }
        state.wake();
        drop(state);
        self.instance.changed();
    }

    fn close(mut self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed> {
        self.stop();
        self.open = false;
        let instance = Arc::clone(&self.instance);
        Box::pin(async move {
            // What was not told in time comes again.
            let _ = timeout_at(deadline, instance.end()).await;
            instance.kill();
            instance.state.lock().flushed
        })
    }
}

impl Drop for NatsSubscription {
    fn drop(&mut self) {
        if self.open {
            self.instance.kill();
        }
    }
}

/// Opens a subscription.
pub(crate) async fn open(catalog: &Arc<Catalog>, link: &Arc<Link>, spec: SubscriptionSpec) -> Result<Arc<Instance>> {
    let parts = catalog.subscription(&spec).await.map_err(|error| error.with_context("subscription", &spec.name))?;
    let mode = if spec.ordering == Ordering::Key { Mode::Keyed } else { Mode::Shared };
    let instance = Instance::start(catalog, link, spec, mode).await?;
    if mode == Mode::Keyed {
        ownership::start(&instance, parts).await?;
        return Ok(instance);
    }
    for (number, part) in (0..).zip(&parts) {
        read_part(&instance, part, number, 0).await?;
    }
    read_address(&instance, 0).await?;
    instance.state.lock().tell_role(Role::Active { slots: Vec::new() });
    Ok(instance)
}

/// Each stream has an order of its own: the slots of the n-th are told as these, from 0.
const SLOTS_OF_A_STREAM: u32 = 1 << 16;
/// The slots of what is sent to the address.
const ADDRESS: u32 = 1 << 31;

async fn read_part(instance: &Arc<Instance>, part: &Part, number: u32, slot: u32) -> Result<SourceId> {
    let plan = instance.catalog.plan(&instance.spec, part, slot).await?;
    let source = Source::new(Kind::Topic, slot, number * SLOTS_OF_A_STREAM + slot, &plan.stream);
    let pattern = part.patterns.first().map(ToString::to_string);
    ownership::take_over(instance, source, plan, pattern).await
}

async fn read_address(instance: &Arc<Instance>, slot: u32) -> Result<SourceId> {
    let plan = instance.catalog.address_plan(&instance.spec, slot);
    let source = Source::new(Kind::Address, slot, ADDRESS + slot, &plan.stream);
    ownership::take_over(instance, source, plan, None).await
}

/// Reads all consumers of one slot.
pub(crate) async fn read_slot(instance: &Arc<Instance>, parts: &[Part], slot: u32) -> Result<Vec<SourceId>> {
    let mut ids = Vec::with_capacity(parts.len() + 1);
    for (number, part) in (0..).zip(parts) {
        ids.push(read_part(instance, part, number, slot).await?);
    }
    ids.push(read_address(instance, slot).await?);
    Ok(ids)
}
