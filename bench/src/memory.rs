//! The memory transport, beside a bounded channel whose receiver sends back an ack.

use crate::Result;
use crate::broker::{Broker, Limits, Raw};
use crate::event::{Sample, encode, handle};
use crate::measure::Meter;
use crate::through::channel;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use tidings::memory::MemoryConfig;
use tidings::transport::Transport;
use tidings::{BusConfig, Connect};
use tokio::sync::{mpsc, oneshot};

const PUBLISHED: Raw =
    Raw { name: "raw", what: "a bounded channel of tokio, whose receiver sends back an ack for each", bare: false };
const CONSUMED: Raw = Raw {
    name: "raw",
    what: "a bounded channel of tokio, whose receiver sends back an ack for each; filled meanwhile, by a task that encodes",
    bare: false,
};

/// More than all events need.
const ALL: usize = usize::MAX / 4;

#[derive(Debug)]
pub struct Memory;

impl Memory {
    /// A broker that publishing waits for, if it has so many bytes that are not settled.
    pub(crate) async fn bounded(capacity: usize, retain: usize) -> Result<Arc<dyn Transport>> {
        let config = MemoryConfig { capacity, retain, ..MemoryConfig::default() };
        let (transport, _): (_, BusConfig) = config.connect().await?;
        Ok(transport)
    }
}

impl Broker for Memory {
    const NAME: &'static str = "memory";
    const PUBLISH: &'static [Raw] = &[PUBLISHED];
    const CONSUME: &'static [Raw] = &[CONSUMED];
    const SETTLED: &'static str = "acked";
    const IN_PROCESS: bool = true;

    async fn versions(&self) -> Result<String> {
        Ok("in this process".into())
    }

    async fn connect(&self, _: &str) -> Result<Arc<dyn Transport>> {
        Self::bounded(ALL, ALL).await
    }

    async fn publish<E: Sample>(&self, _: Raw, _: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let (sender, mut receiver) = mpsc::channel::<(Bytes, oneshot::Sender<()>)>(limits.window);
        let log = tokio::spawn(async move {
            let mut log = Vec::new();
            while let Some((payload, ack)) = receiver.recv().await {
                log.push(payload);
                let _ = ack.send(());
            }
            log.len()
        });
        let mut open = VecDeque::with_capacity(limits.window);
        for number in 0..meter.total() {
            if open.len() == limits.window
                && let Some(oldest) = open.pop_front()
            {
                let oldest: oneshot::Receiver<()> = oldest;
                oldest.await?;
                meter.tick();
            }
            let (ack, acked) = oneshot::channel();
            sender.send((encode(&E::new(number))?, ack)).await?;
            open.push_back(acked);
        }
        for acked in open {
            acked.await?;
            meter.tick();
        }
        drop(sender);
        log.await?;
        Ok(())
    }

    async fn consume<E: Sample>(&self, _: Raw, namespace: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let sent = Arc::new(Meter::new(0, meter.total()));
        self.round_trip::<E>(namespace, limits, &sent, meter).await
    }

    async fn round_trip<E: Sample>(&self, _: &str, limits: Limits, sent: &Arc<Meter>, meter: &Meter) -> Result<()> {
        let take = |payload: Bytes| Ok(handle::<E>(&payload, meter).map(|()| 1)?);
        channel(limits.in_flight, sent, |number| Ok(encode(&E::new(number))?), take, meter).await
    }

    async fn clean_up(&self) -> Result<()> {
        Ok(())
    }
}
