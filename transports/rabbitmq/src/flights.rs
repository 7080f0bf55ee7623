//! What was sent on one channel and is not answered.

use futures_util::FutureExt;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Futures in the order of sending, of which the first alone wakes who waits: the broker answers nearly in order and for many
/// at once, and one wake-up for each costs more than all else here. What lands behind it is found by a [sweep](Self::sweep).
pub(crate) struct Flights<'f, T> {
    flying: VecDeque<Pin<Box<dyn Future<Output = T> + Send + 'f>>>,
    pub(crate) landed: Vec<T>,
}

impl<'f, T> Flights<'f, T> {
    pub(crate) fn new() -> Self {
        Self { flying: VecDeque::new(), landed: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.flying.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.flying.is_empty()
    }

    /// Polls a flight once, and keeps it if it is not over by that.
    pub(crate) fn begin(&mut self, flight: impl Future<Output = T> + Send + 'f) -> Option<T> {
        let mut flight = Box::pin(flight);
        let landed = flight.as_mut().now_or_never();
        if landed.is_none() {
            self.flying.push_back(flight);
        }
        landed
    }

    /// Waits until the first has landed, and takes those that have landed with it. Without flights it never does.
    pub(crate) async fn first(&mut self) {
        poll_fn(|cx| {
            while let Some(Poll::Ready(landed)) = self.flying.front_mut().map(|first| first.as_mut().poll(cx)) {
                self.flying.pop_front();
                self.landed.push(landed);
            }
            if self.landed.is_empty() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// Takes all that have landed, wherever they are.
    pub(crate) fn sweep(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        self.flying.retain_mut(|flight| match flight.as_mut().poll(&mut cx) {
            Poll::Ready(landed) => {
                self.landed.push(landed);
                false
            }
            Poll::Pending => true,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn the_first_wakes_and_a_sweep_finds_the_others() {
        let mut flights = Flights::new();
        let mut answers = Vec::new();
        for number in 0..4 {
            let (answer, answered) = oneshot::channel::<()>();
            answers.push(answer);
            assert_eq!(flights.begin(async move { answered.await.map_or(9, |()| number) }), None);
        }
        assert_eq!(flights.begin(async { 7 }), Some(7), "it is over at once");
        let mut answers = answers.into_iter();
        let (first, second, third) = (answers.next().unwrap(), answers.next().unwrap(), answers.next().unwrap());
        third.send(()).unwrap();
        assert!(flights.first().now_or_never().is_none(), "the first holds it back");
        flights.sweep();
        assert_eq!(std::mem::take(&mut flights.landed), [2]);
        let answering = tokio::spawn(async move {
            tokio::task::yield_now().await;
            second.send(()).unwrap();
            first.send(()).unwrap();
        });
        flights.first().await;
        assert_eq!((flights.landed.as_slice(), flights.len()), (&[0, 1][..], 1), "woken after the sweep too");
        answering.await.unwrap();
        drop(answers);
        flights.landed.clear();
        flights.first().await;
        assert_eq!((flights.landed.as_slice(), flights.is_empty()), (&[9][..], true));
    }
}
