//! The consumers of one channel, and how they end.

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::BasicConsumeOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use std::future::poll_fn;
use std::mem::{forget, take};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

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

/// A channel with one consumer; dropped, it ends as [`close_first`] says, also while it is being opened: a consumer that
/// comes when nobody waits for it any more keeps its channel open.
pub(crate) struct Consuming {
    pub(crate) channel: Channel,
    pub(crate) consumer: Option<Consumer>,
    handle: Handle,
}

impl Consuming {
    pub(crate) async fn open(
        channel: Channel,
        queue: ShortString,
        tag: ShortString,
        options: BasicConsumeOptions,
    ) -> lapin::Result<Self> {
        let mut opened = Self { channel, consumer: None, handle: Handle::current() };
        let consumer = opened.channel.basic_consume(queue, tag, options, FieldTable::default());
        opened.consumer = Some(consumer.await?);
        Ok(opened)
    }
}

impl Drop for Consuming {
    fn drop(&mut self) {
        close_first(&self.handle, &self.channel, self.consumer.take());
    }
}

/// Closes the channel, which gives back everything in its place, and lets go of its consumers then.
///
/// The client cancels a consumer that is dropped: a stand-by would overtake what is still unsettled here, and the server
/// closes the connection if the cancel comes behind the channel's own end, as it may when both are dropped at once.
pub(crate) fn close_first<T: Default + Send + 'static>(handle: &Handle, channel: &Channel, consumers: T) {
    let (channel, mut consumers) = (channel.clone(), Uncancelled(consumers));
    handle.spawn(async move {
        // An error says that it is closed already.
        if timeout(Duration::from_secs(10), channel.close(200, "closed".into())).await.is_ok() {
            drop(take(&mut consumers.0));
        }
    });
}

/// Consumers that must not be cancelled, even if their runtime has ended: the channel goes with its connection, and they
/// are leaked.
struct Uncancelled<T: Default>(T);

impl<T: Default> Drop for Uncancelled<T> {
    fn drop(&mut self) {
        forget(take(&mut self.0));
    }
}
