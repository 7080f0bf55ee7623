//! Tidings.
pub use tidings_codecs as codecs;
pub use tidings_core::*;
#[cfg(feature = "macros")]
pub use tidings_macros::Event;
