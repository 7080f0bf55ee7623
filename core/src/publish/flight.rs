//! The broker's answer to a published message.

use super::gate::Pass;
use crate::transport::{Destination, Outgoing, Publisher};
use crate::{Error, ErrorKind, Message};
use parking_lot::Mutex;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::sync::Semaphore;

/// What is known of a message whose publish failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The broker does not have it.
    NotPersisted,
    /// The broker may have it: sending it again may make a duplicate.
    PossiblyPersisted,
}

/// Why a message was not confirmed, and what is known of it.
#[derive(Debug)]
pub struct PublishFailure {
    /// What is known of the message.
    pub fate: Fate,
    /// Why; a transient error lets core send it again.
    pub error: Error,
}

/// The duty to answer for one message: by value, exactly once, from any thread.
///
/// Dropped unanswered, it says *possibly persisted*. Answering wakes whoever published, takes no lock of the
/// transport and is allowed while the transport holds its own.
pub struct Receipt {
    flight: Option<Arc<Flight>>,
    index: u32,
}

impl Receipt {
    /// The broker has taken responsibility for the message.
    pub fn confirm(mut self) {
        self.answer(None);
    }

    /// The message was not confirmed.
    pub fn fail(mut self, fate: Fate, error: Error) {
        self.answer(Some(PublishFailure { fate, error }));
    }

    /// Whether nobody waits for the answer any more. A message that was not sent yet may then be dropped.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.flight.as_ref().is_none_or(|flight| flight.state.lock().abandoned)
    }

    fn answer(&mut self, failure: Option<PublishFailure>) {
        if let Some(flight) = self.flight.take() {
            flight.answer(1 << self.index, failure.map(|failure| (self.index as usize, failure)));
        }
    }
}

/// Confirms what was submitted together with one answer, where a transport knows of many messages at once.
///
/// What was [added](Self::add) is confirmed when [`answer`](Self::answer) is called or this is dropped, at the latest.
#[derive(Default)]
pub struct Confirmed {
    flight: Option<Arc<Flight>>,
    answered: u64,
}

impl Confirmed {
    /// The broker has taken responsibility for the message.
    pub fn add(&mut self, mut receipt: Receipt) {
        let Some(flight) = receipt.flight.take() else { return };
        if !self.flight.as_ref().is_some_and(|own| Arc::ptr_eq(own, &flight)) {
            self.answer();
            self.flight = Some(flight);
        }
        self.answered |= 1 << receipt.index;
    }

    /// Confirms what was added.
    pub fn answer(&mut self) {
        if let Some(flight) = self.flight.take() {
            flight.answer(std::mem::take(&mut self.answered), None);
        }
    }
}

impl Drop for Confirmed {
    fn drop(&mut self) {
        self.answer();
    }
}

impl fmt::Debug for Confirmed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Confirmed").field("count", &self.answered.count_ones()).finish_non_exhaustive()
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if self.flight.is_some() {
            let error = Error::new(ErrorKind::Internal, "the transport dropped the message without an answer");
            self.answer(Some(PublishFailure { fate: Fate::PossiblyPersisted, error: error.with_transient(true) }));
        }
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receipt").field("index", &self.index).finish_non_exhaustive()
    }
}

/// Up to 64 messages submitted together, waiting for their answers; one allocation for all of them.
pub(crate) struct Flight {
    state: Mutex<State>,
    /// Each answer gives one permit of the window back, if there is one.
    window: Option<Arc<Semaphore>>,
    /// The keys of these messages stay closed until all have been answered, even if nobody waits any more.
    passes: Option<Arc<[Pass]>>,
}

struct State {
    /// One bit for each message.
    unanswered: u64,
    abandoned: bool,
    failures: Vec<(usize, PublishFailure)>,
    waker: Option<Waker>,
}

impl Flight {
    /// The most messages in one flight.
    pub(crate) const MAX: usize = 64;

