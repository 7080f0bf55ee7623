//! Errors of this transport.

use async_nats::client::{PublishError, PublishErrorKind};
use async_nats::{ConnectError, ConnectErrorKind};
use std::borrow::Cow;
use std::fmt;
use tidings_core::{Error, ErrorKind};

pub(crate) const NAME: &str = "nats";

pub(crate) fn error(kind: ErrorKind, why: impl Into<Cow<'static, str>>) -> Error {
    Error::new(kind, why).with_transport(NAME)
}

pub(crate) fn closed() -> Error {
    error(ErrorKind::Closed, "the transport is closed")
}

pub(crate) fn mismatch(what: &str, has: impl fmt::Debug, asked: impl fmt::Debug) -> Error {
    error(ErrorKind::Mismatch, format!("{what}: it exists with {has:?}, asked for was {asked:?}"))
}

pub(crate) fn timed_out(why: impl Into<Cow<'static, str>>) -> Error {
    error(ErrorKind::Timeout, why)
}

/// Why a connection could not be made. The client's error names no credential.
pub(crate) fn connect(error_: ConnectError) -> Error {
    let (kind, why) = match error_.kind() {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            (ErrorKind::Denied, "the server refused the credentials")
        }
        ConnectErrorKind::TimedOut => (ErrorKind::Timeout, "the server did not answer in time"),
        ConnectErrorKind::ServerParse => (ErrorKind::Config, "a server's address cannot be read"),
        ConnectErrorKind::Tls => (ErrorKind::Connection, "no TLS connection to the server"),
        _ => (ErrorKind::Connection, "the server cannot be reached"),
    };
    error(kind, why).with_operation("connect").with_source(error_)
}

pub(crate) fn publish(failed: PublishError) -> Error {
    match failed.kind() {
        PublishErrorKind::MaxPayloadExceeded => {
            error(ErrorKind::TooLarge, "the message with its headers is larger than the server allows")
        }
        PublishErrorKind::InvalidSubject => error(ErrorKind::InvalidName, "the subject is malformed"),
        PublishErrorKind::Send => error(ErrorKind::Closed, "the connection is closed"),
    }
    .with_source(failed)
}

/// What the server's API, or its answer to a publish, said is wrong.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) code: u64,
    pub(crate) err_code: u64,
    pub(crate) description: String,
}

impl ApiError {
    pub(crate) const STREAM_NOT_FOUND: u64 = 10059;
    pub(crate) const CONSUMER_NOT_FOUND: u64 = 10014;
    pub(crate) const STREAM_EXISTS: u64 = 10058;
    pub(crate) const CONSUMER_EXISTS: u64 = 10148;
    pub(crate) const CONSUMER_NAME_TAKEN: u64 = 10013;
    pub(crate) const WRONG_LAST_SEQUENCE: u64 = 10071;
    pub(crate) const NO_MESSAGE: u64 = 10037;

    pub(crate) fn is_not_found(&self) -> bool {
        [Self::STREAM_NOT_FOUND, Self::CONSUMER_NOT_FOUND, Self::NO_MESSAGE].contains(&self.err_code)
    }
}

impl From<ApiError> for Error {
    fn from(failed: ApiError) -> Self {
        let kind = match (failed.code, failed.err_code) {
            // Maximum bytes, maximum messages, insufficient resources, storage.
            (_, 10077 | 10122 | 10023 | 10047 | 10028) => ErrorKind::Full,
            (_, 10054 | 10097) => ErrorKind::TooLarge,
            (_, ApiError::STREAM_NOT_FOUND | ApiError::CONSUMER_NOT_FOUND | ApiError::NO_MESSAGE) => {
                ErrorKind::NotFound
            }
            (_, ApiError::STREAM_EXISTS | ApiError::CONSUMER_EXISTS | 10065) => ErrorKind::Mismatch,
            (503, _) => ErrorKind::Connection,
            (401 | 403, _) => ErrorKind::Denied,
            _ => ErrorKind::Refused,
        };
        error(kind, format!("the server said: {} ({})", failed.description, failed.err_code))
    }
}

/// Why a request to the server's API failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It said so.
    Api(ApiError),
    /// It did not answer, or not so that it can be read.
    Other(Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Api(api) => api.into(),
            Failure::Other(error) => error,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Failure {
    pub(crate) fn is(&self, err_code: u64) -> bool {
        matches!(self, Self::Api(api) if api.err_code == err_code)
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Api(api) if api.is_not_found())
    }
}
