//! What one instance knows: its partitions, what is out, and what its poller is to be told. Pure data, under one lock.

use crate::names::Names;
use crate::part::{Item, Next, Part};
use slab::Slab;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;
use tidings_core::transport::{
    ABANDONED_BACKOFF, Acker, Delivery, Flushed, Lease, Notice, Polled, Role, Settle, Settlement, Tag,
};
use tidings_core::{Error, Message};
use tokio::time::Instant;

/// The slots of what is sent to the address; each further topic has slots of its own too.
const ADDRESS_SLOT: u32 = 1 << 31;
const SLOTS_OF_A_TOPIC: u32 = 1 << 16;
/// The furthest ahead that the broker is told.
const MAX_RESERVE: u64 = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Each key in order.
    Keyed,
    /// In no order.
    Shared,
    /// Read again: nothing is committed.
    Replay,
}

struct Out {
    epoch: u32,
    item: Item,
}

/// What a commit tells of one partition.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) epoch: u32,
    pub(crate) name: Arc<str>,
    pub(crate) partition: i32,
    pub(crate) offset: u64,
    pub(crate) metadata: String,
    /// How many settlements it tells.
    settled: usize,
    reserves: u64,
}

pub(crate) struct State {
    pub(crate) mode: Mode,
    pub(crate) parts: BTreeMap<u32, Part>,
    next_epoch: u32,
    /// Where handing out goes on.
    turn: u32,
    outs: Slab<Out>,
    /// Settled here, and the broker was not told.
    untold: usize,
    max_in_flight: usize,
    /// The thread is to be called when no more than this is ready.
    pub(crate) call_at: Option<usize>,
    /// How far ahead the broker is told that events may be handed out.
    reserve: u64,
    topics: Vec<Arc<str>>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) failed: Option<Error>,
    pub(crate) stopped: bool,
    pub(crate) dead: bool,
    /// A replay that ends has been read to its end.
    pub(crate) follows: bool,
    pub(crate) is_open: bool,
    waker: Option<Waker>,
    pub(crate) flushed: Flushed,
    role: Option<Role>,
    /// Its events are to be sent on, not handed out.
    pub(crate) further: Vec<(Tag, Item)>,
}

/// How many events are kept ready at the most.
pub(crate) fn read_ahead(max_in_flight: usize) -> usize {
    max_in_flight.clamp(16, 4_096)
}

/// What a settlement calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Nothing,
    /// The thread has something to tell the broker, soon.
    Soon,
    /// Somebody waits for that.
    Now,
}

