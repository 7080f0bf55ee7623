//! What the broker stores: every message once, in the order it came, counted in bytes.

use slab::Slab;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tidings_core::Message;
use tokio::time::Instant;

/// The topic of what was sent to a subscription's address: it is in no topic and never read again.
const ADDRESSED: u32 = u32::MAX;

/// A message in the [`Log`]. Subscriptions hold four bytes each, so a copy for each costs nothing.
pub(crate) type Id = u32;

pub(crate) struct Entry {
    pub(crate) message: Arc<Message>,
    /// Its place in the order of all that is stored; 0 until it is due.
    pub(crate) position: u64,
    pub(crate) received: Instant,
    /// Until when it waits for those who have not read it, where the topic limits that.
    pub(crate) kept_until: Option<Instant>,
    pub(crate) topic: u32,
    /// How many subscriptions still have to settle it.
    owners: u32,
    size: usize,
}

/// What an event of a topic is stored with.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) topic: u32,
    /// How many subscriptions have to settle it.
    pub(crate) owners: u32,
    pub(crate) received: Instant,
    pub(crate) kept_until: Option<Instant>,
}

/// All that is stored, within a limit of bytes.
///
/// Events of topics stay after the last subscription settled them, for replays, up to `retain` bytes: exactly
/// those at or after a horizon, which passes the oldest first. What is unsettled when the horizon
/// passes is a straggler and goes when it is settled. So one event that is held for long holds nothing
/// else, and making room costs the same however much is stored.
pub(crate) struct Log {
    entries: Slab<Entry>,
    /// Events of topics at or after the horizon, by position.
    arrivals: VecDeque<Id>,
    /// Unsettled events of topics before the horizon.
    stragglers: BTreeMap<u64, Id>,
    horizon: u64,
    next: u64,
    used: usize,
    retained: usize,
    retain: usize,
    capacity: usize,
}

impl Log {
    pub(crate) fn new(capacity: usize, retain: usize) -> Self {
        Self {
            entries: Slab::new(),
            arrivals: VecDeque::new(),
            stragglers: BTreeMap::new(),
            horizon: 1,
            next: 1,
            used: 0,
            retained: 0,
            retain,
            capacity,
        }
    }

    pub(crate) fn entry(&self, id: Id) -> &Entry {
        &self.entries[id as usize]
    }

