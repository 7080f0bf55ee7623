//! The contiguous settled prefix of a log that is settled out of order.

use std::collections::VecDeque;

/// Turns settlements in any order into a cumulative one.
///
/// Brokers that acknowledge positions (Kafka) or acknowledge cheaply up to one (RabbitMQ's *multiple*)
/// may be told a position only when everything handed out before it is settled. Positions are tracked
/// by the order of hand-out, so gaps between them are fine.
///
/// # Examples
///
/// ```
/// use tidings_core::transport::PrefixTracker;
///
/// let mut tracker = PrefixTracker::default();
/// for position in [10, 11, 15] {
///     tracker.hand_out(position);
/// }
/// assert_eq!(tracker.settle(11), None);
/// assert_eq!(tracker.settle(10), Some(11)); // 10 and 11
/// assert_eq!(tracker.open(), 1);
/// ```
#[derive(Clone, Debug, Default)]
pub struct PrefixTracker {
    /// Handed out and not yet part of the prefix, ascending; `true` when settled.
    window: VecDeque<(u64, bool)>,
    open: usize,
    /// The last position handed out.
    last: Option<u64>,
}

impl PrefixTracker {
    /// Notes that `position` was handed out. Positions ascend; one that does not is ignored, because it
    /// is tracked already or settled.
    pub fn hand_out(&mut self, position: u64) {
        if self.last.is_none_or(|last| last < position) {
            self.last = Some(position);
            self.window.push_back((position, false));
            self.open += 1;
        }
    }

    /// Notes that `position` was settled; returns the new end of the prefix if it grew. Settling again,
    /// or what was never handed out, changes nothing.
    pub fn settle(&mut self, position: u64) -> Option<u64> {
        let at = self.window.binary_search_by_key(&position, |(p, _)| *p).ok()?;
        let settled = &mut self.window.get_mut(at)?.1;
        self.open -= usize::from(!*settled);
        *settled = true;
        let mut end = None;
        while let Some((position, true)) = self.window.front() {
            end = Some(*position);
            self.window.pop_front();
        }
        end
    }

    /// What was settled beyond the prefix, ascending.
    pub fn beyond(&self) -> impl Iterator<Item = u64> {
        self.window.iter().filter(|(_, settled)| *settled).map(|(position, _)| *position)
    }

    /// How many are handed out and unsettled.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn never_passes_what_is_open_in_any_order_of_settling() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut tracker = PrefixTracker::default();
            let (mut open, mut next, mut prefix) = (Vec::new(), 0, None);
            for _ in 0..500 {
                if rng.bool() {
                    next += rng.u64(1..4);
                    tracker.hand_out(next);
                    open.push(next);
                } else if !open.is_empty() {
                    let position = open.swap_remove(rng.usize(..open.len()));
                    prefix = tracker.settle(position).or(prefix);
                    assert_eq!(tracker.settle(position), None, "seed {seed}: settled twice");
                }
                assert!(open.iter().all(|o| Some(*o) > prefix), "seed {seed}: {prefix:?} passed {open:?}");
                assert_eq!(tracker.open(), open.len(), "seed {seed}");
            }
            open.into_iter().for_each(|p| prefix = tracker.settle(p).or(prefix));
            assert_eq!(prefix, (next > 0).then_some(next), "seed {seed}: all settled, so the prefix is all");
        }
    }

    #[test]
    fn agrees_with_sets_of_what_is_handed_out_and_open() {
        for seed in 0..500 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut tracker = PrefixTracker::default();
            let (mut handed_out, mut open) = (BTreeSet::new(), BTreeSet::new());
            let prefix = |handed_out: &BTreeSet<u64>, open: &BTreeSet<u64>| {
                let mut before = handed_out.range(..open.first().copied().unwrap_or(u64::MAX));
                before.next_back().copied()
            };
            for _ in 0..300 {
                let last = handed_out.last().copied().unwrap_or(0);
                // Again now and then, what is open, settled or was passed by.
                let position = (last + rng.u64(0..6)).saturating_sub(rng.u64(0..4));
                if rng.bool() {
                    tracker.hand_out(position);
                    if handed_out.is_empty() || position > last {
                        handed_out.insert(position);
                        open.insert(position);
                    }
                } else {
                    let position = if rng.bool() { open.first().copied().unwrap_or(position) } else { position };
                    let before = prefix(&handed_out, &open);
                    open.remove(&position);
                    let now = prefix(&handed_out, &open);
                    assert_eq!(tracker.settle(position), now.filter(|_| now != before), "seed {seed}: {position}");
                }
                assert_eq!(tracker.open(), open.len(), "seed {seed}");
                let end = prefix(&handed_out, &open);
                let beyond = handed_out.iter().filter(|p| Some(**p) > end && !open.contains(p));
                assert!(tracker.beyond().eq(beyond.copied()), "seed {seed}");
            }
        }
    }

    #[test]
    fn tells_what_is_settled_beyond_the_prefix() {
        let mut tracker = PrefixTracker::default();
        (1..=5).for_each(|p| tracker.hand_out(p));
        tracker.hand_out(3);
        assert_eq!((tracker.settle(4), tracker.settle(2), tracker.settle(9)), (None, None, None));
        assert_eq!(tracker.beyond().collect::<Vec<_>>(), [2, 4]);
    }
}
