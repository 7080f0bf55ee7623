#![doc = include_str!("../README.md")]

mod assertions;
mod faults;
mod harness;
mod timeline;
mod tracker;
mod watch;
pub mod wrap;

pub use assertions::{Found, Letter, Retry};
pub use faults::Faults;
pub use harness::{Harness, Test};
