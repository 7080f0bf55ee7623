//! Publishing, by the transport and by the SDK.

use crate::Result;
use crate::broker::{Broker, Limits};
use crate::consume::prepare;
use crate::event::{Sample, encode};
use crate::measure::Meter;
use crate::scenario::{LIMITS, Loop, SOURCE, provisioned};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings::transport::{Destination, Ordering, PublishFailure, Transport, submit_and_wait};
use tidings::{Bus, Message, MessageId, Topic};

/// How many messages the transport is handed at once; the window is a multiple.
const SUBMITTED: usize = 50;
/// How many events one call of `publish_all` takes.
const ALL: u64 = 10_000;

pub(crate) async fn publish<B: Broker, E: Sample>(
    broker: &B,
    of: Loop,
    namespace: &str,
    meter: &Arc<Meter>,
    limits: Limits,
) -> Result<()> {
    let (transport, bus) = provisioned::<B, E>(broker, namespace).await?;
    prepare::<E>(&transport, Ordering::None, limits.in_flight).await?;
    match of {
        Loop::Raw(raw) => broker.publish::<E>(raw, namespace, limits, meter).await?,
        Loop::Transport => submit::<E>(&transport, meter).await?,
        Loop::All => publish_all::<E>(&bus, meter).await?,
        _ => publish_each::<E>(&bus, meter, limits.window).await?,
    }
    Ok(bus.close(Duration::from_secs(5)).await?)
}

async fn submit<E: Sample>(transport: &Arc<dyn Transport>, meter: &Meter) -> Result<()> {
    let publisher = transport.publisher();
    let topic = Topic::new(E::TOPIC)?;
    let mut open = VecDeque::new();
    let mut number = 0;
    while number < meter.total() {
        if open.len() == LIMITS.window / SUBMITTED
            && let Some((count, oldest)) = open.pop_front()
        {
            confirmed(oldest, count, meter).await?;
        }
        let count = (SUBMITTED as u64).min(meter.total() - number);
        let batch: Result<Vec<_>> = (number..number + count)
            .map(|number| Ok((Destination::Topic(topic.clone()), message::<E>(number, &topic)?, None, false)))
            .collect();
        open.push_back((count, Box::pin(submit_and_wait(&*publisher, &batch?))));
        number += count;
    }
    for (count, oldest) in open {
        confirmed(oldest, count, meter).await?;
    }
    Ok(())
}

async fn confirmed(
    answers: impl Future<Output = Vec<(usize, PublishFailure)>>,
    count: u64,
    meter: &Meter,
) -> Result<()> {
    if let Some((_, failure)) = answers.await.pop() {
        return Err(failure.error.into());
    }
    meter.tick_many(count);
    Ok(())
}

/// As core makes it.
pub(crate) fn message<E: Sample>(number: u64, topic: &Topic) -> Result<Message> {
    let (event, now) = (E::new(number), SystemTime::now());
    let mut message = Message::new(MessageId::new(now), SOURCE, E::NAME, topic.clone());
    message = message.with_payload(E::CONTENT, encode(&event)?);
    (message.key, message.time, message.recorded_time) = (event.key(), Some(now), Some(now));
    Ok(message)
}

pub(crate) async fn publish_each<E: Sample>(bus: &Bus, meter: &Meter, window: usize) -> Result<()> {
    let publish = |number| async move {
        meter.due(number).await;
        bus.publish(&E::new(number)).await
    };
    let mut confirmed = stream::iter(0..meter.total()).map(publish).buffered(window);
    while confirmed.try_next().await?.is_some() {
        meter.tick();
    }
    Ok(())
}

pub(crate) async fn publish_all<E: Sample>(bus: &Bus, meter: &Meter) -> Result<()> {
    let mut number = 0;
    while number < meter.total() {
        // The warm-up by itself, because events are counted call by call.
        let end = if number < meter.warm_up() { meter.warm_up() } else { meter.total() };
        let count = ALL.min(end - number);
        let events: Vec<_> = (number..number + count).map(E::new).collect();
        bus.publish_all(&events).await?;
        meter.tick_many(count);
        number += count;
    }
    Ok(())
}