    /// Bytes stored, and those of them that are only retained.
    pub(crate) fn bytes(&self) -> (usize, usize) {
        (self.used, self.retained)
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether `size` more bytes fit, letting go of what is only retained.
    pub(crate) fn make_room(&mut self, size: usize) -> bool {
        let needed = (self.used - self.retained).saturating_add(size);
        if needed > self.capacity {
            return false;
        }
        while self.used + size > self.capacity {
            self.pass_oldest();
        }
        true
    }

    /// Stores what is not read from a topic, or not yet; one owner settles it.
    pub(crate) fn hold(&mut self, message: Arc<Message>, size: usize, received: Instant) -> Id {
        let place = Place { topic: ADDRESSED, owners: 1, received, kept_until: None };
        self.insert(message, size, 0, place)
    }

    fn insert(&mut self, message: Arc<Message>, size: usize, position: u64, place: Place) -> Id {
        let Place { topic, owners, received, kept_until } = place;
        self.used += size;
        self.entries.insert(Entry { message, position, received, kept_until, topic, owners, size }) as Id
    }

    /// Gives what is held its place in the order.
    pub(crate) fn place(&mut self, id: Id) -> u64 {
        let position = self.next_position();
        self.entries[id as usize].position = position;
        position
    }

    /// Stores a message as an event of a topic.
    pub(crate) fn append(&mut self, message: Arc<Message>, size: usize, place: Place) -> Id {
        let (position, owners) = (self.next_position(), place.owners);
        let id = self.insert(message, size, position, place);
        self.arrived(id, owners, size);
        id
    }

    /// Makes what is held an event of a topic.
    pub(crate) fn publish(&mut self, id: Id, place: Place) {
        self.place(id);
        let Place { topic, owners, received, kept_until } = place;
        let entry = &mut self.entries[id as usize];
        (entry.topic, entry.owners, entry.received, entry.kept_until) = (topic, owners, received, kept_until);
        let size = entry.size;
        self.arrived(id, owners, size);
    }

    fn arrived(&mut self, id: Id, owners: u32, size: usize) {
        self.arrivals.push_back(id);
        if owners == 0 {
            self.retained += size;
            self.trim();
        }
    }

    /// One more subscription has to settle this.
    pub(crate) fn own(&mut self, id: Id) {
        let entry = &mut self.entries[id as usize];
        if entry.owners == 0 {
            self.retained -= entry.size;
        }
        entry.owners += 1;
    }

    /// One subscription has settled this.
    pub(crate) fn settle(&mut self, id: Id) {
        let entry = &mut self.entries[id as usize];
        entry.owners -= 1;
        if entry.owners > 0 {
            return;
        }
        let (position, size) = (entry.position, entry.size);
        if entry.topic == ADDRESSED {
            self.free(id);
        } else if position < self.horizon {
            self.stragglers.remove(&position);
            self.free(id);
        } else {
            self.retained += size;
            self.trim();
        }
    }

    /// The events of topics that are still there, by position.
    pub(crate) fn read(&self) -> impl Iterator<Item = Id> {
        self.stragglers.values().copied().chain(self.arrivals.iter().copied())
    }

    /// Counts bytes that are stored elsewhere.
    pub(crate) fn charge(&mut self, size: usize) {
        self.used += size;
    }

    /// Counts them no more.
    pub(crate) fn discharge(&mut self, size: usize) {
        self.used -= size;
    }

    /// The next position, also of what is stored elsewhere.
    pub(crate) fn next_position(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn trim(&mut self) {
        while self.retained > 0 && (self.retained > self.retain || self.used > self.capacity) {
            self.pass_oldest();
        }
    }

    fn pass_oldest(&mut self) {
        let Some(id) = self.arrivals.pop_front() else { return };
        let entry = &self.entries[id as usize];
        self.horizon = entry.position + 1;
        if entry.owners == 0 {
            self.retained -= entry.size;
            self.free(id);
        } else {
            self.stragglers.insert(entry.position, id);
        }
    }

    fn free(&mut self, id: Id) {
        let entry = self.entries.remove(id as usize);
        self.used -= entry.size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{message, message_of_size};

    fn publish(log: &mut Log, size: usize, owners: u32) -> Id {
        let place = Place { topic: 0, owners, received: Instant::now(), kept_until: None };
        log.append(message_of_size("a.b", size).into(), size, place)
    }

    fn positions(log: &Log) -> Vec<u64> {
        log.read().map(|id| log.entry(id).position).collect()
    }

    #[test]
    fn keeps_what_is_settled_up_to_a_limit_the_newest() {
        let mut log = Log::new(1 << 20, 3000);
        let ids: Vec<_> = (0..5).map(|_| publish(&mut log, 1000, 1)).collect();
        // Settled out of order: the second stays out, and is neither lost nor in the way.
        for id in [ids[4], ids[0], ids[3], ids[2]] {
            log.settle(id);
        }
        assert_eq!(positions(&log), [2, 3, 4, 5]);
        assert_eq!(log.bytes(), (4000, 3000));
        log.settle(ids[1]);
        assert_eq!(positions(&log), [3, 4, 5]);
        assert_eq!(log.bytes(), (3000, 3000));
    }

    #[test]
    fn lets_go_of_what_is_retained_before_it_is_full() {
        let mut log = Log::new(4000, 2000);
        let first = publish(&mut log, 1000, 1);
        publish(&mut log, 1000, 0);
        publish(&mut log, 1000, 0);
        assert!(!log.make_room(3001));
        assert_eq!(log.bytes(), (3000, 2000), "nothing was given up for what cannot fit anyway");
        assert!(log.make_room(3000));
        assert_eq!(log.bytes(), (1000, 0));
        assert_eq!(positions(&log), [1]);
        log.settle(first);
        assert_eq!(log.bytes(), (0, 0));
    }

    #[test]
    fn what_is_sent_to_an_address_is_gone_when_settled() {
        let mut log = Log::new(1 << 20, 1 << 20);
        let message = message("a.b");
        let size = message.size();
        let id = log.hold(message.into(), size, Instant::now());
        assert_eq!(log.place(id), 1);
        assert_eq!(log.read().count(), 0);
        log.settle(id);
        assert_eq!(log.bytes(), (0, 0));
    }

    #[test]
    fn a_replay_keeps_what_it_has_still_to_read() {
        let mut log = Log::new(1 << 20, 1000);
        let old = publish(&mut log, 1000, 0);
        log.own(old);
        publish(&mut log, 1000, 0);
        publish(&mut log, 1000, 0);
        assert_eq!(positions(&log), [1, 3]);
        log.settle(old);
        assert_eq!(positions(&log), [3]);
        assert_eq!(log.bytes(), (1000, 1000));
    }
}
