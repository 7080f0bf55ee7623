//! What can be asked of what has happened.

use crate::harness::Test;
use crate::timeline::{End, Number, Retried, Sent, What};
use std::collections::HashSet;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::time::Duration;
use tidings_core::transport::Destination;
use tidings_core::{DeadLetterReason, Event, Message, SubscriptionName, header};

impl Test {
    /// The events of one type that were published and confirmed, by the test or by what handlers returned. What was
    /// published again with the same id is the same event.
    #[track_caller]
    pub fn published<E: Event>(&self) -> Published<'_, E> {
        let mut seen = HashSet::new();
        let messages = self.tracker.collect(|what| {
            let Some((Destination::Topic(topic), message, number)) = confirmed(what) else { return None };
            let is_it = topic.as_str() == E::TOPIC && message.event_type == E::NAME && seen.insert(number);
            is_it.then(|| message.clone())
        });
        Published { test: self, messages, event: PhantomData }
    }

    /// The runs in which a subscription has handled events of one type.
    ///
    /// # Panics
    /// If there is no such subscription under test, naming those there are.
    #[track_caller]
    pub fn handled<E: Event>(&self, subscription: &str) -> Handled<'_> {
        self.check(subscription);
        let runs = self.tracker.collect(|what| match what {
            What::Run(run) if run.subscription.as_str() == subscription => {
                let mut events = run.events.iter().filter(|(_, event_type)| *event_type == E::NAME).peekable();
                events.peek()?;
                let succeeded = run.end == End::Succeeded;
                let handled = events.filter(|(number, _)| succeeded && !run.but.contains(number)).count();
                Some((run.attempt, handled))
            }
            _ => None,
        });
        Handled { test: self, what: format!("`{subscription}` to have handled `{}`", E::NAME), runs }
    }

    /// The retries of a subscription.
    ///
    /// # Panics
    /// If there is no such subscription under test, naming those there are.
    #[track_caller]
    pub fn retried(&self, subscription: &str) -> Retries<'_> {
        self.check(subscription);
        let retries = self.tracker.collect(|what| match what {
            What::Run(run) if run.subscription.as_str() == subscription => {
                let error = if let End::Failed(error) = &run.end { error.clone() } else { String::new() };
                run.again.map(|delay| Retry { delay, error })
            }
            What::Retried(Retried { subscription: name, delay, error, .. }) if name.as_str() == subscription => {
                Some(Retry { delay: *delay, error: error.clone() })
            }
            _ => None,
        });
        Retries { test: self, subscription: subscription.to_owned(), retries }
    }

    /// What was dead-lettered.
    pub fn dead_letters(&self) -> Letters<'_> {
        let letters = self.tracker.collect(|what| match confirmed(what)? {
            (Destination::DeadLetter(name), message, _) => Some(Letter::new(name, message)),
            _ => None,
        });
        Letters { test: self, what: "dead letters".to_owned(), letters }
    }

    #[track_caller]
    fn check(&self, subscription: &str) {
        let names = self.tracker.names();
        if !names.iter().any(|name| name == subscription) {
            self.fail(&format!("no subscription `{subscription}` under test; there are: {}", names.join(", ")));
        }
    }

    #[track_caller]
    fn count(&self, what: &str, expected: usize, found: usize) {
        if found != expected {
            self.fail(&format!("expected {what} {}, found {}", times(expected), times(found)));
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

fn times(count: usize) -> String {
    match count {
        0 => "never".to_owned(),
        1 => "once".to_owned(),
        _ => format!("{count} times"),
    }
}

/// Events of one type that were published, from [`Test::published`].
#[derive(Debug)]
#[must_use = "it asserts nothing by itself"]
pub struct Published<'t, E> {
    test: &'t Test,
    messages: Vec<Message>,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> Published<'_, E> {
    /// All of them, in the order they were published.
    ///
    /// # Panics
    /// If one cannot be decoded.
    #[must_use]
    #[track_caller]
    pub fn all(&self) -> Vec<E> {
        let mut events = Vec::with_capacity(self.messages.len());
        for message in &self.messages {
            match E::decode(&message.content_type, message.version, &message.payload) {
                Ok(event) => events.push(event),
                Err(error) => self.test.fail(&format!("`{}` was published and cannot be decoded: {error}", E::NAME)),
            }
        }
        events
    }

    /// The only one.
    ///
    /// # Panics
    /// If there are none, or more.
    #[track_caller]
    pub fn one(&self) -> E {
        let mut events = self.times(1);
        events.remove(0)
    }

    /// All, which are this many.
    ///
    /// # Panics
    /// If there are more or less.
    #[track_caller]
    pub fn times(&self, count: usize) -> Vec<E> {
        self.test.count(&format!("`{}` to be published", E::NAME), count, self.messages.len());
        self.all()
    }

    /// There are none.
    ///
    /// # Panics
    /// If there are.
    #[track_caller]
    pub fn none(&self) {
        self.test.count(&format!("`{}` to be published", E::NAME), 0, self.messages.len());
    }

    /// The messages themselves, for their headers, keys and ids.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }
}

/// Runs that have handled events of one type, from [`Test::handled`].
#[derive(Debug)]
#[must_use = "it asserts nothing by itself"]
pub struct Handled<'t> {
    test: &'t Test,
    what: String,
    /// Which attempt it was, and how many events it has handled.
    runs: Vec<(u32, usize)>,
}

