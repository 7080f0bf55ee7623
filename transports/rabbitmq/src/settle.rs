//! Settles deliveries: noted at once, written by the owner of the channel.

use crate::window::{LINGER, Told, Window};
use parking_lot::Mutex;
use std::collections::VecDeque;
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
    /// All tags up to this one are settled.
    settled: u64,
    /// What is known of those beyond, one by one.
    beyond: VecDeque<Known>,
    /// Acked, with when that was; some of them are written since.
    acked: VecDeque<(u64, Instant)>,
    /// How many are acked and not written.
    open: u64,
    /// How many were written, of those that came.
    written: u64,
    came: u64,
}

/// What is known of a tag.
#[derive(Clone, Copy, Debug)]
enum Known {
    Nothing,
    Came,
    /// And not written.
    Acked,
    Settled,
}

/// Servers count tags one by one, and have less than this open. One that is further off is acked by itself.
const FAR: u64 = 1 << 24;

impl Acks {
    /// A delivery has come.
    pub(crate) fn came(&mut self, tag: u64) {
        self.came += 1;
        self.set(tag, Known::Came);
    }

    /// A delivery has come that needs no settlement.
    pub(crate) fn passed(&mut self, tag: u64) {
        self.set(tag, Known::Settled);
    }

    fn set(&mut self, tag: u64, known: Known) {
        let Some(index) = tag.checked_sub(self.settled + 1).filter(|index| *index < FAR) else { return };
        // Below FAR, which fits.
        let index = index as usize;
        if index >= self.beyond.len() {
            self.beyond.resize(index + 1, Known::Nothing);
        }
        self.beyond[index] = known;
    }

    /// The frames to write now; all that is open if `flush`.
    pub(crate) fn frames(&mut self, told: impl IntoIterator<Item = Told>, now: Instant, flush: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        for told in told {
            let (tag, frame) = match told {
                Told::Ack(tag) => {
                    self.set(tag, Known::Acked);
                    self.acked.push_back((tag, now));
                    self.open += 1;
                    continue;
                }
                Told::Nack(tag) => (tag, Frame::Nack(tag)),
                Told::Reject(tag) => (tag, Frame::Reject(tag)),
            };
            self.set(tag, Known::Settled);
            self.written += 1;
            frames.push(frame);
        }
        frames.extend(self.prefix());
        while let Some((tag, _)) = self.acked.front().copied().filter(|(_, at)| flush || *at + LINGER <= now) {
            self.acked.pop_front();
            if tag > self.settled {
                self.set(tag, Known::Settled);
                (self.open, self.written) = (self.open - 1, self.written + 1);
                frames.push(Frame::Ack { tag, multiple: false });
            }
        }
        frames
    }

    /// One ack for all that has nothing unsettled before it. It names the last that is open, because it must name one that is.
    fn prefix(&mut self) -> Option<Frame> {
        let (mut last, mut count) = (None, 0);
        while let Some(known @ (Known::Acked | Known::Settled)) = self.beyond.front() {
            self.settled += 1;
            if matches!(known, Known::Acked) {
                (last, count) = (Some(self.settled), count + 1);
            }
            self.beyond.pop_front();
        }
        self.open -= count;
        self.written += count;
        while self.acked.front().is_some_and(|(tag, _)| *tag <= self.settled) {
            self.acked.pop_front();
        }
        last.map(|tag| Frame::Ack { tag, multiple: count > 1 })
    }

    /// When what waits for a gap to close is written anyway.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.acked.front().map(|(_, at)| *at + LINGER)
    }

    /// How many that are settled were not written.
    pub(crate) fn open(&self) -> u64 {
        self.open
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
