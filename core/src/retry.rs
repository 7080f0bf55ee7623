//! When a failed event is handled again.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

/// Exponential back-off with full jitter: a random time between nothing and a limit that doubles.
///
/// Full jitter spreads many retries the widest (AWS Architecture Blog, *Exponential Backoff And Jitter*).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    jitter: bool,
}

impl Backoff {
    /// Limits that start at `first` and double up to `max`.
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, jitter: true }
    }

    /// The limits themselves, without jitter.
    #[must_use]
    pub const fn without_jitter(mut self) -> Self {
        self.jitter = false;
        self
    }

    /// The longest delay after `failures` failures (at least 1).
    #[must_use]
    pub fn limit(&self, failures: u32) -> Duration {
        let factor = 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        self.first.saturating_mul(factor).min(self.max)
    }

    /// The delay after `failures` failures (at least 1).
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        let limit = self.limit(failures);
        if self.jitter { limit.mul_f64(fastrand::f64()) } else { limit }
    }
}

/// Where an event waits for its next run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryMode {
    /// In its lane, unsettled: nothing with the same key overtakes it; the delay starts anew after a crash.
    InOrder,
    /// Aside, as a confirmed copy at the subscription's address: it holds nothing up and its delay
    /// survives a crash, but later events with its key overtake it.
    Aside,
}

/// How often, when and where a failed event is handled again; then it is dead-lettered.
///
/// The default: 5 attempts, back-off from 200 ms to 30 s with full jitter, [in order](RetryMode::InOrder)
/// where the subscription keeps an order and [aside](RetryMode::Aside) where it does not, held for at most 30 s in all.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tidings_core::RetryPolicy;
///
/// let patient = RetryPolicy::default().attempts(8).backoff(Duration::from_secs(5), Duration::from_secs(600)).aside();
/// let never = RetryPolicy::none();
/// ```
#[derive(Clone, PartialEq)]
pub struct RetryPolicy {
    pub(crate) attempts: u32,
    pub(crate) backoff: Backoff,
    pub(crate) mode: Option<RetryMode>,
    pub(crate) hold_at_most: Duration,
    reject: Vec<Classifier>,
}

/// Whether an error is final.
type Classifier = fn(&(dyn StdError + 'static)) -> bool;

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(30)),
            mode: None,
            hold_at_most: Duration::from_secs(30),
            reject: Vec::new(),
        }
    }
}

impl RetryPolicy {
    /// No retry: the first failure is dead-lettered.
    #[must_use]
    pub fn none() -> Self {
        Self::default().attempts(1)
    }

    /// How often the handler runs in all; 0 counts as 1.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// The delay between runs: random, up to a limit that starts at `first` and doubles up to `max`.
    #[must_use]
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        self.backoff = Backoff { first, max, ..self.backoff };
        self
    }

    /// The delays are their limits, not random ones below.
    #[must_use]
    pub fn without_jitter(mut self) -> Self {
        self.backoff = self.backoff.without_jitter();
        self
    }

    /// Failed events wait in their lane ([`RetryMode::InOrder`]).
    #[must_use]
    pub fn in_order(mut self) -> Self {
        self.mode = Some(RetryMode::InOrder);
        self
    }

    /// Failed events step aside ([`RetryMode::Aside`]).
    #[must_use]
    pub fn aside(mut self) -> Self {
        self.mode = Some(RetryMode::Aside);
        self
    }

    /// How long one event may hold its key in all, over all its delays; then it is dead-lettered.
    #[must_use]
    pub fn hold_at_most(mut self, limit: Duration) -> Self {
        self.hold_at_most = limit;
        self
    }

    /// An error of type `E`, or one caused by it, is final: dead-lettered at once.
    #[must_use]
    pub fn reject_on<E: StdError + 'static>(mut self) -> Self {
        self.reject.push(|error| error.is::<E>());
        self
    }

    /// Whether `error`, or one that caused it, is of a type given to [`reject_on`](Self::reject_on).
    pub(crate) fn is_final(&self, error: &(dyn StdError + 'static)) -> bool {
        let mut next = (!self.reject.is_empty()).then_some(error);
        while let Some(error) = next {
            if self.reject.iter().any(|is_final| is_final(error)) {
                return true;
            }
            next = error.source();
        }
        false
    }

    /// The longest that all delays of one event can take together.
    pub(crate) fn longest_hold(&self) -> Duration {
        (1..self.attempts).map(|failures| self.backoff.limit(failures)).fold(Duration::ZERO, Duration::saturating_add)
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("attempts", &self.attempts)
            .field("backoff", &self.backoff)
            .field("mode", &self.mode)
            .field("hold_at_most", &self.hold_at_most)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit_and_jitter_below_it() {
        let backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
        let limits: Vec<_> = (0..5).map(|n| backoff.limit(n).as_millis()).collect();
        assert_eq!(limits, [200, 200, 400, 800, 1000]);
        assert_eq!(backoff.limit(1000), Duration::from_secs(1));
        assert!((0..1000).all(|_| backoff.delay(3) <= Duration::from_millis(800)));
        assert_eq!(backoff.without_jitter().delay(3), Duration::from_millis(800));
        assert_eq!(RetryPolicy::default().longest_hold(), Duration::from_secs(3));
    }

    #[test]
    fn a_final_error_is_found_through_its_wrappers() {
        let policy = RetryPolicy::default().reject_on::<std::num::ParseIntError>();
        let cause = "x".parse::<u8>().unwrap_err();
        let wrapped = crate::Error::new(crate::ErrorKind::Codec, "bad").with_source(cause);
        assert!(policy.is_final(&wrapped));
        assert!(!policy.is_final(&std::io::Error::other("reset")));
    }
}
