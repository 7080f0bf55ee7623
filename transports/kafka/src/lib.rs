#![doc = include_str!("../docs.md")]

mod client;
mod config;
mod consumer;
mod dead_letters;
mod error;
mod marks;
mod names;
mod part;
mod publisher;
mod reader;
mod replay;
mod settle;
mod state;
mod subscription;
mod topology;
mod transport;
mod wire;

pub use client::KafkaContext;
pub use config::{GroupProtocol, KafkaConfig, Provision, Sasl};
pub use rdkafka;
pub use transport::{KafkaClient, KafkaTransport, capabilities};