    /// A flight of `count` messages, each of which holds one permit of `window`.
    pub(crate) fn new(count: usize, window: Option<Arc<Semaphore>>, passes: Option<Arc<[Pass]>>) -> Arc<Self> {
        debug_assert!((1..=Self::MAX).contains(&count));
        let unanswered = u64::MAX >> (Self::MAX - count);
        let state = State { unanswered, abandoned: false, failures: Vec::new(), waker: None };
        Arc::new(Self { state: Mutex::new(state), window, passes })
    }

    /// As [`new`](Self::new), in the place of a flight that has landed, if nobody holds on to that any more.
    pub(crate) fn take_off(
        landed: Option<Arc<Self>>,
        count: usize,
        window: Option<Arc<Semaphore>>,
        passes: Option<Arc<[Pass]>>,
    ) -> Arc<Self> {
        let Some(mut flight) = landed else { return Self::new(count, window, passes) };
        let Some(this) = Arc::get_mut(&mut flight) else { return Self::new(count, window, passes) };
        this.state.get_mut().unanswered = u64::MAX >> (Self::MAX - count);
        this.window = window;
        this.passes = passes;
        flight
    }

    /// Lets the keys go, and says whether it can be used again: nobody else holds on to it.
    pub(crate) fn land(self: &mut Arc<Self>) -> bool {
        Arc::get_mut(self).is_some_and(|flight| {
            flight.passes = None;
            true
        })
    }

    pub(crate) fn receipt(self: &Arc<Self>, index: u32) -> Receipt {
        Receipt { flight: Some(Arc::clone(self)), index }
    }

