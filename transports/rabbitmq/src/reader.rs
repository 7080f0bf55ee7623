//! Reads the queues of a subscription into its window and writes its settlements: the one owner of its channel, which it
//! makes anew whenever it is lost.

use crate::consumers::{Came, Consumers, close_first};
use crate::error::{error, failed};
use crate::link::{Link, Outages};
use crate::members::{GREETING, Greeting, Members};
use crate::settle::{Acks, Desk, Frame};
use crate::subscription::Close;
use crate::topology::{Queues, Topology};
use crate::window::Item;
use crate::wire::{Received, count, decode};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions,
    BasicRejectOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{Notice, Ordering, Role, SubscriptionSpec};
use tidings_core::{Backoff, Clock, ErrorKind, Result};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout, timeout_at};

/// Between tries to open a channel again.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
/// How many deliveries are taken in at a time.
const BATCH: usize = 256;
/// How often an instance looks at who else is there.
const LOOK: Duration = Duration::from_millis(250);
/// Before an instance says what its role is, it hears who else is there.
const HEARING: Duration = Duration::from_millis(200);
/// What was on its way to this instance when another took a slot from it has come by then.
const SETTLED: Duration = Duration::from_millis(300);

/// What a reader needs.
pub(crate) struct Reader {
    pub(crate) spec: SubscriptionSpec,
    pub(crate) queues: Queues,
    pub(crate) link: Arc<Link>,
    /// The other connection: one that publishes is stopped by an alarm, and this one's acks must not be.
    pub(crate) greetings: Arc<Link>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) outages: Arc<Outages>,
    pub(crate) desk: Arc<Desk>,
}

/// An open channel with its consumers.
pub(crate) struct Session {
    pub(crate) channel: Channel,
    consumers: Option<Consumers>,
    /// By slot, which consumer is the current one.
    current: Vec<u32>,
    acks: Acks,
    prefetch: u64,
    members: Option<Members>,
    heard: Option<lapin::Consumer>,
    greeter: Option<Channel>,
    role: Option<Role>,
    since: Instant,
    due: HashMap<usize, Instant>,
    handle: Handle,
}

impl Drop for Session {
    fn drop(&mut self) {
        close_first(&self.handle, &self.channel, (self.consumers.take(), self.heard.take()));
    }
}

/// Why a session has ended.
enum End {
    /// Nobody holds the subscription any more.
    Dropped,
    Closed(Close),
    Failed(tidings_core::Error),
}

impl Reader {
    /// Reads for as long as somebody holds the subscription, beginning with a session that is open.
    pub(crate) async fn run(self, first: Session, mut close: mpsc::Receiver<Close>) {
        let (mut session, mut outage) = (Some(first), None);
        let mut round = 0;
        loop {
            let opened = match session.take() {
                Some(session) => Ok(session),
                None => tokio::select! {
                    opened = self.open_again(round) => opened,
                    close = close.recv() => return answer(close),
                },
            };
            let end = match opened {
                Ok(session) => {
                    outage = None;
                    let since = Instant::now();
                    let end = self.read(session, &mut close).await;
                    round = if since.elapsed() > Duration::from_secs(5) { 0 } else { round };
                    end
                }
                Err(error) => End::Failed(error),
            };
            self.desk.window.lock().lose();
            match end {
                End::Dropped => return,
                End::Closed(close) => return answer(Some(close)),
                End::Failed(_) if self.link.is_closed() => return self.desk.window.lock().wake(),
                End::Failed(error) => {
                    round += 1;
                    let reason = || error.with_context("subscription", &self.spec.name).to_string().into();
                    outage = outage.or_else(|| Some(self.outages.begin(reason())));
                }
            }
        }
    }

