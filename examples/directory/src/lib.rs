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

pub use config::DirectoryConfig;
pub use transport::{DirectoryTransport, capabilities};
