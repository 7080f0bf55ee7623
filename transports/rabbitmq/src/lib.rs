#![doc = include_str!("../docs.md")]

mod config;
mod consumers;
mod dead_letters;
mod error;
mod flights;
mod link;
mod members;
mod names;
mod publisher;
mod reader;
mod register;
mod replay;
mod settle;
mod subscription;
mod topology;
mod transport;
mod window;
mod wire;

pub use config::{Provision, RabbitMqConfig};
pub use transport::{RabbitMqClient, RabbitMqTransport, capabilities};
