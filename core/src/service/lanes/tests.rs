//! The lanes against a naive model: a broker that loses leases, a worker that runs, holds and settles, and seeds.

use super::*;
use crate::Message;
use crate::transport::{Settle, Settlement, Tag};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

const LIMIT: usize = 24;
const ROUTES: usize = 2;
const SLOTS: u32 = 2;

/// What was published, by position.
#[derive(Clone)]
struct Published {
    key: Option<u8>,
    slot: u32,
    route: usize,
    id: String,
    /// Handed out before.
    redelivered: bool,
}

/// A broker that hands out by position, and again what was not settled when a slot's leases are lost.
#[derive(Default)]
struct Broker {
    published: BTreeMap<u64, Published>,
    /// Not settled, by position: published and not acked.
    open: BTreeSet<u64>,
    /// By slot: to be handed out, in order.
    queue: BTreeMap<u32, BTreeSet<u64>>,
    /// By slot: left open by a former owner, to be handed out later.
    late: BTreeMap<u32, BTreeSet<u64>>,
    epoch: BTreeMap<u32, u32>,
    /// Given back although the lease was live: the worker of this model never does.
    released: Vec<u64>,
}

struct Settler(Arc<Mutex<Broker>>);

impl Settle for Settler {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        let mut broker = self.0.lock();
        if broker.is_live(tag) {
            match settlement {
                Settlement::Ack => assert!(broker.open.remove(&tag.seq), "{} acked twice", tag.seq),
                Settlement::Release { .. } | Settlement::Abandon => broker.released.push(tag.seq),
            }
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        if self.0.lock().is_live(tag) { Lease::Live } else { Lease::Lost }
    }
}

impl Broker {
    fn is_live(&self, tag: Tag) -> bool {
        let slot = self.published[&tag.seq].slot;
        self.epoch.get(&slot).copied().unwrap_or(0) == tag.epoch
    }

    fn of_slot(&self, slot: u32) -> BTreeSet<u64> {
        self.open.iter().copied().filter(|position| self.published[position].slot == slot).collect()
    }

    /// What is open of a key below a position.
    fn older(&self, position: u64) -> Option<u64> {
        let key = self.published[&position].key?;
        self.open.range(..position).copied().find(|older| self.published[older].key == Some(key))
    }
}

