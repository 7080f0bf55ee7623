//! An open subscription, or a replay.

use crate::settle::Desk;
use crate::worker::{Disk, GRACE, Link};
use std::sync::Arc;
use std::task::{Context, Poll};
use tidings_core::Result;
use tidings_core::transport::{BoxFuture, Flushed, Polled, Subscription};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// One instance. Dropping it without [`close`](Subscription::close) is a crash.
pub(crate) struct DirectorySubscription {
    desk: Arc<Desk>,
    link: Arc<Link>,
}

impl DirectorySubscription {
    pub(crate) fn new(desk: Arc<Desk>, link: Arc<Link>) -> Self {
        Self { desk, link }
    }
}

impl Subscription for DirectorySubscription {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        self.desk.poll(cx, max, out)
    }

    fn stop(&mut self) {
        self.desk.stop();
    }

    fn close(self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed> {
        let (done, closed) = oneshot::channel();
        let desk = Arc::clone(&self.desk);
        // If the transport is closed, so is the channel.
        let _ = self.link.queue.push(Box::new(move |disk: &mut Disk| disk.close_reader(&desk, deadline, done)));
        Box::pin(async move {
            match timeout_at(deadline + GRACE, closed).await {
                Ok(Ok(flushed)) => flushed,
                _ => self.desk.given_up(),
            }
        })
    }
}

impl Drop for DirectorySubscription {
    fn drop(&mut self) {
        self.desk.crash();
    }
}
