//! The desk where an instance and the thread that works on the files meet.

use crate::error::closed;
use crate::worker::Queue;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::task::{Context, Poll, Waker};
use tidings_core::transport::{Acker, Delivery, Flushed, Lease, Notice, Polled, Settle, Settlement, Tag};
use tidings_core::{Error, Message, Result};

/// What one instance and the thread tell each other. Neither ever waits for the other here.
pub(crate) struct Desk {
    pub(crate) queue: Arc<Queue>,
    pub(crate) replayed: bool,
    /// Grows when the instance ends: what it was handed before is then not its own any more.
    epoch: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    // From the instance to the thread.
    wanted: usize,
    settled: Vec<(u64, Settlement)>,
    /// Was ready, and will not be taken.
    untaken: Vec<u64>,
    stopped: bool,
    dropped: bool,
    // From the thread to the instance.
    ready: VecDeque<Ready>,
    notices: Vec<Notice>,
    end: Option<End>,
    waker: Option<Waker>,
    flushed: Flushed,
}

/// Handed out on the disk, and not yet taken by a poll.
pub(crate) struct Ready {
    pub(crate) position: u64,
    pub(crate) hand_outs: u32,
    pub(crate) lost: u32,
    pub(crate) message: Message,
}

/// Why nothing comes any more.
pub(crate) enum End {
    /// All of a replay was read.
    Over,
    Closed,
    Failed(Error),
}

/// What an instance asks of the thread.
pub(crate) struct Asked {
    pub(crate) wanted: usize,
    pub(crate) settled: Vec<(u64, Settlement)>,
    pub(crate) stopped: bool,
    pub(crate) dropped: bool,
    /// What was ready and will not be taken.
    pub(crate) untaken: Vec<u64>,
}

impl Desk {
    pub(crate) fn new(queue: Arc<Queue>, replayed: bool) -> Arc<Self> {
        Arc::new(Self { queue, replayed, epoch: AtomicU32::new(1), state: Mutex::default() })
    }

    // ---- The instance's side ----

    pub(crate) fn poll(self: &Arc<Self>, cx: &Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        let mut state = self.state.lock();
        match &mut state.end {
            Some(End::Closed) => return Poll::Ready(Err(closed().with_operation("receive"))),
            Some(end @ End::Failed(_)) => {
                let End::Failed(error) = std::mem::replace(end, End::Closed) else { return Poll::Pending };
                return Poll::Ready(Err(error.with_operation("receive")));
            }
            Some(End::Over) | None => {}
        }
        if !state.notices.is_empty() {
            // Alone: what a notice is about is read after it.
            out.notices.append(&mut state.notices);
            return Poll::Ready(Ok(()));
        }
        if state.stopped || state.end.is_some() {
            return Poll::Ready(Ok(()));
        }
        let count = max.min(state.ready.len());
        if count > 0 {
            out.deliveries.extend(state.ready.drain(..count).map(|ready| self.delivery(ready)));
            state.wanted = 0;
            return Poll::Ready(Ok(()));
        }
        state.wanted = max;
        state.waker = Some(cx.waker().clone());
        drop(state);
        self.queue.poke();
        Poll::Pending
    }

    fn delivery(self: &Arc<Self>, ready: Ready) -> Delivery {
        let tag = Tag { epoch: self.epoch.load(SeqCst), seq: ready.position };
        Delivery {
            message: ready.message.into(),
            position: ready.position,
            slot: 0,
            redelivered: ready.hand_outs > 1,
            replayed: self.replayed,
            hand_outs: Some(ready.hand_outs),
            lost: Some(ready.lost),
            acker: Acker::new(Arc::clone(self) as Arc<dyn Settle>, tag),
        }
    }

    pub(crate) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
        self.queue.poke();
    }

    /// The instance went without closing.
    pub(crate) fn crash(&self) {
        self.epoch.fetch_add(1, SeqCst);
        self.state.lock().dropped = true;
        self.queue.poke();
    }

    pub(crate) fn flushed(&self) -> Flushed {
        self.state.lock().flushed
    }

    /// What became of the settlements, if the thread did not say so in time.
    pub(crate) fn given_up(&self) -> Flushed {
        let state = self.state.lock();
        Flushed { unknown: state.flushed.unknown + state.settled.len() as u64, ..state.flushed }
    }

    // ---- The thread's side ----

    pub(crate) fn ask(&self) -> Asked {
        let mut state = self.state.lock();
        let stopped = state.stopped || state.end.is_some();
        if stopped {
            state.call_back(0);
        }
        Asked {
            wanted: state.wanted.saturating_sub(state.ready.len()),
            settled: std::mem::take(&mut state.settled),
            stopped,
            dropped: state.dropped,
            untaken: std::mem::take(&mut state.untaken),
        }
    }

    /// Counts settlements that are read and not yet on the disk as unknown, and those of nothing as stale.
    pub(crate) fn count(&self, unknown: u64, stale: u64) {
        let mut state = self.state.lock();
        state.flushed.unknown += unknown;
        state.flushed.stale += stale;
    }

    /// All that was settled is on the disk, and what is handed out too.
    pub(crate) fn give(&self, ready: impl IntoIterator<Item = Ready>, notices: impl IntoIterator<Item = Notice>) {
        let mut state = self.state.lock();
        state.flushed.applied += std::mem::take(&mut state.flushed.unknown);
        let before = (state.ready.len(), state.notices.len());
        state.ready.extend(ready);
        state.notices.extend(notices);
        // What was given back meanwhile comes before these.
        if let Some(first) = state.settled.iter().filter(|(_, how)| is_given_back(how)).map(|(at, _)| *at).min() {
            state.call_back(first);
        }
        if before != (state.ready.len(), state.notices.len()) {
            state.waker.take().into_iter().for_each(Waker::wake);
        }
    }

    pub(crate) fn end(&self, end: End) {
        let mut state = self.state.lock();
        if !matches!(end, End::Over) {
            self.epoch.fetch_add(1, SeqCst);
            state.flushed.stale += std::mem::take(&mut state.settled).len() as u64;
        }
        state.end.get_or_insert(end);
        state.waker.take().into_iter().for_each(Waker::wake);
    }
}

impl State {
    /// Nothing that is ready and newer than this is taken any more: it may have to wait for what was given back.
    fn call_back(&mut self, after: u64) {
        let newer = self.ready.iter().filter(|ready| ready.position > after);
        self.untaken.extend(newer.map(|ready| ready.position));
        self.ready.retain(|ready| ready.position <= after);
    }
}

pub(crate) fn is_given_back(settlement: &Settlement) -> bool {
    !matches!(settlement, Settlement::Ack)
}

impl Settle for Desk {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        let mut state = self.state.lock();
        if self.epoch.load(SeqCst) == tag.epoch {
            state.settled.push((tag.seq, settlement));
            if is_given_back(&settlement) {
                state.call_back(tag.seq);
            }
            drop(state);
            self.queue.poke();
        } else {
            state.flushed.stale += 1;
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        if self.epoch.load(SeqCst) == tag.epoch { Lease::Live } else { Lease::Lost }
    }
}
