//! The errors of this transport, and what those of the client mean.

use lapin::types::ShortString;
use tidings_core::{Error, ErrorKind, Result};

/// The name of this transport.
pub(crate) const NAME: &str = "rabbitmq";

/// Reply codes of AMQP 0-9-1, section 1.2 of its generated specification.
const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;
const RESOURCE_LOCKED: u16 = 405;
const PRECONDITION_FAILED: u16 = 406;
const COMMAND_INVALID: u16 = 503;
const NOT_ALLOWED: u16 = 530;

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

/// A name as the protocol takes it, which is at most 255 bytes.
pub(crate) fn short(name: impl Into<String>) -> Result<ShortString> {
    let name = name.into();
    let length = name.len();
    ShortString::try_new(name).map_err(|_| {
        let why = "a name derived from namespace, topic and subscription is longer than 255 bytes; shorten one of them";
        error(ErrorKind::InvalidName, why).with_context("bytes", length)
    })
}

/// The reply code and text of the server, if it was it that refused.
fn reply(failure: &lapin::Error) -> Option<(u16, &str)> {
    match failure.kind() {
        lapin::ErrorKind::ProtocolError(error) => Some((error.get_id(), error.get_message().as_str())),
        _ => None,
    }
}

/// What the server has said to what it denies.
pub(crate) fn denial(failure: &lapin::Error) -> Option<&str> {
    reply(failure).filter(|(code, _)| *code == ACCESS_REFUSED).map(|(_, text)| text)
}

/// The name of an `exchange` or `topic` in what the server has said: `write access to exchange 'tidings' in vhost '/' refused`.
pub(crate) fn named<'a>(text: &'a str, what: &str) -> Option<&'a str> {
    text.split_once(&format!("{what} '"))?.1.split('\'').next()
}

/// Whether something is locked by another connection.
pub(crate) fn is_locked(failure: &lapin::Error) -> bool {
    reply(failure).is_some_and(|(code, _)| code == RESOURCE_LOCKED)
}

/// Whether something does not exist.
pub(crate) fn is_absent(failure: &lapin::Error) -> bool {
    reply(failure).is_some_and(|(code, _)| code == NOT_FOUND)
}

/// What the server refuses because it lacks a plug-in.
pub(crate) fn is_unknown_type(failure: &lapin::Error) -> bool {
    reply(failure).is_some_and(|(code, text)| {
        matches!(code, COMMAND_INVALID | PRECONDITION_FAILED) && text.contains("exchange type")
    })
}

/// The server's limit, if it refused a message for its size.
pub(crate) fn size_limit(failure: &lapin::Error) -> Option<usize> {
    let (_, text) =
        reply(failure).filter(|(code, text)| *code == PRECONDITION_FAILED && text.contains("message size"))?;
    text.rsplit(' ').next()?.parse().ok()
}

/// What an operation on a connection or channel that was open has failed with.
pub(crate) fn failed(failure: lapin::Error) -> Error {
    let Some((code, text)) = reply(&failure) else { return lost(failure) };
    let text = text.to_owned();
    let refused = |kind, way_out: &str| error(kind, format!("the server refused: {text}{way_out}"));
    let error = match code {
        ACCESS_REFUSED => refused(ErrorKind::Denied, "; grant the permission"),
        NOT_FOUND => refused(ErrorKind::NotFound, ""),
        PRECONDITION_FAILED if text.contains("inequivalent arg") => {
            refused(ErrorKind::Mismatch, "; it exists with another setting: delete it, or ask for what it has")
        }
        PRECONDITION_FAILED | COMMAND_INVALID | NOT_ALLOWED => refused(ErrorKind::Refused, ""),
        RESOURCE_LOCKED => refused(ErrorKind::Full, ""),
        _ => refused(ErrorKind::Connection, ""),
    };
    error.with_source(failure)
}

fn lost(failure: lapin::Error) -> Error {
    error(ErrorKind::Connection, "the connection is lost").with_source(failure)
}

/// Why a connection could not be made.
pub(crate) fn refused(failure: lapin::Error) -> Error {
    let Some((code, text)) = reply(&failure) else {
        let tls =
            matches!(failure.kind(), lapin::ErrorKind::IOError(io) if io.kind() == std::io::ErrorKind::InvalidData);
        let why = if tls { "TLS: the server is not trusted, or refuses" } else { "the server cannot be reached" };
        return error(ErrorKind::Connection, why).with_transient(!tls).with_source(failure);
    };
    let no_such_vhost = code == NOT_ALLOWED && text.contains("not found");
    let (kind, why) = match code {
        NOT_ALLOWED if no_such_vhost => (ErrorKind::NotFound, "there is no such virtual host"),
        NOT_ALLOWED => (ErrorKind::Denied, "the user may not use the virtual host"),
        ACCESS_REFUSED => (ErrorKind::Denied, "the server refused the credentials"),
        _ => (ErrorKind::Connection, "the server refused the connection"),
    };
    error(kind, why).with_source(failure)
}

/// What did not come within its time.
pub(crate) fn late(what: &'static str, after: std::time::Duration) -> Error {
    error(ErrorKind::Timeout, format!("no answer from the server within {after:?}: {what}"))
}
