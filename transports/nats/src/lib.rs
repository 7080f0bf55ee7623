#![doc = include_str!("../docs.md")]

mod api;
mod config;
mod connection;
mod dead_letters;
mod error;
mod names;
mod ownership;
mod publisher;
mod replay;
mod settle;
mod source;
mod state;
mod subscription;
mod topology;
mod transport;
mod wire;

pub use config::{NatsConfig, Provision};
pub use transport::{NatsTransport, capabilities};
