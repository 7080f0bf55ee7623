//! Reads retained topics again: the stream of each, from its start, a time or a position.

use crate::consumers::close_first;
use crate::error::{error, failed};
use crate::link::Link;
use crate::reader::{now_us, write_frames};
use crate::settle::{Acks, Desk};
use crate::subscription::{Close, RabbitMqSubscription};
use crate::topology::Topology;
use crate::window::{Item, OF_QUEUES, Told, Window};
use crate::wire::{Received, SENT, count, decode};
use futures_util::FutureExt;
use futures_util::stream::{BoxStream, SelectAll, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{PrefixTracker, ReplayFrom, ReplaySpec};
use tidings_core::{Backoff, ErrorKind, Result};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

/// A message that nobody is to see: where a replay ends that began when it was sent.
const END: &str = "tidings-replay-end";
/// How far the clocks of the server and of those who publish may be apart, in seconds.
const CLOCKS: u64 = 60;
const AGAIN: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// A replay that can be opened.
pub(crate) struct Replay {
    spec: ReplaySpec,
    link: Arc<Link>,
    publishing: Arc<Link>,
    logs: Vec<Log>,
    desk: Arc<Desk>,
    /// What its end is marked with; none if it follows.
    mark: Option<String>,
}

/// The stream of one topic, and how far it was read.
struct Log {
    queue: ShortString,
    /// By offset.
    tracker: PrefixTracker,
    /// The first offset that is not settled with all before it.
    next: Option<u64>,
    /// Settled beyond that.
    beyond: BTreeSet<u64>,
    /// All that was there has come.
    complete: bool,
}

struct Session {
    channel: Channel,
    handle: Handle,
    streams: SelectAll<BoxStream<'static, (usize, Option<lapin::Result<Delivery>>)>>,
    acks: Acks,
    /// By delivery tag, which offset of which log it was.
    offsets: HashMap<u64, (usize, u64)>,
}

impl Drop for Session {
    fn drop(&mut self) {
        close_first(&self.handle, &self.channel, std::mem::take(&mut self.streams));
    }
}

impl Replay {
    pub(crate) async fn new(
        spec: ReplaySpec,
        link: &Arc<Link>,
        publishing: &Arc<Link>,
        topology: &Arc<Topology>,
    ) -> Result<Self> {
        if spec.max_in_flight == 0 || spec.max_in_flight > usize::from(u16::MAX) {
            return Err(error(ErrorKind::Config, "max_in_flight must be 1 to 65,535"));
        }
        let topics = topology.retained(&spec.topics).await?;
        if topics.is_empty() {
            let why = "a queue cannot be read again; provision the topic with `retained = true`, and what is published from \
                       then on can";
            let names: Vec<_> = spec.topics.iter().map(ToString::to_string).collect();
            return Err(error(ErrorKind::Unsupported, why).with_context("topics", names.join(", ")));
        }
        if matches!(spec.from, ReplayFrom::Position(position) if position >= OF_QUEUES) {
            let why =
                "a position in a queue says nothing of the topic's log; replay from a position that a replay has told";
            return Err(error(ErrorKind::Unsupported, why));
        }
        if matches!(spec.from, ReplayFrom::Position(_)) && topics.len() > 1 {
            let why = "each topic has positions of its own; replay from a position one topic at a time";
            return Err(error(ErrorKind::Unsupported, why));
        }
        let log = |topic| -> Result<Log> {
            let queue = topology.names.log(topic)?;
            Ok(Log { queue, tracker: PrefixTracker::default(), next: None, beyond: BTreeSet::new(), complete: false })
        };
        let logs = topics.iter().map(log).collect::<Result<Vec<_>>>()?;
        let mark = (!spec.follow).then(|| format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)));
        let desk = Desk::new(Window::new(true, spec.max_in_flight));
        Ok(Self { spec, link: Arc::clone(link), publishing: Arc::clone(publishing), logs, desk, mark })
    }

    /// Marks the end, and begins.
    pub(crate) async fn open(self) -> Result<RabbitMqSubscription> {
        if let Some(mark) = self.mark.clone() {
            self.link.within("the end of the replay", self.mark_end(&mark)).await?;
        }
        let (desk, link) = (Arc::clone(&self.desk), Arc::clone(&self.link));
        let first = self.session().await?;
        let (close, closing) = mpsc::channel(1);
        tokio::spawn(self.run(first, closing));
        Ok(RabbitMqSubscription::new(desk, link, close, true))
    }

    async fn mark_end(&self, mark: &str) -> Result<()> {
        let channel = self.publishing.confirming().await?;
        for log in &self.logs {
            let mut headers = FieldTable::default();
            headers.insert(END.into(), AMQPValue::LongString(mark.into()));
            let properties = BasicProperties::default().with_headers(headers).with_delivery_mode(2);
            let options = BasicPublishOptions { mandatory: true, immediate: false };
            let sent = channel.basic_publish("".into(), log.queue.clone(), options, b"", properties).await;
            match sent.map_err(failed)?.await.map_err(failed)? {
                lapin::Confirmation::Ack(None) => {}
                _ => {
                    return Err(
                        error(ErrorKind::NotFound, "the stream of the topic is gone").with_context("queue", &log.queue)
                    );
                }
            }
        }
        Ok(())
    }

    async fn session(&self) -> Result<Session> {
        self.link.live().await?;
        self.link.within("consuming", self.consume()).await
    }

    async fn consume(&self) -> Result<Session> {
        let channel = self.link.channel().await?;
        let prefetch = u16::try_from(self.spec.max_in_flight.div_ceil(self.logs.len()).max(1)).unwrap_or(u16::MAX);
        channel.basic_qos(prefetch, BasicQosOptions::default()).await.map_err(failed)?;
        let (handle, streams) = (Handle::current(), SelectAll::new());
        let mut session = Session { channel, handle, streams, acks: Acks::default(), offsets: HashMap::new() };
        for (n, log) in self.logs.iter().enumerate().filter(|(_, log)| !log.complete || log.tracker.open() > 0) {
            let mut arguments = FieldTable::default();
            arguments.insert("x-stream-offset".into(), self.offset(log));
            let (queue, tag) = (log.queue.clone(), crate::error::short(format!("replay-{n}"))?);
            let options = BasicConsumeOptions::default();
            let consumer = session.channel.basic_consume(queue, tag, options, arguments).await.map_err(failed)?;
            let ended = futures_util::stream::once(async move { (n, None) });
            session.streams.push(consumer.map(move |came| (n, Some(came))).chain(ended).boxed());
        }
        self.desk.window.lock().open();
        Ok(session)
    }

    /// Where to read from: where it was, if it was read before.
    fn offset(&self, log: &Log) -> AMQPValue {
        match (log.next, self.spec.from) {
            (Some(next), _) => AMQPValue::LongLongInt(i64::try_from(next).unwrap_or(i64::MAX)),
            (None, ReplayFrom::Beginning) => AMQPValue::LongString("first".into()),
            (None, ReplayFrom::Position(at)) => AMQPValue::LongLongInt(i64::try_from(at).unwrap_or(i64::MAX)),
            (None, ReplayFrom::Time(time)) => {
                // What marks the end has to come behind it, whatever the clocks say; what is too early is passed over.
                let now = u64::try_from(now_us()).unwrap_or_default() / 1_000_000;
                let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                AMQPValue::Timestamp(since.as_secs().min(now.saturating_sub(CLOCKS)))
            }
        }
    }

    async fn run(mut self, first: Session, mut close: mpsc::Receiver<Close>) {
        let mut session = Some(first);
        let mut round = 0;
        loop {
            let opened = match session.take() {
                Some(session) => Ok(session),
                None => {
                    sleep(AGAIN.delay(round)).await;
                    self.session().await
                }
            };
            let ended = match opened {
                Ok(session) => self.read(session, &mut close).await,
                Err(error) => Err(error),
            };
            self.desk.window.lock().lose();
            match ended {
                Ok(asked) => {
                    if let Some(asked) = asked {
                        let _ = asked.answer.send(());
                    }
                    return;
                }
                Err(_) if self.link.is_closed() => return self.desk.window.lock().wake(),
                Err(error) => {
                    round += 1;
                    tracing::warn!(%error, "rabbitmq: a replay begins anew where it was");
                }
            }
        }
    }

    async fn read(&mut self, mut session: Session, close: &mut mpsc::Receiver<Close>) -> Result<Option<Close>> {
        loop {
            let window = self.desk.window.lock().next_due();
            let due = window.into_iter().chain(session.acks.next_due()).min();
            tokio::select! {
                biased;
                asked = close.recv() => return self.finish(session, asked).await,
                () = self.desk.settled.notified() => self.write(&mut session, false).await?,
                came = session.streams.next(), if !session.streams.is_empty() => self.take_in(&mut session, came)?,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.desk.window.lock().advance(Instant::now());
                    self.write(&mut session, false).await?;
                }
            }
        }
    }

    async fn finish(&mut self, mut session: Session, asked: Option<Close>) -> Result<Option<Close>> {
        let deadline = asked.as_ref().map_or_else(|| Instant::now() + Duration::from_secs(5), |close| close.deadline);
        let flushing = async {
            self.write(&mut session, true).await?;
            session.channel.close(200, "closed".into()).await.map_err(failed)
        };
        let flushed = timeout_at(deadline, flushing).await.is_ok_and(|flushed| flushed.is_ok());
        let mut window = self.desk.window.lock();
        let written = session.acks.written();
        if flushed {
            window.flushed.applied += written;
        } else {
            window.flushed.unknown += written;
        }
        window.closed = true;
        drop(window);
        Ok(asked)
    }

    fn take_in(
        &mut self,
        session: &mut Session,
        first: Option<(usize, Option<lapin::Result<Delivery>>)>,
    ) -> Result<()> {
        let mut next = first;
        while let Some((n, came)) = next {
            let gone = || error(ErrorKind::Connection, "the server has cancelled the consumer of a stream");
            let delivery = came.ok_or_else(gone)?.map_err(failed)?;
            session.acks.came(delivery.delivery_tag);
            self.take_one(session, n, delivery);
            next = session.streams.next().now_or_never().flatten();
        }
        let complete = self.mark.is_some() && self.logs.iter().all(|log| log.complete);
        let mut window = self.desk.window.lock();
        window.complete |= complete;
        window.wake();
        Ok(())
    }

    fn take_one(&mut self, session: &mut Session, n: usize, delivery: Delivery) {
        let (tag, offset) = (delivery.delivery_tag, count(&delivery.properties, "x-stream-offset").unwrap_or_default());
        let Some(log) = self.logs.get_mut(n) else { return };
        log.next.get_or_insert(offset);
        let mark = mark_of(&delivery);
        log.complete |= mark.is_some() && mark == self.mark;
        let before = match self.spec.from {
            ReplayFrom::Position(position) => offset < position,
            // The server begins with the chunk that holds the time, to the second.
            ReplayFrom::Time(time) => !log.complete && published_before(&delivery, time),
            ReplayFrom::Beginning => false,
        };
        let settled = log.next.is_some_and(|next| offset < next) || log.beyond.contains(&offset);
        if mark.is_some() || before || settled || (log.complete && self.mark.is_some()) {
            if !settled {
                log.tracker.hand_out(offset);
                log.settle(offset);
            }
            let mut window = self.desk.window.lock();
            return window.told.push(Told::Ack(tag));
        }
        log.tracker.hand_out(offset);
        session.offsets.insert(tag, (n, offset));
        let received =
            Received { routing_key: delivery.routing_key.into(), properties: delivery.properties, data: delivery.data };
        let slot = u32::try_from(n).unwrap_or(u32::MAX);
        let item = Item { message: decode(received).into(), slot, tag, redelivered: false, hand_outs: 0 };
        self.desk.window.lock().push(offset, item);
    }

    async fn write(&mut self, session: &mut Session, flush: bool) -> Result<()> {
        let told = self.desk.window.lock().take_told(Instant::now(), flush);
        let mut settled = 0;
        for told in &told {
            let (Told::Ack(tag) | Told::Nack(tag) | Told::Reject(tag)) = told;
            if let Some((n, offset)) = session.offsets.remove(tag)
                && let Some(log) = self.logs.get_mut(n)
            {
                log.settle(offset);
                settled += 1;
            }
        }
        let frames = session.acks.frames(told, Instant::now(), flush);
        write_frames(&session.channel, &frames).await?;
        let mut window = self.desk.window.lock();
        window.written(settled);
        window.wake();
        Ok(())
    }
}

