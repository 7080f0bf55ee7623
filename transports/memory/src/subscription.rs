//! An open subscription, or a replay.

use crate::broker::{Broker, Seat, Step};
use crate::error::closed;
use crate::group::Asking;
use crate::settle::MemorySettle;
use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::task::{Context, Poll};
use tidings_core::Result;
use tidings_core::transport::{BoxFuture, Flushed, Polled, Settle, Subscription};
use tokio::time::{Instant, Sleep, sleep_until};

/// One instance. Dropping it without [`close`](Subscription::close) is a crash.
pub(crate) struct MemorySubscription {
    broker: Arc<Broker>,
    seat: Seat,
    settle: Arc<dyn Settle>,
    /// Until the next event is due; made when one first is.
    sleep: Option<Pin<Box<Sleep>>>,
    open: bool,
}

impl MemorySubscription {
    pub(crate) fn new(broker: Arc<Broker>, (seat, epoch): (Seat, Arc<AtomicU32>)) -> Self {
        let settle = Arc::new(MemorySettle { broker: Arc::clone(&broker), seat, epoch });
        Self { broker, seat, settle, sleep: None, open: true }
    }

    /// Ready when `due` has come.
    fn poll_due(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if sleep.deadline() != due {
            sleep.as_mut().reset(due);
        }
        sleep.as_mut().poll(cx)
    }
}

impl Subscription for MemorySubscription {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        loop {
            // The guard is gone before the timer is asked, which may wake others.
            let ask = Asking { max, settle: &self.settle, out };
            let step = self.broker.lock().poll(self.seat, cx.waker(), ask);
            match step {
                Step::Added | Step::Over => return Poll::Ready(Ok(())),
                Step::Closed => return Poll::Ready(Err(closed().with_operation("receive"))),
                Step::Wait(None) => return Poll::Pending,
                Step::Wait(Some(due)) => std::task::ready!(self.poll_due(cx, due)),
            }
        }
    }

    fn stop(&mut self) {
        self.broker.lock().stop(self.seat);
    }

    fn close(mut self: Box<Self>, _deadline: Instant) -> BoxFuture<Flushed> {
        self.open = false;
        Box::pin(ready(self.broker.leave(self.seat, false)))
    }
}

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        if self.open {
            self.broker.leave(self.seat, true);
        }
    }
}
