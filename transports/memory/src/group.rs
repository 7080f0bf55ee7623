//! A subscription and its instances: who is handed what.

use crate::broker::Seat;
use crate::log::{Id, Log};
use crate::slot::{Item, Slot, Wait};
use crate::timers::{Timers, after};
use slab::Slab;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::Waker;
use std::time::Duration;
use tidings_core::transport::{
    ABANDONED_BACKOFF, Acker, Delivery, Flushed, Notice, Ordering, Polled, Role, Settle, Settlement, Start, Tag,
    share_slots,
};
use tidings_core::{Topic, TopicPattern};
use tokio::time::Instant;

/// What a subscription was created with, and must be opened with again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Terms {
    pub(crate) topics: Vec<TopicPattern>,
    pub(crate) ordering: Ordering,
    pub(crate) start: Start,
}

/// A subscription: its place in the log, slot by slot, and its open instances.
pub(crate) struct Group {
    /// The namespace it reads.
    pub(crate) space: usize,
    pub(crate) terms: Terms,
    /// `Some` for a replay, which has one instance and goes with it; whether it follows.
    pub(crate) replay: Option<bool>,
    slots: Vec<Slot>,
    members: Slab<Member>,
    timers: Timers<Due>,
    /// Events lost to retention, a run for each topic, until an instance can be told.
    gaps: Vec<Gap>,
    /// Which member was woken last, where members share message by message.
    turn: usize,
    /// Whether any may be hungry, where they do; if not, none is looked for. Who waits and is full is not: settling wakes it.
    any_hungry: bool,
}

/// Who is cut off, and for how long what they left open stays away.
pub(crate) struct Cut {
    /// The instances of this transport; all, if `None`.
    pub(crate) client: Option<u64>,
    pub(crate) wait: Option<Instant>,
}

/// One open instance.
pub(crate) struct Member {
    pub(crate) instance: u64,
    /// Which transport opened it.
    pub(crate) client: u64,
    /// Orders members by how long they have been connected.
    rank: u64,
    epoch: Arc<AtomicU32>,
    max_in_flight: usize,
    out: Slab<Out>,
    /// The slots it is handed events of.
    owned: Vec<u32>,
    /// Wakes its poller.
    waker: Option<Waker>,
    /// Whether its poller found nothing, and has not been woken since.
    parked: bool,
    /// Whether its poller found nothing, and has not polled since.
    idle: bool,
    stopped: bool,
    notices: Vec<Notice>,
    told: Option<Role>,
    flushed: Flushed,
}

#[derive(Clone, Copy)]
struct Out {
    item: Item,
    slot: u32,
}

enum Due {
    /// What was sent to the subscription's address arrives.
    Arrive { slot: u32, id: Id },
    /// A slot waits for this.
    Slot { slot: u32, wait: Wait },
}

struct Gap {
    topic: Topic,
    missed: u64,
    from: u64,
    to: u64,
}

/// What an instance asks for, and where it is put.
pub(crate) struct Asking<'a> {
    /// How many deliveries it takes.
    pub(crate) max: usize,
    pub(crate) settle: &'a Arc<dyn Settle>,
    pub(crate) out: &'a mut Polled,
}

/// How an instance joins.
pub(crate) struct Joining {
    pub(crate) instance: u64,
    pub(crate) client: u64,
    pub(crate) epoch: Arc<AtomicU32>,
    pub(crate) max_in_flight: usize,
}

impl Member {
    fn new(joining: Joining) -> Self {
        Self {
            instance: joining.instance,
            client: joining.client,
            rank: joining.instance,
            epoch: joining.epoch,
            max_in_flight: joining.max_in_flight,
            out: Slab::new(),
            owned: Vec::new(),
            waker: None,
            parked: false,
            idle: false,
            stopped: false,
            notices: Vec::new(),
            told: None,
            flushed: Flushed::default(),
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.as_ref().filter(|_| std::mem::take(&mut self.parked)) {
            waker.wake_by_ref();
        }
    }

    fn tell(&mut self, notice: Notice) {
        self.notices.push(notice);
        self.wake();
    }

    fn is_full(&self) -> bool {
        self.out.len() >= self.max_in_flight
    }

    /// Whether it waits for events and could take some.
    fn is_hungry(&self) -> bool {
        self.parked && !self.stopped && !self.is_full()
    }
}

impl Group {
    pub(crate) fn new(space: usize, terms: Terms, replay: Option<bool>) -> Self {
        Self {
            space,
            terms,
            replay,
            slots: vec![Slot::default()],
            members: Slab::new(),
            timers: Timers::default(),
            gaps: Vec::new(),
            turn: 0,
            any_hungry: false,
        }
    }

