//! The errors of this transport.

use tidings_core::{Error, ErrorKind};

/// The name of this transport.
pub(crate) const NAME: &str = "memory";

pub(crate) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message.into()).with_transport(NAME)
}

pub(crate) fn closed() -> Error {
    error(ErrorKind::Closed, "the transport is closed")
}

/// What exists, `had`, is not what is asked for.
pub(crate) fn mismatch(what: &str, had: impl std::fmt::Debug, asked: impl std::fmt::Debug) -> Error {
    error(ErrorKind::Mismatch, format!("{what}: it has {had:?}, asked for is {asked:?}"))
}
