//! Settles deliveries: noted at once, written by the owner of the channel.

use crate::window::{LINGER, Told, Window};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tidings_core::transport::{Lease, Settle, Settlement, Tag};
use tokio::sync::Notify;
use tokio::time::Instant;

/// A window, and who is told when something in it was settled.
pub(crate) struct Desk {
    pub(crate) window: Mutex<Window>,
    pub(crate) settled: Notify,
}

impl Desk {
    pub(crate) fn new(window: Window) -> Arc<Self> {
        Arc::new(Self { window: Mutex::new(window), settled: Notify::new() })
    }
}

/// Settles what one instance was handed.
pub(crate) struct RabbitMqSettle(pub(crate) Arc<Desk>);

impl Settle for RabbitMqSettle {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        let tell = self.0.window.lock().settle(tag, settlement);
        if tell {
            self.0.settled.notify_one();
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        if self.0.window.lock().is_live(tag) { Lease::Live } else { Lease::Lost }
    }
}

/// A frame that settles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Ack { tag: u64, multiple: bool },
    Nack(u64),
    Reject(u64),
}

/// Which frames settle what is to be settled on one channel: the contiguous prefix is one multiple ack, what is beyond a
/// gap is acked by itself if the gap does not close soon.
///
/// Several consumers share a channel and its tags, and what they bring does not come in the order of these: a multiple ack
/// covers no tag that was not seen.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    /// All tags up to this one have come.
    all_came: u64,
    /// Those beyond it that have.
    beyond: BTreeSet<u64>,
    /// Came and not settled.
    unsettled: BTreeSet<u64>,
    /// Acked and not written, with when that was.
    open: BTreeMap<u64, Instant>,
    /// How many were written, of those that came.
    written: u64,
    came: u64,
}

impl Acks {
    /// A delivery has come.
    pub(crate) fn came(&mut self, tag: u64) {
        self.came += 1;
        self.unsettled.insert(tag);
        self.passed(tag);
    }

    /// A delivery has come that needs no settlement.
    pub(crate) fn passed(&mut self, tag: u64) {
        self.beyond.insert(tag);
        while self.beyond.first() == Some(&(self.all_came + 1)) {
            self.beyond.pop_first();
            self.all_came += 1;
        }
    }

    /// The last tag up to which everything has come and is settled.
    fn prefix(&self) -> u64 {
        self.unsettled.first().map_or(self.all_came, |first| self.all_came.min(first.saturating_sub(1)))
    }

    /// The frames to write now; all that is open if `flush`.
    pub(crate) fn frames(&mut self, told: impl IntoIterator<Item = Told>, now: Instant, flush: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        for told in told {
            let tag = match told {
                Told::Ack(tag) => {
                    self.open.insert(tag, now);
                    tag
                }
                Told::Nack(tag) => {
                    frames.push(Frame::Nack(tag));
                    tag
                }
                Told::Reject(tag) => {
                    frames.push(Frame::Reject(tag));
                    tag
                }
            };
            self.unsettled.remove(&tag);
        }
        self.written += frames.len() as u64;
        let beyond = self.open.split_off(&(self.prefix() + 1));
        let within = std::mem::replace(&mut self.open, beyond);
        // The last that is open, because a multiple ack must name one that is.
        frames.extend(within.keys().next_back().map(|tag| Frame::Ack { tag: *tag, multiple: within.len() > 1 }));
        self.written += within.len() as u64;
        let due = |at: &Instant| flush || *at + LINGER <= now;
        let singles: Vec<_> = self.open.iter().filter(|(_, at)| due(at)).map(|(tag, _)| *tag).collect();
        for tag in singles {
            self.open.remove(&tag);
            self.written += 1;
            frames.push(Frame::Ack { tag, multiple: false });
        }
        frames
    }

