//! The dead letters of a subscription as a tool: count, list, show, redrive, purge.

use crate::clock::from_rfc3339;
use crate::dead_letter::{Failures, header};
use crate::publish::Post;
use crate::transport::{DeadLetter, DeadLetters, Destination, Fate};
use crate::{
    Bus, Clock, DeadLetterReason, Error, ErrorKind, Headers, Key, Message, MessageId, Result, SubscriptionName, Text,
    Topic, to_rfc3339,
};
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How many dead letters are in memory at a time, whatever is asked for.
const PAGE: usize = 64;

impl Bus {
    /// The dead letters of a subscription, such as `billing.shop.order.placed`. The subscription need not run, and
    /// nothing dead-letters again by being read here.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] for what is no name of a subscription, and whatever the broker refuses.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use tidings_core::{Bus, DeadLetterReason, Result};
    /// # async fn example(bus: Bus) -> Result<()> {
    /// let letters = bus.dead_letters("billing.shop.order.placed").await?;
    /// for letter in letters.list(None, 20).await? {
    ///     println!("{} {} {:?}: {}", letter.position, letter.reason_text, letter.age, letter.error);
    /// }
    /// letters.redrive_if(|letter| letter.reason == Some(DeadLetterReason::NewerVersion)).await?;
    /// # Ok(()) }
    /// ```
    pub async fn dead_letters<N>(&self, subscription: N) -> Result<DeadLetterBox>
    where
        N: TryInto<SubscriptionName, Error: Into<Error>>,
    {
        let name = subscription.try_into().map_err(Into::into)?;
        let letters = self.transport().dead_letters(&name).await?;
        Ok(DeadLetterBox { bus: self.clone(), name, letters })
    }
}

/// The dead letters of one subscription, from [`Bus::dead_letters`]. They are read and changed outside of any service,
/// at most 64 of them in memory at a time.
///
/// A dead letter that is *redriven* goes to its subscription alone, at the end of what waits there, as it came the first
/// time: same id, source, key, time, headers and payload; only what made it a dead letter, and the count of its attempts,
/// is taken off, so that its attempts start anew. Handlers are told that it may be a duplicate, and
/// [`header::REDRIVEN`] says when it was redriven. Others with its key may have been handled since: a redriven event is
/// out of order.
///
/// The dead letter is removed only after the broker has confirmed the event. A crash, or a lost connection, between the
/// two leaves both: redriving again makes a duplicate, never a loss.
pub struct DeadLetterBox {
    bus: Bus,
    name: SubscriptionName,
    letters: Arc<dyn DeadLetters>,
}

/// What a dead letter tells without its payload.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeadLetterInfo {
    /// Its place among the dead letters of its subscription, which names it.
    pub position: u64,
    /// The event's id.
    pub id: MessageId,
    /// Who published it.
    pub source: Text,
    /// The event's name.
    pub event_type: Text,
    /// The version of the event's contract.
    pub version: u32,
    /// Where it was published.
    pub topic: Topic,
    /// What its order is kept by.
    pub key: Option<Key>,
    /// When it was first published.
    pub recorded_time: Option<SystemTime>,
    /// All its headers: the application's, and those that this is read from ([`header`]).
    pub headers: Headers,
    /// Why it was dead-lettered; `None` if this version of the SDK does not know the reason.
    pub reason: Option<DeadLetterReason>,
    /// The reason as it is written; empty if there is none.
    pub reason_text: Text,
    /// The last error and its causes in one line; empty if there is none.
    pub error: Text,
    /// How many runs of its handler have failed.
    pub attempts: u32,
    /// When the first of them failed.
    pub first_failure: Option<SystemTime>,
    /// When it was dead-lettered.
    pub time: Option<SystemTime>,
    /// How long ago that was, by the clock of this bus.
    pub age: Option<Duration>,
    /// When it was last redriven, if it was dead-lettered again since.
    pub redriven: Option<SystemTime>,
    /// It was dead-lettered by a replay, so that the subscription itself may have handled it.
    pub replayed: bool,
    /// The size of its payload, in bytes.
    pub size: usize,
}

impl DeadLetterInfo {
    fn new(letter: DeadLetter, clock: Clock) -> Self {
        let DeadLetter { position, message } = letter;
        let failures = Failures::of(&message);
        let text = |name| Text::from(message.headers.get_str(name).unwrap_or_default());
        let time_of = |name| message.headers.get_str(name).and_then(from_rfc3339);
        let (reason_text, time) = (text(header::REASON), time_of(header::TIME));
        Self {
            position,
            reason: DeadLetterReason::from_name(&reason_text),
            reason_text,
            error: text(header::ERROR),
            attempts: failures.attempts,
            first_failure: failures.first,
            time,
            // A clock that runs ahead elsewhere makes no age below zero.
            age: time.map(|time| clock.now().duration_since(time).unwrap_or_default()),
            redriven: time_of(header::REDRIVEN),
            replayed: message.headers.get(header::REPLAYED).is_some(),
            size: message.payload.len(),
            id: message.id,
            source: message.source,
            event_type: message.event_type,
            version: message.version,
            topic: message.topic,
            key: message.key,
            recorded_time: message.recorded_time,
            headers: message.headers,
        }
    }
}

