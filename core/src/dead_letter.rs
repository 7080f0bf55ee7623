//! Dead letters: what could not be handled, kept whole with the reason.

use crate::clock::to_rfc3339;
use crate::error::clean_line;
use crate::{Message, SubscriptionName};
use std::fmt;
use std::time::SystemTime;

/// Headers that the SDK adds to retries and dead letters; applications cannot set them.
pub mod header {
    /// How many runs of the handler have failed, in decimal.
    pub const ATTEMPTS: &str = "tidings-attempts";
    /// When the first of them failed, as RFC 3339.
    pub const FIRST_FAILURE: &str = "tidings-first-failure";
    /// On a publish that was repeated without knowing whether the first arrived: how often.
    pub const REPEAT: &str = "tidings-repeat";
    /// Why it was dead-lettered: a [`DeadLetterReason`](super::DeadLetterReason).
    pub const REASON: &str = "tidings-dead-reason";
    /// The last error and its causes in one line of at most 1 KiB.
    pub const ERROR: &str = "tidings-dead-error";
    /// The subscription that dead-lettered it.
    pub const SUBSCRIPTION: &str = "tidings-dead-subscription";
    /// The topic it was published to.
    pub const ORIGIN: &str = "tidings-dead-origin";
    /// When it was dead-lettered, as RFC 3339.
    pub const TIME: &str = "tidings-dead-time";
    /// On what was dead-lettered by a replay, and stays on it when it is redriven.
    pub const REPLAYED: &str = "tidings-replayed";
    /// On a dead letter that was sent back to its subscription: when that was last done, as RFC 3339. It may be a
    /// duplicate. A broker that drops what has an id twice must count two values of this as two messages.
    pub const REDRIVEN: &str = "tidings-redriven";

    /// What an event loses when it is redriven.
    pub(crate) const OF_DEAD_LETTERS: [&str; 7] = [ATTEMPTS, FIRST_FAILURE, REASON, ERROR, SUBSCRIPTION, ORIGIN, TIME];
}

/// Why a message was dead-lettered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadLetterReason {
    /// It failed as often as the retry policy allows, or held its key for as long.
    Exhausted,
    /// The handler rejected it, or failed with an error that the policy calls final.
    Rejected,
    /// Its payload could not be decoded.
    Undecodable,
    /// Its payload could not be decoded, and its version is newer than the handler's.
    NewerVersion,
    /// Its payload is larger than `max_payload`.
    TooLarge,
    /// Its instances ended again and again while they handled it alone.
    Suspect,
    /// No handler takes its type, and the subscription dead-letters these.
    Unrouted,
}

impl DeadLetterReason {
    const ALL: [Self; 7] = [
        Self::Exhausted,
        Self::Rejected,
        Self::Undecodable,
        Self::NewerVersion,
        Self::TooLarge,
        Self::Suspect,
        Self::Unrouted,
    ];

    /// The reason that is written so in the header [`header::REASON`], if this version of the SDK knows it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }

    /// The reason as it stands in the header [`header::REASON`].
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Rejected => "rejected",
            Self::Undecodable => "undecodable",
            Self::NewerVersion => "newer_version",
            Self::TooLarge => "too_large",
            Self::Suspect => "suspect",
            Self::Unrouted => "unrouted",
        }
    }
}

impl fmt::Display for DeadLetterReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How often and since when an event has failed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Failures {
    pub(crate) attempts: u32,
    pub(crate) first: Option<SystemTime>,
}

impl Failures {
    /// What earlier runs, here or elsewhere, have left in the headers of a retry.
    pub(crate) fn of(message: &Message) -> Self {
        let headers = &message.headers;
        if headers.is_empty() {
            return Self::default();
        }
        let attempts = headers.get_str(header::ATTEMPTS).and_then(|n| n.parse().ok()).unwrap_or(0);
        Self { attempts, first: headers.get_str(header::FIRST_FAILURE).and_then(crate::clock::from_rfc3339) }
    }

    pub(crate) fn count(&mut self, now: SystemTime) {
        self.attempts = self.attempts.saturating_add(1);
        self.first.get_or_insert(now);
    }

    /// The message as it is sent aside: as it came, with its count.
    pub(crate) fn write(&self, message: &mut Message) {
        message.headers.set(header::ATTEMPTS, self.attempts.to_string());
        if let Some(first) = self.first {
            message.headers.set(header::FIRST_FAILURE, to_rfc3339(first));
        }
    }
}

/// Why and when a message is dead-lettered.
#[derive(Debug)]
pub(crate) struct Burial<'a> {
    pub(crate) subscription: &'a SubscriptionName,
    pub(crate) reason: DeadLetterReason,
    pub(crate) error: &'a str,
    pub(crate) failures: &'a Failures,
    pub(crate) now: SystemTime,
}

impl Burial<'_> {
    /// Makes `message` a dead letter: the original bytes, attributes and headers, and why it is here.
    pub(crate) fn write(&self, message: &mut Message) {
        self.failures.write(message);
        let headers = &mut message.headers;
        headers.set(header::REASON, self.reason.as_str());
        headers.set(header::ERROR, clean_line(self.error, 1024));
        headers.set(header::SUBSCRIPTION, self.subscription.to_string());
        headers.set(header::ORIGIN, message.topic.to_string());
        headers.set(header::TIME, to_rfc3339(self.now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Topic;

    #[test]
    fn a_dead_letter_keeps_all_that_came_and_tells_why() {
        let mut original = Message::new("1".into(), "/shop", "shop.order", Topic::new("shop.order").unwrap())
            .with_payload("application/json", "{");
        original.headers.append("x-tenant", "a").unwrap();
        let mut failures = Failures::default();
        failures.count(SystemTime::UNIX_EPOCH);
        failures.count(SystemTime::now());
        let mut letter = original.clone();
        let (subscription, reason) =
            (SubscriptionName::new("billing.shop.order").unwrap(), DeadLetterReason::Exhausted);
        let now = SystemTime::now();
        Burial { subscription: &subscription, reason, error: "no\r\nbank", failures: &failures, now }
            .write(&mut letter);
        assert_eq!((&letter.id, &letter.payload), (&original.id, &original.payload));
        let get = |name| letter.headers.get_str(name).unwrap();
        assert_eq!((get("x-tenant"), get(header::REASON), get(header::ERROR)), ("a", "exhausted", "no  bank"));
        assert_eq!((get(header::ATTEMPTS), get(header::ORIGIN)), ("2", "shop.order"));
        assert_eq!(get(header::FIRST_FAILURE), "1970-01-01T00:00:00.000000Z");
        assert_eq!(Failures::of(&letter), failures);
    }
}