impl State {
    pub(crate) fn new(mode: Mode, max_in_flight: usize) -> Self {
        Self {
            mode,
            parts: BTreeMap::new(),
            next_epoch: 1,
            turn: 0,
            outs: Slab::new(),
            untold: 0,
            max_in_flight,
            call_at: None,
            reserve: (max_in_flight as u64 * 2).max(256),
            topics: Vec::new(),
            notices: Vec::new(),
            failed: None,
            stopped: false,
            dead: false,
            follows: true,
            is_open: false,
            waker: None,
            flushed: Flushed::default(),
            role: None,
            further: Vec::new(),
        }
    }

    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    pub(crate) fn park(&mut self, waker: &Waker) {
        if !self.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.waker = Some(waker.clone());
        }
    }

    pub(crate) fn tell(&mut self, notice: Notice) {
        self.notices.push(notice);
        self.wake();
    }

    pub(crate) fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.wake();
    }

    // ---- Partitions ----

    /// Begins to read a partition; says by what it is known from now on.
    pub(crate) fn add(&mut self, mut part: Part, names: &Names) -> u32 {
        let epoch = self.next_epoch;
        self.next_epoch += 1;
        part.topic = names.topic_of(&part.name);
        part.slot = self.slot(&part.name, part.partition, part.topic.is_some());
        if self.mode == Mode::Replay {
            part.reserved = u64::MAX;
        }
        self.parts.insert(epoch, part);
        epoch
    }

    fn slot(&mut self, name: &Arc<str>, partition: i32, is_topic: bool) -> u32 {
        let partition = u32::try_from(partition).unwrap_or(0);
        if !is_topic {
            return ADDRESS_SLOT + partition;
        }
        let number = self.topics.iter().position(|known| known == name).unwrap_or_else(|| {
            self.topics.push(Arc::clone(name));
            self.topics.len() - 1
        });
        u32::try_from(number).unwrap_or(0).wrapping_mul(SLOTS_OF_A_TOPIC).wrapping_add(partition) % ADDRESS_SLOT
    }

    pub(crate) fn find(&self, name: &str, partition: i32) -> Option<u32> {
        let same = |(_, part): &(&u32, &Part)| part.partition == partition && &*part.name == name;
        self.parts.iter().find(same).map(|(epoch, _)| *epoch)
    }

    /// Takes no more of these partitions, and starts nothing of them any more.
    pub(crate) fn revoke(&mut self, epochs: &[u32]) {
        for epoch in epochs {
            if let Some(part) = self.parts.get_mut(epoch) {
                part.revoking = true;
                part.dirty = true;
                part.forget();
            }
        }
        self.tell(Notice::Leases);
    }

    /// Whether anything of these is out.
    pub(crate) fn are_out(&self, epochs: &[u32]) -> bool {
        epochs.iter().any(|epoch| self.parts.get(epoch).is_some_and(|part| part.out > 0))
    }

    /// Lets go of partitions: what is out of them is lost, and what the broker was not told too.
    pub(crate) fn remove(&mut self, epochs: &[u32]) {
        let mut lost = false;
        for epoch in epochs {
            let Some(part) = self.parts.remove(epoch) else { continue };
            self.untold -= part.untold;
            self.flushed.stale += part.untold as u64;
            lost |= part.out > 0;
        }
        self.outs.retain(|_, out| !epochs.contains(&out.epoch));
        self.further.retain(|(tag, _)| !epochs.contains(&tag.epoch));
        if lost {
            self.notices.push(Notice::Leases);
        }
        self.tell_role();
        self.wake();
    }

    /// Tells what it owns, if that has changed.
    pub(crate) fn tell_role(&mut self) {
        if self.mode == Mode::Replay {
            return;
        }
        let mut slots: Vec<u32> = self.parts.values().filter(|p| p.topic.is_some()).map(|p| p.slot).collect();
        slots.sort_unstable();
        let role = if slots.is_empty() { Role::StandBy } else { Role::Active { slots } };
        if self.role.as_ref() != Some(&role) {
            self.role = Some(role.clone());
            self.tell(Notice::Role(role));
        }
    }

    /// How many events are fetched and not handed out.
    pub(crate) fn ready(&self) -> usize {
        self.parts.values().map(Part::ready).sum()
    }

    // ---- Handing out ----

    fn room(&self) -> usize {
        self.max_in_flight.saturating_sub(self.outs.len() + self.untold)
    }

    /// So many are worth a commit before its time.
    fn many_untold(&self) -> usize {
        self.max_in_flight.div_ceil(2)
    }

    /// Hands out up to `max` events; whether there were any, when the next is due, and what the thread is to do.
    pub(crate) fn hand_out(
        &mut self,
        max: usize,
        settle: &Arc<dyn Settle>,
        out: &mut Polled,
    ) -> (bool, Option<Instant>, Call) {
        let (now, mut due, mut call) = (Instant::now(), None::<Instant>, Call::Nothing);
        let (room, read_ahead) = (self.room(), read_ahead(self.max_in_flight));
        // All room is taken by what was settled, and the broker may have no room to be told of it before what was given back is settled too.
        let full_of_untold = room == 0 && self.outs.is_empty();
        let mut left = max.min(room.max(usize::from(full_of_untold)));
        let mut any = false;
        let epochs: Vec<u32> =
            self.parts.range(self.turn..).chain(self.parts.range(..self.turn)).map(|p| *p.0).collect();
        if let Some(second) = epochs.get(1) {
            self.turn = *second;
        }
        for epoch in epochs {
            while left > 0 {
                let Some(part) = self.parts.get_mut(&epoch).filter(|part| !part.revoking) else { break };
                match part.next(now, !full_of_untold) {
                    Next::Item(item) => {
                        if let Some(delivery) = self.deliver(epoch, item, settle) {
                            out.deliveries.push(delivery);
                            (any, left) = (true, left - 1);
                        } else {
                            call = Call::Now;
                        }
                    }
                    Next::Later(at) => {
                        due = Some(due.map_or(at, |due| due.min(at)));
                        break;
                    }
                    Next::Unreserved => {
                        part.dirty = true;
                        call = Call::Now;
                        break;
                    }
                    Next::Nothing => break,
                }
            }
            if self.parts.get(&epoch).is_some_and(|part| part.is_low(read_ahead)) {
                call = Call::Now;
            }
        }
        if self.call_at.is_some_and(|at| self.ready() <= at) {
            (self.call_at, call) = (None, Call::Now);
        }
        (any, due, call)
    }

    /// Makes a delivery; `None` if the event is not handed out, but sent on.
    fn deliver(&mut self, epoch: u32, mut item: Item, settle: &Arc<dyn Settle>) -> Option<Delivery> {
        let part = self.parts.get_mut(&epoch)?;
        part.out += 1;
        if self.mode != Mode::Replay && part.handed + self.reserve / 2 > part.reserved {
            part.dirty = true;
        }
        item.hand_outs = item.hand_outs.saturating_add(1);
        let (slot, position) = (part.slot, item.offset);
        let (redelivered, replayed) = (item.hand_outs > 1 || item.marked, self.mode == Mode::Replay);
        let message = Arc::clone(&item.message);
        let further = item.further;
        let seq = self.outs.insert(Out { epoch, item }) as u64;
        let tag = Tag { epoch, seq };
        if let Some(further) = further {
            self.send_on(tag, further, message);
            return None;
        }
        let acker = Acker::new(Arc::clone(settle), tag);
        Some(Delivery { message, position, slot, redelivered, replayed, hand_outs: None, lost: None, acker })
    }

    fn send_on(&mut self, tag: Tag, further: u64, message: Arc<Message>) {
        let item = Item { message, offset: 0, hand_outs: 0, marked: false, due: None, further: Some(further) };
        self.further.push((tag, item));
    }

    // ---- Settling ----

    /// Settles what was handed out; a stale tag settles nothing.
    pub(crate) fn settle(&mut self, tag: Tag, settlement: Settlement) -> Call {
        let Ok(seq) = usize::try_from(tag.seq) else { return Call::Nothing };
        let is_here = self.outs.get(seq).is_some_and(|out| out.epoch == tag.epoch);
        let Some(part) = self.parts.get_mut(&tag.epoch).filter(|_| is_here && !self.dead) else {
            self.flushed.stale += 1;
            return Call::Nothing;
        };
        let item = self.outs.remove(seq).item;
        part.out -= 1;
        let revoked = part.revoking && part.out == 0;
        match settlement {
            Settlement::Ack => {
                part.settle(item.offset);
                if self.mode == Mode::Replay {
                    self.flushed.applied += 1;
                    self.wake();
                    return Call::Nothing;
                }
                part.untold += 1;
                self.untold += 1;
                let waits = self.untold == self.many_untold() || self.untold >= self.max_in_flight || revoked;
                return if waits { Call::Now } else { Call::Soon };
            }
            // The next owner reads it.
            Settlement::Release { .. } | Settlement::Abandon if part.revoking => {}
            Settlement::Release { after } if after.is_zero() => part.give_back(item, None),
            Settlement::Release { after } => part.give_back(item, Some(after_now(after))),
            Settlement::Abandon => part.give_back(item, Some(after_now(ABANDONED_BACKOFF))),
        }
        self.flushed.applied += 1;
        self.wake();
        if revoked { Call::Now } else { Call::Nothing }
    }

    pub(crate) fn lease(&self, tag: Tag) -> Lease {
        let out = usize::try_from(tag.seq).ok().and_then(|seq| self.outs.get(seq));
        let is_here = out.is_some_and(|out| out.epoch == tag.epoch) && !self.dead;
        match self.parts.get(&tag.epoch).filter(|_| is_here) {
            None => Lease::Lost,
            Some(part) if part.revoking => Lease::Revoking,
            Some(_) => Lease::Live,
        }
    }

    /// Whether there is something to tell, and whether somebody waits for it.
    pub(crate) fn is_dirty(&self) -> (bool, bool) {
        let dirty = self.parts.values().any(|part| part.dirty);
        let revoking = self.parts.values().any(|part| part.dirty && part.revoking);
        (dirty, dirty && (self.is_unreserved() || self.untold >= self.many_untold() || revoking))
    }

    /// Whether of some partition soon nothing more may be handed out.
    fn is_unreserved(&self) -> bool {
        self.parts.values().any(|part| part.dirty && part.reserved < part.handed + self.reserve / 2)
    }

    /// What a commit is to tell now. `exact` if nothing is handed out any more; early if it cannot wait for its time.
    pub(crate) fn commits(&mut self, exact: bool, is_early: bool) -> Vec<Told> {
        if is_early && self.is_unreserved() {
            self.reserve = (self.reserve * 2).min(MAX_RESERVE);
        }
        let reserve = self.reserve;
        let dirty = self.parts.iter_mut().filter(|(_, part)| part.dirty);
        dirty.map(|(epoch, part)| tell(*epoch, part, if exact || part.revoking { 0 } else { reserve })).collect()
    }

    /// What was told is known to the broker; or not.
    pub(crate) fn told(&mut self, told: &Told, is_known: bool) {
        let Some(part) = self.parts.get_mut(&told.epoch) else { return };
        if !is_known {
            part.dirty = true;
            return;
        }
        part.reserved = part.reserved.max(told.reserves);
        let settled = told.settled.min(part.untold);
        part.untold -= settled;
        self.untold -= settled;
        self.flushed.applied += settled as u64;
        self.wake();
    }

    /// Whether a replay has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.mode == Mode::Replay && self.is_open && !self.follows && self.parts.values().all(Part::is_over)
    }

    /// Ends all, as a crash does; what the broker was not told it may still be.
    pub(crate) fn die(&mut self) {
        self.dead = true;
        self.wake();
    }

    /// The last of it: nothing is out any more.
    pub(crate) fn end(&mut self) {
        self.flushed.unknown += self.untold as u64;
        self.untold = 0;
        self.outs.clear();
        self.parts.clear();
        self.dead = true;
        self.wake();
    }
}

