//! What one instance has been sent and not settled: what is ready, held, out. Pure data, no tasks.

use foldhash::fast::RandomState;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;
use tidings_core::transport::{Flushed, Notice, Settlement, Tag};
use tidings_core::{Key, Message, MessageId, Text, Topic};
use tokio::time::Instant;

/// Bits of a tag's number that hold the position; the others hold the slot.
const POSITION_BITS: u32 = 48;
/// The first position that is given to a message of a queue; those of a stream, its offsets, are below.
pub(crate) const OF_QUEUES: u64 = 1 << (POSITION_BITS - 1);
/// How many messages that went elsewhere, and may come back, keep their positions.
const REMEMBERED: usize = 10_000;

/// How many acks are one frame, if they come quickly.
const RUN: usize = 64;
/// How long an ack waits for others, with which it is one frame.
pub(crate) const LINGER: Duration = Duration::from_millis(2);

/// The place of a message: its position, then its slot.
pub(crate) type Place = (u64, u32);

/// A message as it came.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) message: Arc<Message>,
    pub(crate) slot: u32,
    /// The delivery tag, on the channel of this epoch.
    pub(crate) tag: u64,
    pub(crate) redelivered: bool,
    pub(crate) hand_outs: u32,
}

/// What the channel is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Ack(u64),
    /// Given back; newer servers do not count this.
    Nack(u64),
    /// Given back after a failure, which counts.
    Reject(u64),
}

type Lane = (Topic, Key);
type Identity = (Text, MessageId);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// Whether the order of keys is kept: then what is given back waits here for its turn.
    pub(crate) ordered: bool,
    /// How many may be out.
    pub(crate) max: usize,
    /// Grows with each channel; 0 while there is none.
    epoch: u32,
    live: bool,
    next_position: u64,
    /// Where messages stood that may be sent again.
    remembered: HashMap<Identity, BTreeSet<Place>>,
    /// In order; what comes for the first time goes to the end.
    ready: VecDeque<(Place, Item)>,
    /// Lanes whose first message is not due yet; with when each is, by place.
    lanes: HashMap<Lane, BTreeMap<Place, (Item, Option<Instant>)>>,
    /// Given back, and due one by one.
    delayed: BTreeMap<(Instant, Place), Item>,
    due_lanes: BTreeSet<(Instant, Place)>,
    out: HashMap<Place, Item, RandomState>,
    /// How many were handed out whose settlement was not written yet.
    unsettled: usize,
    /// For the channel.
    pub(crate) told: Vec<Told>,
    /// When the first of these came, if all of them may wait for others: acks, of which many are one frame.
    told_since: Option<Instant>,
    /// How a dropped delivery is given back: as one that failed.
    failed: BTreeSet<Place>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) flushed: Flushed,
    pub(crate) waker: Option<Waker>,
    pub(crate) stopped: bool,
    pub(crate) closed: bool,
    /// A replay has read all that it should.
    pub(crate) complete: bool,
}

pub(crate) fn number((position, slot): Place) -> u64 {
    position | u64::from(slot) << POSITION_BITS
}

fn place(number: u64) -> Place {
    // At most 16 bits, which fit.
    (number & ((1 << POSITION_BITS) - 1), (number >> POSITION_BITS) as u32)
}

fn lane_of(message: &Message) -> Option<Lane> {
    message.key.as_ref().map(|key| (message.topic.clone(), key.clone()))
}

fn identity(message: &Message) -> Identity {
    (message.source.clone(), message.id.clone())
}

