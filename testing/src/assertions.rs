//! What can be asked of what has happened.

use crate::harness::Test;
use crate::timeline::{End, Number, Retried, Sent, What};
use std::collections::HashSet;
use std::time::Duration;
use tidings_core::transport::Destination;
use tidings_core::{DeadLetterReason, Event, Message, SubscriptionName, header};

impl Test {
    /// The events of one type that were published and confirmed, by the test or because a handler returned them. What was
    /// published again with the same id is the same event.
    ///
    /// # Panics
    /// If one cannot be decoded.
    #[track_caller]
    pub fn published<E: Event>(&self) -> Found<'_, E> {
        let decode = |message: &Message| E::decode(&message.content_type, message.version, &message.payload);
        let decoded: Result<Vec<E>, _> = self.messages::<E>().found.iter().map(decode).collect();
        match decoded {
            Ok(found) => Found { test: self, what: format!("`{}` published", E::NAME), found },
            Err(error) => self.fail(&format!("`{}` was published and cannot be decoded: {error}", E::NAME)),
        }
    }

    /// The messages of [`published`](Self::published) events, for their ids, keys and headers.
    pub fn messages<E: Event>(&self) -> Found<'_, Message> {
        let mut seen = HashSet::new();
        let found = self.tracker.collect(|what| {
            let Some((Destination::Topic(topic), message, number)) = confirmed(what) else { return Vec::new() };
            let is_it = topic.as_str() == E::TOPIC && message.event_type == E::NAME && seen.insert(number);
            if is_it { vec![message.clone()] } else { Vec::new() }
        });
        Found { test: self, what: format!("messages `{}`", E::NAME), found }
    }

    /// The times a subscription has handled an event of one type; each is the attempt that succeeded, from 1.
    ///
    /// # Panics
    /// If there is no such subscription under test, naming those there are.
    #[track_caller]
    pub fn handled<E: Event>(&self, subscription: &str) -> Found<'_, u32> {
        self.check(subscription);
        let found = self.tracker.collect(|what| match what {
            What::Run(run) if run.subscription.as_str() == subscription && run.end == End::Succeeded => {
                let is_it = |(number, event_type): &&_| *event_type == E::NAME && !run.but.contains(number);
                run.events.iter().filter(is_it).map(|_| run.attempt).collect()
            }
            _ => Vec::new(),
        });
        Found { test: self, what: format!("`{}` handled by `{subscription}`", E::NAME), found }
    }

    /// The retries of a subscription: failed runs that were followed by another.
    ///
    /// # Panics
    /// If there is no such subscription under test, naming those there are.
    #[track_caller]
    pub fn retried(&self, subscription: &str) -> Found<'_, Retry> {
        self.check(subscription);
        let retry = |what: &What| match what {
            What::Run(run) if run.subscription.as_str() == subscription => {
                let error = if let End::Failed(error) = &run.end { error.clone() } else { String::new() };
                run.again.map(|delay| Retry { delay, error })
            }
            What::Retried(Retried { subscription: name, delay, error, .. }) if name.as_str() == subscription => {
                Some(Retry { delay: *delay, error: error.clone() })
            }
            _ => None,
        };
        let found = self.tracker.collect(|what| retry(what).into_iter().collect());
        Found { test: self, what: format!("retries of `{subscription}`"), found }
    }

    /// What was dead-lettered.
    pub fn dead_letters(&self) -> Found<'_, Letter> {
        let found = self.tracker.collect(|what| match confirmed(what) {
            Some((Destination::DeadLetter(name), message, _)) => vec![Letter::new(name, message)],
            _ => Vec::new(),
        });
        Found { test: self, what: "dead letters".to_owned(), found }
    }

    #[track_caller]
    fn check(&self, subscription: &str) {
        let names = self.tracker.names();
        if !names.iter().any(|name| name == subscription) {
            self.fail(&format!("no subscription `{subscription}` under test; there are: {}", names.join(", ")));
        }
    }
}

/// What was published where, if that is what it is and the broker has confirmed it.
fn confirmed(what: &What) -> Option<(&Destination, &Message, Number)> {
    match what {
        What::Published(sent) if sent.sent == Sent::Confirmed => Some((&sent.to, &sent.message, sent.number)),
        _ => None,
    }
}

/// What a [`Test`] has found, in the order it happened; what it is asked for, it must be.
#[derive(Debug)]
#[must_use = "it asserts nothing by itself"]
pub struct Found<'t, T> {
    test: &'t Test,
    what: String,
    found: Vec<T>,
}

impl<T> Found<'_, T> {
    /// All, which are this many.
    ///
    /// # Panics
    /// If there are more or less.
    #[track_caller]
    pub fn times(self, count: usize) -> Vec<T> {
        if self.found.len() != count {
            self.test.fail(&format!("expected {count} {}, found {}", self.what, self.found.len()));
        }
        self.found
    }

    /// The only one.
    ///
    /// # Panics
    /// If there are none, or more.
    #[track_caller]
    pub fn one(self) -> T {
        self.times(1).remove(0)
    }

    /// There is one.
    ///
    /// # Panics
    /// If there are none, or more.
    #[track_caller]
    pub fn once(self) {
        self.times(1);
    }

    /// There are none.
    ///
    /// # Panics
    /// If there are.
    #[track_caller]
    pub fn none(self) {
        self.times(0);
    }

    /// All, however many.
    #[must_use]
    pub fn all(self) -> Vec<T> {
        self.found
    }

    /// Those of them that are so.
    pub fn only(mut self, is_so: impl FnMut(&T) -> bool) -> Self {
        self.found.retain(is_so);
        self
    }
}

impl Found<'_, Letter> {
    /// Those of one subscription.
    ///
    /// # Panics
    /// If there is no such subscription under test, naming those there are.
    #[track_caller]
    pub fn of(self, subscription: &str) -> Self {
        self.test.check(subscription);
        let what = format!("dead letters of `{subscription}`");
        Self { what, ..self.only(|letter| letter.subscription.as_str() == subscription) }
    }
}

/// A failed run that was followed by another.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Retry {
    /// After how long.
    pub delay: Duration,
    /// The error, in one line.
    pub error: String,
}

/// What a subscription could not handle.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Letter {
    /// The subscription.
    pub subscription: SubscriptionName,
    /// The message, with the headers that tell why ([`header`]).
    pub message: Message,
    /// Why it was dead-lettered.
    pub reason: Option<DeadLetterReason>,
    /// The last error, in one line.
    pub error: String,
    /// How many runs have failed.
    pub attempts: u32,
}

impl Letter {
    fn new(subscription: &SubscriptionName, message: &Message) -> Self {
        let text = |name| message.headers.get_str(name).unwrap_or_default();
        Self {
            subscription: subscription.clone(),
            reason: DeadLetterReason::from_name(text(header::REASON)),
            error: text(header::ERROR).to_owned(),
            attempts: text(header::ATTEMPTS).parse().unwrap_or(0),
            message: message.clone(),
        }
    }
}
