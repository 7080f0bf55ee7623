//! The errors of this transport.

use std::io;
use std::path::Path;
use tidings_core::{Error, ErrorKind};

/// The name of this transport.
pub(crate) const NAME: &str = "directory";

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

/// A file that is not what this transport wrote.
pub(crate) fn damaged(file: &Path, why: impl std::fmt::Display) -> Error {
    error(ErrorKind::Codec, format!("the file is damaged: {why}; restore it, or move it away"))
        .with_context("file", file.display())
}

/// Says which file the operating system refused; nearly all of that may pass.
pub(crate) fn failed(file: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Full,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Denied,
            _ => ErrorKind::Connection,
        };
        error(kind, format!("{source}")).with_context("file", file.display()).with_source(source)
    }
}
