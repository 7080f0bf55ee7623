//! What is due later, the earliest first.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;
use tokio::time::Instant;

/// Further than any process lives, and near enough to add to any instant.
const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A heap of due times; those due at the same time keep the order in which they were added.
pub(crate) struct Timers<T> {
    heap: BinaryHeap<Reverse<Timer<T>>>,
    added: u64,
}

struct Timer<T> {
    due: Instant,
    order: u64,
    what: T,
}

/// The instant `delay` from `now`, however long that is.
pub(crate) fn after(now: Instant, delay: Duration) -> Instant {
    now + delay.min(FAR)
}

impl<T> Timers<T> {
    /// Adds `what`, and says whether it is now the earliest.
    pub(crate) fn add(&mut self, due: Instant, what: T) -> bool {
        let earliest = self.next().is_none_or(|next| due < next);
        self.added += 1;
        self.heap.push(Reverse(Timer { due, order: self.added, what }));
        earliest
    }

    /// When the earliest is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|timer| timer.0.due)
    }

    /// Takes the earliest, if it is due.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<T> {
        self.next().filter(|due| *due <= now)?;
        self.heap.pop().map(|timer| timer.0.what)
    }

    /// Takes all.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.heap.drain().map(|timer| timer.0.what)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }
}

impl<T> Default for Timers<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), added: 0 }
    }
}

impl<T> Ord for Timer<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.due, self.order).cmp(&(other.due, other.order))
    }
}

impl<T> PartialOrd for Timer<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Timer<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<T> Eq for Timer<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_first_and_equals_in_order() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut timers = Timers::default();
        assert!(timers.add(now + second, 'b'));
        assert!(!timers.add(now + second, 'c'));
        assert!(timers.add(now, 'a'));
        assert!(!timers.add(after(now, Duration::MAX), 'd'));
        assert_eq!(timers.pop(now), Some('a'));
        assert_eq!(timers.pop(now), None);
        let later = now + second;
        assert_eq!([timers.pop(later), timers.pop(later), timers.pop(later)], [Some('b'), Some('c'), None]);
        assert_eq!(timers.drain().collect::<String>(), "d");
    }
}
