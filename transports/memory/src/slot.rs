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
    pub(crate) lost: u32,
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
    /// What a dead owner left open comes back.
    Recovery,
}

/// The events of a slot that are not out: unread ones, and those that were given back.
///
/// Positions ascend: all that was ever handed out comes before all that is unread. What was given back
/// goes first, in the order of its positions; what a dead owner left open may come later, in that order too. While a lane's event is given back and not yet due, the
/// lane's later events wait behind it, so that nothing overtakes it, in this instance or another.
#[derive(Default)]
pub(crate) struct Slot {
    unread: VecDeque<Id>,
    /// Given back and due, by position.
    returned: BTreeMap<u64, Item>,
    /// Left open by a dead owner, or given back until these have come, with when each is due, by position. A new
    /// owner holds back so long what is newer than `mark`, the last that was handed out when the owner died.
    recovering: BTreeMap<u64, (Item, Instant)>,
    pub(crate) mark: u64,
    /// Lanes whose first event is not due yet, with when each event is, by position.
    lanes: HashMap<Lane, BTreeMap<u64, (Item, Option<Instant>)>>,
    /// Which member is handed its events; nobody's if events are shared message by message.
    pub(crate) owner: Option<usize>,
    /// Which member gets it once nothing of it is open; until then nothing is handed out.
    pub(crate) heir: Option<usize>,
    /// How many are out.
    pub(crate) open: usize,
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
        self.open == 0 && !self.is_ready() && self.recovering.is_empty() && self.lanes.is_empty()
    }

    /// Whether its owner may be handed anything: nothing new once it has an heir, but what it waits for.
    pub(crate) fn gives(&self) -> bool {
        self.heir.is_none() || !self.recovering.is_empty()
    }

    /// How many a new owner is still to be handed before what is newer.
    pub(crate) fn recovering(&self) -> usize {
        self.recovering.len()
    }

    /// The next to hand out; nothing but what recovers unless `newer` may come too.
    #[inline]
    pub(crate) fn next(&mut self, log: &Log, newer: bool) -> Option<Item> {
        // As it mostly is: nothing was given back.
        if newer && self.recovering.is_empty() && self.returned.is_empty() && self.lanes.is_empty() {
            return Some(Item { id: self.unread.pop_front()?, hand_outs: 0, lost: 0 });
        }
        self.next_in_order(log, newer)
    }

    fn next_in_order(&mut self, log: &Log, newer: bool) -> Option<Item> {
        if let Some(first) = self.recovering.first_entry()
            && first.get().1 <= Instant::now()
        {
            return Some(first.remove().0);
        }
        if !newer {
            return None;
        }
        if self.returned.is_empty() {
            return self.next_unread(log);
        }
        self.returned.pop_first().map(|(_, item)| item)
    }

    fn next_unread(&mut self, log: &Log) -> Option<Item> {
        loop {
            let item = Item { id: self.unread.pop_front()?, hand_outs: 0, lost: 0 };
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

    /// Takes back what a dead owner left open, from `due` on.
    ///
    /// What was given back before recovers with it, and so does what was handed out of a lane whose first event
    /// is not due: all that was ever handed out comes in the order of its positions.
    pub(crate) fn recover(&mut self, log: &Log, item: Item, due: Instant) {
        let entry = log.entry(item.id);
        self.recovering.insert(entry.position, (item, due));
        self.mark = self.high;
        let newer = self.returned.split_off(&(self.mark + 1));
        let returned = std::mem::replace(&mut self.returned, newer).into_iter();
        self.recovering.extend(returned.map(|(position, item)| (position, (item, due))));
        let lane = lane_of(&entry.message).and_then(|lane| self.lanes.remove(&lane)).unwrap_or_default();
        for (position, (item, later)) in lane {
            if position > self.mark {
                self.returned.insert(position, item);
            } else {
                self.recovering.insert(position, (item, later.unwrap_or(due)));
            }
        }
    }

    /// Whether this has to come before what a new owner holds back.
    fn recovers(&self, position: u64) -> bool {
        position <= self.mark && !self.recovering.is_empty()
    }

    /// Makes ready what was given back.
    fn ready_again(&mut self, position: u64, item: Item) {
        if self.recovers(position) {
            self.recovering.insert(position, (item, Instant::now()));
        } else {
            self.returned.insert(position, item);
        }
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
        let recovers = self.recovers(entry.position);
        let lane = lane_of(&entry.message).filter(|_| ordered);
        if let Some(lane) = lane.filter(|lane| self.lanes.contains_key(lane) || (due.is_some() && !recovers)) {
            return self.hold_lane(log, lane, (item, due));
        }
        match due {
            None => {
                self.ready_again(entry.position, item);
                None
            }
            Some(due) if recovers => {
                self.recovering.insert(entry.position, (item, due));
                Some((due, Wait::Recovery))
            }
            Some(due) => Some((due, Wait::Return(item))),
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
            Wait::Recovery => None,
        }
    }

    /// Frees the first events of a lane that are due; says when the next one is.
    fn advance_lane(&mut self, lane: Lane, now: Option<Instant>) -> Option<(Instant, Wait)> {
        let mut waiting = self.lanes.remove(&lane)?;
        while let Some((position, (item, due))) = waiting.pop_first() {
            if let Some(due) = due.filter(|due| now.is_none_or(|now| *due > now)) {
                waiting.insert(position, (item, Some(due)));
                self.lanes.insert(lane.clone(), waiting);
                return Some((due, Wait::Lane(Box::new(lane))));
            }
            self.ready_again(position, item);
        }
        None
    }

    /// Takes all that waits here.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Id> {
        let lanes = std::mem::take(&mut self.lanes).into_values().flatten().map(|(_, (item, _))| item.id);
        let returned = std::mem::take(&mut self.returned).into_values().map(|item| item.id);
        let recovering = std::mem::take(&mut self.recovering).into_values().map(|(item, _)| item.id);
        self.unread.drain(..).chain(returned).chain(recovering).chain(lanes)
    }
}

fn lane_of(message: &Message) -> Option<Lane> {
    message.key.as_ref().map(|key| (message.topic.clone(), key.clone()))
}

fn in_lane(message: &Message, lane: &Lane) -> bool {
    message.key.as_ref() == Some(&lane.1) && message.topic == lane.0
}