struct Sim {
    random: fastrand::Rng,
    broker: Arc<Mutex<Broker>>,
    settle: Arc<dyn Settle>,
    lanes: Lanes,
    running: Vec<Vec<Job>>,
    hold_backs: BTreeMap<u32, u64>,
    now: Instant,
    last: u64,
    starved: bool,
    seed: u64,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let broker = Arc::new(Mutex::new(Broker::default()));
        Self {
            random: fastrand::Rng::with_seed(seed),
            settle: Arc::new(Settler(Arc::clone(&broker))),
            broker,
            lanes: Lanes::new(Ordering::Key, LIMIT, ROUTES, Outage::new(None)),
            running: Vec::new(),
            hold_backs: BTreeMap::new(),
            now: Instant::now(),
            last: 0,
            starved: false,
            seed,
        }
    }

    fn publish(&mut self) {
        let mut broker = self.broker.lock();
        self.last += 1;
        let position = self.last;
        let key = (self.random.u8(0..10) > 0).then(|| self.random.u8(0..5));
        let slot = key.map_or(0, |key| u32::from(key) % SLOTS);
        // Some are a publisher's repeat: the same id once more.
        let earlier = broker.published.values().next_back().filter(|p| p.key == key && self.random.u8(0..4) == 0);
        let (id, route) = match earlier {
            Some(earlier) => (earlier.id.clone(), earlier.route),
            None => (position.to_string(), self.random.usize(0..ROUTES)),
        };
        broker.published.insert(position, Published { key, slot, route, id, redelivered: false });
        broker.open.insert(position);
        broker.queue.entry(slot).or_default().insert(position);
    }

    /// Hands out the first of a slot: what a former owner left open before what is newer, or after it.
    fn deliver(&mut self, slot: u32) -> bool {
        let free = self.lanes.room();
        self.starved = free == 0;
        assert_eq!(free, LIMIT.saturating_sub(self.lanes.len()));
        if free == 0 {
            return false;
        }
        let mut broker = self.broker.lock();
        let none_newer = broker.queue.entry(slot).or_default().is_empty();
        let late = broker.late.entry(slot).or_default();
        // While others are late, room is kept for them.
        let from_late = !late.is_empty() && (free <= late.len() || none_newer || self.random.bool());
        let from = if from_late { late } else { broker.queue.entry(slot).or_default() };
        let Some(position) = from.pop_first() else { return false };
        let over = from_late && from.is_empty();
        let epoch = broker.epoch.get(&slot).copied().unwrap_or(0);
        let published = broker.published.get_mut(&position).unwrap();
        let redelivered = std::mem::replace(&mut published.redelivered, true);
        let topic = Topic::new("t").unwrap();
        let mut message = Message::new(published.id.as_str().into(), "/s", "t", topic);
        message.key = published.key.map(|key| key.to_string().into());
        let route = published.route;
        drop(broker);
        let acker = Acker::new(Arc::clone(&self.settle), Tag { epoch, seq: position });
        let delivery = Delivery {
            message: message.into(),
            position,
            slot,
            redelivered,
            replayed: false,
            hand_outs: None,
            lost: None,
            acker,
        };
        self.lanes.admit(delivery, route);
        if over {
            self.hold_backs.remove(&slot);
            self.lanes.end_hold_back(slot);
        }
        true
    }

    /// The leases of a slot are lost. With a hold-back what was open comes later; some of it was settled elsewhere.
    fn lose(&mut self, slot: u32, held_back: bool) {
        if self.hold_backs.remove(&slot).is_some() {
            self.lanes.end_hold_back(slot);
        }
        let mut broker = self.broker.lock();
        *broker.epoch.entry(slot).or_default() += 1;
        broker.late.remove(&slot);
        for _ in 0..self.random.usize(0..3) {
            let first = broker.of_slot(slot).into_iter().find(|p| broker.published[p].redelivered);
            if let Some(first) = first.filter(|first| broker.older(*first).is_none()) {
                broker.open.remove(&first);
            }
        }
        let open = broker.of_slot(slot);
        let mark = open.iter().rev().copied().find(|position| broker.published[position].redelivered);
        let (late, queue) = match mark.filter(|_| held_back) {
            Some(mark) => open.into_iter().partition(|position| *position <= mark),
            None => (BTreeSet::new(), open),
        };
        broker.queue.insert(slot, queue);
        broker.late.insert(slot, late);
        drop(broker);
        if let Some(mark) = mark.filter(|_| held_back) {
            self.hold_backs.insert(slot, mark);
            self.lanes.hold_back(slot, mark);
        }
    }

    /// As a worker does: what has lost its lease ends unsettled.
    fn take(&mut self, route: usize, max: usize) -> bool {
        let Some(first) = self.lanes.take(route) else { return false };
        let mut more = Vec::new();
        self.lanes.take_more(route, &first, max, &mut more);
        assert!(more.len() <= max && (more.is_empty() || !first.alone), "seed {}", self.seed);
        self.meanwhile(first.delivery.slot);
        let mut run: Vec<Job> = Vec::new();
        for job in std::iter::once(first).chain(more) {
            if job.delivery.acker.lease() == Lease::Lost {
                self.lanes.leave(job);
            } else {
                self.check(&job, route, &run);
                run.push(job);
            }
        }
        if !run.is_empty() {
            self.running.push(run);
        }
        true
    }

    /// What other threads may do between the taking of jobs and the look at their leases.
    fn meanwhile(&mut self, slot: u32) {
        if self.random.u8(0..8) > 0 {
            return;
        }
        let held_back = self.random.bool();
        self.lose(slot, held_back);
        for _ in 0..self.random.usize(0..8) {
            self.deliver(slot);
        }
    }

    fn check(&self, job: &Job, route: usize, before: &[Job]) {
        let (position, seed) = (job.delivery.position, self.seed);
        let live = |job: &&Job| job.delivery.acker.lease() == Lease::Live;
        let beside: Vec<_> = self.running.iter().flatten().filter(live).map(|job| job.delivery.position).collect();
        let broker = self.broker.lock();
        let published = &broker.published[&position];
        assert_eq!(published.route, route);
        assert!(broker.open.contains(&position), "seed {seed}: {position} is settled and runs again");
        assert!(!job.alone || before.is_empty(), "seed {seed}: {position} must run alone");
        let Some(key) = published.key else { return };
        let mark = self.hold_backs.get(&published.slot);
        assert!(mark.is_none_or(|mark| position <= *mark), "seed {seed}: {position} is newer than {mark:?}");
        let older: Vec<_> = broker.open.range(..position).filter(|p| broker.published[p].key == Some(key)).collect();
        let batch: Vec<_> = before.iter().map(|job| job.delivery.position).collect();
        assert!(
            older.iter().all(|p| batch.contains(p)),
            "seed {seed}: {position} runs before {older:?}, with {batch:?}"
        );
        let beside: Vec<_> = beside.into_iter().filter(|p| broker.published[p].key == Some(key)).collect();
        assert!(beside.is_empty(), "seed {seed}: {position} runs beside {beside:?}");
    }

    fn crowded(&self, job: &Job) -> bool {
        let key = &job.delivery.message.key;
        let len = self.lanes.entries.iter().filter(|(_, e)| e.lane.as_ref().map(|(_, k)| k) == key.as_ref()).count();
        key.is_some() && len > 1 && len * 4 >= LIMIT
    }

    /// Ends a run: all settled, or all put back.
    fn end(&mut self, run: usize, settle: bool) {
        let run = self.running.swap_remove(run);
        let several = run.len() > 1;
        for mut job in run {
            assert_eq!(self.lanes.is_crowded(job.id), self.crowded(&job), "seed {}", self.seed);
            if settle {
                let successor = self.lanes.finish(job.id);
                successor.unwrap_or(job.delivery.acker).ack();
            } else {
                job.alone |= several;
                let delay = if several { 0 } else { self.random.u64(0..5) };
                self.lanes.hold(job, self.now + Duration::from_secs(delay));
            }
        }
    }

    fn step(&mut self) {
        let slot = self.random.u32(0..SLOTS);
        match self.random.u8(0..100) {
            0..25 => self.publish(),
            25..55 => drop(self.deliver(slot)),
            55..70 => drop(self.take(self.random.clone().usize(0..ROUTES), 0)),
            70..75 => drop(self.take(self.random.clone().usize(0..ROUTES), 4)),
            75..92 if !self.running.is_empty() => {
                let (run, settle) = (self.random.usize(0..self.running.len()), self.random.u8(0..3) > 0);
                self.end(run, settle);
            }
            92..95 => {
                self.now += Duration::from_secs(self.random.u64(0..4));
                let due = self.lanes.wake_due(self.now);
                assert!(due.is_none_or(|due| due > self.now));
            }
            95..97 => self.lose(slot, false),
            97..98 => self.lose(slot, true),
            _ => {}
        }
        self.random.u8(..);
        self.invariants();
    }

    fn invariants(&mut self) {
        let seed = self.seed;
        assert_eq!(self.broker.lock().released, [0; 0], "seed {seed}: a live delivery was given back");
        let running = self.running.iter().flatten().count();
        assert_eq!(self.lanes.running(), running, "seed {seed}");
        assert!(self.lanes.len() <= LIMIT);
        // A reader that waits for room is called as soon as there is room and nothing else to do.
        let free = LIMIT - self.lanes.len();
        let idle = (0..ROUTES).all(|route| !self.lanes.has_ready(route));
        let expected = self.starved && (free * 4 >= LIMIT || (idle && free > 0));
        assert_eq!(self.lanes.should_read(), expected, "seed {seed}: {free} free, idle {idle}");
        self.starved &= !expected;
        let held = self.lanes.entries.iter().filter(|(_, entry)| entry.state == State::Held).count();
        assert_eq!(self.lanes.holds.len(), held, "seed {seed}");
        for (key, lane) in &self.lanes.lanes {
            let chain = std::iter::successors(Some(lane.first), |id| self.lanes.entries[*id].next);
            let chain: Vec<_> = chain.take(LIMIT + 1).collect();
            assert_eq!((chain.len(), chain.last()), (lane.len, Some(&lane.last)), "seed {seed}: {key:?}");
        }
    }

    /// Everything comes, everything is handled: nothing is lost.
    fn settle_all(&mut self) {
        for _ in 0..100_000 {
            while !self.running.is_empty() {
                self.end(0, true);
            }
            self.now += Duration::from_secs(10);
            self.lanes.wake_due(self.now);
            let delivered = (0..SLOTS).filter(|slot| self.deliver(*slot)).count();
            let taken = (0..ROUTES).filter(|route| self.take(*route, 3)).count();
            self.invariants();
            if delivered + taken + self.running.len() == 0 {
                break;
            }
        }
        let open = self.broker.lock().open.clone();
        assert!(open.is_empty() && self.lanes.len() == 0, "seed {}: lost {open:?}, {:#?}", self.seed, self.lanes);
        assert!(self.lanes.lanes.is_empty());
    }
}

#[test]
fn whatever_happens_each_key_is_handled_in_order_and_nothing_is_lost() {
    for seed in 0..1_000 {
        let mut sim = Sim::new(seed);
        for _ in 0..3 {
            (0..150).for_each(|_| sim.step());
            sim.settle_all();
        }
    }
}
