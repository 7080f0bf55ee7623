//! Which event may be handled next: lanes by topic and key, holds, hold-back after a takeover. Pure data, no tasks.

use super::outage::Outage;
use super::recent::Recent;
use crate::dead_letter::Failures;
use crate::transport::{Acker, Delivery, Lease, Ordering};
use crate::{Key, Message, Topic, header};
use foldhash::fast::RandomState;
use slab::Slab;
use std::collections::{BTreeSet, HashMap, VecDeque, hash_map};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What was lost with its instance more often than this is a suspect: it may be what ends them.
const SUSPECT_AFTER: u32 = 3;

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
    /// It may have been handled before: handed out again, published again, replayed, or seen lately.
    pub(crate) possible_duplicate: bool,
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
    lanes: HashMap<LaneKey, Lane, RandomState>,
    /// By route.
    ready: Vec<VecDeque<JobId>>,
    holds: BTreeSet<(Instant, JobId)>,
    /// By slot, the last position that a former owner may have been handed.
    hold_backs: HashMap<u32, u64>,
    running: usize,
    pub(crate) outage: Outage,
    recent: Recent,
    /// A suspect: nothing else is begun or read while it is here.
    isolated: Option<JobId>,
    /// How many deliveries are to be read one by one, because a suspect was among them.
    cautious: usize,
    /// The reader has stopped for want of room.
    starved: bool,
    paused: bool,
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
    message: Arc<Message>,
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

/// A service that is dropped gives back what it has not begun: only what runs is abandoned.
impl Drop for Lanes {
    fn drop(&mut self) {
        self.clear().into_iter().for_each(Job::give_back);
    }
}

impl Job {
    /// Gives the delivery back, to be handed out again at once.
    pub(crate) fn give_back(self) {
        self.delivery.acker.release(Duration::ZERO);
    }

    /// How often it has ended its instance while it was alone there.
    pub(crate) fn crashes(&self) -> u32 {
        self.delivery.lost.map_or(0, |lost| lost.saturating_sub(SUSPECT_AFTER))
    }
}

/// Whether a lane has filled its share, a quarter of all.
fn is_crowded(lane: &Lane, limit: usize) -> bool {
    lane.len > 1 && lane.len * 4 >= limit
}

impl Lanes {
    /// Lanes for at most `limit` deliveries, handled by `routes` routes.
    pub(crate) fn new(ordering: Ordering, limit: usize, routes: usize, outage: Outage) -> Self {
        Self {
            ordering,
            limit,
            entries: Slab::with_capacity(limit),
            lanes: HashMap::default(),
            ready: vec![VecDeque::new(); routes],
            holds: BTreeSet::new(),
            hold_backs: HashMap::new(),
            running: 0,
            outage,
            recent: Recent::default(),
            isolated: None,
            cautious: 0,
            starved: false,
            paused: false,
            stopped: false,
        }
    }

    /// Takes a delivery in. A redelivered copy of one that is here takes its place instead: it is not run twice.
    pub(crate) fn admit(&mut self, delivery: Delivery, route: usize) {
        let Some(delivery) = self.replace(delivery) else { return };
        self.cautious = self.cautious.saturating_sub(1);
        let message = Arc::clone(&delivery.message);
        let lane = match (&message.key, self.ordering) {
            (Some(key), Ordering::Key) => Some((message.topic.clone(), key.clone())),
            _ => None,
        };
        let (slot, position) = (delivery.slot, delivery.position);
        let vacant = self.entries.vacant_entry();
        let id = vacant.key();
        let failures = Failures::of(&message);
        let seen = self.recent.was_here(&message, failures.attempts);
        let published_again = [header::REPEAT, header::REDRIVEN].iter().any(|name| message.headers.get(name).is_some());
        let possible_duplicate = seen || published_again || delivery.redelivered || delivery.replayed;
        let job = Some(Job { id, delivery, failures, held: Duration::ZERO, possible_duplicate, alone: false });
        let state = State::Waiting;
        vacant.insert(Entry { lane, next: None, route, slot, position, message, state, job, successor: None });
        self.line_up(id);
    }

