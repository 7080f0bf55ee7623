//! One opaque error for everything: what failed, where, and whether trying again may help.

use crate::transport::Fate;
use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

/// The result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error, boxed; what handlers may return by `?`.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// What kind of failure an [`Error`] is; match on it to decide what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A topic, pattern, subscription, header or event name breaks its rules.
    InvalidName,
    /// A setting is unknown, malformed or contradicts another one.
    Config,
    /// The transport, as it is connected, cannot honour an option. Nothing was emulated or ignored.
    Unsupported,
    /// A payload or the headers exceed a limit.
    TooLarge,
    /// A payload cannot be encoded or decoded.
    Codec,
    /// A topic, subscription or message does not exist, and may not be created.
    NotFound,
    /// What exists on the broker has other settings than asked for.
    Mismatch,
    /// The same name is used twice where it must be unique.
    Duplicate,
    /// The broker refused the credentials or the permission.
    Denied,
    /// The broker refused a message.
    Refused,
    /// No route, storage or memory is free for a message now.
    Full,
    /// The connection is lost or cannot be made.
    Connection,
    /// A deadline passed.
    Timeout,
    /// The bus, service or subscription is closed.
    Closed,
    /// Something a handler needs is missing, such as a state.
    Missing,
    /// A defect in the transport or in this SDK; please report it.
    Internal,
}

impl ErrorKind {
    /// Whether failures of this kind usually pass by themselves.
    const fn is_transient(self) -> bool {
        matches!(self, Self::Connection | Self::Timeout | Self::Full)
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidName => "invalid name",
            Self::Config => "invalid configuration",
            Self::Unsupported => "not supported",
            Self::TooLarge => "too large",
            Self::Codec => "codec failure",
            Self::NotFound => "not found",
            Self::Mismatch => "mismatch",
            Self::Duplicate => "duplicate",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Full => "full",
            Self::Connection => "connection failure",
            Self::Timeout => "timed out",
            Self::Closed => "closed",
            Self::Missing => "missing",
            Self::Internal => "internal error",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The error of this SDK.
///
/// It says what failed ([`kind`](Self::kind)), whether trying again may help
/// ([`is_transient`](Self::is_transient)), in which operation and transport, with context as
/// key-value pairs, and the error below it ([`source`](StdError::source)). It holds neither
/// payloads nor credentials.
///
/// # Examples
///
/// ```
/// use tidings_core::{ErrorKind, Topic};
///
/// let error = Topic::new("Shop Order").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::InvalidName);
/// assert!(!error.is_transient());
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    transient: bool,
    message: Cow<'static, str>,
    operation: Option<&'static str>,
    transport: Option<&'static str>,
    fate: Option<Fate>,
    context: Vec<(&'static str, String)>,
    source: Option<BoxError>,
}

impl Error {
    /// Makes an error; `message` says what is wrong and the way out, in lower case, without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            transient: kind.is_transient(),
            message: message.into(),
            operation: None,
            transport: None,
            fate: None,
            context: Vec::new(),
            source: None,
        }))
    }

    /// Names the operation that failed, such as `publish`. The innermost name is kept.
    #[must_use]
    pub fn with_operation(mut self, operation: &'static str) -> Self {
        self.0.operation.get_or_insert(operation);
        self
    }

    /// Names the transport that failed, such as `memory`.
    #[must_use]
    pub fn with_transport(mut self, transport: &'static str) -> Self {
        self.0.transport.get_or_insert(transport);
        self
    }

    /// Adds a context pair, such as the topic. Never add a payload or a credential.
    #[must_use]
    pub fn with_context(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((key, value.to_string()));
        self
    }

    /// Adds the error below this one.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says whether trying again may help, where that differs from what its kind implies.
    #[must_use]
    pub fn with_transient(mut self, transient: bool) -> Self {
        self.0.transient = transient;
        self
    }

    /// Says what is known of the message that could not be published.
    #[must_use]
    pub(crate) fn with_fate(mut self, fate: Fate) -> Self {
        self.0.fate = Some(fate);
        self
    }

    /// Whether the broker may have the message all the same, so that publishing it again may make a duplicate.
    #[must_use]
    pub fn possibly_persisted(&self) -> bool {
        self.0.fate == Some(Fate::PossiblyPersisted)
    }

    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same operation may succeed later without any change by the caller.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.0.transient
    }

    /// The operation that failed, if named.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The transport that failed, if one was involved.
    #[must_use]
    pub fn transport(&self) -> Option<&'static str> {
        self.0.transport
    }

    /// The context pairs, in the order they were added.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(k, v)| (*k, v.as_str()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(transport) = self.0.transport {
            write!(f, "{transport}: ")?;
        }
        if let Some(operation) = self.0.operation {
            write!(f, "{operation}: ")?;
        }
        write!(f, "{}: {}", self.0.kind, self.0.message)?;
        for (i, (key, value)) in self.0.context.iter().enumerate() {
            write!(f, "{}{key}={value}", if i == 0 { " (" } else { ", " })?;
        }
        f.write_str(if self.0.context.is_empty() { "" } else { ")" })
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut source = self.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl From<std::convert::Infallible> for Error {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

/// The chain of an error as one line: at most 1 KiB, control characters replaced by spaces.
///
/// This is what a dead letter carries, so it must be fit for a header on every broker.
pub(crate) fn one_line(error: &(dyn StdError + 'static)) -> String {
    const LIMIT: usize = 1024;
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source.filter(|_| line.len() < LIMIT) {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    clean_line(&line, LIMIT)
}

/// `text` without control characters, cut to at most `limit` bytes at a character boundary.
pub(crate) fn clean_line(text: &str, limit: usize) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > limit {
        line.truncate(line.floor_char_boundary(limit));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_where_and_why() {
        let error = Error::new(ErrorKind::Timeout, "no confirm within 30s")
            .with_operation("publish")
            .with_transport("memory")
            .with_context("topic", "shop.order.placed")
            .with_source(std::io::Error::other("broken pipe"));
        assert_eq!(error.to_string(), "memory: publish: timed out: no confirm within 30s (topic=shop.order.placed)");
        assert!(format!("{error:?}").ends_with(": broken pipe"));
        assert!(error.is_transient());
    }

    #[test]
    fn one_line_is_bounded_and_free_of_control_characters() {
        let error = Error::new(ErrorKind::Internal, format!("a\r\nb\u{85}{}", "ü".repeat(2000)));
        let line = one_line(&error);
        assert!(line.len() <= 1024 && line.len() > 1000);
        assert!(!line.chars().any(char::is_control));
    }
}
