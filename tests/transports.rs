//! The conformance suite on every transport of this repository.
//!
//! `TIDINGS_TEST_TRANSPORTS=memory,nats` chooses among them.

use std::process::ExitCode;
use tidings_conformance::Suite;
use tidings_tests::factories::{Directory, Kafka, Memory, Nats, RabbitMq};
use tidings_tests::server;

fn main() -> ExitCode {
    let ended = Suite::new()
        .with(Memory)
        .with(Directory)
        .with_requested(Nats::default())
        .with_requested(RabbitMq::default())
        .with_requested(Kafka::default())
        .with_requested(Kafka::kip_848())
        .main();
    server::stop_all();
    ended
}
