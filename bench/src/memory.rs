//! The memory transport, beside a bounded channel whose receiver sends back an ack.

use crate::Result;
use crate::broker::{Broker, Limits, Raw};
use crate::event::{Sample, encode, handle};
use crate::measure::Meter;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use tidings::memory::MemoryConfig;
use tidings::transport::Transport;
use tidings::{BusConfig, Connect};
use tokio::sync::{mpsc, oneshot};

const CHANNEL: Raw =
    Raw { name: "raw", what: "a bounded channel of tokio, whose receiver sends back an ack for each", bare: false };

#[derive(Debug)]
pub struct Memory;

impl Broker for Memory {
    const NAME: &'static str = "memory";
    const PUBLISH: &'static [Raw] = &[CHANNEL];
    const CONSUME: &'static [Raw] = &[CHANNEL];

    async fn versions(&self) -> Result<String> {
        Ok("in this process".into())
    }

    async fn connect(&self, namespace: &str) -> Result<Arc<dyn Transport>> {
        let config = MemoryConfig {
            capacity: usize::MAX / 4,
            retain: usize::MAX / 4,
            ..MemoryConfig::from_url(&format!("memory://{namespace}"))?
        };
        let (transport, _): (_, BusConfig) = config.connect().await?;
        Ok(transport)
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

    async fn consume<E: Sample>(&self, _: Raw, _: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let (sender, mut receiver) = mpsc::channel::<(u64, Bytes)>(limits.in_flight);
        let (ack, mut acks) = mpsc::channel::<u64>(limits.in_flight);
        let total = meter.total();
        let producer = tokio::spawn(async move {
            let mut sent = VecDeque::new();
            for number in 0..total {
                let payload = encode(&E::new(number)).unwrap_or_default();
                sent.push_back(payload.clone());
                if sender.send((number, payload)).await.is_err() {
                    return;
                }
                while sent.len() >= limits.in_flight && acks.recv().await.is_some() {
                    sent.pop_front();
                }
            }
        });
        while let Some((number, payload)) = receiver.recv().await {
            handle::<E>(&payload)?;
            ack.try_send(number).ok();
            if !meter.tick() {
                break;
            }
        }
        drop(receiver);
        producer.abort();
        Ok(())
    }

    async fn clean_up(&self) -> Result<()> {
        Ok(())
    }
}
