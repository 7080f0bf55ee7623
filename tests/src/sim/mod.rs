//! A simulation of core: virtual time, and everything random drawn from one seed.
//!
//! A seed decides the settings, the events and what their handlers do with them, and what goes wrong: acks and answers
//! that are lost, refusals, latency, reordering across keys, instances that are killed, dropped, drained, cut off,
//! started. The broker is memory behind a decorator. When all is calm and settled, a checker goes through the history.

mod checker;
mod faults;
mod history;
mod plan;
mod service;
mod world;

pub use world::{Report, run};