impl DeadLetterBox {
    /// The subscription whose dead letters these are.
    #[must_use]
    pub fn subscription(&self) -> &SubscriptionName {
        &self.name
    }

    /// How many there are.
    ///
    /// # Errors
    /// Whatever the broker refuses.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn count(&self) -> Result<u64> {
        self.letters.count().await.map_err(|error| self.about(error, "count dead letters"))
    }

    /// Up to `max` of them, the oldest first, of those after the position `after`: a page, whose last position is the
    /// `after` of the next.
    ///
    /// # Errors
    /// Whatever the broker refuses.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn list(&self, after: Option<u64>, max: usize) -> Result<Vec<DeadLetterInfo>> {
        let clock = self.bus.clock();
        let (mut infos, mut after) = (Vec::new(), after);
        while infos.len() < max {
            let page = self.page(after, PAGE.min(max - infos.len()), "list dead letters").await?;
            let Some(last) = page.last() else { break };
            after = Some(last.position);
            infos.extend(page.into_iter().map(|letter| DeadLetterInfo::new(letter, clock)));
        }
        Ok(infos)
    }

    /// The whole message at a position, as it is stored: payload, attributes, and the headers that tell why.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none at this position (any more), and whatever the broker refuses.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn show(&self, position: u64) -> Result<Message> {
        self.find(position, "show dead letter").await.map(|letter| letter.message)
    }

    /// Sends one back to its subscription, then removes it here.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none at this position (any more). If the event is not confirmed, the dead
    /// letter stays; [`Error::possibly_persisted`] says whether the subscription may get the event all the same, as it
    /// does if the dead letter could not be removed.
    ///
    /// # Cancel safety
    /// The event may be sent and its dead letter stay: redriving again may make a duplicate.
    pub async fn redrive(&self, position: u64) -> Result<()> {
        let letter = self.find(position, "redrive").await?;
        self.send(vec![letter]).await.1
    }

    /// Sends one back with another payload, in the same content type: a repaired one.
    ///
    /// # Errors
    /// As [`redrive`](Self::redrive); and [`ErrorKind::TooLarge`] for a payload over the bus's limit.
    ///
    /// # Cancel safety
    /// As [`redrive`](Self::redrive).
    pub async fn redrive_edited(&self, position: u64, payload: impl Into<Bytes> + Send) -> Result<()> {
        let mut letter = self.find(position, "redrive").await?;
        letter.message.payload = payload.into();
        letter.message.check(self.bus.max_payload()).map_err(|error| self.about(error, "redrive"))?;
        self.send(vec![letter]).await.1
    }

    /// Sends back those for which `filter` says so, the oldest first, of those that are here when it begins: what
    /// dead-letters again meanwhile is not looked at, so that this ends. Returns how many were sent back.
    ///
    /// # Errors
    /// As [`redrive`](Self::redrive), at the first page in which one could not be sent: `redriven` in the error's context
    /// says how many were. Calling it again goes on.
    ///
    /// # Cancel safety
    /// What was sent back stays so; of at most 64, the event may be sent and its dead letter stay.
    pub async fn redrive_if(&self, mut filter: impl FnMut(&DeadLetterInfo) -> bool + Send) -> Result<u64> {
        let (clock, mut redriven) = (self.bus.clock(), 0);
        let mut pages = self.pages("redrive").await?;
        while let Some(page) = pages.next().await.map_err(|error| error.with_context("redriven", redriven))? {
            let wanted = page.into_iter().filter(|letter| filter(&DeadLetterInfo::new(letter.clone(), clock)));
            let (sent, result) = self.send(wanted.collect()).await;
            redriven += sent;
            result.map_err(|error| error.with_context("redriven", redriven))?;
        }
        Ok(redriven)
    }

    /// Sends back all that are here when it begins. Returns how many those were.
    ///
    /// # Errors
    /// As [`redrive_if`](Self::redrive_if).
    ///
    /// # Cancel safety
    /// As [`redrive_if`](Self::redrive_if).
    pub async fn redrive_all(&self) -> Result<u64> {
        self.redrive_if(|_| true).await
    }

    /// Deletes those at these positions, for good; positions where there is none are ignored. Returns how many were
    /// deleted.
    ///
    /// # Errors
    /// Whatever the broker refuses; some may be deleted then.
    ///
    /// # Cancel safety
    /// Some may be deleted.
    pub async fn purge(&self, positions: &[u64]) -> Result<u64> {
        self.letters.remove(positions).await.map_err(|error| self.about(error, "purge"))
    }

    /// Deletes all of them, for good, if there are exactly as many as `seen`, which is the confirmation: a
    /// [`count`](Self::count) that somebody has looked at. What is dead-lettered after it began stays. Returns how many
    /// were deleted.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if there are more or less, and nothing is deleted; and whatever the broker refuses.
    ///
    /// # Cancel safety
    /// Some may be deleted.
    pub async fn purge_all(&self, seen: u64) -> Result<u64> {
        let mut pages = self.pages("purge").await?;
        let count = self.count().await?;
        if count != seen {
            let why = format!("{seen} dead letters were confirmed and there are {count}; nothing was deleted");
            return Err(self.about(Error::new(ErrorKind::Mismatch, why), "purge"));
        }
        let mut purged = 0;
        while let Some(page) = pages.next().await? {
            let positions: Vec<_> = page.iter().map(|letter| letter.position).collect();
            purged += self.purge(&positions).await?;
        }
        Ok(purged)
    }

    async fn page(&self, after: Option<u64>, max: usize, operation: &'static str) -> Result<Vec<DeadLetter>> {
        self.letters.page(after, max).await.map_err(|error| self.about(error, operation))
    }

    async fn pages(&self, operation: &'static str) -> Result<Pages<'_>> {
        let end = self.letters.last().await.map_err(|error| self.about(error, operation))?;
        Ok(Pages { letters: self, after: None, end, operation })
    }

    async fn find(&self, position: u64, operation: &'static str) -> Result<DeadLetter> {
        let mut page = self.page(position.checked_sub(1), 1, operation).await?;
        page.pop().filter(|letter| letter.position == position).ok_or_else(|| {
            let error = Error::new(ErrorKind::NotFound, "no dead letter at this position; it was redriven or purged");
            self.about(error.with_context("position", position), operation)
        })
    }

    /// Sends these to the subscription and removes those that were confirmed, which are counted even if others failed.
    async fn send(&self, letters: Vec<DeadLetter>) -> (u64, Result<()>) {
        if letters.is_empty() {
            return (0, Ok(()));
        }
        let now = self.bus.clock().now();
        let positions: Vec<_> = letters.iter().map(|letter| letter.position).collect();
        let posts: Vec<_> = letters.into_iter().map(|letter| self.revive(letter.message, now)).collect();
        // Room for what was stored already must be made: it is removed next.
        let failures = self.bus.send(&posts, self.bus.terms(true)).await;
        let failed = |index: usize| failures.iter().any(|(failed, _)| *failed == index);
        let positions = positions.into_iter().enumerate().filter(|(index, _)| !failed(*index));
        let positions: Vec<_> = positions.map(|(_, position)| position).collect();
        let removed = if positions.is_empty() { Ok(0) } else { self.letters.remove(&positions).await };
        if let Err(error) = removed {
            let error = error.with_context("stay", "sent, but still dead letters: redriving again makes duplicates");
            return (0, Err(self.about(error.with_fate(Fate::PossiblyPersisted), "redrive")));
        }
        let first = failures.into_iter().min_by_key(|(index, _)| *index);
        let result = first.map_or(Ok(()), |(_, first)| Err(first.error.with_fate(first.fate)));
        (positions.len() as u64, result.map_err(|error| self.about(error, "redrive")))
    }

    /// The event as it came before it was a dead letter, marked.
    fn revive(&self, mut message: Message, now: SystemTime) -> Post {
        for name in header::OF_DEAD_LETTERS {
            message.headers.remove(name);
        }
        message.headers.set(header::REDRIVEN, to_rfc3339(now));
        Post { destination: Destination::Subscription(self.name.clone()), message: message.into(), delay: None }
    }

    fn about(&self, error: Error, operation: &'static str) -> Error {
        let transport = self.bus.transport().name();
        error.with_operation(operation).with_transport(transport).with_context("subscription", &self.name)
    }
}

impl fmt::Debug for DeadLetterBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeadLetterBox").field(&self.name).finish()
    }
}

/// All dead letters that were there when it was made, page by page.
struct Pages<'a> {
    letters: &'a DeadLetterBox,
    after: Option<u64>,
    /// The last that was there; `None` if there was none.
    end: Option<u64>,
    operation: &'static str,
}

impl Pages<'_> {
    async fn next(&mut self) -> Result<Option<Vec<DeadLetter>>> {
        let Some(end) = self.end.filter(|end| self.after.is_none_or(|after| after < *end)) else { return Ok(None) };
        let mut page = self.letters.page(self.after, PAGE, self.operation).await?;
        page.retain(|letter| letter.position <= end);
        self.after = page.last().map(|letter| letter.position);
        Ok((!page.is_empty()).then_some(page))
    }
}
