//! A simulation of core: virtual time, and everything random drawn from one seed.
//!
//! A seed decides the settings, the events and what their handlers do with them, and what goes wrong: acks and answers
//! that are lost, refusals, silence, latency, reordering across keys, instances that are killed, dropped, drained, cut
//! off, started, and what handlers depend on being down. The broker is memory behind a decorator. When all is calm and
//! settled, a checker goes through the history:
//!
//! - a confirmed event is handled, and what its handler returned taken by the broker, or it is a dead letter with the
//!   planned reason, attempts and payload: one of these, never both;
//! - nothing is acked before what its handler returned, its copy aside or its dead letter was confirmed, and no more often
//!   than it was handled, sent aside or buried; nothing is given back without a reason;
//! - where keys have an order, nothing begins before all that was confirmed before it with its key has ended, and no key is
//!   handled twice at a time but by one that has lost its lease, and knows it;
//! - attempts: none begins before the one before it has failed; more runs of one than failures need something that went
//!   wrong with that very event (a settlement or an answer that did not arrive); what is sent aside or buried tells of no
//!   more failures than there were; in an outage none is counted;
//! - a run that is not the first of its attempt is marked (without an order: all but one are), so is a publish that
//!   repeats one without an answer;
//! - what a repeated run returns has the same ids, and equal events have different ones;
//! - an outage begins when the last 10 runs, of at least 5 events, failed for now, not before, and not later; then one run
//!   goes on at a time, and nothing is dead-lettered;
//! - concurrency and what is in flight stay below their limits; nothing begins after a stop;
//! - in the end nothing is in flight and the broker stores nothing but dead letters, within hours of virtual time.
//!
//! Only tokio's scheduler and timer order what happens, so the same seed gives the same history.

mod checker;
mod faults;
mod history;
mod plan;
mod service;
mod world;

pub use world::{Report, run};
