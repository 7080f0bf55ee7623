//! One slot of a subscription: what waits in it, in order.

use crate::log::{Id, Log};
use std::collections::{BTreeMap, HashMap, VecDeque};
use tidings_core::{Key, Message, Topic};
use tokio::time::Instant;

/// A message on its way through a subscription.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub(crate) id: Id,
    pub(crate) hand_outs: u32,
    /// It was open when its owner died, and a new owner holds newer ones back until it has come.
    pub(crate) recovering: bool,
}

/// What keeps its order: events of one topic with one key.
pub(crate) type Lane = (Topic, Key);

/// What a slot asks to be told later.
#[derive(Debug)]
pub(crate) enum Wait {
    /// This comes back.
    Return(Item),
    /// The first event of this lane is due.
    Lane(Box<Lane>),
}

/// The events of a slot that are not out: unread ones, and those that were given back.
///
/// Positions ascend: all that was ever handed out comes before all that is unread. What was given back
/// goes first, in the order of its positions. While a lane's event is given back and not yet due, the
/// lane's later events wait behind it, so that nothing overtakes it, in this instance or another.
#[derive(Default)]
pub(crate) struct Slot {
    unread: VecDeque<Id>,
    /// Given back and due, by position.
    returned: BTreeMap<u64, Item>,
    /// Lanes whose first event is not due yet, with when each event is, by position.
    lanes: HashMap<Lane, BTreeMap<u64, (Item, Option<Instant>)>>,
    /// Which member is handed its events; nobody's if events are shared message by message.
    pub(crate) owner: Option<usize>,
    /// Which member gets it once nothing of it is open; until then nothing is handed out.
    pub(crate) heir: Option<usize>,
    /// How many are out.
    pub(crate) open: usize,
    /// How many that a dead owner left open have not come back yet.
    pub(crate) recovering: usize,
    /// The last position that was handed out.
    pub(crate) high: u64,
}

impl Slot {
    pub(crate) fn push(&mut self, id: Id) {
        self.unread.push_back(id);
    }

    /// Whether there may be something to hand out.
    pub(crate) fn is_ready(&self) -> bool {
        !(self.returned.is_empty() && self.unread.is_empty())
    }

    /// How many may be handed out.
    pub(crate) fn ready(&self) -> usize {
        self.returned.len() + self.unread.len()
    }

    /// Whether nothing waits and nothing is out.
    pub(crate) fn is_done(&self) -> bool {
        self.open == 0 && !self.is_ready() && self.lanes.is_empty()
    }

    /// The next to hand out; only what recovers unless `newer` may come too.
    pub(crate) fn next(&mut self, log: &Log, newer: bool) -> Option<Item> {
        if !self.returned.is_empty() {
            let mut found = self.returned.iter().filter(|(_, item)| newer || item.recovering);
            if let Some(position) = found.next().map(|(position, _)| *position) {
                return self.returned.remove(&position);
            }
        }
        if newer { self.next_unread(log) } else { None }
    }

    fn next_unread(&mut self, log: &Log) -> Option<Item> {
        loop {
            let item = Item { id: self.unread.pop_front()?, hand_outs: 0, recovering: false };
            if self.lanes.is_empty() || !self.joins_lane(log, item) {
                return Some(item);
            }
        }
    }

    /// Puts `item` behind the event that holds its lane, if one does.
    fn joins_lane(&mut self, log: &Log, item: Item) -> bool {
        let entry = log.entry(item.id);
        let Some(waiting) = lane_of(&entry.message).and_then(|lane| self.lanes.get_mut(&lane)) else { return false };
        waiting.insert(entry.position, (item, None));
        true
    }

    /// Takes the first unread event that its topic keeps no longer.
    pub(crate) fn expire(&mut self, log: &Log, now: Instant) -> Option<Id> {
        let kept_until = log.entry(*self.unread.front()?).kept_until;
        kept_until.filter(|until| *until <= now)?;
        self.unread.pop_front()
    }

    /// Takes back what was out, to its place in the order, from `due` on; says what to wait for.
    pub(crate) fn give_back(
        &mut self,
        log: &Log,
        item: Item,
        due: Option<Instant>,
        ordered: bool,
    ) -> Option<(Instant, Wait)> {
        let entry = log.entry(item.id);
        if let Some(lane) = lane_of(&entry.message).filter(|_| ordered)
            && (due.is_some() || self.lanes.contains_key(&lane))
        {
            return self.hold_lane(log, lane, (item, due));
        }
        match due {
            Some(due) => Some((due, Wait::Return(item))),
            None => {
                self.returned.insert(entry.position, item);
                None
            }
        }
    }

    fn hold_lane(&mut self, log: &Log, lane: Lane, held: (Item, Option<Instant>)) -> Option<(Instant, Wait)> {
        let position = log.entry(held.0.id).position;
        let waiting = self.lanes.entry(lane.clone()).or_default();
        let later = |_: &u64, item: &mut Item| in_lane(&log.entry(item.id).message, &lane);
        waiting.extend(self.returned.extract_if(position.., later).map(|(position, item)| (position, (item, None))));
        waiting.insert(position, held);
        let first = waiting.keys().next() == Some(&position);
        if first { self.advance_lane(lane, None) } else { None }
    }

    /// Takes back what is due, of those that wait for themselves or hold a lane.
    pub(crate) fn resume(&mut self, log: &Log, wait: Wait, now: Instant) -> Option<(Instant, Wait)> {
        match wait {
            Wait::Return(item) => self.give_back(log, item, None, true),
            Wait::Lane(lane) => self.advance_lane(*lane, Some(now)),
        }
    }

    /// Frees the first events of a lane that are due; says when the next one is.
    fn advance_lane(&mut self, lane: Lane, now: Option<Instant>) -> Option<(Instant, Wait)> {
        let waiting = self.lanes.get_mut(&lane)?;
        while let Some(first) = waiting.first_entry() {
            if let Some(due) = first.get().1.filter(|due| now.is_none_or(|now| *due > now)) {
                return Some((due, Wait::Lane(Box::new(lane))));
            }
            let (position, (item, _)) = first.remove_entry();
            self.returned.insert(position, item);
        }
        self.lanes.remove(&lane);
        None
    }

    /// Takes all that waits here.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Id> {
        let lanes = std::mem::take(&mut self.lanes).into_values().flatten().map(|(_, (item, _))| item.id);
        let returned = std::mem::take(&mut self.returned).into_values().map(|item| item.id);
        self.unread.drain(..).chain(returned).chain(lanes)
    }
}

fn lane_of(message: &Message) -> Option<Lane> {
    message.key.as_ref().map(|key| (message.topic.clone(), key.clone()))
}

fn in_lane(message: &Message, lane: &Lane) -> bool {
    message.key.as_ref() == Some(&lane.1) && message.topic == lane.0
}
