//! What Tidings costs: the raw client, the transport driven directly and the whole SDK in turn, on the same work.
//!
//! A scenario is written once, over any `Broker`; what is a broker's own, its raw loops above all, is one file.

#![allow(missing_docs, reason = "a program, split for its tests")]

pub mod broker;
pub mod command;
pub mod consume;
pub mod event;
pub mod kafka;
pub mod measure;
pub mod memory;
pub mod nats;
pub mod picture;
pub mod publish;
pub mod rabbitmq;
pub mod report;
pub mod scenario;
pub mod through;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T, E = BoxError> = std::result::Result<T, E>;
