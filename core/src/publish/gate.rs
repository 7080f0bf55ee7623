//! At most one unconfirmed publish per key, so that a repeat overtakes nothing.

use crate::{Key, Topic};
use foldhash::fast::RandomState;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::Arc;
use tokio::sync::oneshot;

type Lane = (Topic, Key);

/// Who may publish which key now; the others wait in line.
#[derive(Default)]
pub(crate) struct Gate(Mutex<HashMap<Lane, VecDeque<oneshot::Sender<Pass>>, RandomState>>);

/// The right to publish one key; dropped, it goes to the next in line.
pub(crate) struct Pass {
    gate: Arc<Gate>,
    lane: Lane,
}

impl Gate {
    /// Enters for one key, if nobody is in.
    pub(crate) fn enter_now(self: &Arc<Self>, lane: &Lane) -> Option<Pass> {
        match self.0.lock().entry(lane.clone()) {
            Entry::Occupied(_) => None,
            Entry::Vacant(free) => {
                free.insert(VecDeque::new());
                Some(Pass { gate: Arc::clone(self), lane: lane.clone() })
            }
        }
    }

    /// Waits in line for one key.
    pub(crate) async fn enter(self: &Arc<Self>, lane: Lane) -> Pass {
        let turn = match self.0.lock().entry(lane.clone()) {
            Entry::Vacant(free) => {
                free.insert(VecDeque::new());
                None
            }
            Entry::Occupied(mut line) => {
                let (sender, receiver) = oneshot::channel();
                line.get_mut().push_back(sender);
                Some(receiver)
            }
        };
        match turn {
            None => Pass { gate: Arc::clone(self), lane },
            // The sender is in the line, which only `Pass::drop` takes it from, by sending.
            Some(receiver) => receiver.await.unwrap_or_else(|_| Pass { gate: Arc::clone(self), lane }),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let next = {
            let mut busy = self.gate.0.lock();
            // Who has given up is passed over here: handing the pass to each of them, and getting it back, would nest.
            let waiting = |line: &mut VecDeque<oneshot::Sender<Self>>| {
                std::iter::from_fn(|| line.pop_front()).find(|next| !next.is_closed())
            };
            let next = busy.get_mut(&self.lane).and_then(waiting);
            if next.is_none() {
                busy.remove(&self.lane);
            }
            next
        };
        if let Some(next) = next {
            // If the next one gives up just now, the pass comes back here and goes to the one after.
            let _ = next.send(Self { gate: Arc::clone(&self.gate), lane: self.lane.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn lets_one_in_at_a_time_in_order_and_skips_who_gave_up() {
        let gate = Arc::new(Gate::default());
        let lane = (Topic::new("t").unwrap(), Key::from("k"));
        let first = gate.enter(lane.clone()).await;
        let other = gate.enter((lane.0.clone(), "other".into())).now_or_never();
        assert!(other.is_some());
        let mut waiting = [0, 1, 2].map(|_| Box::pin(gate.enter(lane.clone())));
        assert!(waiting.iter_mut().all(|w| w.as_mut().now_or_never().is_none()));
        let [gives_up, mut second, mut third] = waiting;
        drop(gives_up);
        drop(first);
        let pass = second.as_mut().now_or_never().expect("next in line");
        assert!(third.as_mut().now_or_never().is_none());
        drop(pass);
        drop(third.as_mut().now_or_never().expect("last in line"));
        drop(other);
        assert!(gate.0.lock().is_empty());
    }

    #[test]
    fn however_many_gave_up() {
        let gate = Arc::new(Gate::default());
        let lane = (Topic::new("t").unwrap(), Key::from("k"));
        let first = gate.enter(lane.clone()).now_or_never().expect("nobody is in");
        for _ in 0..100_000 {
            assert!(gate.enter(lane.clone()).now_or_never().is_none());
        }
        let mut last = Box::pin(gate.enter(lane));
        assert!(last.as_mut().now_or_never().is_none());
        drop(first);
        drop(last.now_or_never().expect("the only one who waits"));
        assert!(gate.0.lock().is_empty());
    }
}