    async fn open_again(&self, round: u32) -> Result<Session> {
        if round > 0 {
            sleep(AGAIN.delay(round)).await;
        }
        match self.open().await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Somebody has deleted it.
                self.topology.restore(&self.spec).await?;
                self.open().await
            }
            session => session,
        }
    }

    /// Opens a channel and consumes.
    pub(crate) async fn open(&self) -> Result<Session> {
        // Not within the time of an answer: the connection may take longer to be repaired.
        self.link.live().await?;
        let channel = self.link.channel().await?;
        let opening = self.consume(channel);
        let session = self.link.within("consuming", opening).await?;
        self.desk.window.lock().open();
        Ok(session)
    }

    async fn consume(&self, channel: Channel) -> Result<Session> {
        let each = self.spec.max_in_flight.div_ceil(self.queues.len()).max(1);
        let prefetch = u16::try_from(each).unwrap_or(u16::MAX);
        let mut session = Session {
            channel,
            consumers: Some(Consumers::default()),
            current: vec![0; self.queues.len()],
            acks: Acks::default(),
            prefetch: u64::from(prefetch) * self.queues.len() as u64,
            members: None,
            heard: None,
            greeter: None,
            role: None,
            since: Instant::now(),
            due: HashMap::new(),
            handle: Handle::current(),
        };
        session.channel.basic_qos(prefetch, BasicQosOptions::default()).await.map_err(failed)?;
        if self.spec.ordering == Ordering::Key {
            session.members = Some(Members::join(self.queues.len(), now_us()));
            session.heard = Some(self.listen(&session.channel).await?);
        }
        for slot in 0..self.queues.len() {
            self.add_consumer(&mut session, slot).await?;
        }
        Ok(session)
    }

    async fn add_consumer(&self, session: &mut Session, slot: usize) -> Result<()> {
        let number = session.current[slot];
        let mut arguments = FieldTable::default();
        if let Some(members) = &session.members {
            arguments.insert("x-priority".into(), AMQPValue::LongLongInt(members.priority(slot)));
        }
        let (queue, tag) = (self.queues[slot].clone(), tag_of(slot, number)?);
        let options = BasicConsumeOptions::default();
        let consumer = session.channel.basic_consume(queue, tag, options, arguments).await.map_err(failed)?;
        if let Some(consumers) = &mut session.consumers {
            consumers.push(slot, number, consumer);
        }
        Ok(())
    }

    /// Hears the greetings of the other instances.
    async fn listen(&self, channel: &Channel) -> Result<lapin::Consumer> {
        let options = QueueDeclareOptions::exclusive().auto_delete();
        let queue = channel.queue_declare("".into(), options, FieldTable::default()).await.map_err(failed)?;
        let (name, members) = (queue.name().clone(), self.topology.names.members()?);
        let key = crate::error::short(self.spec.name.as_str())?;
        let bound = channel.queue_bind(name.clone(), members, key, QueueBindOptions::default(), FieldTable::default());
        bound.await.map_err(failed)?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        channel.basic_consume(name, "members".into(), options, FieldTable::default()).await.map_err(failed)
    }

    async fn read(&self, mut session: Session, close: &mut mpsc::Receiver<Close>) -> End {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut greeted = Instant::now() - GREETING;
        if session.members.is_none() {
            self.tell_role(&mut session, Role::Active { slots: Vec::new() });
        }
        loop {
            let due = self.next_due(&session);
            let done = tokio::select! {
                biased;
                asked = close.recv() => return self.finish(session, asked).await,
                () = self.desk.settled.notified() => self.write(&mut session, false).await,
                came = next(&mut session.consumers) => self.take_in(&mut session, came),
                greeting = hear(&mut session.heard) => self.hear(&mut session, greeting).await,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.desk.window.lock().advance(Instant::now());
                    self.write(&mut session, false).await
                }
                _ = look.tick(), if session.members.is_some() => {
                    let greet = greeted.elapsed() >= GREETING;
                    if greet {
                        greeted = Instant::now();
                    }
                    self.look_around(&mut session, greet).await
                }
            };
            if let Err(error) = done {
                self.account(&session);
                return End::Failed(error);
            }
        }
    }

    fn next_due(&self, session: &Session) -> Option<Instant> {
        let window = self.desk.window.lock().next_due();
        window.into_iter().chain(session.acks.next_due()).min()
    }

    /// Takes in what has come, and what else has come meanwhile.
    fn take_in(&self, session: &mut Session, first: Came) -> Result<()> {
        let (mut items, mut result) = (Vec::new(), Ok(()));
        let mut next_one = Some(first);
        while let Some((slot, number, came)) = next_one {
            match came {
                Some(Ok(delivery)) => items.push(item(slot, delivery)),
                Some(Err(failure)) => result = Err(failed(failure)),
                None if session.current[slot] == number => {
                    let why = "the server has cancelled the consumer: the queue is deleted, or its node is down";
                    result = result.and(Err(error(ErrorKind::Connection, why)));
                }
                // Another has taken its place.
                None => {}
            }
            if result.is_err() || items.len() >= BATCH {
                break;
            }
            next_one = next(&mut session.consumers).now_or_never();
        }
        if let Some(consumers) = &mut session.consumers {
            consumers.turn();
        }
        for item in &items {
            session.acks.came(item.tag);
            if !session.due.is_empty() {
                session.due.remove(&(item.slot as usize));
            }
        }
        let mut window = self.desk.window.lock();
        for item in items {
            let position = window.position(&item);
            window.push(position, item);
        }
        window.wake();
        result
    }

    /// Writes what was settled.
    async fn write(&self, session: &mut Session, flush: bool) -> Result<()> {
        let told = self.desk.window.lock().take_told(Instant::now(), flush);
        let before = session.acks.written();
        let frames = session.acks.frames(told, Instant::now(), flush);
        write_frames(&session.channel, &frames).await?;
        let written = session.acks.written() - before;
        // What was written belongs to this session alone.
        self.desk.window.lock().written(usize::try_from(written).unwrap_or(usize::MAX));
        Ok(())
    }

    /// Counts how the settlements of a channel that is lost have ended.
    fn account(&self, session: &Session) {
        let mut window = self.desk.window.lock();
        let applied = session.acks.applied(session.prefetch);
        window.flushed.applied += applied;
        window.flushed.unknown += session.acks.written() - applied;
        window.flushed.stale += session.acks.open();
    }

    /// Flushes, says goodbye and closes the channel, which gives back in place what is unsettled.
    async fn finish(&self, mut session: Session, asked: Option<Close>) -> End {
        let deadline = asked.as_ref().map_or_else(|| Instant::now() + Duration::from_secs(10), |close| close.deadline);
        let flushing = async {
            self.write(&mut session, true).await?;
            self.see_applied(&mut session).await?;
            if session.members.is_some() {
                self.greet(&mut session, true).await;
            }
            session.channel.close(200, "closed".into()).await.map_err(failed)
        };
        let flushed = timeout_at(deadline, flushing).await;
        let mut window = self.desk.window.lock();
        window.closed = true;
        match flushed {
            Ok(Ok(())) => window.flushed.applied += session.acks.written(),
            _ => {
                let applied = session.acks.applied(session.prefetch);
                window.flushed.applied += applied;
                window.flushed.unknown += session.acks.written() + session.acks.open() - applied;
            }
        }
        drop(window);
        asked.map_or(End::Dropped, End::Closed)
    }

    /// Waits until the queues have applied what was written. Quorum queues take 32 settlements at a time, and those that a
    /// channel still has to pass on are lost with it (tried on 4.0.5); what begins or ends a consumer goes through the queue's
    /// log behind them. Where keys have an owner none may end here: its stand-by would overtake what is unsettled.
    async fn see_applied(&self, session: &mut Session) -> Result<()> {
        if session.acks.written() == 0 {
            return Ok(());
        }
        for (slot, queue) in self.queues.iter().enumerate() {
            if session.members.is_some() {
                let mut arguments = FieldTable::default();
                arguments.insert("x-priority".into(), AMQPValue::LongLongInt(i64::MIN / 2));
                let tag = crate::error::short(format!("tidings-{slot}-last"))?;
                let options = BasicConsumeOptions::default();
                let last =
                    session.channel.basic_consume(queue.clone(), tag, options, arguments).await.map_err(failed)?;
                if let Some(consumers) = &mut session.consumers {
                    // Kept like the others: dropped, it would be cancelled.
                    consumers.push(slot, u32::MAX, last);
                }
            } else {
                let tag = tag_of(slot, session.current[slot])?;
                session.channel.basic_cancel(tag, BasicCancelOptions::default()).await.map_err(failed)?;
            }
        }
        // By the time this is answered the channel has passed on what it had kept back.
        let prefetch = u16::try_from(session.prefetch).unwrap_or(u16::MAX);
        session.channel.basic_qos(prefetch, BasicQosOptions::default()).await.map_err(failed)
    }

    // ---- Who else is there ----

    async fn hear(&self, session: &mut Session, greeting: Option<lapin::Result<Delivery>>) -> Result<()> {
        let Some(greeting) = greeting else {
            return Err(error(ErrorKind::Connection, "the server has cancelled the consumer of the greetings"));
        };
        let greeting = greeting.map_err(failed)?;
        session.acks.passed(greeting.delivery_tag);
        let Ok(greeting) = serde_json::from_slice::<Greeting>(&greeting.data) else { return Ok(()) };
        let changed = session.members.as_mut().map(|members| members.heard(greeting, Instant::now()));
        if changed.is_some_and(|changed| changed.greet) {
            self.greet(session, false).await;
        }
        self.update_role(session);
        Ok(())
    }

    async fn look_around(&self, session: &mut Session, greet: bool) -> Result<()> {
        if greet {
            self.greet(session, false).await;
        }
        let Some(members) = session.members.as_mut() else { return Ok(()) };
        // While the server takes no greetings, nobody can be heard.
        if !self.greetings.is_blocked() {
            members.forget(Instant::now());
        }
        let due = members.due();
        session.due.retain(|slot, _| due.contains(slot));
        let mut taken = false;
        for slot in due {
            let since = *session.due.entry(slot).or_insert_with(Instant::now);
            if since.elapsed() >= SETTLED && self.has_let_go(session, slot).await? {
                self.take_slot(session, slot).await?;
                taken = true;
            }
        }
        if taken {
            self.greet(session, false).await;
        }
        self.update_role(session);
        Ok(())
    }

    /// Whether nothing of a slot is here or on its way here: else its consumer must stay, or others would overtake that.
    async fn has_let_go(&self, session: &mut Session, slot: usize) -> Result<bool> {
        let number = u32::try_from(slot).unwrap_or(u32::MAX);
        if self.desk.window.lock().has_of(number) {
            return Ok(false);
        }
        // What was sent before the answer to this has come before it.
        let prefetch = u16::try_from(session.prefetch / self.queues.len() as u64).unwrap_or(u16::MAX);
        session.channel.basic_qos(prefetch, BasicQosOptions::default()).await.map_err(failed)?;
        self.take_in_all(session)?;
        // What has come since shows that it is the active one still.
        Ok(session.due.contains_key(&slot) && !self.desk.window.lock().has_of(number))
    }

    /// Takes in what has come, without waiting for more.
    fn take_in_all(&self, session: &mut Session) -> Result<()> {
        while let Some(came) = next(&mut session.consumers).now_or_never() {
            self.take_in(session, came)?;
        }
        Ok(())
    }

    /// Takes a slot from another instance: the broker gives it once that one has settled what it has.
    async fn take_slot(&self, session: &mut Session, slot: usize) -> Result<()> {
        let old = tag_of(slot, session.current[slot])?;
        session.current[slot] += 1;
        session.channel.basic_cancel(old, BasicCancelOptions::default()).await.map_err(failed)?;
        self.take_in_all(session)?;
        if let Some(members) = session.members.as_mut() {
            members.take(slot, now_us());
        }
        session.due.remove(&slot);
        self.add_consumer(session, slot).await
    }

    fn update_role(&self, session: &mut Session) {
        let Some(members) = session.members.as_ref() else { return };
        if session.role.is_none() && session.since.elapsed() < HEARING {
            return;
        }
        let role = members.role();
        if session.role.as_ref() != Some(&role) {
            self.tell_role(session, role);
        }
    }

    fn tell_role(&self, session: &mut Session, role: Role) {
        session.role = Some(role.clone());
        let mut window = self.desk.window.lock();
        window.notices.push(Notice::Role(role));
        window.wake();
    }

    /// Says who this is; nobody is told if that fails, and the next time comes soon.
    async fn greet(&self, session: &mut Session, farewell: bool) {
        let Some(greeting) = session.members.as_ref().map(|members| members.greeting(farewell)) else { return };
        let Ok(bytes) = serde_json::to_vec(&greeting) else { return };
        let sent = async {
            let connected = session.greeter.as_ref().is_some_and(|channel| channel.status().connected());
            if !connected {
                session.greeter = Some(self.greetings.channel().await.ok()?);
            }
            let (exchange, key) =
                (self.topology.names.members().ok()?, crate::error::short(self.spec.name.as_str()).ok()?);
            let channel = session.greeter.as_ref()?;
            let options = BasicPublishOptions::default();
            channel.basic_publish(exchange, key, options, &bytes, BasicProperties::default()).await.ok()
        };
        if !self.greetings.is_blocked() {
            let _ = timeout(LOOK, sent).await;
        }
    }
}