    /// Puts the acker of a redelivered copy in the place of the first's; gives the delivery back if there is none.
    fn replace(&mut self, delivery: Delivery) -> Option<Delivery> {
        let message = &delivery.message;
        let place = (delivery.slot, delivery.position);
        let same = |e: &Entry| {
            (e.slot, e.position) == place && e.message.id == message.id && e.message.source == message.source
        };
        let known = delivery.redelivered.then(|| self.entries.iter_mut().find(|(_, entry)| same(entry))).flatten();
        let Some((_, entry)) = known else { return Some(delivery) };
        // What is replaced is dropped: its lease is lost, so that settles nothing.
        match &mut entry.job {
            Some(job) => {
                job.delivery.acker = delivery.acker;
                job.possible_duplicate = true;
            }
            None => entry.successor = Some(delivery.acker),
        }
        None
    }

    /// Puts a new job into its lane, by its position: what was left open by a former owner comes before what is newer.
    fn line_up(&mut self, id: JobId) {
        let entry = &self.entries[id];
        let position = entry.position;
        let Some(key) = &entry.lane else { return self.activate(id) };
        let lane = match self.lanes.entry(key.clone()) {
            hash_map::Entry::Occupied(lane) => lane.into_mut(),
            hash_map::Entry::Vacant(free) => {
                free.insert(Lane { first: id, last: id, len: 1 });
                return self.activate(id);
            }
        };
        lane.len += 1;
        let (first, crowded) = (lane.first, is_crowded(lane, self.limit));
        if self.entries[lane.last].position <= position {
            self.entries[lane.last].next = Some(id);
            lane.last = id;
            if crowded && self.entries[first].state == State::Held {
                // It has filled its share since its first began to wait, so that the others would.
                self.holds.retain(|(_, held)| *held != first);
                self.activate(first);
            }
            return;
        }
        if self.entries[first].state != State::Running && position < self.entries[first].position {
            lane.first = id;
            self.entries[id].next = Some(first);
            self.demote(first);
            return self.activate(id);
        }
        let mut before = first;
        while let Some(next) = self.entries[before].next.filter(|next| self.entries[*next].position <= position) {
            before = next;
        }
        // Behind a first one that is newer, but at work.
        if self.entries[before].next.is_none() {
            lane.last = id;
        }
        self.entries[id].next = self.entries[before].next.replace(id);
    }

    /// Makes the first job of a lane, or one without a lane, ready, unless it is held back.
    fn activate(&mut self, id: JobId) {
        let held_back = self.is_held_back(&self.entries[id]);
        let entry = &mut self.entries[id];
        if held_back {
            entry.state = State::HeldBack;
        } else {
            entry.state = State::Ready;
            self.ready[entry.route].push_back(id);
        }
    }

    /// Puts a job that was the first of its lane back in line.
    fn demote(&mut self, id: JobId) {
        let entry = &mut self.entries[id];
        match std::mem::replace(&mut entry.state, State::Waiting) {
            State::Ready => self.ready[entry.route].retain(|ready| *ready != id),
            State::Held => self.holds.retain(|(_, held)| *held != id),
            _ => {}
        }
    }

    fn is_held_back(&self, entry: &Entry) -> bool {
        let newest = self.hold_backs.get(&entry.slot);
        entry.lane.is_some() && newest.is_some_and(|newest| entry.position > *newest)
    }

    /// Takes the next ready job of a route to be run.
    pub(crate) fn take(&mut self, route: usize) -> Option<Job> {
        if !self.may_start() {
            return None;
        }
        let id = self.ready[route].pop_front()?;
        self.start(id)
    }

