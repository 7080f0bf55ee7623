//! The tasks that run handlers, all of one service.

use crate::transport::BoxFuture;
use parking_lot::Mutex;
use std::future::poll_fn;
use std::ops::Deref;
use std::sync::Arc;
use tokio::task::JoinSet;

/// More may come while it works; none any more once it was ended.
#[derive(Default)]
pub(crate) struct Crew(Mutex<State>);

#[derive(Default)]
struct State {
    tasks: JoinSet<()>,
    ended: bool,
}

impl Crew {
    pub(super) fn add(&self, work: BoxFuture<()>) {
        let mut state = self.0.lock();
        if !state.ended {
            state.tasks.spawn(work);
        }
    }

    /// Waits until none works any more: each adds no more when it has ended.
    pub(super) async fn finished(&self) {
        while poll_fn(|cx| self.0.lock().tasks.poll_join_next(cx)).await.is_some() {}
    }

    /// Cuts off whoever still works. [`finished`](Self::finished) tells when that is done.
    pub(super) fn end(&self) {
        let mut state = self.0.lock();
        state.ended = true;
        state.tasks.abort_all();
    }
}

/// Whoever has a crew. Its workers know it, so it ends with this and not by itself.
#[derive(Default)]
pub(super) struct Foreman(Arc<Crew>);

impl Deref for Foreman {
    type Target = Arc<Crew>;

    fn deref(&self) -> &Arc<Crew> {
        &self.0
    }
}

impl Drop for Foreman {
    fn drop(&mut self) {
        self.0.end();
    }
}
