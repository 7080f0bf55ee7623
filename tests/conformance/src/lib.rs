#![doc = include_str!("../README.md")]
#![allow(clippy::unwrap_used)] // a case fails by panicking

mod broker;
mod cases;
mod env;
mod events;
mod history;
mod instance;
mod reader;
mod services;
mod suite;

pub use broker::{Broker, Factory};
pub use suite::{Report, Suite};
