//! Which events were here lately, so that a repeated one can be told to its handler.

use crate::Message;
use foldhash::fast::RandomState;
use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasher;

/// How many events are remembered.
const WINDOW: usize = 4096;

/// The last events of a subscription in this instance: each publish, retry or redrive of one counts as another.
#[derive(Debug)]
pub(crate) struct Recent {
    hasher: RandomState,
    order: VecDeque<u64>,
    known: HashSet<u64, RandomState>,
}

impl Default for Recent {
    fn default() -> Self {
        Self {
            hasher: RandomState::default(),
            order: VecDeque::with_capacity(WINDOW),
            known: HashSet::with_capacity_and_hasher(2 * WINDOW, RandomState::default()),
        }
    }
}

impl Recent {
    /// Remembers an event that has failed `attempts` times, and says whether it was here before. A collision of hashes
    /// says so wrongly, once in many millions.
    pub(crate) fn was_here(&mut self, message: &Message, attempts: u32) -> bool {
        let hash = self.hasher.hash_one((&message.source, &message.id, attempts));
        if !self.known.insert(hash) {
            return true;
        }
        if self.order.len() == WINDOW
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(hash);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Topic;

    #[test]
    fn remembers_the_last_events_and_no_more() {
        let message = |n: usize| Message::new(n.to_string().into(), "/s", "t", Topic::new("t").unwrap());
        let mut recent = Recent::default();
        assert!((0..WINDOW).all(|n| !recent.was_here(&message(n), 0)));
        assert!((0..WINDOW).all(|n| recent.was_here(&message(n), 0)));
        assert!(!recent.was_here(&message(1), 1), "a retry is another");
        assert!(!recent.was_here(&message(0), 0), "the oldest was forgotten");
        assert_eq!((recent.order.len(), recent.known.len()), (WINDOW, WINDOW));
    }
}