impl Log {
    fn settle(&mut self, offset: u64) {
        self.beyond.insert(offset);
        if let Some(end) = self.tracker.settle(offset) {
            self.next = Some(end + 1);
            self.beyond = self.beyond.split_off(&(end + 1));
        }
    }
}

fn mark_of(delivery: &Delivery) -> Option<String> {
    let mark = delivery.properties.headers().as_ref()?.inner().get(END)?;
    match mark {
        AMQPValue::LongString(mark) => Some(mark.to_string()),
        _ => Some(String::new()),
    }
}

/// Notes when a message is published, or due after `delay`.
pub(crate) fn sent(properties: BasicProperties, delay: Duration) -> BasicProperties {
    let mut headers = properties.headers().clone().unwrap_or_default();
    let due = now_us().saturating_add(i64::try_from(delay.as_micros()).unwrap_or(i64::MAX));
    headers.insert(SENT.into(), AMQPValue::LongLongInt(due));
    properties.with_headers(headers)
}

/// Whether it was published, or due, before `time`, as far as it says.
fn published_before(delivery: &Delivery, time: SystemTime) -> bool {
    if let Some(sent) = count(&delivery.properties, SENT) {
        return SystemTime::UNIX_EPOCH + Duration::from_micros(sent) < time;
    }
    let headers = delivery.properties.headers().as_ref();
    let recorded = headers.and_then(|headers| headers.inner().get("cloudEvents_recordedtime"));
    let recorded = recorded.and_then(AMQPValue::as_long_string).map(ToString::to_string);
    recorded.and_then(|text| tidings_core::from_rfc3339(&text)).is_some_and(|recorded| recorded < time)
}
