//! The broker in the process: everything behind one lock.
//!
//! Wakers are called and receipts answered while it is held: they only schedule, and never call back.

use crate::dead_letters::Buried;
use crate::error::{closed, error};
use crate::fnv::FnvMap;
use crate::group::{Asking, Cut, Group};
use crate::log::{Id, Log, Place};
use crate::timers::{Timers, after};
use crate::{MemoryConfig, Stats};
use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::Waker;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{Confirmed, Destination, Fate, Flushed, Outgoing, ReplayFrom, Settlement, Tag, slot_of};
use tidings_core::{Error, ErrorKind, Message, Result, SubscriptionName, Topic};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The broker, shared by all that is connected to it.
pub(crate) struct Broker {
    pub(crate) config: MemoryConfig,
    /// When it began, by both clocks.
    began: (SystemTime, Instant),
    state: Mutex<State>,
}

/// What one connected transport has of the broker.
pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) space: usize,
    pub(crate) closed: AtomicBool,
    /// How many of its publishes wait for room.
    pub(crate) waiting: AtomicUsize,
    /// Told when none waits any more.
    pub(crate) flushed: Notify,
}

/// Where an instance sits.
#[derive(Clone, Copy)]
pub(crate) struct Seat {
    pub(crate) group: usize,
    pub(crate) key: usize,
    pub(crate) instance: u64,
}

/// What a poll came to.
pub(crate) enum Step {
    /// Something was added.
    Added,
    /// Nothing will ever be added again.
    Over,
    /// The instance is not connected any more.
    Closed,
    /// Nothing now, and something at this time at the earliest.
    Wait(Option<Instant>),
}

pub(crate) struct State {
    pub(crate) log: Log,
    pub(crate) groups: Slab<Group>,
    pub(crate) topics: Vec<TopicState>,
    pub(crate) spaces: Vec<Space>,
    /// What is published to topics later.
    delayed: Timers<Delayed>,
    /// Publishes that wait for room, the first first.
    waiting: VecDeque<Waiting>,
    /// What was stored of a batch, and is still to be answered for.
    confirmed: Confirmed,
    /// Whether any topic limits how long it keeps what is unread.
    pub(crate) limited: bool,
    /// The topic that was last published to: mostly it is the next one too, and need not be looked up again.
    pub(crate) last: u32,
    numbers: u64,
}

/// The names in one namespace.
#[derive(Default)]
pub(crate) struct Space {
    name: String,
    pub(crate) topics: FnvMap<Topic, u32>,
    pub(crate) groups: FnvMap<SubscriptionName, usize>,
    pub(crate) dead: HashMap<SubscriptionName, Buried>,
}

pub(crate) struct TopicState {
    pub(crate) space: usize,
    pub(crate) topic: Topic,
    pub(crate) slots: u32,
    pub(crate) retention: Option<Duration>,
    /// Whether its properties were asked for; else they are the defaults.
    pub(crate) provisioned: bool,
    /// Who reads it.
    pub(crate) groups: Vec<usize>,
}

struct Delayed {
    topic: u32,
    id: Id,
}

struct Waiting {
    client: Arc<Client>,
    out: Outgoing,
    size: usize,
}