fn answer(close: Option<Close>) {
    if let Some(close) = close {
        // Nobody may wait any more.
        let _ = close.answer.send(());
    }
}

/// The next of what has come. Without consumers it never does.
async fn next(consumers: &mut Option<Consumers>) -> Came {
    match consumers {
        Some(consumers) => consumers.next().await,
        None => std::future::pending().await,
    }
}

async fn hear(heard: &mut Option<lapin::Consumer>) -> Option<lapin::Result<Delivery>> {
    match heard {
        Some(heard) => heard.next().await,
        None => std::future::pending().await,
    }
}

fn item(slot: usize, delivery: Delivery) -> Item {
    let handed_out =
        ["x-acquired-count", "x-delivery-count"].into_iter().find_map(|name| count(&delivery.properties, name));
    let received =
        Received { routing_key: delivery.routing_key.into(), properties: delivery.properties, data: delivery.data };
    Item {
        message: decode(received).into(),
        slot: u32::try_from(slot).unwrap_or(u32::MAX),
        tag: delivery.delivery_tag,
        redelivered: delivery.redelivered,
        hand_outs: handed_out.map_or(0, |count| u32::try_from(count).unwrap_or(u32::MAX)),
    }
}

fn tag_of(slot: usize, number: u32) -> Result<ShortString> {
    crate::error::short(format!("tidings-{slot}-{number}"))
}

/// Queues all frames, in order, and waits until the last is written.
pub(crate) async fn write_frames(channel: &Channel, frames: &[Frame]) -> Result<()> {
    let Some((last, others)) = frames.split_last() else { return Ok(()) };
    for frame in others {
        // The first poll queues it; what it waits for is that it was written, and so was what follows.
        if let Some(Err(failure)) = write_frame(channel, *frame).now_or_never() {
            return Err(failed(failure));
        }
    }
    write_frame(channel, *last).await.map_err(failed)
}

async fn write_frame(channel: &Channel, frame: Frame) -> lapin::Result<()> {
    match frame {
        Frame::Ack { tag, multiple } => channel.basic_ack(tag, BasicAckOptions { multiple }).await,
        Frame::Nack(tag) => channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true }).await,
        Frame::Reject(tag) => channel.basic_reject(tag, BasicRejectOptions { requeue: true }).await,
    }
}

/// The time of day in microseconds.
pub(crate) fn now_us() -> i64 {
    let since = Clock::SYSTEM.now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
