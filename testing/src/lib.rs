//! A harness to test services on Tidings, and to put faults between core and a transport.

pub mod wrap;