    fn is_ordered(&self) -> bool {
        self.terms.ordering == Ordering::Key
    }

    pub(crate) fn reads(&self, topic: &Topic) -> bool {
        self.terms.topics.iter().any(|pattern| pattern.matches(topic))
    }

    /// Sees to it that there are as many slots as its topics have.
    pub(crate) fn grow(&mut self, slots: u32) {
        if self.is_ordered() && slots as usize > self.slots.len() {
            self.slots.resize_with(slots as usize, Slot::default);
            self.rebalance();
        }
    }

    // ---- What comes in ----

    /// Adds what has its place in the log already.
    pub(crate) fn enqueue(&mut self, slot: u32, id: Id) {
        let slot = if self.is_ordered() { slot } else { 0 };
        if let Some(waits) = self.slots.get_mut(slot as usize) {
            waits.push(id);
            self.rouse(slot);
        }
    }

    /// Adds what is sent to its address, to arrive when it is due.
    pub(crate) fn enqueue_at(&mut self, due: Instant, slot: u32, id: Id) {
        self.wait(due, Due::Arrive { slot, id });
    }

    fn wait(&mut self, due: Instant, what: Due) {
        if self.timers.add(due, what) {
            self.rouse_all();
        }
    }

    /// Moves on what is due.
    pub(crate) fn advance(&mut self, log: &mut Log, now: Instant) {
        while let Some(due) = self.timers.pop(now) {
            match due {
                Due::Arrive { slot, id } => {
                    log.place(id);
                    self.enqueue(slot, id);
                }
                Due::Slot { slot, wait } => {
                    let next = self.slots[slot as usize].resume(log, wait, now);
                    self.wait_for(slot, next);
                    self.rouse(slot);
                }
            }
        }
    }

    fn wait_for(&mut self, slot: u32, next: Option<(Instant, Wait)>) {
        if let Some((due, wait)) = next {
            self.wait(due, Due::Slot { slot, wait });
        }
    }

    pub(crate) fn has_timers(&self) -> bool {
        !self.timers.is_empty()
    }

    /// When its next event is due, if `key` should wait for that.
    /// `other` is when something is due elsewhere that it may have to read.
    pub(crate) fn next_due(&self, key: usize, other: Option<Instant>) -> Option<Instant> {
        let next = self.timers.next().into_iter().chain(other).min();
        next.filter(|_| !self.members[key].is_full() && !self.members[key].owned.is_empty())
    }

    /// Drops unread events that their topics keep no longer.
    pub(crate) fn expire(&mut self, log: &mut Log, now: Instant) {
        for slot in &mut self.slots {
            while let Some(id) = slot.expire(log, now) {
                let (topic, position) = (&log.entry(id).message.topic, log.entry(id).position);
                match self.gaps.iter_mut().find(|gap| gap.topic == *topic) {
                    Some(gap) => {
                        gap.missed += 1;
                        (gap.from, gap.to) = (gap.from.min(position), gap.to.max(position + 1));
                    }
                    None => {
                        self.gaps.push(Gap { topic: topic.clone(), missed: 1, from: position, to: position + 1 });
                    }
                }
                log.settle(id);
            }
        }
    }

    // ---- Who is woken ----

    /// Wakes who can take something of `slot`, if it waits.
    fn rouse(&mut self, slot: u32) {
        if self.is_ordered() {
            let slot = &self.slots[slot as usize];
            if let Some(owner) = slot.owner.filter(|_| slot.gives()) {
                let member = &mut self.members[owner];
                if member.is_hungry() {
                    member.wake();
                }
            }
        } else if self.any_hungry {
            match self.next_hungry() {
                Some(key) => {
                    self.turn = key;
                    self.members[key].wake();
                }
                None => self.any_hungry = false,
            }
        }
    }

    fn next_hungry(&self) -> Option<usize> {
        let hungry = || self.members.iter().filter(|(_, member)| member.is_hungry()).map(|(key, _)| key);
        hungry().find(|key| *key > self.turn).or_else(|| hungry().next())
    }