impl Broker {
    pub(crate) fn new(config: MemoryConfig) -> Self {
        let state = State {
            log: Log::new(config.capacity, config.retain),
            groups: Slab::new(),
            topics: Vec::new(),
            spaces: Vec::new(),
            delayed: Timers::default(),
            waiting: VecDeque::new(),
            confirmed: Confirmed::default(),
            limited: false,
            last: 0,
            numbers: 0,
        };
        Self { config, began: (SystemTime::now(), Instant::now()), state: Mutex::new(state) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// When what a dead instance left open comes back, if not at once.
    pub(crate) fn redelivery(&self) -> Option<Instant> {
        let delay = self.config.redelivery_delay;
        (!delay.is_zero()).then(|| after(Instant::now(), delay))
    }

    /// The instant of a time of day. The two clocks part when the machine sleeps; then it is the earlier
    /// one, so that a replay reads too much rather than too little.
    pub(crate) fn instant_of(&self, time: SystemTime) -> Option<Instant> {
        let now = Instant::now();
        let (began, instant) = self.began;
        let since_began = time.duration_since(began).unwrap_or_default();
        let by_now = SystemTime::now().duration_since(time).unwrap_or_default();
        Some(now.checked_sub(by_now)?.min(instant.checked_add(since_began)?))
    }

    /// Lets an instance go; what it had comes back, after the redelivery delay if it crashed.
    pub(crate) fn leave(&self, seat: Seat, crashed: bool) -> Flushed {
        let wait = if crashed { self.redelivery() } else { None };
        self.lock().leave(seat, wait, crashed)
    }
}

impl State {
    /// A number that was never given before.
    pub(crate) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(crate) fn space(&mut self, name: &str) -> usize {
        self.spaces.iter().position(|space| space.name == name).unwrap_or_else(|| {
            self.spaces.push(Space { name: name.to_owned(), ..Space::default() });
            self.spaces.len() - 1
        })
    }

    pub(crate) fn stats(&self) -> Stats {
        let (stored, retained) = self.log.bytes();
        Stats { stored, retained, waiting: self.waiting.len() }
    }

    // ---- Publishing ----

    /// Takes responsibility for each message, refuses it, or lets it wait for room.
    pub(crate) fn submit(&mut self, client: &Arc<Client>, batch: &mut dyn Iterator<Item = Outgoing>) {
        let now = Instant::now();
        if client.closed.load(SeqCst) {
            batch.for_each(|out| out.receipt.fail(Fate::NotPersisted, closed().with_operation("publish")));
        } else {
            batch.for_each(|out| self.take(client, out, now));
            self.confirmed.answer();
        }
    }

    fn take(&mut self, client: &Arc<Client>, out: Outgoing, now: Instant) {
        let size = out.message.size();
        if out.owed || (self.waiting.is_empty() && self.make_room(size, now)) {
            self.store(client.space, out, size, now);
        } else if size > self.log.capacity() {
            out.receipt.fail(Fate::NotPersisted, too_large(size, self.log.capacity()));
        } else {
            client.waiting.fetch_add(1, SeqCst);
            self.waiting.push_back(Waiting { client: Arc::clone(client), out, size });
            self.admit(now);
        }
    }

    fn make_room(&mut self, size: usize, now: Instant) -> bool {
        if self.log.make_room(size) {
            return true;
        }
        if !self.limited {
            return false;
        }
        let log = &mut self.log;
        self.groups.iter_mut().for_each(|(_, group)| group.expire(log, now));
        self.log.make_room(size)
    }

    /// Stores what waits for room, in turn, as far as there is some.
    pub(crate) fn admit(&mut self, now: Instant) {
        while let Some(first) = self.waiting.front() {
            let (abandoned, size) = (first.out.receipt.is_abandoned(), first.size);
            if !abandoned && !self.make_room(size, now) {
                break;
            }
            let Some(Waiting { client, out, .. }) = self.waiting.pop_front() else { break };
            if abandoned {
                out.receipt.fail(Fate::NotPersisted, error(ErrorKind::Full, "nobody waited for room any more"));
            } else {
                self.store(client.space, out, size, now);
            }
            client.waited();
        }
        self.confirmed.answer();
    }

    pub(crate) fn admit_waiting(&mut self) {
        if !self.waiting.is_empty() {
            self.admit(Instant::now());
        }
    }

    /// Stores a message for which there is room; whoever calls this answers for what is confirmed.
    fn store(&mut self, space: usize, out: Outgoing, size: usize, now: Instant) {
        let due = out.delay.filter(|delay| !delay.is_zero()).map(|delay| after(now, delay));
        let stored = match &out.destination {
            Destination::Topic(topic) => {
                let topic = self.topic(space, topic);
                match due {
                    None => self.publish(topic, out.message, size, now),
                    Some(due) => {
                        let id = self.log.hold(out.message, size, now);
                        self.delay(topic, id, due);
                    }
                }
                Ok(())
            }
            Destination::Subscription(name) => self.send((space, name), (out.message, size), (now, due)),
            Destination::DeadLetter(_) if due.is_some() => {
                let why = "dead letters are not delayed; publish to the subscription's address instead";
                Err(error(ErrorKind::Unsupported, why))
            }
            Destination::DeadLetter(name) => {
                self.bury(space, name, out.message);
                Ok(())
            }
        };
        match stored {
            Ok(()) => self.confirmed.add(out.receipt),
            Err(error) => out.receipt.fail(Fate::NotPersisted, error.with_operation("publish")),
        }
    }

    /// Makes a message the last event of its topic.
    fn publish(&mut self, topic: u32, message: Arc<Message>, size: usize, now: Instant) {
        let state = &self.topics[topic as usize];
        let slot = slot_of(message.key.as_ref(), state.slots);
        let id = self.log.append(message, size, state.place(topic, now));
        for group in &state.groups {
            self.groups[*group].enqueue(slot, id);
        }
    }

    /// Makes what was delayed the last event of its topic.
    fn publish_delayed(&mut self, Delayed { topic, id }: Delayed, now: Instant) {
        let state = &self.topics[topic as usize];
        let slot = slot_of(self.log.entry(id).message.key.as_ref(), state.slots);
        self.log.publish(id, state.place(topic, now));
        for group in &state.groups {
            self.groups[*group].enqueue(slot, id);
        }
    }

    fn delay(&mut self, topic: u32, id: Id, due: Instant) {
        if self.delayed.add(due, Delayed { topic, id }) {
            self.topics[topic as usize].groups.iter().for_each(|group| self.groups[*group].rouse_all());
        }
    }

    /// Publishes what was delayed and is due.
    pub(crate) fn advance(&mut self) {
        if self.delayed.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(delayed) = self.delayed.pop(now) {
            self.publish_delayed(delayed, now);
        }
    }

    /// Sends to the address of a subscription.
    fn send(
        &mut self,
        (space, name): (usize, &SubscriptionName),
        (message, size): (Arc<Message>, usize),
        (now, due): (Instant, Option<Instant>),
    ) -> Result<()> {
        let Some(group) = self.spaces[space].groups.get(name).copied() else {
            return Err(error(ErrorKind::NotFound, "the subscription does not exist; subscribe or provision it first")
                .with_context("subscription", name));
        };
        let slots = self.spaces[space].topics.get(&message.topic).map_or(1, |topic| self.topics[*topic as usize].slots);
        let slot = slot_of(message.key.as_ref(), slots);
        let id = self.log.hold(message, size, now);
        if let Some(due) = due {
            self.groups[group].enqueue_at(due, slot, id);
        } else {
            self.log.place(id);
            self.groups[group].enqueue(slot, id);
        }
        Ok(())
    }

    // ---- Reading ----

    fn seated(&mut self, seat: Seat) -> Option<(&mut Group, &mut Log)> {
        let group = self.groups.get_mut(seat.group)?;
        group.member(seat.key, seat.instance)?;
        Some((group, &mut self.log))
    }

    /// One poll of an instance: notices first and alone, so that none is read after what it is about.
    pub(crate) fn poll(&mut self, seat: Seat, waker: &Waker, mut ask: Asking<'_>) -> Step {
        self.advance();
        if self.seated(seat).is_none() {
            return Step::Closed;
        }
        self.move_on(seat.group);
        let group = &mut self.groups[seat.group];
        if group.notify(seat.key, &mut ask.out.notices) {
            Step::Added
        } else if group.is_over(seat.key) {
            Step::Over
        } else if group.hand_out(seat.key, &self.log, &mut ask) {
            Step::Added
        } else {
            group.park(seat.key, waker);
            Step::Wait(group.next_due(seat.key, self.delayed.next()))
        }
    }

    /// Does what is due in a subscription.
    fn move_on(&mut self, group: usize) {
        let (group, log) = (&mut self.groups[group], &mut self.log);
        if !self.limited && !group.has_timers() {
            return;
        }
        let now = Instant::now();
        group.advance(log, now);
        if self.limited {
            group.expire(log, now);
            self.admit(now);
        }
    }

    pub(crate) fn settle(&mut self, seat: Seat, tag: Tag, settlement: Settlement) {
        if let Some(group) = self.groups.get_mut(seat.group) {
            group.settle(seat, &mut self.log, tag, settlement);
            self.admit_waiting();
        }
    }

    pub(crate) fn stop(&mut self, seat: Seat) {
        if let Some((group, _)) = self.seated(seat) {
            group.stop(seat.key);
        }
    }

    fn leave(&mut self, seat: Seat, wait: Option<Instant>, died: bool) -> Flushed {
        let Some((group, log)) = self.seated(seat) else { return Flushed::default() };
        let flushed = group.leave(seat.key, log, wait, died);
        self.end_replays();
        flushed
    }

    /// Forgets the replays that nobody reads any more.
    fn end_replays(&mut self) {
        let over = |(key, group): (usize, &Group)| (group.replay.is_some() && group.is_empty()).then_some(key);
        while let Some(key) = self.groups.iter().find_map(over) {
            self.remove_group(key);
        }
        self.admit_waiting();
    }

    pub(crate) fn remove_group(&mut self, key: usize) {
        let mut group = self.groups.remove(key);
        group.leave_all(|_| true, &self.log);
        group.drain(&mut self.log);
        self.topics.iter_mut().for_each(|topic| topic.groups.retain(|group| *group != key));
    }

    pub(crate) fn lose_leases(&mut self, space: usize, name: &SubscriptionName, wait: Option<Instant>) -> Result<()> {
        let Some(group) = self.spaces[space].groups.get(name) else {
            return Err(
                error(ErrorKind::NotFound, "the subscription does not exist").with_context("subscription", name)
            );
        };
        let group = *group;
        self.cut_off(group, &Cut { client: None, wait });
        Ok(())
    }

    /// All instances of one transport lose what they were handed.
    pub(crate) fn cut(&mut self, client: u64, wait: Option<Instant>) {
        let groups: Vec<_> = self.groups.iter().map(|(group, _)| group).collect();
        groups.into_iter().for_each(|group| self.cut_off(group, &Cut { client: Some(client), wait }));
    }

    fn cut_off(&mut self, group: usize, whose: &Cut) {
        self.groups[group].lose_leases(&self.log, whose, || {
            self.numbers += 1;
            self.numbers
        });
    }

    /// Disconnects a transport; says how many of its publishes still waited.
    pub(crate) fn disconnect(&mut self, client: &Client) -> usize {
        let of_client = |waiting: &Waiting| waiting.client.id == client.id;
        let (theirs, others) = std::mem::take(&mut self.waiting).into_iter().partition::<VecDeque<_>, _>(of_client);
        self.waiting = others;
        let refused = theirs.len();
        for waiting in theirs {
            waiting.out.receipt.fail(Fate::NotPersisted, closed().with_operation("publish"));
            client.waited();
        }
        let log = &self.log;
        self.groups.iter_mut().for_each(|(_, group)| group.leave_all(|member| member == client.id, log));
        self.end_replays();
        refused
    }

    /// What a replay, or a subscription that starts at the beginning, is handed of topics it reads.
    pub(crate) fn catch_up(&mut self, key: usize, from: ReplayFrom, since: Option<Instant>) {
        let (log, topics, group) = (&mut self.log, &self.topics, &mut self.groups[key]);
        let reads: Vec<bool> = topics.iter().map(|t| t.space == group.space && group.reads(&t.topic)).collect();
        let ids: Vec<Id> = log.read().filter(|id| reads[log.entry(*id).topic as usize]).collect();
        for id in ids {
            let entry = log.entry(id);
            let wanted = match from {
                ReplayFrom::Beginning => true,
                ReplayFrom::Time(_) => since.is_none_or(|since| entry.received >= since),
                ReplayFrom::Position(position) => entry.position >= position,
            };
            if wanted {
                let slot = slot_of(entry.message.key.as_ref(), topics[entry.topic as usize].slots);
                log.own(id);
                group.enqueue(slot, id);
            }
        }
    }
}

impl TopicState {
    /// What its events are stored with; `number` is its own.
    fn place(&self, number: u32, now: Instant) -> Place {
        let kept_until = self.retention.map(|retention| after(now, retention));
        Place { topic: number, owners: self.groups.len() as u32, received: now, kept_until }
    }
}

impl Client {
    pub(crate) fn check(&self) -> Result<()> {
        if self.closed.load(SeqCst) { Err(closed()) } else { Ok(()) }
    }

    /// One of its publishes waits no more.
    fn waited(&self) {
        if self.waiting.fetch_sub(1, SeqCst) == 1 {
            self.flushed.notify_waiters();
        }
    }
}

fn too_large(size: usize, capacity: usize) -> Error {
    let why = format!("a message of {size} bytes never fits into a capacity of {capacity}; raise `capacity`");
    error(ErrorKind::TooLarge, why).with_operation("publish")
}
