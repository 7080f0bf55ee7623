#![doc = include_str!("../docs.md")]

mod broker;
mod config;
mod dead_letters;
mod error;
mod fnv;
mod group;
mod log;
mod publisher;
mod settle;
mod slot;
mod subscription;
mod timers;
mod topology;
mod transport;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use config::MemoryConfig;
pub use transport::{MemoryBroker, MemoryTransport, Stats, capabilities};