    pub(crate) fn rouse_all(&mut self) {
        let hungry = self.members.iter_mut().filter(|(_, member)| member.is_hungry() && !member.owned.is_empty());
        hungry.for_each(|(_, member)| member.wake());
    }

    // ---- Handing out ----

    /// The member, if it is still the instance that is meant.
    pub(crate) fn member(&mut self, key: usize, instance: u64) -> Option<&mut Member> {
        self.members.get_mut(key).filter(|member| member.instance == instance)
    }

    /// Tells a member what it has not been told.
    pub(crate) fn notify(&mut self, key: usize, out: &mut Vec<Notice>) -> bool {
        let (member, before) = (&mut self.members[key], out.len());
        (member.parked, member.idle) = (false, false);
        out.append(&mut member.notices);
        if !member.owned.is_empty() {
            out.extend(self.gaps.drain(..).map(|gap| Notice::Gap {
                topic: Some(gap.topic),
                missed_at_most: gap.missed,
                from: gap.from,
                to: gap.to,
            }));
        }
        out.len() > before
    }

    /// Whether this member is never handed anything again.
    pub(crate) fn is_over(&self, key: usize) -> bool {
        let read = self.replay == Some(false) && self.timers.is_empty() && self.slots.iter().all(Slot::is_done);
        read || self.members[key].stopped
    }

    pub(crate) fn park(&mut self, key: usize, waker: &Waker) {
        let member = &mut self.members[key];
        (member.parked, member.idle, self.any_hungry) = (true, true, true);
        if !member.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            member.waker = Some(waker.clone());
        }
    }

    /// Hands events to a member; whether there were any.
    pub(crate) fn hand_out(&mut self, key: usize, log: &Log, ask: &mut Asking<'_>) -> bool {
        let before = ask.out.deliveries.len();
        ask.max = self.fair_share(key, ask.max);
        for turn in 0..self.members[key].owned.len() {
            self.hand_out_slot(key, self.members[key].owned[turn], log, ask);
        }
        if self.members[key].owned.len() > 1 {
            self.members[key].owned.rotate_left(1);
        }
        if !self.is_ordered() && self.slots[0].is_ready() {
            self.rouse(0);
        }
        ask.out.deliveries.len() > before
    }

    /// How many a member may take now, so that others who wait get some too.
    fn fair_share(&self, key: usize, max: usize) -> usize {
        let member = &self.members[key];
        let room = member.max_in_flight.saturating_sub(member.out.len()).min(max);
        if self.is_ordered() || self.members.len() == 1 {
            return room;
        }
        let others = self.members.iter().filter(|(_, m)| m.idle && !m.stopped && !m.is_full()).count();
        room.min(self.slots[0].ready().div_ceil(others + 1))
    }

    fn hand_out_slot(&mut self, key: usize, number: u32, log: &Log, ask: &mut Asking<'_>) {
        let (reserved, replayed) = (self.reserved(key), self.replay.is_some());
        let (member, slot) = (&mut self.members[key], &mut self.slots[number as usize]);
        let epoch = member.epoch.load(Relaxed);
        while ask.max > 0 && slot.gives() {
            let recovering = slot.recovering() > 0;
            let newer = !recovering || (slot.heir.is_none() && member.out.len() + reserved < member.max_in_flight);
            let Some(mut item) = slot.next(log, newer) else { return };
            ask.max -= 1;
            item.hand_outs = item.hand_outs.saturating_add(1);
            if recovering && slot.recovering() == 0 {
                member.notices.push(Notice::HoldBackOver { slot: number });
            }
            let entry = log.entry(item.id);
            slot.open += 1;
            slot.high = slot.high.max(entry.position);
            let seq = member.out.insert(Out { item, slot: number }) as u64;
            ask.out.deliveries.push(Delivery {
                message: Arc::clone(&entry.message),
                position: entry.position,
                slot: number,
                redelivered: item.hand_outs > 1,
                replayed,
                hand_outs: Some(item.hand_outs),
                lost: Some(item.lost),
                acker: Acker::new(Arc::clone(ask.settle), Tag { epoch, seq }),
            });
        }
    }

