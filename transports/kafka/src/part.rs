//! One partition that an instance reads: what was fetched, what is out, what is settled.
//!
//! Offsets are tracked in the order in which they were fetched. What was given back goes first, in the order of its offsets; while
//! the first event of a key is given back and not due, later events of that key wait behind it.

use crate::marks::{self, Marks};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use tidings_core::transport::PrefixTracker;
use tidings_core::{Key, Message, Topic};
use tokio::time::Instant;

/// How many events that are not due a partition of delays keeps ready at the least.
const RUNG_READY: usize = 64;

/// An event on its way through a partition.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) message: Arc<Message>,
    pub(crate) offset: u64,
    pub(crate) hand_outs: u32,
    /// It may have been handed out before, by another owner.
    pub(crate) marked: bool,
    /// Not to be handed out before.
    pub(crate) due: Option<Instant>,
    /// It is due later than its partition can tell, at this time in milliseconds since 1970: it is to be sent on.
    pub(crate) further: Option<u64>,
}

impl Item {
    fn lane(&self) -> Option<Lane> {
        self.message.key.as_ref().map(|key| (self.message.topic.clone(), key.clone()))
    }

    fn is_of(&self, lane: &Lane) -> bool {
        self.message.key.as_ref() == Some(&lane.1) && self.message.topic == lane.0
    }
}

type Lane = (Topic, Key);

/// What a partition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Topic,
    /// What is sent to the subscription, at once.
    Address,
    /// What is sent to the subscription with a delay.
    Later,
}

/// What an owner may hand out next.
pub(crate) enum Next {
    Item(Item),
    /// Nothing before this.
    Later(Instant),
    /// Nothing before the broker was told how far.
    Unreserved,
    Nothing,
}

pub(crate) struct Part {
    pub(crate) name: Arc<str>,
    pub(crate) partition: i32,
    pub(crate) topic: Option<Topic>,
    pub(crate) kind: Kind,
    pub(crate) slot: u32,
    /// Whether events of one key keep their order.
    keyed: bool,
    tracker: PrefixTracker,
    /// What is to be committed: the first offset that is not settled with all before it.
    pub(crate) prefix: u64,
    /// What the owner before has told.
    pub(crate) before: Marks,
    unread: VecDeque<Item>,
    returned: BTreeMap<u64, Item>,
    /// Keys whose first event is not due yet, with when each event is, by offset.
    lanes: HashMap<Lane, BTreeMap<u64, Item>>,
    /// Without order: what is not due yet.
    later: BTreeMap<(Instant, u64), Item>,
    /// How many are kept in `lanes` and `later`.
    parked: usize,
    /// How many are out.
    pub(crate) out: usize,
    /// One after the last that was handed out.
    pub(crate) handed: u64,
    /// What is before this may be handed out: the broker was told.
    pub(crate) reserved: u64,
    /// Settled here, and the broker was not told.
    pub(crate) untold: usize,
    /// There is something to tell the broker.
    pub(crate) dirty: bool,
    /// It goes to another instance once nothing of it is out.
    pub(crate) revoking: bool,
    /// The next offset that is expected from the broker.
    pub(crate) read_to: u64,
    /// Nothing more of it is read: where a replay ends.
    pub(crate) end: Option<u64>,
    pub(crate) is_paused: bool,
}

impl Part {
    pub(crate) fn new(name: &Arc<str>, partition: i32, kind: Kind, keyed: bool) -> Self {
        Self {
            name: Arc::clone(name),
            partition,
            topic: None,
            kind,
            slot: 0,
            keyed,
            tracker: PrefixTracker::default(),
            prefix: 0,
            before: Marks::default(),
            unread: VecDeque::new(),
            returned: BTreeMap::new(),
            lanes: HashMap::new(),
            later: BTreeMap::new(),
            parked: 0,
            out: 0,
            handed: 0,
            reserved: 0,
            untold: 0,
            dirty: true,
            revoking: false,
            read_to: 0,
            end: None,
            is_paused: false,
        }
    }

    /// Where it is read from, and what the owner before has told of it.
    pub(crate) fn starting_at(mut self, offset: u64, before: Marks) -> Self {
        (self.prefix, self.read_to, self.handed) = (offset, offset, before.handed.max(offset));
        self.before = before;
        self
    }

    /// Whether an event is wanted that was fetched: it is not if it was settled by the owner before, or fetched before, which a client may do
    /// that was told to pause and to go on.
    pub(crate) fn fetched(&mut self, offset: u64) -> bool {
        if self.revoking || offset < self.read_to {
            return false;
        }
        self.read_to = offset + 1;
        self.tracker.hand_out(offset);
        if !self.before.is_settled(offset) {
            return true;
        }
        self.settle(offset);
        false
    }

    pub(crate) fn push(&mut self, item: Item) {
        self.unread.push_back(item);
    }

    /// How many events it keeps ready, if those count for what is read ahead.
    pub(crate) fn ready(&self) -> usize {
        if self.kind == Kind::Later { 0 } else { self.unread.len() + self.returned.len() + self.parked }
    }

    /// Whether it is one of delays and not to be fetched from: it keeps enough ready, or still does so if it was paused.
    /// Each fetch after a pause begins anew and brings thousands, so that little may not be kept of much.
    pub(crate) fn has_enough(&self, read_ahead: usize) -> bool {
        let enough = RUNG_READY.max(read_ahead / 4);
        self.kind == Kind::Later && self.unread.len() >= if self.is_paused { enough / 4 } else { enough }
    }

