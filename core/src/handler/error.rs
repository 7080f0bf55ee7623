//! How a handler fails.

use crate::BoxError;
use std::fmt;
use std::time::Duration;

/// How a handler fails: for now, or for good.
///
/// Any error by `?` is transient: the event is handled again as its
/// [`RetryPolicy`](crate::RetryPolicy) says, then dead-lettered.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tidings_core::HandlerError;
///
/// async fn pay(card: Option<&str>) -> Result<(), HandlerError> {
///     let card = card.ok_or_else(|| HandlerError::reject("no card"))?; // never succeeds: dead letter at once
///     let _digits: u64 = card.parse()?;                                // may succeed later: retried
///     Err(HandlerError::retry_after(Duration::from_secs(30), "the bank said when"))
/// }
/// ```
pub struct HandlerError {
    pub(crate) verdict: Verdict,
    pub(crate) source: BoxError,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Transient,
    RetryAfter(Duration),
    Reject,
}

impl HandlerError {
    /// Handling this event will never succeed: it is dead-lettered at once.
    pub fn reject(why: impl Into<BoxError>) -> Self {
        Self { verdict: Verdict::Reject, source: why.into() }
    }

    /// Handling this event may succeed after `delay`, which takes the place of the policy's next delay.
    /// It counts as an attempt.
    pub fn retry_after(delay: Duration, why: impl Into<BoxError>) -> Self {
        Self { verdict: Verdict::RetryAfter(delay), source: why.into() }
    }

    /// Whether the event is dead-lettered at once.
    #[must_use]
    pub fn is_reject(&self) -> bool {
        self.verdict == Verdict::Reject
    }
}

// `Into<Box<dyn Error>>` and not `Error`, so that `?` takes `anyhow::Error` and `&str` too. For the same
// reason HandlerError must not be an `Error` itself.
impl<E: Into<BoxError>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self { verdict: Verdict::Transient, source: error.into() }
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerError").field("verdict", &self.verdict).field("source", &self.source).finish()
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}
