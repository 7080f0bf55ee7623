//! What is published and consumed: events of a known size, in JSON or MessagePack, with and without a key.

use crate::measure::Meter;
use bytes::Bytes;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tidings::prelude::*;

/// An event that can be made by number.
pub trait Sample: Event + Clone + Sync {
    /// Of each payload.
    const BYTES: usize;
    const CONTENT: &'static str = match Self::CONTENT_TYPE {
        Some(other) => other,
        None => "application/json",
    };

    fn new(number: u64) -> Self;

    /// How long ago it was made, if that is in it.
    fn age(&self) -> Option<Duration> {
        None
    }
}

/// What numbers begin with, so that all are of one length.
const FIRST: u64 = 1_000_000_000;
/// The same, for nanoseconds.
const FIRST_NANOS: u64 = FIRST * 1_000_000;
/// What the names of the fields, the number and the customer need.
const JSON_REST: usize = r#"{"number":,"customer":"","note":""}"#.len() + 10 + 12;
const MSGPACK_REST: usize = 1 + 7 + 5 + 9 + 13 + 5 + 2;

/// Since when the age of an event is counted.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

macro_rules! samples {
    ($(#[doc = $doc:literal] #[event($($event:tt)*)] $name:ident, $bytes:expr, $rest:expr, $number:expr, $age:expr;)*) => { $(
        #[doc = $doc]
        #[derive(Clone, Debug, Event, Serialize, Deserialize)]
        #[event($($event)*)]
        pub struct $name {
            number: u64,
            customer: String,
            note: String,
        }

        impl Sample for $name {
            const BYTES: usize = $bytes;

            fn new(number: u64) -> Self {
                let (customer, note) = (format!("customer-{:03}", number % 500), "n".repeat($bytes - $rest));
                Self { number: $number(number), customer, note }
            }

            fn age(&self) -> Option<Duration> {
                $age(self.number)
            }
        }
    )* };
}

samples! {
    /// No key: instances would share the work message by message.
    #[event(name = "bench.order.placed")]
    Plain, 256, JSON_REST, numbered, |_| None;

    /// The order of its customer is kept.
    #[event(name = "bench.order.keyed", key = customer)]
    Keyed, 256, JSON_REST, numbered, |_| None;

    /// Sixteen times as many bytes.
    #[event(name = "bench.order.large")]
    Large, 4_096, JSON_REST, numbered, |_| None;

    /// The same bytes as of JSON, in MessagePack.
    #[event(name = "bench.order.packed", codec = "msgpack")]
    Packed, 256, MSGPACK_REST, numbered, |_| None;

    /// Its number says when it was made.
    #[event(name = "bench.order.timed")]
    Timed, 256, JSON_REST + 6, |_| FIRST_NANOS + nanos(), |number| Some(Duration::from_nanos(nanos() - (number - FIRST_NANOS)));
}

fn numbered(number: u64) -> u64 {
    FIRST + number
}

fn nanos() -> u64 {
    u64::try_from(EPOCH.elapsed().as_nanos()).unwrap_or(u64::MAX / 2)
}

/// As every loop encodes, a raw one too.
pub fn encode<E: Sample>(event: &E) -> tidings::Result<Bytes> {
    event.encode(E::CONTENT)
}

/// As every loop decodes and handles, a raw one too.
pub fn handle<E: Sample>(payload: &[u8], meter: &Meter) -> tidings::Result<()> {
    E::decode(E::CONTENT, 1, payload).map(|event| handled(&event, meter))
}

/// What is done with each event, by a handler too.
pub fn handled<E: Sample>(event: &E, meter: &Meter) {
    if let Some(age) = std::hint::black_box(event).age() {
        meter.took(age);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_payload_has_its_size_and_each_age_is_known() -> tidings::Result<()> {
        fn check<E: Sample>(number: u64) -> tidings::Result<()> {
            assert_eq!(encode(&E::new(number))?.len(), E::BYTES, "{}", E::NAME);
            Ok(())
        }
        for number in [0, 99_999_999] {
            check::<Plain>(number)?;
            check::<Keyed>(number)?;
            check::<Large>(number)?;
            check::<Packed>(number)?;
            check::<Timed>(number)?;
        }
        let timed = Timed::decode(Timed::CONTENT, 1, &encode(&Timed::new(0))?)?;
        assert!(timed.age().is_some_and(|age| age < Duration::from_secs(60)));
        Ok(())
    }
}
