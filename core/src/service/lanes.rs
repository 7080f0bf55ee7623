//! Which event may be handled next: lanes by topic and key, holds, hold-back after a takeover. Pure data, no tasks.

use crate::dead_letter::Failures;
use crate::transport::{Acker, Delivery, Ordering};
use crate::{Key, MessageId, Text, Topic};
use slab::Slab;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;
use tokio::time::Instant;

/// Names a job while it is in the lanes.
pub(crate) type JobId = usize;

/// A delivery and what has happened to it here.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) delivery: Delivery,
    pub(crate) failures: Failures,
    /// How long it has held its lane in all.
    pub(crate) held: Duration,
    /// A batch with it has failed: from now on it runs alone.
    pub(crate) alone: bool,
}

/// All deliveries of one subscription that this instance has not settled.
///
/// A lane is (topic, key), exact. Its first job is ready, running, held or held back; the others wait behind it.
#[derive(Debug)]
pub(crate) struct Lanes {
    ordering: Ordering,
    limit: usize,
    entries: Slab<Entry>,
    lanes: HashMap<LaneKey, Lane>,
    /// By route.
    ready: Vec<VecDeque<JobId>>,
    holds: BTreeSet<(Instant, JobId)>,
    /// By slot, the last position that a former owner may have been handed.
    hold_backs: HashMap<u32, u64>,
    running: usize,
    /// The reader has stopped for want of room.
    starved: bool,
    stopped: bool,
}

type LaneKey = (Topic, Key);

#[derive(Debug)]
struct Entry {
    lane: Option<LaneKey>,
    /// The one behind it in its lane.
    next: Option<JobId>,
    route: usize,
    slot: u32,
    position: u64,
    source: Text,
    message_id: MessageId,
    state: State,
    /// Here unless it is running.
    job: Option<Job>,
    /// Left by a redelivered copy of a running job, to be settled in place of the first.
    successor: Option<Acker>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Behind others of its lane.
    Waiting,
    /// First, but newer than what a former owner of its slot has left open.
    HeldBack,
    /// First, until its next run is due.
    Held,
    Ready,
    Running,
}

#[derive(Debug)]
struct Lane {
    first: JobId,
    last: JobId,
    len: usize,
}

impl Lanes {
    /// Lanes for at most `limit` deliveries, handled by `routes` routes.
    pub(crate) fn new(ordering: Ordering, limit: usize, routes: usize) -> Self {
        Self {
            ordering,
            limit,
            entries: Slab::with_capacity(limit),
            lanes: HashMap::new(),
            ready: vec![VecDeque::new(); routes],
            holds: BTreeSet::new(),
            hold_backs: HashMap::new(),
            running: 0,
            starved: false,
            stopped: false,
        }
    }

    /// Takes a delivery in. A redelivered copy of one that is here takes its place instead: it is not run twice.
    pub(crate) fn admit(&mut self, delivery: Delivery, route: usize) {
        let Some(delivery) = self.replace(delivery) else { return };
        let message = &delivery.message;
        let lane = match (&message.key, self.ordering) {
            (Some(key), Ordering::Key) => Some((message.topic.clone(), key.clone())),
            _ => None,
        };
        let (slot, position) = (delivery.slot, delivery.position);
        let (source, message_id) = (message.source.clone(), message.id.clone());
        let vacant = self.entries.vacant_entry();
        let id = vacant.key();
        let failures = Failures::of(message);
        let job = Some(Job { id, delivery, failures, held: Duration::ZERO, alone: false });
        let state = State::Waiting;
        vacant.insert(Entry {
            lane,
            next: None,
            route,
            slot,
            position,
            source,
            message_id,
            state,
            job,
            successor: None,
        });
        self.line_up(id);
    }

