//! What is published and consumed: 256 bytes of JSON, with and without a key.

use bytes::Bytes;
use tidings::prelude::*;

pub const JSON: &str = "application/json";

/// How large each payload is.
pub const BYTES: usize = 256;

/// An event that can be made by number, with or without a key.
pub trait Sample: Event + Clone + Sync {
    fn new(number: u64) -> Self;
}

/// No key: instances would share the work message by message.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "bench.order.placed")]
pub struct Plain {
    number: u64,
    customer: String,
    note: String,
}

/// The order of its customer is kept.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "bench.order.keyed", key = customer)]
pub struct Keyed {
    number: u64,
    customer: String,
    note: String,
}

/// What numbers begin with, so that all are of one length.
const FIRST: u64 = 1_000_000_000;
const NAMES: usize = r#"{"number":,"customer":"","note":""}"#.len() + 10 + 12;

fn fields(number: u64) -> (u64, String, String) {
    (FIRST + number, format!("customer-{:03}", number % 500), "n".repeat(BYTES - NAMES))
}

impl Sample for Plain {
    fn new(number: u64) -> Self {
        let (number, customer, note) = fields(number);
        Self { number, customer, note }
    }
}

impl Sample for Keyed {
    fn new(number: u64) -> Self {
        let (number, customer, note) = fields(number);
        Self { number, customer, note }
    }
}

/// As every loop encodes, a raw one too.
pub fn encode<E: Sample>(event: &E) -> tidings::Result<Bytes> {
    event.encode(JSON)
}

/// As every loop decodes and handles, a raw one too.
pub fn handle<E: Sample>(payload: &[u8]) -> tidings::Result<()> {
    E::decode(JSON, 1, payload).map(|event| drop(std::hint::black_box(event)))
}