    /// How much of a member's window is kept for what recovers: what it holds back for that must not
    /// fill the window.
    fn reserved(&self, key: usize) -> usize {
        if !self.is_ordered() {
            return 0;
        }
        self.members[key].owned.iter().map(|slot| self.slots[*slot as usize].recovering()).sum()
    }

    // ---- Settling ----

    /// Settles what a member was handed; a stale tag settles nothing.
    pub(crate) fn settle(&mut self, seat: Seat, log: &mut Log, tag: Tag, settlement: Settlement) {
        let Some(member) = self.member(seat.key, seat.instance) else { return };
        let was_full = member.is_full();
        let live = member.epoch.load(Relaxed) == tag.epoch;
        let Some(mut out) = live.then(|| member.out.try_remove(tag.seq as usize)).flatten() else {
            member.flushed.stale += 1;
            return;
        };
        member.flushed.applied += 1;
        let parked = member.parked;
        self.slots[out.slot as usize].open -= 1;
        match settlement {
            Settlement::Ack => log.settle(out.item.id),
            Settlement::Release { after } => self.release(log, out, after),
            Settlement::Abandon => {
                out.item.lost = out.item.lost.saturating_add(1);
                self.release(log, out, ABANDONED_BACKOFF);
            }
        }
        if parked && (was_full || self.replay.is_some() || self.reserved(seat.key) > 0) {
            self.members[seat.key].wake();
        }
        self.pass_on(out.slot);
    }

    fn release(&mut self, log: &Log, out: Out, delay: Duration) {
        let due = (!delay.is_zero()).then(|| after(Instant::now(), delay));
        let ordered = self.is_ordered();
        let next = self.slots[out.slot as usize].give_back(log, out.item, due, ordered);
        self.wait_for(out.slot, next);
        if due.is_none() {
            self.rouse(out.slot);
        }
    }

    /// Gives back all that was out of a member; after `wait` if there is one.
    fn give_back_all(&mut self, log: &Log, mut out: Slab<Out>, wait: Option<Instant>) {
        let ordered = self.is_ordered();
        for Out { item, slot: number } in out.drain() {
            let slot = &mut self.slots[number as usize];
            slot.open -= 1;
            let next = match wait.filter(|_| ordered) {
                None => slot.give_back(log, item, wait, ordered),
                Some(due) => {
                    slot.recover(log, item, due);
                    Some((due, Wait::Recovery))
                }
            };
            self.wait_for(number, next);
        }
    }

    // ---- Instances ----

    pub(crate) fn join(&mut self, joining: Joining) -> usize {
        let key = self.members.insert(Member::new(joining));
        self.rebalance();
        key
    }

    /// An instance hands nothing out any more, but keeps what it owns until it leaves.
    pub(crate) fn stop(&mut self, key: usize) {
        self.members[key].stopped = true;
        self.members[key].wake();
        self.rebalance();
    }

    /// An instance is gone; what it had comes back, after `wait` if there is one, and counts as lost if it died.
    pub(crate) fn leave(&mut self, key: usize, log: &Log, wait: Option<Instant>, died: bool) -> Flushed {
        let mut member = self.members.remove(key);
        if died {
            member.out.iter_mut().for_each(|(_, out)| out.item.lost = out.item.lost.saturating_add(1));
        }
        member.epoch.fetch_add(1, Relaxed);
        member.wake();
        for slot in self.slots.iter_mut().filter(|slot| slot.owner == Some(key)) {
            slot.owner = None;
        }
        self.give_back_all(log, member.out, wait);
        self.rebalance();
        member.flushed
    }

    /// All instances of some transports; their polls fail from now on.
    pub(crate) fn leave_all(&mut self, of: impl Fn(u64) -> bool, log: &Log) {
        let theirs: Vec<_> = self.members.iter().filter(|(_, m)| of(m.client)).map(|(key, _)| key).collect();
        for key in theirs {
            self.leave(key, log, None, false);
        }
    }