    /// Puts the acker of a redelivered copy in the place of the first's; gives the delivery back if there is none.
    fn replace(&mut self, delivery: Delivery) -> Option<Delivery> {
        let message = &delivery.message;
        let same = |e: &Entry| e.message_id == message.id && e.source == message.source && e.slot == delivery.slot;
        let known = delivery.redelivered.then(|| self.entries.iter_mut().find(|(_, entry)| same(entry))).flatten();
        let Some((_, entry)) = known else { return Some(delivery) };
        // What is replaced is dropped: its lease is lost, so that settles nothing.
        match &mut entry.job {
            Some(job) => job.delivery.acker = delivery.acker,
            None => entry.successor = Some(delivery.acker),
        }
        None
    }

    /// Puts a new job into its lane, by its position: what was left open by a former owner comes before what is newer.
    fn line_up(&mut self, id: JobId) {
        let entry = &self.entries[id];
        let position = entry.position;
        let Some(key) = &entry.lane else { return self.activate(id) };
        let Some(lane) = self.lanes.get_mut(key) else {
            self.lanes.insert(key.clone(), Lane { first: id, last: id, len: 1 });
            return self.activate(id);
        };
        lane.len += 1;
        if self.entries[lane.last].position <= position {
            self.entries[lane.last].next = Some(id);
            lane.last = id;
            return;
        }
        let first = lane.first;
        if self.entries[first].state == State::HeldBack && position < self.entries[first].position {
            lane.first = id;
            self.entries[first].state = State::Waiting;
            self.entries[id].next = Some(first);
            return self.activate(id);
        }
        let mut before = first;
        while let Some(next) = self.entries[before].next.filter(|next| self.entries[*next].position <= position) {
            before = next;
        }
        self.entries[id].next = self.entries[before].next.replace(id);
    }

    /// Makes the first job of a lane, or one without a lane, ready, unless it is held back.
    fn activate(&mut self, id: JobId) {
        let entry = &mut self.entries[id];
        let newest = self.hold_backs.get(&entry.slot);
        if entry.lane.is_some() && newest.is_some_and(|newest| entry.position > *newest) {
            entry.state = State::HeldBack;
        } else {
            entry.state = State::Ready;
            self.ready[entry.route].push_back(id);
        }
    }

    /// Takes the next ready job of a route to be run.
    pub(crate) fn take(&mut self, route: usize) -> Option<Job> {
        if self.stopped {
            return None;
        }
        let id = self.ready[route].pop_front()?;
        self.start(id)
    }

    /// Takes up to `max` jobs to be run together with `first`: those behind it in its lane, then what else is ready.
    pub(crate) fn take_more(&mut self, route: usize, first: &Job, max: usize, jobs: &mut Vec<Job>) {
        let mut last = first.id;
        while jobs.len() < max && !first.alone {
            let behind = self.entries[last].next.filter(|next| self.can_join(*next, route, State::Waiting));
            let Some(id) = behind
                .or_else(|| self.ready[route].front().copied().filter(|id| self.can_join(*id, route, State::Ready)))
            else {
                return;
            };
            if behind.is_none() {
                self.ready[route].pop_front();
            }
            last = id;
            jobs.extend(self.start(id));
        }
    }

    fn can_join(&self, id: JobId, route: usize, state: State) -> bool {
        let entry = &self.entries[id];
        entry.state == state && entry.route == route && entry.job.as_ref().is_some_and(|job| !job.alone)
    }

    fn start(&mut self, id: JobId) -> Option<Job> {
        let entry = &mut self.entries[id];
        entry.state = State::Running;
        self.running += 1;
        entry.job.take()
    }

    /// Ends a running job that is settled, and makes the next of its lane ready. Returns the acker of a redelivered
    /// copy, which is to be settled instead.
    pub(crate) fn finish(&mut self, id: JobId) -> Option<Acker> {
        self.running -= 1;
        let entry = self.entries.remove(id);
        let Some(key) = entry.lane else { return entry.successor };
        let Some(lane) = self.lanes.get_mut(&key) else { return entry.successor };
        lane.len -= 1;
        if lane.first != id {
            // One of a batch: those before it in the lane are still running.
            self.unlink(&key, id, entry.next);
            return entry.successor;
        }
        match entry.next {
            None => drop(self.lanes.remove(&key)),
            Some(next) => {
                lane.first = next;
                if self.entries[next].state == State::Waiting {
                    self.activate(next);
                }
            }
        }
        entry.successor
    }