    /// When what waits for a gap to close is written anyway.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.open.values().min().map(|at| *at + LINGER)
    }

    /// How many that are settled were not written.
    pub(crate) fn open(&self) -> u64 {
        self.open.len() as u64
    }

    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// How many of those written the broker has certainly applied: it sends no more than `prefetch` unsettled ones.
    pub(crate) fn applied(&self, prefetch: u64) -> u64 {
        self.came.saturating_sub(prefetch).min(self.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn acks(count: u64) -> Acks {
        let mut acks = Acks::default();
        (1..=count).for_each(|tag| acks.came(tag));
        acks
    }

    #[tokio::test(start_paused = true)]
    async fn a_prefix_is_one_frame_and_gaps_are_waited_for() {
        let (mut acks, now) = (acks(6), Instant::now());
        assert_eq!(acks.frames([Told::Ack(3), Told::Ack(2)], now, false), []);
        assert_eq!(acks.frames([Told::Ack(1)], now, false), [Frame::Ack { tag: 3, multiple: true }]);
        assert_eq!(acks.frames([Told::Ack(5)], now, false), []);
        assert_eq!(acks.next_due(), Some(now + LINGER));
        assert_eq!(acks.frames([], now + LINGER, false), [Frame::Ack { tag: 5, multiple: false }]);
        assert_eq!(acks.frames([Told::Ack(4)], now, false), [Frame::Ack { tag: 4, multiple: false }]);
        assert_eq!((acks.open(), acks.written()), (0, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_multiple_ack_names_a_tag_that_is_open() {
        let (mut acks, now) = (acks(4), Instant::now());
        assert_eq!(acks.frames([Told::Nack(3), Told::Ack(2)], now, false), [Frame::Nack(3)]);
        assert_eq!(acks.frames([Told::Ack(1)], now, false), [Frame::Ack { tag: 2, multiple: true }]);
        assert_eq!(acks.frames([Told::Reject(4)], now, true), [Frame::Reject(4)]);
    }

    /// Against a broker that knows what is open; what it sends comes in an order of its own.
    #[tokio::test(start_paused = true)]
    async fn settles_each_exactly_once_and_nothing_else() {
        for seed in 0..300 {
            let (mut random, mut acks) = (fastrand::Rng::with_seed(seed), Acks::default());
            let (mut open, mut out, mut settled) = (Vec::new(), Vec::new(), 0);
            let (mut next, mut sent) = (0, Vec::new());
            for _ in 0..300 {
                if random.bool() {
                    next += 1;
                    sent.push(next);
                    // A greeting, for example, is never open.
                    open.extend((next % 7 > 0).then_some(next));
                }
                if random.bool() && !sent.is_empty() {
                    let tag = sent.swap_remove(random.usize(..sent.len()));
                    if tag % 7 > 0 {
                        acks.came(tag);
                        out.push(tag);
                    } else {
                        acks.passed(tag);
                    }
                }
                let told: Vec<_> = (0..random.usize(0..4))
                    .filter(|_| !out.is_empty())
                    .collect::<Vec<_>>()
                    .into_iter()
                    .filter_map(|_| {
                        if out.is_empty() {
                            return None;
                        }
                        let tag = out.swap_remove(random.usize(..out.len()));
                        settled += 1;
                        Some(if random.u8(..8) == 0 { Told::Nack(tag) } else { Told::Ack(tag) })
                    })
                    .collect();
                tokio::time::advance(Duration::from_millis(random.u64(..4))).await;
                let kept: Vec<_> = out.iter().chain(sent.iter().filter(|tag| *tag % 7 > 0)).copied().collect();
                for frame in acks.frames(told, Instant::now(), random.u8(..16) == 0) {
                    match frame {
                        Frame::Ack { tag, multiple: true } => {
                            assert!(open.contains(&tag), "seed {seed}: {tag} is not open");
                            assert!(kept.iter().all(|kept| *kept > tag), "seed {seed}: {tag} settles others");
                            open.retain(|open| *open > tag);
                        }
                        Frame::Ack { tag, .. } | Frame::Nack(tag) | Frame::Reject(tag) => {
                            let at = open.iter().position(|open| *open == tag);
                            open.swap_remove(at.unwrap_or_else(|| panic!("seed {seed}: {tag} is not open")));
                        }
                    }
                }
            }
            acks.frames([], Instant::now(), true);
            assert_eq!((acks.open(), acks.written()), (0, settled), "seed {seed}");
        }
    }
}