    /// Each instance loses what it was handed, as if it had been cut off and had come back.
    pub(crate) fn lose_leases(&mut self, log: &Log, whose: &Cut, mut next_rank: impl FnMut() -> u64) {
        let theirs =
            self.members.iter().filter(|(_, member)| whose.client.is_none_or(|client| client == member.client));
        let keys: Vec<_> = theirs.map(|(key, _)| key).collect();
        for key in keys {
            let member = &mut self.members[key];
            if member.owned.is_empty() && member.out.is_empty() {
                continue;
            }
            member.epoch.fetch_add(1, Relaxed);
            member.rank = next_rank();
            member.tell(Notice::Leases);
            for (slot, number) in self.slots.iter_mut().zip(0..).filter(|(slot, _)| slot.owner == Some(key)) {
                slot.owner = None;
                if slot.recovering() > 0 {
                    member.notices.push(Notice::HoldBackOver { slot: number });
                }
            }
            let out = std::mem::take(&mut member.out);
            self.give_back_all(log, out, whose.wait);
        }
        self.rebalance();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Takes all that waits for this subscription, which is given up.
    pub(crate) fn drain(&mut self, log: &mut Log) {
        self.slots.iter_mut().flat_map(Slot::drain).for_each(|id| log.settle(id));
        for due in self.timers.drain() {
            match due {
                Due::Arrive { id, .. } | Due::Slot { wait: Wait::Return(Item { id, .. }), .. } => log.settle(id),
                Due::Slot { .. } => {}
            }
        }
    }

    // ---- Slots and owners ----

    /// Gives each slot to the member whose share it is, or will be once nothing of it is open.
    fn rebalance(&mut self) {
        if self.is_ordered() {
            let wanted = self.shares();
            for (number, wanted) in wanted.into_iter().enumerate() {
                self.settle_owner(number as u32, wanted);
            }
        }
        self.tell_roles();
        self.rouse_all();
    }

    fn shares(&self) -> Vec<Option<usize>> {
        let mut members: Vec<_> =
            self.members.iter().filter(|(_, m)| !m.stopped).map(|(key, m)| (m.rank, key)).collect();
        members.sort_unstable();
        let ranks: Vec<_> = members.iter().map(|(rank, _)| *rank).collect();
        share_slots(self.slots.len(), &ranks).into_iter().map(|at| at.map(|at| members[at].1)).collect()
    }

    fn settle_owner(&mut self, number: u32, wanted: Option<usize>) {
        let slot = &mut self.slots[number as usize];
        slot.heir = None;
        let Some(to) = wanted.filter(|_| wanted != slot.owner) else { return };
        match slot.owner {
            // It keeps what it owns until it leaves.
            Some(owner) if self.members[owner].stopped => {}
            Some(_) if slot.open > 0 => slot.heir = wanted,
            _ => self.hand_over(number, to),
        }
    }

    /// Passes a slot on that was only waiting for this.
    fn pass_on(&mut self, number: u32) {
        let slot = &self.slots[number as usize];
        if let Some(heir) = slot.heir.filter(|_| slot.open == 0) {
            self.hand_over(number, heir);
            self.tell_roles();
        }
    }

    fn hand_over(&mut self, number: u32, to: usize) {
        let slot = &mut self.slots[number as usize];
        let former = slot.owner.replace(to);
        slot.heir = None;
        if slot.recovering() > 0 {
            if let Some(former) = former {
                self.members[former].tell(Notice::HoldBackOver { slot: number });
            }
            self.members[to].tell(Notice::HoldBack { slot: number, after: slot.mark });
        }
        self.members[to].wake();
    }

    /// Notes what each member owns, and tells it if that has changed.
    fn tell_roles(&mut self) {
        let (ordered, replay) = (self.is_ordered(), self.replay.is_some());
        for (key, member) in &mut self.members {
            let owned = (0..).zip(&self.slots).filter(|(_, slot)| slot.owner == Some(key));
            let owned: Vec<u32> = if ordered { owned.map(|(number, _)| number).collect() } else { vec![0] };
            let role = match ordered {
                true if owned.is_empty() => Role::StandBy,
                true => Role::Active { slots: owned.clone() },
                false => Role::Active { slots: Vec::new() },
            };
            if member.told.as_ref() != Some(&role) && !replay {
                member.told = Some(role.clone());
                // Only the last one matters, and it comes before what is held back in the new role.
                member.notices.retain(|notice| !matches!(notice, Notice::Role(_)));
                member.notices.insert(0, Notice::Role(role));
                member.wake();
            }
            if member.owned.len() != owned.len() || !owned.iter().all(|slot| member.owned.contains(slot)) {
                member.owned = owned;
            }
        }
    }
}