fn tell(epoch: u32, part: &mut Part, reserve: u64) -> Told {
    part.dirty = false;
    let reserves = part.handed.max(part.prefix).saturating_add(reserve);
    let handed = if reserve == 0 { part.handed } else { reserves };
    let (metadata, left) = part.metadata(handed);
    let settled = part.untold.saturating_sub(left);
    let (name, partition, offset) = (Arc::clone(&part.name), part.partition, part.prefix);
    Told { epoch, name, partition, offset, metadata, settled, reserves: if reserve == 0 { 0 } else { reserves } }
}

fn after_now(delay: std::time::Duration) -> Instant {
    let far = std::time::Duration::from_secs(365 * 24 * 3600);
    Instant::now() + delay.min(far)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::part::Kind;
    use std::time::Duration;
    use tidings_core::Topic;

    struct Nobody;

    impl Settle for Nobody {
        fn settle(&self, _: Tag, _: Settlement) {}
        fn lease(&self, _: Tag) -> Lease {
            Lease::Lost
        }
    }

    fn item(offset: u64) -> Item {
        let message = Message::new("1".into(), "/s", "shop", Topic::new("shop").unwrap());
        Item { message: message.into(), offset, hand_outs: 0, marked: false, due: None, further: None }
    }

    fn handed_out(state: &mut State) -> Vec<(u64, Tag)> {
        let (settle, mut polled): (Arc<dyn Settle>, _) = (Arc::new(Nobody), Polled::default());
        state.hand_out(usize::MAX, &settle, &mut polled);
        let outs = state.outs.iter().map(|(seq, out)| (out.item.offset, Tag { epoch: out.epoch, seq: seq as u64 }));
        outs.collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_given_back_comes_when_the_metadata_has_no_room_for_what_was_settled_behind_it() {
        let mut state = State::new(Mode::Shared, 16);
        let name: Arc<str> = "shop".into();
        let mut part = Part::new(&name, 0, Kind::Topic, false);
        part.reserved = u64::MAX;
        for offset in 0..40_000 {
            assert!(part.fetched(offset));
            part.push(item(offset));
        }
        state.add(part, &Names::new(""));
        let minute = Duration::from_secs(60);
        let mut last = 0;
        loop {
            let out = handed_out(&mut state);
            let Some((newest, _)) = out.last() else { break };
            last = last.max(*newest);
            for (offset, tag) in out {
                let given_back = offset.is_multiple_of(2);
                let settlement = if given_back { Settlement::Release { after: minute } } else { Settlement::Ack };
                state.settle(tag, settlement);
            }
            state.commits(false, false).iter().for_each(|told| state.told(told, true));
        }
        assert!(last > 2_000 && state.room() == 0, "{last}");
        tokio::time::advance(minute).await;
        let mut next = 0;
        while state.parts.values().any(|part| part.prefix < last) {
            let out = handed_out(&mut state);
            assert!(!out.is_empty() && out.len() <= 16, "{} out at {next}", out.len());
            for (offset, tag) in out {
                next = next.max(offset);
                state.settle(tag, Settlement::Ack);
            }
            state.commits(false, false).iter().for_each(|told| state.told(told, true));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn delayed_events_are_read_on_as_soon_as_few_are_left() {
        let mut state = State::new(Mode::Shared, 4_096);
        let name: Arc<str> = "later".into();
        let mut part = Part::new(&name, 0, Kind::Later, false);
        part.reserved = u64::MAX;
        let enough = read_ahead(4_096) / 4;
        for offset in 0..enough as u64 {
            assert!(!part.has_enough(4_096), "at {offset}");
            assert!(part.fetched(offset) && !part.fetched(offset), "once");
            part.push(item(offset));
        }
        part.is_paused = part.has_enough(4_096);
        assert!(part.is_paused);
        state.add(part, &Names::new(""));
        let (settle, mut polled): (Arc<dyn Settle>, _) = (Arc::new(Nobody), Polled::default());
        let (.., call) = state.hand_out(enough / 2, &settle, &mut polled);
        assert_ne!(call, Call::Now, "half is left");
        let (.., call) = state.hand_out(enough / 2 - 1, &settle, &mut polled);
        assert_eq!((polled.deliveries.len(), call), (enough - 1, Call::Now));
    }
}