    fn unlink(&mut self, key: &LaneKey, id: JobId, next: Option<JobId>) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        let mut before = lane.first;
        while let Some(behind) = self.entries[before].next {
            if behind == id {
                self.entries[before].next = next;
                if next.is_none() {
                    lane.last = before;
                }
                return;
            }
            before = behind;
        }
    }

    /// Puts a running job back: it holds its lane until `until`, then runs again.
    pub(crate) fn hold(&mut self, mut job: Job, until: Instant) {
        let id = job.id;
        self.running -= 1;
        let entry = &mut self.entries[id];
        if let Some(acker) = entry.successor.take() {
            job.delivery.acker = acker;
        }
        entry.job = Some(job);
        let first = entry.lane.as_ref().is_none_or(|key| self.lanes.get(key).is_none_or(|lane| lane.first == id));
        let entry = &mut self.entries[id];
        if first {
            entry.state = State::Held;
            self.holds.insert((until, id));
        } else {
            // One of a batch that was put back, behind another of its key.
            entry.state = State::Waiting;
        }
    }

    /// Makes ready what is due, and says when the next is.
    pub(crate) fn wake_due(&mut self, now: Instant) -> Option<Instant> {
        while let Some((due, id)) = self.holds.first().copied() {
            if due > now {
                return Some(due);
            }
            self.holds.pop_first();
            self.activate(id);
        }
        None
    }

    /// Nothing of `slot` newer than `after` becomes ready from now on.
    pub(crate) fn hold_back(&mut self, slot: u32, after: u64) {
        self.hold_backs.insert(slot, after);
    }

    /// All that was left open in `slot` is here or settled.
    pub(crate) fn end_hold_back(&mut self, slot: u32) {
        self.hold_backs.remove(&slot);
        let freed = |(id, entry): (JobId, &Entry)| (entry.slot == slot && entry.state == State::HeldBack).then_some(id);
        let mut freed: Vec<_> = self.entries.iter().filter_map(freed).collect();
        freed.sort_by_key(|id| self.entries[*id].position);
        freed.into_iter().for_each(|id| self.activate(id));
    }

    /// Whether the lane of a running job has filled its share, a quarter of all.
    pub(crate) fn is_crowded(&self, id: JobId) -> bool {
        let lane = self.entries[id].lane.as_ref().and_then(|key| self.lanes.get(key));
        lane.is_some_and(|lane| lane.len * 4 >= self.limit)
    }

    /// Whether a redelivered copy of a running job has come.
    pub(crate) fn has_successor(&self, id: JobId) -> bool {
        self.entries[id].successor.is_some()
    }

    /// How many more deliveries there is room for; if none, the reader waits until it [should read](Self::should_read).
    pub(crate) fn room(&mut self) -> usize {
        let free = self.limit.saturating_sub(self.entries.len());
        self.starved = free == 0;
        free
    }

    /// Whether the reader waits and reading is worth it again: for much at once, or for workers with nothing to do.
    pub(crate) fn should_read(&mut self) -> bool {
        let free = self.limit.saturating_sub(self.entries.len());
        let worth_it = free * 4 >= self.limit || self.ready.iter().all(VecDeque::is_empty);
        self.starved && worth_it && std::mem::take(&mut self.starved)
    }

    /// How many deliveries are here.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    /// Whether a route has something to do.
    pub(crate) fn has_ready(&self, route: usize) -> bool {
        !self.stopped && !self.ready[route].is_empty()
    }

    /// Hands out nothing any more.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Takes out everything, to be given back, the oldest first.
    pub(crate) fn clear(&mut self) -> Vec<Job> {
        let mut jobs: Vec<_> = self.entries.drain().filter_map(|entry| entry.job).collect();
        jobs.sort_by_key(|job| job.delivery.position);
        self.lanes.clear();
        self.holds.clear();
        self.ready.iter_mut().for_each(VecDeque::clear);
        jobs
    }
}