impl Window {
    pub(crate) fn new(ordered: bool, max: usize) -> Self {
        Self { ordered, max, next_position: OF_QUEUES, ..Self::default() }
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Begins with a new channel.
    pub(crate) fn open(&mut self) {
        self.epoch += 1;
        self.live = true;
    }

    /// The channel is gone, and all that came through it: it will come again, here or elsewhere.
    pub(crate) fn lose(&mut self) {
        if !std::mem::take(&mut self.live) {
            return;
        }
        self.flushed.stale += self.told.drain(..).len() as u64;
        self.told_since = None;
        if !self.out.is_empty() || self.unsettled > 0 {
            self.notices.push(Notice::Leases);
        }
        self.unsettled = 0;
        self.failed.clear();
        if self.remembered.len() > REMEMBERED {
            self.remembered.clear();
        }
        self.due_lanes.clear();
        let lanes = std::mem::take(&mut self.lanes).into_values().flatten().map(|(place, (item, _))| (place, item));
        let delayed = std::mem::take(&mut self.delayed).into_iter().map(|((_, place), item)| (place, item));
        let all: Vec<_> =
            std::mem::take(&mut self.ready).into_iter().chain(self.out.drain()).chain(lanes).chain(delayed).collect();
        all.into_iter().for_each(|(place, item)| self.remember(place, &item.message));
        self.wake();
    }

    fn remember(&mut self, place: Place, message: &Message) {
        self.remembered.entry(identity(message)).or_default().insert(place);
    }

    /// The position of what has come: its old one, if it was here before, else the next.
    pub(crate) fn position(&mut self, item: &Item) -> u64 {
        if item.redelivered
            && let Some(places) = self.remembered.get_mut(&identity(&item.message))
            && let Some(place) = places.iter().find(|place| place.1 == item.slot).copied()
        {
            places.remove(&place);
            if places.is_empty() {
                self.remembered.remove(&identity(&item.message));
            }
            return place.0;
        }
        self.next_position += 1;
        self.next_position
    }

    /// Takes in what has come.
    pub(crate) fn push(&mut self, position: u64, item: Item) {
        self.make_ready((position, item.slot), item);
    }

    fn make_ready(&mut self, place: Place, item: Item) {
        if self.ordered && !self.lanes.is_empty() {
            let waiting = lane_of(&item.message).and_then(|lane| self.lanes.get_mut(&lane));
            if let Some(waiting) = waiting {
                waiting.insert(place, (item, None));
                return;
            }
        }
        self.queue(place, item);
    }

    fn queue(&mut self, place: Place, item: Item) {
        if self.ready.back().is_none_or(|(last, _)| *last < place) {
            return self.ready.push_back((place, item));
        }
        let at = self.ready.partition_point(|(other, _)| *other < place);
        self.ready.insert(at, (place, item));
    }

    /// The next to be handed out, if one may be.
    pub(crate) fn next(&mut self) -> Option<(Place, Item)> {
        if self.unsettled >= self.max {
            return None;
        }
        let (place, mut item) = self.ready.pop_front()?;
        item.hand_outs = item.hand_outs.saturating_add(1);
        self.unsettled += 1;
        self.out.insert(place, item.clone());
        Some((place, item))
    }

    pub(crate) fn is_live(&self, tag: Tag) -> bool {
        self.live && !self.closed && tag.epoch == self.epoch && self.out.contains_key(&place(tag.seq))
    }

    /// Settles what was handed out; whether the channel, or its timer, is to be told.
    pub(crate) fn settle(&mut self, tag: Tag, settlement: Settlement) -> bool {
        let place = place(tag.seq);
        let live = self.live && !self.closed && tag.epoch == self.epoch;
        let Some(item) = live.then(|| self.out.remove(&place)).flatten() else {
            self.flushed.stale += 1;
            return false;
        };
        match settlement {
            Settlement::Ack => return self.ack(item.tag),
            Settlement::Release { after } => self.give_back(place, item, after),
            Settlement::Abandon => {
                self.failed.insert(place);
                self.give_back(place, item, tidings_core::transport::ABANDONED_BACKOFF);
            }
        }
        true
    }

    fn ack(&mut self, tag: u64) -> bool {
        self.told.push(Told::Ack(tag));
        let first = self.told_since.is_none();
        if first {
            self.told_since = Some(Instant::now());
        }
        first || self.told.len() >= self.run()
    }

    /// How many acks do not wait for more: a quarter of what may be out, or the reading would stop for them.
    fn run(&self) -> usize {
        (self.max / 4).min(RUN)
    }

    /// What the channel is to be told now; acks alone wait for more, for a moment.
    pub(crate) fn take_told(&mut self, now: Instant, flush: bool) -> Vec<Told> {
        let waits = self.told_since.is_some_and(|since| since + LINGER > now) && self.told.len() < self.run();
        if waits && !flush {
            return Vec::new();
        }
        self.told_since = None;
        std::mem::take(&mut self.told)
    }

    fn give_back(&mut self, place: Place, mut item: Item, after: Duration) {
        item.redelivered = true;
        let due = (!after.is_zero()).then(|| Instant::now() + after.min(Duration::from_secs(86_400 * 365)));
        if !self.ordered {
            match due {
                Some(due) => drop(self.delayed.insert((due, place), item)),
                None => self.return_to_broker(place, &item),
            }
            return;
        }
        self.flushed.applied += 1;
        self.unsettled -= 1;
        let Some(lane) = lane_of(&item.message) else {
            match due {
                Some(due) => drop(self.delayed.insert((due, place), item)),
                None => self.make_ready(place, item),
            }
            return self.wake();
        };
        if let Some(due) = due {
            self.hold(lane, place, item, due);
        } else {
            self.make_ready(place, item);
        }
        self.wake();
    }

    /// Holds a lane until its first message is due: what came later waits behind it.
    fn hold(&mut self, lane: Lane, place: Place, item: Item, due: Instant) {
        let in_lane = |item: &Item| item.message.key.as_ref() == Some(&lane.1) && item.message.topic == lane.0;
        let is_behind = |(at, item): &(Place, Item)| *at > place && in_lane(item);
        let (behind, ready): (Vec<_>, _) = std::mem::take(&mut self.ready).into_iter().partition(is_behind);
        self.ready = ready.into();
        let waiting = self.lanes.entry(lane).or_default();
        waiting.extend(behind.into_iter().map(|(place, item)| (place, (item, None))));
        waiting.insert(place, (item, Some(due)));
        self.due_lanes.insert((due, place));
    }

    fn return_to_broker(&mut self, place: Place, item: &Item) {
        self.remember(place, &item.message);
        let failed = self.failed.remove(&place);
        self.told.push(if failed { Told::Reject(item.tag) } else { Told::Nack(item.tag) });
        self.told_since = None;
    }

    /// When something is due next.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let lane = self.due_lanes.first().map(|(due, _)| *due);
        let delayed = self.delayed.first_key_value().map(|((due, _), _)| *due);
        lane.into_iter().chain(delayed).chain(self.told_since.map(|since| since + LINGER)).min()
    }