impl Handled<'_> {
    /// How many events were handled: successful runs, times the events in each.
    #[must_use]
    pub fn count(&self) -> usize {
        self.runs.iter().map(|(_, handled)| handled).sum()
    }

    /// Which attempt each successful run was, from 1.
    #[must_use]
    pub fn attempts(&self) -> Vec<u32> {
        self.runs.iter().filter(|(_, handled)| *handled > 0).map(|(attempt, _)| *attempt).collect()
    }

    /// How many runs there were, failed ones included.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// One event was handled, once.
    ///
    /// # Panics
    /// If none was, or more were, or it was handled again.
    #[track_caller]
    pub fn once(&self) {
        self.times(1);
    }

    /// Events were handled this many times.
    ///
    /// # Panics
    /// If it was more or less.
    #[track_caller]
    pub fn times(&self, count: usize) {
        self.test.count(&self.what, count, self.count());
    }

    /// None was handled; runs may have failed.
    ///
    /// # Panics
    /// If one was.
    #[track_caller]
    pub fn none(&self) {
        self.times(0);
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

/// The retries of a subscription, from [`Test::retried`].
#[derive(Debug)]
#[must_use = "it asserts nothing by itself"]
pub struct Retries<'t> {
    test: &'t Test,
    subscription: String,
    retries: Vec<Retry>,
}

impl Retries<'_> {
    /// All of them, in order.
    #[must_use]
    pub fn all(&self) -> &[Retry] {
        &self.retries
    }

    /// There were this many; returns them.
    ///
    /// # Panics
    /// If there were more or less.
    #[track_caller]
    pub fn times(&self, count: usize) -> &[Retry] {
        self.test.count(&format!("`{}` to retry", self.subscription), count, self.retries.len());
        &self.retries
    }

    /// There was none.
    ///
    /// # Panics
    /// If there was.
    #[track_caller]
    pub fn none(&self) {
        self.times(0);
    }
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

/// What was dead-lettered, from [`Test::dead_letters`].
#[derive(Debug)]
#[must_use = "it asserts nothing by itself"]
pub struct Letters<'t> {
    test: &'t Test,
    what: String,
    letters: Vec<Letter>,
}

impl Letters<'_> {
    /// Those of one subscription.
    ///
    /// # Panics
    /// If there is no such subscription under test, naming those there are.
    #[track_caller]
    pub fn of(mut self, subscription: &str) -> Self {
        self.test.check(subscription);
        self.letters.retain(|letter| letter.subscription.as_str() == subscription);
        self.what = format!("dead letters of `{subscription}`");
        self
    }

    /// All of them, in order.
    #[must_use]
    pub fn all(&self) -> &[Letter] {
        &self.letters
    }

    /// The only one.
    ///
    /// # Panics
    /// If there are none, or more.
    #[track_caller]
    pub fn one(&self) -> &Letter {
        &self.times(1)[0]
    }

    /// All, which are this many.
    ///
    /// # Panics
    /// If there are more or less.
    #[track_caller]
    pub fn times(&self, count: usize) -> &[Letter] {
        let found = self.letters.len();
        if found != count {
            self.test.fail(&format!("expected {count} {}, found {found}", self.what));
        }
        &self.letters
    }

    /// There are none.
    ///
    /// # Panics
    /// If there are.
    #[track_caller]
    pub fn none(&self) {
        self.times(0);
    }
}
