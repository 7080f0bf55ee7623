//! What a broker brings to the scenarios.

use crate::Result;
use crate::event::Sample;
use crate::measure::Meter;
use crate::scenario::LIMITS;
use std::sync::Arc;
use tidings::transport::Transport;

/// A raw loop of a broker: the native client, used the best way that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw {
    pub name: &'static str,
    /// What it does, in the report.
    pub what: &'static str,
    /// Its messages carry no attributes: it moves fewer bytes than the SDK has to.
    pub bare: bool,
}

/// How much may be under way.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Unconfirmed publishes.
    pub window: usize,
    /// Deliveries read and not confirmed as settled.
    pub in_flight: usize,
}

/// A broker and its raw client. The first raw loop of each kind is the one that the others are compared with.
pub trait Broker: Send + Sync + 'static {
    const NAME: &'static str;
    const PUBLISH: &'static [Raw];
    const CONSUME: &'static [Raw];
    /// What becomes of an event that was handled, in the report: not every broker confirms an ack.
    const SETTLED: &'static str;
    /// How many events each loop has, if nothing else is said: what takes a few minutes in all.
    const COUNT: u64 = 30_000;
    /// How many events are read and not settled at the most, by the transport and by handlers.
    const IN_FLIGHT: usize = LIMITS.in_flight;
    /// It is in this process, and so is compared with channels too.
    const IN_PROCESS: bool = false;

    /// The versions of broker and client.
    fn versions(&self) -> impl Future<Output = Result<String>> + Send;

    /// A transport in a namespace of its own.
    fn connect(&self, namespace: &str) -> impl Future<Output = Result<Arc<dyn Transport>>> + Send;

    /// Publishes events to a topic that a transport has provisioned, each when it is due by the meter, which is told of each
    /// confirmation.
    fn publish<E: Sample>(
        &self,
        raw: Raw,
        namespace: &str,
        limits: Limits,
        meter: &Meter,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Consumes what a topic holds, from the beginning, until the meter has seen enough; told of each event handled.
    fn consume<E: Sample>(
        &self,
        raw: Raw,
        namespace: &str,
        limits: Limits,
        meter: &Meter,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Publishes while it consumes.
    fn round_trip<E: Sample>(
        &self,
        namespace: &str,
        limits: Limits,
        sent: &Arc<Meter>,
        meter: &Meter,
    ) -> impl Future<Output = Result<()>> + Send {
        async move {
            let publish = self.publish::<E>(Self::PUBLISH[0], namespace, limits, sent);
            tokio::try_join!(publish, self.consume::<E>(Self::CONSUME[0], namespace, limits, meter))?;
            Ok(())
        }
    }

    /// Removes all that was made.
    fn clean_up(&self) -> impl Future<Output = Result<()>> + Send;
}