    /// Moves on what is due.
    pub(crate) fn advance(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, place), item) = entry.remove_entry();
            if self.ordered { self.make_ready(place, item) } else { self.return_to_broker(place, &item) }
        }
        while let Some((due, place)) = self.due_lanes.first().copied().filter(|(due, _)| *due <= now) {
            self.due_lanes.remove(&(due, place));
            let of = |(_, waiting): &(&Lane, &BTreeMap<Place, _>)| waiting.contains_key(&place);
            if let Some(lane) = self.lanes.iter().find(of).map(|(lane, _)| lane.clone()) {
                self.advance_lane(lane, now);
            }
        }
        self.wake();
    }

    fn advance_lane(&mut self, lane: Lane, now: Instant) {
        let Some(mut waiting) = self.lanes.remove(&lane) else { return };
        while let Some((place, (item, due))) = waiting.pop_first() {
            if let Some(due) = due.filter(|due| *due > now) {
                waiting.insert(place, (item, Some(due)));
                self.lanes.insert(lane, waiting);
                return;
            }
            self.queue(place, item);
        }
    }

    /// So many settlements were written to the channel.
    pub(crate) fn written(&mut self, count: usize) {
        let was_full = self.unsettled >= self.max;
        self.unsettled -= count.min(self.unsettled);
        if was_full {
            self.wake();
        }
    }

    /// Whether this instance has anything of a slot.
    pub(crate) fn has_of(&self, slot: u32) -> bool {
        let of = |place: &Place| place.1 == slot;
        self.ready.iter().any(|(place, _)| of(place))
            || self.out.keys().any(of)
            || self.delayed.keys().any(|(_, place)| of(place))
            || self.lanes.values().flat_map(BTreeMap::keys).any(of)
    }

    /// Whether nothing will ever be handed out again.
    pub(crate) fn is_over(&self) -> bool {
        self.complete && self.unsettled == 0 && self.is_empty()
    }

    /// Whether nothing waits here and nothing is out.
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.out.is_empty() && self.delayed.is_empty() && self.lanes.is_empty()
    }

    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidings_core::transport::ABANDONED_BACKOFF;

    fn item(id: &str, key: &str, tag: u64) -> Item {
        let message = Message::new(id.into(), "/s", "t", Topic::new("t").unwrap()).with_key(key);
        Item { message: message.into(), slot: 0, tag, redelivered: false, hand_outs: 0 }
    }

    fn window(ordered: bool, items: &[(&str, &str)]) -> Window {
        let mut window = Window::new(ordered, 100);
        window.open();
        come(&mut window, items, false);
        window
    }

    fn come(window: &mut Window, items: &[(&str, &str)], redelivered: bool) {
        for ((id, key), tag) in items.iter().zip(1..) {
            let item = Item { redelivered, ..item(id, key, tag) };
            let position = window.position(&item);
            window.push(position, item);
        }
    }

    fn next(window: &mut Window) -> Option<(String, Tag)> {
        let epoch = window.epoch();
        window.next().map(|(place, item)| (item.message.id.to_string(), Tag { epoch, seq: number(place) }))
    }

    fn all(window: &mut Window) -> Vec<(String, Tag)> {
        std::iter::from_fn(|| next(window)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_held_holds_its_key_alone() {
        let mut window = window(true, &[("1", "a"), ("2", "b"), ("3", "a")]);
        let (_, first) = next(&mut window).unwrap();
        window.settle(first, Settlement::Release { after: Duration::from_secs(1) });
        come(&mut window, &[("4", "a"), ("5", "b")], false);
        assert_eq!(all(&mut window).into_iter().map(|(id, _)| id).collect::<Vec<_>>(), ["2", "5"]);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(window.next_due().is_some_and(|due| due <= Instant::now()));
        window.advance(Instant::now());
        let rest = all(&mut window);
        assert_eq!(rest.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["1", "3", "4"]);
        assert_eq!(rest[0].1, first, "the same place each time");
        assert!(window.told.is_empty(), "the broker is told nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn without_order_the_broker_gets_it_back() {
        let mut window = window(false, &[("1", "a"), ("2", "a"), ("3", "a")]);
        let out = all(&mut window);
        window.settle(out[0].1, Settlement::Release { after: Duration::ZERO });
        window.settle(out[1].1, Settlement::Abandon);
        window.settle(out[2].1, Settlement::Ack);
        assert_eq!(window.told, [Told::Nack(1), Told::Ack(3)]);
        tokio::time::advance(ABANDONED_BACKOFF).await;
        window.advance(Instant::now());
        assert_eq!(window.told, [Told::Nack(1), Told::Ack(3), Told::Reject(2)]);
        come(&mut window, &[("1", "a")], true);
        assert_eq!(next(&mut window).unwrap().1, out[0].1, "the same place again");
    }

    #[test]
    fn what_comes_again_has_its_place_and_stale_tags_settle_nothing() {
        let mut window = window(true, &[("1", "a"), ("2", "a"), ("1", "a")]);
        let out = all(&mut window);
        window.settle(out[0].1, Settlement::Ack);
        window.lose();
        window.lose();
        assert_eq!(window.flushed.stale, 1, "it was not written");
        window.open();
        come(&mut window, &[("2", "a"), ("1", "a"), ("9", "a")], true);
        let again = all(&mut window);
        let places: Vec<_> = again.iter().map(|(_, tag)| tag.seq).collect();
        assert_eq!(places, [out[1].1.seq, out[2].1.seq, number((OF_QUEUES + 4, 0))]);
        assert!(!window.is_live(out[1].1) && window.is_live(again[0].1));
        assert!(!window.settle(out[1].1, Settlement::Ack));
        assert!(window.told.is_empty() && matches!(window.notices[..], [Notice::Leases]));
    }

    #[tokio::test(start_paused = true)]
    async fn acks_wait_for_one_another_a_moment() {
        let ids: Vec<_> = (1..=30).map(|n| (n.to_string(), "a")).collect();
        let items: Vec<_> = ids.iter().map(|(id, key)| (id.as_str(), *key)).collect();
        let mut window = window(false, &items);
        let mut out = all(&mut window).into_iter().map(|(_, tag)| tag);
        let mut ack = |window: &mut Window| window.settle(out.next().unwrap(), Settlement::Ack);
        assert!(ack(&mut window), "who writes is woken, to wait");
        assert!(!ack(&mut window), "and not again");
        assert!(window.take_told(Instant::now(), false).is_empty());
        assert_eq!(window.next_due(), Some(Instant::now() + LINGER));
        tokio::time::advance(LINGER).await;
        assert_eq!(window.take_told(Instant::now(), false).len(), 2);
        let woken: Vec<_> = (0..25).map(|_| ack(&mut window)).collect();
        assert_eq!(woken.iter().filter(|woken| **woken).count(), 2, "with the first, and with a quarter of all");
        assert_eq!(window.take_told(Instant::now(), false).len(), 25);
        ack(&mut window);
        assert_eq!(window.take_told(Instant::now(), true).len(), 1);
        ack(&mut window);
        let last = next_out(&window);
        window.settle(last, Settlement::Release { after: Duration::ZERO });
        assert_eq!(window.take_told(Instant::now(), false).len(), 2, "what is given back does not wait");
    }

    fn next_out(window: &Window) -> Tag {
        Tag { epoch: window.epoch, seq: number(*window.out.keys().min().unwrap()) }
    }

    #[test]
    fn no_more_are_out_than_allowed() {
        let mut window = window(true, &[("1", "a"), ("2", "a"), ("3", "a")]);
        window.max = 2;
        let out = all(&mut window);
        assert_eq!(out.len(), 2);
        window.settle(out[0].1, Settlement::Ack);
        assert!(next(&mut window).is_none(), "the broker was not told yet");
        window.written(1);
        assert!(next(&mut window).is_some());
        assert!(window.has_of(0) && !window.has_of(1));
    }
}