    /// Whether a job may be run now: during an outage, one at a time, when a probe is due.
    fn may_start(&self) -> bool {
        !self.stopped
            && !self.paused
            && self.outage.next_probe().is_none_or(|probe| self.running == 0 && probe <= Instant::now())
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
        let fits = entry.state == state && entry.route == route && !self.is_held_back(entry);
        fits && entry.job.as_ref().is_some_and(|job| !job.alone)
    }

    fn start(&mut self, id: JobId) -> Option<Job> {
        let entry = &mut self.entries[id];
        entry.state = State::Running;
        self.running += 1;
        entry.job.take()
    }

    /// If a suspect is here, takes out all else that does not run, to be given back and then read one by one: should the
    /// suspect end this process, it takes nothing with it.
    pub(crate) fn isolate(&mut self) -> Vec<Job> {
        let suspect = |(id, entry): (JobId, &Entry)| {
            let job = entry.job.as_ref().filter(|job| entry.state != State::HeldBack && job.crashes() > 0)?;
            Some((job.delivery.position, id))
        };
        if self.isolated.is_some() {
            return Vec::new();
        }
        let Some((position, id)) = self.entries.iter().filter_map(suspect).min() else { return Vec::new() };
        self.isolated = Some(id);
        let others = self.take_parked(Some(id));
        self.cautious = self.cautious.max(others.iter().filter(|job| job.delivery.position < position).count() + 1);
        others
    }

    /// Takes out everything that does not run, to be given back, the oldest first.
    pub(crate) fn clear(&mut self) -> Vec<Job> {
        self.take_parked(None)
    }

    fn take_parked(&mut self, except: Option<JobId>) -> Vec<Job> {
        self.holds.retain(|(_, id)| Some(*id) == except);
        self.ready.iter_mut().for_each(|ready| ready.retain(|id| Some(*id) == except));
        let others = self.entries.iter_mut().filter(|(id, _)| Some(*id) != except);
        let mut jobs: Vec<Job> = others.filter_map(|(_, entry)| entry.job.take()).collect();
        for job in &jobs {
            let entry = self.entries.remove(job.id);
            let first = self.leave_lane(job.id, entry.lane, entry.next);
            if let Some(first) = first.filter(|first| Some(*first) == except) {
                self.activate(first);
            }
        }
        jobs.sort_by_key(|job| job.delivery.position);
        jobs
    }

    /// Ends a running job that is settled, and makes the next of its lane ready. Returns the acker of a redelivered
    /// copy, which is to be settled instead.
    pub(crate) fn finish(&mut self, id: JobId) -> Option<Acker> {
        self.running -= 1;
        self.isolated = self.isolated.filter(|isolated| *isolated != id);
        let entry = self.entries.remove(id);
        if let Some(next) = self.leave_lane(id, entry.lane, entry.next)
            && self.entries[next].state == State::Waiting
        {
            self.activate(next);
        }
        entry.successor
    }

    /// Ends a running job that lost its lease and is left to who has it now: another, or a copy that has come here
    /// meanwhile. The copy goes back into its lane, by its position: let go, it would come again behind what is newer.
    /// Returns the job if there is no copy.
    pub(crate) fn leave(&mut self, mut job: Job) -> Option<Job> {
        let id = job.id;
        let Some(acker) = self.entries[id].successor.take() else {
            drop(self.finish(id));
            return Some(job);
        };
        self.running -= 1;
        // What is replaced is dropped: its lease is lost, so that settles nothing.
        (job.delivery.acker, job.possible_duplicate) = (acker, true);
        let entry = &mut self.entries[id];
        entry.state = State::Waiting;
        entry.job = Some(job);
        let (key, next) = (entry.lane.clone(), entry.next.take());
        if let Some(next) = self.leave_lane(id, key, next)
            && self.entries[next].state == State::Waiting
        {
            self.activate(next);
        }
        self.line_up(id);
        None
    }