    /// Whether it is one of delays and waits to be read on.
    pub(crate) fn is_low(&self, read_ahead: usize) -> bool {
        self.kind == Kind::Later && self.is_paused && !self.has_enough(read_ahead)
    }

    /// Frees what is due.
    fn advance(&mut self, now: Instant) {
        while let Some(first) = self.later.first_entry().filter(|first| first.key().0 <= now) {
            let item = first.remove();
            self.parked -= 1;
            self.returned.insert(item.offset, item);
        }
        if self.lanes.is_empty() {
            return;
        }
        let is_due = |waiting: &BTreeMap<u64, Item>| {
            waiting.first_key_value().is_none_or(|(_, first)| first.due.is_none_or(|due| due <= now))
        };
        let due: Vec<Lane> = self.lanes.iter().filter(|(_, w)| is_due(w)).map(|(lane, _)| lane.clone()).collect();
        due.into_iter().for_each(|lane| self.advance_lane(lane, now));
    }

    /// Frees the first events of a lane that are due.
    fn advance_lane(&mut self, lane: Lane, now: Instant) {
        let Some(mut waiting) = self.lanes.remove(&lane) else { return };
        while let Some(first) = waiting.first_entry() {
            if first.get().due.is_some_and(|due| due > now) {
                self.lanes.insert(lane, waiting);
                return;
            }
            let item = first.remove();
            self.parked -= 1;
            self.returned.insert(item.offset, item);
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let lanes = self.lanes.values().filter_map(|w| w.first_key_value().and_then(|(_, first)| first.due)).min();
        let later = self.later.first_key_value().map(|((due, _), _)| *due);
        lanes.into_iter().chain(later).min()
    }

    /// What is handed out next; nothing `newer` than what was given back, unless that may come too.
    pub(crate) fn next(&mut self, now: Instant, newer: bool) -> Next {
        self.advance(now);
        if let Some((offset, item)) = self.returned.pop_first() {
            self.handed = self.handed.max(offset + 1);
            return Next::Item(item);
        }
        while let Some(first) = self.unread.front().filter(|_| newer) {
            if let Some(due) = first.due.filter(|due| *due > now) {
                return Next::Later(self.next_due().map_or(due, |other| other.min(due)));
            }
            if first.offset >= self.reserved {
                return Next::Unreserved;
            }
            let Some(item) = self.unread.pop_front() else { break };
            if let Some(item) = self.behind(item) {
                self.handed = self.handed.max(item.offset + 1);
                return Next::Item(item);
            }
        }
        self.next_due().map_or(Next::Nothing, Next::Later)
    }

    /// Puts an event behind the one that holds its lane, if one does.
    fn behind(&mut self, mut item: Item) -> Option<Item> {
        if self.lanes.is_empty() || !self.keyed {
            return Some(item);
        }
        let Some(waiting) = item.lane().and_then(|lane| self.lanes.get_mut(&lane)) else { return Some(item) };
        item.due = None;
        waiting.insert(item.offset, item);
        self.parked += 1;
        None
    }

    /// Takes back what was out, to its place in the order.
    pub(crate) fn give_back(&mut self, mut item: Item, due: Option<Instant>) {
        item.due = due;
        let lane = item.lane().filter(|_| self.keyed);
        if let Some(lane) = lane.filter(|lane| due.is_some() || self.lanes.contains_key(lane)) {
            return self.hold_lane(lane, item);
        }
        match due {
            None => drop(self.returned.insert(item.offset, item)),
            Some(due) => {
                self.parked += 1;
                self.later.insert((due, item.offset), item);
            }
        }
    }

    fn hold_lane(&mut self, lane: Lane, item: Item) {
        let later = self.returned.extract_if(item.offset.., |_, other| other.is_of(&lane));
        let later: Vec<(u64, Item)> = later.map(|(offset, other)| (offset, Item { due: None, ..other })).collect();
        self.parked += later.len() + 1;
        let waiting = self.lanes.entry(lane).or_default();
        waiting.extend(later);
        waiting.insert(item.offset, item);
    }

    /// Notes that an offset is settled.
    pub(crate) fn settle(&mut self, offset: u64) {
        self.dirty = true;
        if let Some(end) = self.tracker.settle(offset) {
            self.prefix = end + 1;
        }
    }

    /// Drops what was fetched and is not out: its next owner fetches it again.
    pub(crate) fn forget(&mut self) {
        self.unread.clear();
        self.returned.clear();
        self.lanes.clear();
        self.later.clear();
        self.parked = 0;
    }

    /// The metadata of a commit of the prefix; and how many that are settled found no room in it.
    pub(crate) fn metadata(&self, handed: u64) -> (String, usize) {
        marks::encode(self.prefix, handed, self.tracker.beyond())
    }

    /// Whether a replay has read it to its end and all was settled.
    pub(crate) fn is_over(&self) -> bool {
        self.end.is_some_and(|end| self.read_to >= end)
            && self.out == 0
            && self.unread.is_empty()
            && self.returned.is_empty()
            && self.parked == 0
    }
}

impl Part {
    /// Goes on at `offset`: what is before was taken by retention.
    pub(crate) fn skip_to(&mut self, offset: u64) {
        self.read_to = offset;
        if self.tracker.open() == 0 {
            self.prefix = offset;
            self.dirty = true;
        }
    }
}
