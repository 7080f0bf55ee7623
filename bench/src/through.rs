//! One publishes while another consumes, in this process: the memory transport and a typed handler, beside channels.

use crate::broker::Raw;
use crate::consume::{How, check_settled, polled, serve, service};
use crate::event::{Plain, Sample, encode, handle};
use crate::measure::Meter;
use crate::memory::Memory;
use crate::publish::{message, publish_each};
use crate::scenario::{LIMITS, Loop, PATIENCE, bus};
use crate::{BoxError, Result};
use bytes::Bytes;
use std::future::poll_fn;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tidings::transport::{Destination, Ordering, Polled, Publisher, TopicSpec, Topology, Transport, submit_and_wait};
use tidings::{Event, Message, Topic};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

pub const ACKED: Raw = Raw {
    name: "raw",
    what: "a bounded channel of tokio, whose receiver sends back an ack for each through another; 256 bytes that are ready",
    bare: true,
};
pub const ACKED_BATCHES: Raw = Raw {
    name: "raw",
    what: "a bounded channel of `Vec`s of 128 times 256 bytes that are ready, whose receiver sends back an ack for each",
    bare: true,
};
pub const ACKED_TYPED: Raw = Raw {
    name: "raw",
    what: "a bounded channel of tokio, whose receiver sends back an ack for each through another; encoded and decoded",
    bare: true,
};

/// How many are in a batch.
pub const BATCH: usize = 128;
/// How many `submit_and_wait` takes.
const SUBMITTED: usize = 64;

/// So many at a time; on a runtime of one thread, or on this one.
#[derive(Clone, Copy, Debug)]
pub struct Through {
    pub batch: usize,
    pub one_thread: bool,
}

pub async fn run(of: Loop, how: Through, meter: &Arc<Meter>) -> Result<()> {
    if !how.one_thread {
        return run_here(of, how.batch, meter).await;
    }
    let run = || {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { timeout(PATIENCE, run_here(of, how.batch, meter)).await? })
    };
    tokio::task::block_in_place(|| thread::scope(|scope| scope.spawn(run).join())).map_err(|_| "a panic")?
}

async fn run_here(of: Loop, batch: usize, meter: &Arc<Meter>) -> Result<()> {
    let (open, total, sent) = (LIMITS.in_flight, meter.total(), Arc::new(Meter::new(0, meter.total())));
    match of {
        Loop::Raw(ACKED_TYPED) => {
            let take = |payload: Bytes| Ok(handle::<Plain>(&payload, meter).map(|()| 1)?);
            channel(open, &sent, |number| Ok(encode(&Plain::new(number))?), take, meter).await
        }
        Loop::Raw(ACKED) => {
            let payload = encode(&Plain::new(0))?;
            channel(open, &sent, move |_| Ok(payload.clone()), |_| Ok(1), meter).await
        }
        Loop::Raw(_) => {
            let payload = encode(&Plain::new(0))?;
            let make = move |number| Ok(vec![payload.clone(); of_batch(number, batch, total)]);
            channel(open / batch, &sent, make, |batch| Ok(batch.len() as u64), meter).await
        }
        Loop::Transport => transport(batch, meter).await,
        _ => typed(&sent, meter).await,
    }
}

/// How many are in the batch of this number: the last may be smaller.
fn of_batch(number: u64, batch: usize, total: u64) -> usize {
    let left = total.saturating_sub(number * batch as u64);
    usize::try_from(left).unwrap_or(batch).min(batch)
}

/// One task sends, this one takes, says how many events that were, and sends back an ack; `open` may be without one.
pub(crate) async fn channel<T: Send + 'static>(
    open: usize,
    sent: &Arc<Meter>,
    make: impl Fn(u64) -> Result<T> + Send + 'static,
    mut take: impl FnMut(T) -> Result<u64>,
    meter: &Meter,
) -> Result<()> {
    let (sender, mut receiver) = mpsc::channel(open);
    let (ack, mut acks) = mpsc::channel(open);
    let sent = Arc::clone(sent);
    let producer = tokio::spawn(async move {
        for number in 0.. {
            sent.due(number).await;
            // Without an ack, nobody takes any more.
            if number >= open as u64 && acks.recv().await.is_none() {
                break;
            }
            if sender.send(make(number)?).await.is_err() {
                break;
            }
        }
        Ok::<_, BoxError>(())
    });
    while let Some(item) = receiver.recv().await {
        let count = take(item)?;
        ack.send(()).await?;
        if !meter.tick_many(count) {
            break;
        }
    }
    drop((receiver, ack));
    producer.await?
}

/// A broker that takes so many messages that are not acked, as the channels do, and one of them.
async fn bounded() -> Result<(Arc<dyn Transport>, Arc<Message>)> {
    let topic = Topic::new(Plain::TOPIC)?;
    let message = Arc::new(message::<Plain>(0, &topic)?);
    let transport = Memory::bounded(LIMITS.in_flight * message.size(), 0).await?;
    transport.provision(&Topology { topics: vec![TopicSpec::new(topic)], subscriptions: Vec::new() }).await?;
    Ok((transport, message))
}

async fn transport(batch: usize, meter: &Arc<Meter>) -> Result<()> {
    let (transport, message) = bounded().await?;
    let mut subscription = transport.subscribe(polled::<Plain>(&transport, Ordering::None, LIMITS.in_flight)?).await?;
    let producer = tokio::spawn(submit(transport.publisher(), message, batch, meter.total()));
    let (mut polled, mut more) = (Polled::default(), true);
    while more {
        poll_fn(|cx| subscription.poll_batch(cx, BATCH, &mut polled)).await?;
        polled.notices.clear();
        let count = polled.deliveries.len() as u64;
        polled.deliveries.drain(..).for_each(|delivery| delivery.acker.ack());
        more = meter.tick_many(count);
    }
    producer.await??;
    check_settled(meter.total(), subscription.close(Instant::now() + Duration::from_secs(10)).await.applied)
}

async fn submit(publisher: Arc<dyn Publisher>, message: Arc<Message>, batch: usize, total: u64) -> Result<()> {
    let posts = vec![(Destination::Topic(message.topic.clone()), message, None, false); batch];
    for number in 0..total.div_ceil(batch as u64) {
        for part in posts[..of_batch(number, batch, total)].chunks(SUBMITTED) {
            if let Some((_, failure)) = submit_and_wait(&*publisher, part).await.pop() {
                return Err(failure.error.into());
            }
        }
    }
    Ok(())
}

async fn typed(sent: &Arc<Meter>, meter: &Arc<Meter>) -> Result<()> {
    let (transport, _) = bounded().await?;
    let bus = bus(&transport)?;
    let service = service::<Plain>(&transport, meter, How::default());
    service.provision(&bus).await?;
    let (publish, sent) = (bus.clone(), Arc::clone(sent));
    let producer = tokio::spawn(async move { publish_each::<Plain>(&publish, &sent, LIMITS.in_flight).await });
    serve(&bus, service, meter, 1).await?;
    producer.await??;
    Ok(bus.close(Duration::from_secs(5)).await?)
}