    /// Closes the gap that a removed job leaves in its lane, and says who is the first now, if that was it.
    fn leave_lane(&mut self, id: JobId, key: Option<LaneKey>, next: Option<JobId>) -> Option<JobId> {
        let hash_map::Entry::Occupied(mut lane) = self.lanes.entry(key?) else { return None };
        if lane.get().first == id {
            match next {
                Some(next) => (lane.get_mut().first, lane.get_mut().len) = (next, lane.get().len - 1),
                None => drop(lane.remove()),
            }
            return next;
        }
        let lane = lane.into_mut();
        lane.len -= 1;
        // One of a batch, whose first is still running.
        let mut before = lane.first;
        while let Some(behind) = self.entries[before].next {
            if behind == id {
                self.entries[before].next = next;
                if next.is_none() {
                    lane.last = before;
                }
                break;
            }
            before = behind;
        }
        None
    }

    /// Puts a running job back: it holds its lane until `until`, then runs again.
    pub(crate) fn hold(&mut self, mut job: Job, until: Instant) {
        let id = job.id;
        self.running -= 1;
        let entry = &mut self.entries[id];
        if let Some(acker) = entry.successor.take() {
            job.delivery.acker = acker;
            job.possible_duplicate = true;
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

    /// Makes ready what is due, and says when the next job, or the next probe, is.
    pub(crate) fn wake_due(&mut self, now: Instant) -> Option<Instant> {
        while let Some((due, id)) = self.holds.first().copied().filter(|(due, _)| *due <= now) {
            self.holds.remove(&(due, id));
            self.activate(id);
        }
        let probe = self.outage.next_probe().filter(|probe| *probe > now);
        self.holds.first().map(|(due, _)| *due).into_iter().chain(probe).min()
    }

    /// Nothing of `slot` newer than `after` becomes ready from now on.
    pub(crate) fn hold_back(&mut self, slot: u32, after: u64) {
        self.hold_backs.insert(slot, after);
        for ready in &mut self.ready {
            ready.retain(|id| {
                let entry = &mut self.entries[*id];
                let newer = entry.slot == slot && entry.lane.is_some() && entry.position > after;
                if newer {
                    entry.state = State::HeldBack;
                }
                !newer
            });
        }
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
        lane.is_some_and(|lane| is_crowded(lane, self.limit))
    }

    /// Whether a redelivered copy of a running job has come, whose lease is not lost in its turn.
    pub(crate) fn has_successor(&self, id: JobId) -> bool {
        let successor = self.entries.get(id).and_then(|entry| entry.successor.as_ref());
        successor.is_some_and(|acker| acker.lease() != Lease::Lost)
    }

    /// How many more deliveries there is room for; if none, the reader waits until it [should read](Self::should_read).
    pub(crate) fn room(&mut self) -> usize {
        let free = self.limit.saturating_sub(self.entries.len());
        let free = match (self.isolated, self.cautious) {
            _ if self.paused => 0,
            (None, 0) => free,
            // One more, if nothing that is here can be run: what is held back waits for others.
            (None, _) if self.entries.iter().all(|(_, e)| matches!(e.state, State::HeldBack | State::Waiting)) => {
                free.min(1)
            }
            _ => 0,
        };
        self.starved = free == 0;
        free
    }

    /// Whether the reader waits and reading is worth it again: for much at once, or for workers with nothing to do.
    pub(crate) fn should_read(&mut self) -> bool {
        let free = self.limit.saturating_sub(self.entries.len());
        let idle = self.ready.iter().all(VecDeque::is_empty);
        let worth_it = free > 0 && (free * 4 >= self.limit || idle);
        self.starved && worth_it && std::mem::take(&mut self.starved)
    }

    /// How many deliveries are here.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    /// How many jobs of a route are ready.
    pub(crate) fn ready(&self, route: usize) -> usize {
        self.ready[route].len()
    }

    /// Starts and reads nothing until resumed; what runs goes on.
    pub(crate) fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether a route has something to do.
    pub(crate) fn has_ready(&self, route: usize) -> bool {
        !self.ready[route].is_empty() && self.may_start()
    }

    /// Hands out nothing any more.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }
}

#[cfg(test)]
mod tests;
