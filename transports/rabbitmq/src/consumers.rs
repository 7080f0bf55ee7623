//! The consumers of one channel.

use futures_util::StreamExt;
use lapin::Consumer;
use lapin::message::Delivery;
use std::future::poll_fn;
use std::task::{Context, Poll};

/// One delivery of one consumer; `None` at its end. The number tells a consumer from the one that takes its place.
pub(crate) type Came = (usize, u32, Option<lapin::Result<Delivery>>);

/// By slot and number. They are few, and each is asked in turn, which costs less than to keep account of who was woken.
#[derive(Default)]
pub(crate) struct Consumers {
    all: Vec<(usize, u32, Consumer)>,
    at: usize,
}

impl Consumers {
    pub(crate) fn push(&mut self, slot: usize, number: u32, consumer: Consumer) {
        self.all.push((slot, number, consumer));
    }

    /// The next of what has come, of one consumer until it has no more. Without consumers it never does.
    pub(crate) async fn next(&mut self) -> Came {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Came> {
        for _ in 0..self.all.len() {
            self.at %= self.all.len();
            let (slot, number, consumer) = &mut self.all[self.at];
            match consumer.poll_next_unpin(cx) {
                Poll::Ready(Some(came)) => return Poll::Ready((*slot, *number, Some(came))),
                Poll::Ready(None) => {
                    let (slot, number, _) = self.all.swap_remove(self.at);
                    return Poll::Ready((slot, number, None));
                }
                Poll::Pending => self.turn(),
            }
        }
        Poll::Pending
    }

    /// Goes on with another, so that one that always has more does not keep the others waiting.
    pub(crate) fn turn(&mut self) {
        self.at += 1;
    }
}