    /// Ready with the failures, by index, when all have been answered.
    pub(crate) fn poll_answers(&self, cx: &mut Context<'_>) -> Poll<Vec<(usize, PublishFailure)>> {
        let mut state = self.state.lock();
        if state.unanswered == 0 {
            return Poll::Ready(std::mem::take(&mut state.failures));
        }
        if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Nobody waits any more. Returns what failed, and who was not answered.
    pub(crate) fn abandon(&self) -> (Vec<(usize, PublishFailure)>, impl Iterator<Item = usize> + use<>) {
        let mut state = self.state.lock();
        state.abandoned = true;
        state.waker = None;
        let unanswered = state.unanswered;
        (std::mem::take(&mut state.failures), (0..Self::MAX).filter(move |index| unanswered & (1 << index) != 0))
    }

    /// Answers for those whose bits are set: as confirmed, if this is no failure.
    fn answer(&self, answered: u64, failure: Option<(usize, PublishFailure)>) {
        let mut state = self.state.lock();
        state.unanswered &= !answered;
        state.failures.extend(failure);
        let waker = if state.unanswered == 0 { state.waker.take() } else { None };
        drop(state);
        if let Some(window) = &self.window {
            window.add_permits(answered.count_ones() as usize);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Submits messages (where to, what, delay, owed) at once; the future resolves to the failures by index, ascending.
///
/// For tests of transports and for tools. Dropping the future abandons what is unanswered.
pub fn submit_and_wait<M: Clone + Into<Arc<Message>>>(
    publisher: &dyn Publisher,
    batch: &[(Destination, M, Option<Duration>, bool)],
) -> impl Future<Output = Vec<(usize, PublishFailure)>> + Send + use<M> {
    let mut flights = batch.chunks(Flight::MAX).map(|part| Flight::new(part.len(), None, None));
    let answers = Answers { first: flights.next(), more: flights.collect(), failures: Vec::new(), at: 0 };
    let receipt = |index: usize| {
        // Below Flight::MAX, which fits.
        Receipt { flight: answers.flight(index / Flight::MAX).cloned(), index: (index % Flight::MAX) as u32 }
    };
    publisher.submit(&mut batch.iter().zip(0..).map(|((destination, message, delay, owed), index)| Outgoing {
        destination: destination.clone(),
        message: message.clone().into(),
        delay: *delay,
        owed: *owed,
        receipt: receipt(index),
    }));
    answers
}

struct Answers {
    /// By itself, because mostly it is all.
    first: Option<Arc<Flight>>,
    more: Vec<Arc<Flight>>,
    failures: Vec<(usize, PublishFailure)>,
    /// The flight that is waited for.
    at: usize,
}

impl Answers {
    fn flight(&self, number: usize) -> Option<&Arc<Flight>> {
        if number == 0 { self.first.as_ref() } else { self.more.get(number - 1) }
    }
}

impl Future for Answers {
    type Output = Vec<(usize, PublishFailure)>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { first, more, failures, at } = &mut *self;
        while let Some(flight) = first.iter().chain(more.iter()).nth(*at) {
            let mut failed = ready!(flight.poll_answers(cx));
            if !failed.is_empty() {
                failed.sort_by_key(|(index, _)| *index);
                failures.extend(failed.into_iter().map(|(index, failure)| (*at * Flight::MAX + index, failure)));
            }
            *at += 1;
        }
        Poll::Ready(std::mem::take(failures))
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.first.iter().chain(&self.more).for_each(|flight| drop(flight.abandon()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test]
    async fn names_by_index_what_failed_and_returns_each_permit() {
        let window = Arc::new(Semaphore::new(0));
        let flight = Flight::new(3, Some(Arc::clone(&window)), None);
        let [a, b, c] = [0, 1, 2].map(|index| flight.receipt(index));
        c.confirm();
        assert_eq!(window.available_permits(), 1);
        b.fail(Fate::NotPersisted, Error::new(ErrorKind::Full, "full"));
        drop(a);
        let failures = poll_fn(|cx| flight.poll_answers(cx)).await;
        let seen: Vec<_> = failures.iter().map(|(i, f)| (*i, f.fate)).collect();
        assert_eq!(seen, [(1, Fate::NotPersisted), (0, Fate::PossiblyPersisted)]);
        assert_eq!(window.available_permits(), 3);
    }

    #[tokio::test]
    async fn what_is_confirmed_together_is_answered_for_once_and_each_permit_returned() {
        let window = Arc::new(Semaphore::new(0));
        let [one, other] = [3, 1].map(|count| Flight::new(count, Some(Arc::clone(&window)), None));
        let mut confirmed = Confirmed::default();
        confirmed.add(one.receipt(0));
        confirmed.add(one.receipt(2));
        assert_eq!(window.available_permits(), 0);
        confirmed.add(other.receipt(0));
        assert_eq!(window.available_permits(), 2, "those of another flight are not kept waiting");
        drop(confirmed);
        assert_eq!(window.available_permits(), 3);
        assert!(poll_fn(|cx| other.poll_answers(cx)).await.is_empty());
        assert_eq!(one.abandon().1.collect::<Vec<_>>(), [1], "this one was not added");
    }

    /// Confirms the even ones.
    struct Even;

    impl Publisher for Even {
        fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
            for (index, Outgoing { receipt, .. }) in batch.enumerate() {
                match index % 2 {
                    0 => receipt.confirm(),
                    _ => receipt.fail(Fate::NotPersisted, Error::new(ErrorKind::Full, "full")),
                }
            }
        }
    }

    #[tokio::test]
    async fn a_batch_of_any_size_has_its_failures_by_index() {
        for size in [0, 1, 64, 65, 128, 200] {
            let topic = crate::Topic::new("t").unwrap();
            let message = Message::new("1".into(), "/s", "t", topic.clone());
            let batch = vec![(Destination::Topic(topic), message, None, false); size];
            let failed: Vec<_> = submit_and_wait(&Even, &batch).await.into_iter().map(|(index, _)| index).collect();
            assert_eq!(failed, (0..size).filter(|index| index % 2 == 1).collect::<Vec<_>>());
        }
    }

    #[test]
    fn tells_the_transport_when_nobody_waits_and_the_caller_who_was_not_answered() {
        let flight = Flight::new(64, None, None);
        let receipts: Vec<_> = (0..64).map(|index| flight.receipt(index)).collect();
        let mut rest = receipts.into_iter();
        rest.by_ref().take(62).for_each(Receipt::confirm);
        let waiting: Vec<_> = rest.collect();
        assert!(waiting.iter().all(|receipt| !receipt.is_abandoned()));
        assert_eq!(flight.abandon().1.collect::<Vec<_>>(), [62, 63]);
        assert!(waiting.iter().all(Receipt::is_abandoned));
    }
}
