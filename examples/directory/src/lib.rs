#![doc = include_str!("../docs.md")]

mod config;
mod cursor;
mod dead_letters;
mod error;
mod publisher;
mod reader;
mod settle;
mod store;
mod subscription;
mod topology;
mod transport;
mod wire;
mod worker;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use config::DirectoryConfig;
pub use transport::{DirectoryTransport, capabilities};
