//! Collects what is published within a short time into one batch, for transports where a batch is cheaper.

use super::Post;
use crate::transport::{Outgoing, Publisher, Receipt};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// As many are sent at once without waiting any longer.
const FULL: usize = 64;

pub(crate) struct Linger {
    publisher: Arc<dyn Publisher>,
    time: Duration,
    waiting: Mutex<Vec<(Post, Receipt)>>,
}

impl Linger {
    pub(crate) fn new(publisher: Arc<dyn Publisher>, time: Duration) -> Arc<Self> {
        Arc::new(Self { publisher, time, waiting: Mutex::default() })
    }

    /// Adds posts behind those that wait; the first one starts the clock.
    pub(crate) fn add(self: &Arc<Self>, posts: impl Iterator<Item = (Post, Receipt)>) {
        let mut waiting = self.waiting.lock();
        let was_empty = waiting.is_empty();
        waiting.extend(posts);
        if waiting.len() >= FULL {
            self.flush(&mut waiting);
        } else if was_empty {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep(this.time).await;
                this.flush(&mut this.waiting.lock());
            });
        }
    }

    /// Under the lock, so that batches leave in order.
    fn flush(&self, waiting: &mut Vec<(Post, Receipt)>) {
        let mut answers = Vec::with_capacity(waiting.len());
        let posts: Vec<Post> = waiting
            .drain(..)
            .map(|(post, receipt)| {
                answers.push(receipt);
                post
            })
            .collect();
        self.publisher.submit(&mut posts.iter().zip(answers).map(|(post, receipt)| Outgoing {
            destination: post.destination.clone(),
            message: Arc::clone(&post.message),
            delay: post.delay,
            owed: false,
            receipt,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::flight::Flight;
    use crate::transport::Destination;
    use crate::{Message, Topic};
    use futures_util::FutureExt;
    use std::future::poll_fn;
    use tokio::time::Instant;

    /// Confirms at once and notes the size of each batch.
    #[derive(Default)]
    struct Batches(Mutex<Vec<usize>>);

    impl Publisher for Batches {
        fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
            let count = batch.map(|outgoing| outgoing.receipt.confirm()).count();
            self.0.lock().push(count);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn sends_together_what_comes_within_the_time_and_at_once_what_is_full() {
        let batches = Arc::new(Batches::default());
        let linger = Linger::new(Arc::clone(&batches) as _, Duration::from_millis(5));
        let topic = Topic::new("t").unwrap();
        let message = Message::new("1".into(), "/s", "t", topic.clone());
        let post = Post { destination: Destination::Topic(topic), message: Arc::new(message), delay: None };
        let add = |count: usize| {
            let flight = Flight::new(count, None, None);
            linger.add((0..count as u32).map(|index| (post.clone(), flight.receipt(index))));
            flight
        };
        let start = Instant::now();
        let (one, two) = (add(1), add(2));
        assert!(poll_fn(|cx| one.poll_answers(cx)).now_or_never().is_none());
        poll_fn(|cx| two.poll_answers(cx)).await;
        assert!(poll_fn(|cx| one.poll_answers(cx)).now_or_never().is_some());
        assert!(start.elapsed() >= Duration::from_millis(5));
        let full = add(64);
        assert!(poll_fn(|cx| full.poll_answers(cx)).now_or_never().is_some());
        assert_eq!(*batches.0.lock(), [3, 64]);
    }
}
