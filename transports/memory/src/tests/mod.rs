//! The transport as core sees it.

mod chaos;
mod instances;
mod publishing;
mod reading;
mod replaying;
