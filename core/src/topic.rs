//! Names: topics, patterns of topics, subscriptions.

use crate::{Error, ErrorKind, Result, Text};
use std::fmt;

/// The longest topic or subscription name, in bytes, so that with a namespace and what the SDK
/// derives from it (`_tidings.dead.<subscription>`) it stays under the 249 bytes that Kafka allows.
pub const MAX_NAME: usize = 200;

/// What a topic may not start with: it is internal to the SDK and matched by no pattern.
pub const RESERVED_TOPIC_PREFIX: &str = "_tidings.";

/// Where an event is published: dot-separated tokens of `[a-z0-9-]`, such as `shop.order.placed`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Text);

/// The name of a subscription, such as `billing.shop.order.placed`; the same rules as a [`Topic`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscriptionName(Text);

/// One or many topics: tokens as in a [`Topic`], where `*` stands for exactly one token and a
/// final `>` for one or more.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPattern(Text);

impl Topic {
    /// Checks `name` and makes it a topic.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] for an empty, too long or malformed name.
    pub fn new(name: impl Into<Text>) -> Result<Self> {
        check("topic", name.into(), is_name).map(Self)
    }

    /// The topic of an event, whose name the compiler has checked, if it is right.
    pub(crate) fn of<E: crate::Event>() -> Result<Self> {
        if const { is_name(E::TOPIC) && E::TOPIC.len() <= MAX_NAME } {
            return Ok(Self(Text::from_static(E::TOPIC)));
        }
        Self::new(Text::from_static(E::TOPIC))
    }

    /// The name as a string slice.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, cheap to clone.
    #[must_use]
    pub fn text(&self) -> &Text {
        &self.0
    }
}

impl SubscriptionName {
    /// Checks `name` and makes it the name of a subscription.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] for an empty, too long or malformed name.
    pub fn new(name: impl Into<Text>) -> Result<Self> {
        check("subscription", name.into(), is_name).map(Self)
    }

    /// The name as a string slice.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, cheap to clone.
    #[must_use]
    pub fn text(&self) -> &Text {
        &self.0
    }
}

impl TopicPattern {
    /// Checks `pattern` and makes it a pattern; a plain topic is a pattern too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] for a malformed pattern, a `>` that is not last, or a first
    /// token that is a wildcard (brokers find the stream by the first token).
    pub fn new(pattern: impl Into<Text>) -> Result<Self> {
        let pattern = check("topic pattern", pattern.into(), is_pattern)?;
        let rest_in_the_middle = pattern.split('.').rev().skip(1).any(|t| t == ">");
        if rest_in_the_middle {
            return Err(invalid("topic pattern", &pattern, "`>` stands for the rest and must be the last token"));
        }
        if matches!(pattern.split('.').next(), Some("*" | ">")) {
            return Err(invalid("topic pattern", &pattern, "the first token must be literal, as in `shop.>`"));
        }
        Ok(Self(pattern))
    }

    /// Whether `topic` belongs to this pattern.
    #[must_use]
    pub fn matches(&self, topic: &Topic) -> bool {
        let (mut want, mut have) = (self.0.split('.'), topic.as_str().split('.'));
        loop {
            match (want.next(), have.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (Some(w), Some(h)) if w == h => {}
                _ => return false,
            }
        }
    }

    /// The topic this pattern names, if it has no wildcard.
    #[must_use]
    pub fn as_topic(&self) -> Option<Topic> {
        let literal = !self.0.split('.').any(|t| matches!(t, "*" | ">"));
        literal.then(|| Topic(self.0.clone()))
    }

    /// The pattern as a string slice.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for SubscriptionName {
    type Error = Error;
    fn try_from(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl TryFrom<String> for SubscriptionName {
    type Error = Error;
    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl From<&Self> for SubscriptionName {
    fn from(name: &Self) -> Self {
        name.clone()
    }
}

impl From<Topic> for TopicPattern {
    fn from(topic: Topic) -> Self {
        Self(topic.0)
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SubscriptionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for TopicPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Tokens joined by dots. It can be asked at compile time, as each publish does of its event's topic.
const fn is_name(name: &str) -> bool {
    let (bytes, mut after_dot, mut at) = (name.as_bytes(), true, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'.' if !after_dot => after_dot = true,
            b'a'..=b'z' | b'0'..=b'9' | b'-' => after_dot = false,
            _ => return false,
        }
        at += 1;
    }
    !after_dot
}

fn is_pattern(pattern: &str) -> bool {
    pattern.split('.').all(|token| matches!(token, "*" | ">") || is_name(token))
}

fn check(what: &'static str, name: Text, is_right: impl Fn(&str) -> bool) -> Result<Text> {
    if name.len() > MAX_NAME {
        return Err(invalid(what, &name, "it is longer than 200 bytes"));
    }
    if is_right(&name) {
        return Ok(name);
    }
    let why = if name.is_empty() {
        "it is empty"
    } else if name.split('.').any(str::is_empty) {
        "it has an empty token"
    } else if name.contains(['*', '>']) {
        "wildcards stand alone in a token, and only in patterns"
    } else {
        "tokens may hold only a-z, 0-9 and `-`, joined by dots, as in `shop.order.placed`"
    };
    Err(invalid(what, &name, why))
}

fn invalid(what: &'static str, name: &str, why: &str) -> Error {
    let shown = crate::error::clean_line(name, 80);
    Error::new(ErrorKind::InvalidName, format!("{what} `{shown}`: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_lower_case_tokens() {
        for good in ["a", "shop.order.placed", "a-1.b"] {
            assert!(Topic::new(good).is_ok(), "{good}");
        }
        let long = "a".repeat(201);
        for bad in ["", ".", "a.", ".a", "a..b", "A", "a b", "a.*", "a.>", "_tidings.x", "a_b", "ä", "$sys", &long] {
            assert_eq!(Topic::new(bad).unwrap_err().kind(), ErrorKind::InvalidName, "{bad}");
        }
    }

    #[test]
    fn patterns_match_by_token() {
        let matches = |p: &str, t: &str| TopicPattern::new(p).unwrap().matches(&Topic::new(t).unwrap());
        assert!(matches("shop.>", "shop.order.placed"));
        assert!(matches("shop.*.placed", "shop.order.placed"));
        assert!(matches("shop.order", "shop.order"));
        assert!(!matches("shop.>", "shop"));
        assert!(!matches("shop.*", "shop.order.placed"));
        assert!(!matches("shop.order", "shop.order.placed"));
        assert!(!matches("shop.order.placed", "shop.order"));
    }

    #[test]
    fn patterns_need_a_literal_first_token_and_a_last_rest() {
        for bad in [">", "*", "*.a", "a.>.b", "a.b*", "a.**", "a..>"] {
            assert!(TopicPattern::new(bad).is_err(), "{bad}");
        }
        assert_eq!(TopicPattern::new("a.b").unwrap().as_topic(), Some(Topic::new("a.b").unwrap()));
        assert_eq!(TopicPattern::new("a.*").unwrap().as_topic(), None);
    }
}
