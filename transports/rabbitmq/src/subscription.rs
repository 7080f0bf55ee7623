//! An open subscription, or a replay: hands out what its reader has put into the window.

use crate::error::closed;
use crate::link::Link;
use crate::settle::{Desk, RabbitMqSettle};
use crate::window::number;
use std::sync::Arc;
use std::task::{Context, Poll};
use tidings_core::transport::{Acker, BoxFuture, Delivery, Flushed, Polled, Settle, Subscription, Tag};
use tidings_core::{Error, Result};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

/// Asks a reader to flush and to let go.
pub(crate) struct Close {
    pub(crate) deadline: Instant,
    pub(crate) answer: oneshot::Sender<()>,
}

/// One instance. Dropping it without [`close`](Subscription::close) is a crash.
pub(crate) struct RabbitMqSubscription {
    desk: Arc<Desk>,
    settle: Arc<dyn Settle>,
    link: Arc<Link>,
    reader: mpsc::Sender<Close>,
    replays: bool,
}

impl RabbitMqSubscription {
    pub(crate) fn new(desk: Arc<Desk>, link: Arc<Link>, reader: mpsc::Sender<Close>, replays: bool) -> Self {
        let settle = Arc::new(RabbitMqSettle(Arc::clone(&desk)));
        Self { desk, settle, link, reader, replays }
    }

    fn closed(&self) -> Error {
        closed().with_operation("receive")
    }
}

impl Subscription for RabbitMqSubscription {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        let mut window = self.desk.window.lock();
        if self.link.is_closed() {
            return Poll::Ready(Err(self.closed()));
        }
        // Alone, so that none is read after what it is about.
        if !window.notices.is_empty() {
            out.notices.append(&mut window.notices);
            return Poll::Ready(Ok(()));
        }
        if window.stopped || window.is_over() {
            return Poll::Ready(Ok(()));
        }
        let before = out.deliveries.len();
        let epoch = window.epoch();
        while out.deliveries.len() - before < max {
            let Some((place, item)) = window.next() else { break };
            let tag = Tag { epoch, seq: number(place) };
            out.deliveries.push(Delivery {
                message: item.message,
                position: place.0,
                slot: place.1,
                redelivered: item.redelivered,
                replayed: self.replays,
                hand_outs: (!self.replays).then_some(item.hand_outs),
                lost: None,
                acker: Acker::new(Arc::clone(&self.settle), tag),
            });
        }
        if out.deliveries.len() > before {
            return Poll::Ready(Ok(()));
        }
        if !window.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            window.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    fn stop(&mut self) {
        let mut window = self.desk.window.lock();
        window.stopped = true;
        window.wake();
    }

    fn close(self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            if self.reader.send(Close { deadline, answer }).await.is_ok() {
                // It ends by itself if nobody waits.
                let _ = timeout_at(deadline, answered).await;
            }
            let mut window = self.desk.window.lock();
            window.closed = true;
            let written = window.told.len() as u64;
            window.flushed.unknown += written;
            window.told.clear();
            window.flushed
        })
    }
}

impl Drop for RabbitMqSubscription {
    fn drop(&mut self) {
        self.desk.window.lock().closed = true;
    }
}
