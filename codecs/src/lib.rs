//! Codecs of Tidings: bytes to value and back, named by content type.
//!
//! `#[derive(Event)]` makes an event call [`encode`] and [`decode`], which choose among the codecs
//! that are compiled in: [`Json`] (feature `json`) and [`MessagePack`] (feature `msgpack`).
//!
//! What holds for each codec:
//!
//! - Arrays and maps nest at most [`MAX_DEPTH`] deep, in what is written and in what is read, fields that the
//!   type ignores included. So no payload overflows the stack, except of a type that holds itself without an array
//!   or map between, such as `struct Wrap(Option<Box<Wrap>>)`: serde follows such a type without reading on.
//! - A payload is one value; bytes after it are refused.
//! - What cannot be read back as it was is refused when it is written: a float that is not finite in JSON,
//!   which would become `null`.
//! - An error tells what was expected, and where if the codec knows, and never what was there: neither
//!   payload nor field values. Names of fields and types that the program's own types declare are told.
//! - The size of a payload is not limited here; core does that before it decodes.
//!
//! To encode, a value is serialized twice, the first time into nothing, to check it; so
//! [`Serialize`](serde::Serialize) must not consume what it writes.

#[cfg(any(feature = "json", feature = "msgpack"))]
mod buffer;
mod codec;
mod content_type;
#[cfg(any(feature = "json", feature = "msgpack"))]
mod encodable;
#[cfg(any(feature = "json", feature = "msgpack"))]
mod error;
#[cfg(feature = "json")]
mod json;
#[cfg(feature = "msgpack")]
mod msgpack;
#[cfg(feature = "schema")]
pub mod schema;

pub use codec::{CONTENT_TYPES, Codec, decode, encode};
#[cfg(feature = "json")]
pub use json::Json;
#[cfg(feature = "msgpack")]
pub use msgpack::MessagePack;

/// How deep arrays and maps may nest in a payload: `[[1]]` is 2 deep.
///
/// Readers of JSON and MessagePack recurse; this keeps them far from the end of a thread's stack.
pub const MAX_DEPTH: usize = 64;

/// For the code that `#[derive(Event)]` writes, and for nothing else.
#[doc(hidden)]
pub mod private {
    pub use crate::__if_schema as if_schema;
    pub use bytes::Bytes;
    use serde::{Serialize, de::DeserializeOwned};
    use tidings_core::Result;

    /// What an event must be for the codecs. That serde knows it, said so that a missing derive is one error.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is an event, but serde cannot write and read it",
        label = "serde cannot write and read this",
        note = "add `#[derive(Serialize, Deserialize)]` to it, both of the crate `serde`"
    )]
    pub trait Contract: Sized {
        /// Writes it.
        ///
        /// # Errors
        /// As [`encode`](crate::encode).
        fn encode(&self, content_type: &str) -> Result<Bytes>;

        /// Reads it.
        ///
        /// # Errors
        /// As [`decode`](crate::decode).
        fn decode(content_type: &str, payload: &[u8]) -> Result<Self>;
    }

    #[diagnostic::do_not_recommend]
    impl<T: Serialize + DeserializeOwned> Contract for T {
        fn encode(&self, content_type: &str) -> Result<Bytes> {
            crate::encode(self, content_type)
        }

        fn decode(content_type: &str, payload: &[u8]) -> Result<Self> {
            crate::decode(content_type, payload)
        }
    }

    /// Whether two names are the same, at compile time.
    #[must_use]
    pub const fn same(a: &str, b: &str) -> bool {
        let (a, b) = (a.as_bytes(), b.as_bytes());
        let mut i = 0;
        while i < a.len() && i < b.len() && a[i] == b[i] {
            i += 1;
        }
        i == a.len() && i == b.len()
    }
}

/// Keeps what it is given if schemas are compiled in, which only this crate knows.
#[cfg(feature = "schema")]
#[doc(hidden)]
#[macro_export]
macro_rules! __if_schema {
    ($($item:tt)*) => { $($item)* };
}

/// Drops what it is given if schemas are not compiled in, which only this crate knows.
#[cfg(not(feature = "schema"))]
#[doc(hidden)]
#[macro_export]
macro_rules! __if_schema {
    ($($item:tt)*) => {};
}
