//! What one instance holds: what waits to be handed out, and what is out. Pure data behind one lock, no tasks.

use crate::settle::{NatsSettle, Op, Writer};
use crate::wire;
use async_nats::{Message as Raw, Subject};
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, SystemTime};
use tidings_core::Error;
use tidings_core::transport::{
    ABANDONED_BACKOFF, Acker, Delivery, Flushed, Lease, Notice, Polled, Role, Settle, Settlement, Tag,
};
use tokio::time::Instant;

/// How long something may lie ready before it is given back to others, if nobody comes for it.
const UNCLAIMED: Duration = Duration::from_millis(500);

/// How many may be read from an address ahead of their turn.
const ADDRESS_AHEAD: usize = 16;

/// Of how many delayed messages is remembered that they were not handed out yet; others are told as redelivered.
const EARLY: usize = 65_536;

/// For how long after a cut acked messages may come again because a killed server has forgotten that.
const FORGETFUL: Duration = Duration::from_secs(60);

/// How many acks are remembered, to be told again to a server that was killed and has forgotten them.
const REMEMBERED: usize = 16_384;

/// How many positions that may have been lost at a cut are asked for; others come when they were not acked in time.
const ASKED_FOR: usize = 4_096;

/// How instances share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Message by message.
    Shared,
    /// By key: each slot has one owner.
    Keyed,
    /// Not at all: it is a replay.
    Replay,
}

/// What is read: topics, or the subscription's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Topic,
    Address,
}

/// Names a source while it is open.
pub(crate) type SourceId = u64;

/// A message that the server has handed to this instance.
pub(crate) struct Held {
    raw: Raw,
    position: u64,
    stored: SystemTime,
    received: Instant,
    /// Not to be handed out before.
    due: Option<Instant>,
    redelivered: bool,
}

impl Held {
    fn reply(&self) -> Subject {
        self.raw.reply.clone().unwrap_or_else(|| Subject::from_static("_none"))
    }
}

/// What was handed out and is not settled at the server.
struct Out {
    source: SourceId,
    held: Held,
    /// How it was settled, while the server has not confirmed it.
    settling: Option<&'static [u8]>,
}

/// What a former owner left open: until all of it is here nothing is handed out, and then in the order of positions.
#[derive(Debug)]
pub(crate) struct Recovery {
    /// The last position that a former owner may have been handed.
    pub(crate) after: u64,
    /// How many of those are still to come.
    pub(crate) missing: u64,
    pub(crate) since: Instant,
}

/// One consumer that this instance reads.
pub(crate) struct Source {
    pub(crate) kind: Kind,
    /// The slot whose owner reads it.
    pub(crate) slot: u32,
    /// The slot as deliveries tell it: different for each consumer, because each has an order of its own.
    pub(crate) number: u32,
    pub(crate) stream: Arc<str>,
    waiting: BTreeMap<u64, Held>,
    /// How many of those are not due.
    delayed: usize,
    /// What is out, by position.
    open: HashMap<u64, u64>,
    /// The last position that was read.
    pub(crate) high: u64,
    /// When the server was last told, and has confirmed, that all that was held then is still being handled.
    confirmed: Instant,
    pub(crate) recovery: Option<Recovery>,
    /// Its slot is handed on once nothing of it is out.
    pub(crate) revoking: bool,
    /// A replay has read all that there is for it.
    pub(crate) done: bool,
    /// What came before it was due, and how often the server had sent it then: the next time is not a repeat.
    early: HashMap<u64, u64>,
    acked: Acked,
    /// Since when the server may have forgotten acks.
    cut: Option<Instant>,
}

pub(crate) struct State {
    pub(crate) mode: Mode,
    max: usize,
    ack_wait: Duration,
    pub(crate) sources: BTreeMap<SourceId, Source>,
    out: HashMap<u64, Out>,
    /// Settled, and not confirmed at the first attempt: a server that was killed may have forgotten that it had sent them, and
    /// ignores what is said of them until it has sent them again.
    unheard: HashSet<u64>,
    /// What is known of consumers that were read before, by the number of their slot.
    former: HashMap<u32, (u64, Acked)>,
    next: u64,
    pub(crate) notices: Vec<Notice>,
    waker: Option<Waker>,
    /// When its poller was woken, if it has not polled since.
    woken: Option<Instant>,
    /// Whether somebody waits for deliveries.
    demand: bool,
    pub(crate) stopped: bool,
    /// Nothing is handed out and nothing can be settled any more.
    pub(crate) dead: bool,
    pub(crate) failed: Option<Error>,
    pub(crate) flushed: Flushed,
    told: Option<Role>,
}

/// What was acked lately in one consumer.
#[derive(Default)]
struct Acked {
    order: VecDeque<u64>,
    /// By position, what the reply subject has beside it: how often it was delivered, its number, its time.
    replies: HashMap<u64, (u64, u64, u64)>,
    /// What all reply subjects begin with.
    prefix: String,
}

impl Acked {
    /// A copy of the numbers: a subject that is kept would keep the buffer that it was read into.
    fn note(&mut self, reply: &str) {
        let mut tokens = reply.rsplitn(6, '.').collect::<Vec<_>>();
        // With an account there is one more token at the end.
        if reply.split('.').count() > 9 {
            tokens = reply.rsplitn(7, '.').skip(1).collect();
        }
        let [_, time, number, position, delivered, prefix] = tokens[..] else { return };
        let parsed = |token: &str| token.parse::<u64>().ok();
        let (Some(time), Some(number), Some(position), Some(delivered)) =
            (parsed(time), parsed(number), parsed(position), parsed(delivered))
        else {
            return;
        };
        if self.prefix != prefix {
            prefix.clone_into(&mut self.prefix);
        }
        if self.replies.insert(position, (delivered, number, time)).is_none() {
            self.order.push_back(position);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.replies.remove(&oldest);
        }
    }

    /// Whether this very message was acked: a stream that was created anew counts its positions from the beginning.
    fn has(&self, held: &Held) -> bool {
        let stored = held.stored.duration_since(SystemTime::UNIX_EPOCH).map(|since| since.as_nanos());
        let acked = self.replies.get(&held.position).map(|(_, _, time)| u128::from(*time));
        acked.is_some() && acked == stored.ok()
    }

    fn replies(&self) -> impl Iterator<Item = Subject> {
        self.replies.iter().map(|(position, (delivered, number, time))| {
            Subject::from(format!("{}.{delivered}.{position}.{number}.{time}.0", self.prefix))
        })
    }
}

/// Where a message stands, as its reply subject tells.
pub(crate) struct Place<'a> {
    pub(crate) consumer: &'a str,
    delivered: u64,
    position: u64,
    /// The how-manieth message of its consumer it is.
    pub(crate) number: u64,
    stored: SystemTime,
    pending: u64,
}

/// `$JS.ACK.<stream>.<consumer>.<delivered>.<position>.<number>.<time>.<pending>`, or with domain and account before the stream.
pub(crate) fn place(reply: &str) -> Option<Place<'_>> {
    let mut tokens = [""; 12];
    let count = reply.split('.').zip(&mut tokens).map(|(token, at)| *at = token).count();
    let at = match count {
        9 => 2,
        11.. => 4,
        _ => return None,
    };
    let number = |n: usize| tokens.get(at + n).and_then(|token| token.parse::<u64>().ok());
    let stored = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(number(5)?))?;
    let consumer = tokens.get(at + 1)?;
    let (delivered, position, pending) = (number(2)?, number(3)?, number(6)?);
    Some(Place { consumer, delivered, position, number: number(4)?, stored, pending })
}

impl Source {
    pub(crate) fn new(kind: Kind, slot: u32, number: u32, stream: &str) -> Self {
        Self {
            kind,
            slot,
            number,
            stream: stream.into(),
            waiting: BTreeMap::new(),
            delayed: 0,
            open: HashMap::new(),
            high: 0,
            confirmed: Instant::now(),
            recovery: None,
            revoking: false,
            done: false,
            early: HashMap::new(),
            acked: Acked::default(),
            cut: None,
        }
    }

    fn wait(&mut self, held: Held) {
        self.delayed += usize::from(held.due.is_some());
        self.waiting.insert(held.position, held);
    }

    /// The next to hand out. What is not due holds up what is newer in its lane, and nothing else.
    fn next(&mut self, now: Instant) -> Option<Held> {
        if self.revoking || self.recovery.is_some() {
            return None;
        }
        if self.delayed == 0 {
            return self.waiting.pop_first().map(|(_, held)| held);
        }
        let mut blocked = HashSet::new();
        let mut found = None;
        for (position, held) in &self.waiting {
            let lane = wire::lane(&held.raw);
            if held.due.is_some_and(|due| due > now) {
                blocked.extend(lane);
            } else if lane.is_none_or(|lane| !blocked.contains(&lane)) {
                found = Some(*position);
                break;
            }
        }
        let held = self.waiting.remove(&found?)?;
        self.delayed -= usize::from(held.due.is_some());
        Some(held)
    }

    fn next_due(&self) -> Option<Instant> {
        let may = !self.revoking && self.recovery.is_none() && self.delayed > 0;
        may.then(|| self.waiting.values().filter_map(|held| held.due).min()).flatten()
    }

    /// How many it holds that are newer than what it recovers.
    pub(crate) fn newer(&self) -> usize {
        self.recovery.as_ref().map_or(0, |recovery| self.waiting.range(recovery.after.saturating_add(1)..).count())
    }

    pub(crate) fn is_out(&self) -> bool {
        !self.open.is_empty()
    }

    fn lease_ends(&self, received: Instant, ack_wait: Duration) -> Instant {
        received.max(self.confirmed) + ack_wait
    }
}

impl State {
    pub(crate) fn new(mode: Mode, max: usize, ack_wait: Duration) -> Self {
        Self {
            mode,
            max,
            ack_wait,
            sources: BTreeMap::new(),
            out: HashMap::new(),
            unheard: HashSet::new(),
            former: HashMap::new(),
            next: 0,
            notices: Vec::new(),
            waker: None,
            woken: None,
            demand: false,
            stopped: false,
            dead: false,
            failed: None,
            flushed: Flushed::default(),
            told: None,
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(crate) fn open(&mut self, mut source: Source) -> SourceId {
        let id = self.number();
        if let Some((high, acked)) = self.former.remove(&source.number) {
            (source.high, source.acked, source.cut) = (source.high.max(high), acked, Some(Instant::now()));
        }
        self.sources.insert(id, source);
        id
    }

    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            self.woken.get_or_insert_with(Instant::now);
            waker.wake();
        }
    }

    pub(crate) fn tell(&mut self, notice: Notice) {
        self.notices.push(notice);
        self.wake();
    }

    pub(crate) fn tell_role(&mut self, role: Role) {
        if self.told.as_ref() != Some(&role) {
            self.told = Some(role.clone());
            // Only the last one matters.
            self.notices.retain(|notice| !matches!(notice, Notice::Role(_)));
            self.tell(Notice::Role(role));
        }
    }

    // ---- Handing out ----

    /// One poll begins.
    pub(crate) fn polled(&mut self) {
        (self.woken, self.demand) = (None, true);
    }

    pub(crate) fn park(&mut self, waker: &Waker) {
        if !self.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.waker = Some(waker.clone());
        }
    }

    pub(crate) fn hand_out(
        &mut self,
        max: usize,
        settle: &Arc<NatsSettle>,
        names: &crate::names::Names,
        out: &mut Polled,
    ) -> bool {
        let (now, before) = (Instant::now(), out.deliveries.len());
        let mut room = self.max.saturating_sub(self.out.len()).min(max);
        for (id, source) in &mut self.sources {
            while room > 0 {
                let Some(mut held) = source.next(now) else { break };
                held.due = None;
                room -= 1;
                self.next += 1;
                let seq = self.next;
                out.deliveries.push(deliver(
                    source,
                    &held,
                    self.mode,
                    names,
                    Acker::new(Arc::clone(settle) as Arc<dyn Settle>, Tag { epoch: 0, seq }),
                ));
                source.open.insert(held.position, seq);
                self.out.insert(seq, Out { source: *id, held, settling: None });
            }
        }
        out.deliveries.len() > before
    }

    /// When something becomes due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        if self.out.len() >= self.max {
            return None;
        }
        self.sources.values().filter_map(Source::next_due).min()
    }

    /// Whether a replay has read, and had settled, all that there was.
    pub(crate) fn is_over(&self) -> bool {
        let read = |source: &Source| source.done && source.waiting.is_empty();
        self.mode == Mode::Replay && self.out.is_empty() && self.sources.values().all(read)
    }

    // ---- Reading ----

    /// How many more a source should ask the server for, if it has asked for `asked`.
    pub(crate) fn wants(&self, id: SourceId, asked: usize) -> usize {
        let Some(source) = self.sources.get(&id) else { return 0 };
        if self.stopped || self.dead || source.revoking || source.done || (self.mode == Mode::Shared && !self.demand) {
            return 0;
        }
        let topics = |source: &&Source| source.kind == Kind::Topic;
        let waiting: usize = self.sources.values().filter(topics).map(|source| source.waiting.len()).sum();
        let room = self.max.saturating_sub(self.out.len() - self.unheard.len() + waiting);
        if source.kind == Kind::Address {
            return room.min(ADDRESS_AHEAD).saturating_sub(source.waiting.len() + asked);
        }
        if room == 0 {
            return 0;
        }
        let target = (room / self.sources.values().filter(topics).count().max(1)).max(1);
        let more = target.saturating_sub(asked);
        // Asking for few at a time costs more than it brings.
        if asked == 0 || more * 2 >= target { more } else { 0 }
    }

    /// Takes in what the server has sent.
    pub(crate) fn arrive(&mut self, id: SourceId, raw: Raw, end: Option<u64>, writer: &Writer) {
        let reply = raw.reply.clone();
        let Some(place) = reply.as_ref().and_then(|reply| place(reply)) else { return };
        let (mode, stopped, now) = (self.mode, self.stopped || self.dead, Instant::now());
        let Some(source) = self.sources.get_mut(&id) else { return };
        if mode == Mode::Replay {
            source.done |= end.is_some_and(|end| place.position >= end || place.pending == 0);
            if source.done && end.is_some_and(|end| place.position > end) {
                return self.wake();
            }
        }
        let (position, stored) = (place.position, place.stored);
        let held = Held { raw, position, stored, received: now, due: None, redelivered: false };
        if source.kind == Kind::Address
            && let Some(left) = not_due(&held.raw, place.stored)
        {
            let again = place.delivered > 1 && source.early.get(&place.position) != Some(&(place.delivered - 1));
            if !again && (source.early.len() < EARLY || source.early.contains_key(&place.position)) {
                source.early.insert(place.position, place.delivered);
            }
            return writer.push(Op::nak(id, held.reply(), left));
        }
        let redelivered = place.delivered > 1 && source.early.remove(&place.position) != Some(place.delivered - 1);
        if mode == Mode::Shared && stopped {
            return writer.push(Op::nak(id, held.reply(), Duration::ZERO));
        }
        self.take_in(id, held, redelivered, writer);
    }

    /// What is here already takes the new copy's place at the server; else it waits its turn.
    fn take_in(&mut self, id: SourceId, mut held: Held, redelivered: bool, writer: &Writer) {
        let Some(source) = self.sources.get_mut(&id) else { return };
        if let Some(tag) = source.open.get(&held.position).copied() {
            let Some(out) = self.out.get_mut(&tag) else { return };
            (out.held.raw.reply, out.held.received) = (held.raw.reply, held.received);
            if let Some(body) = out.settling {
                writer.push(Op::settle(id, out.held.reply(), body, tag));
            }
            return;
        }
        if let Some(known) = source.waiting.get_mut(&held.position) {
            (known.raw.reply, known.received) = (held.raw.reply, held.received);
            return;
        }
        if source.cut.is_some_and(|cut| cut.elapsed() < FORGETFUL) && source.acked.has(&held) {
            writer.push(Op::ack(id, held.reply()));
            if let Some(recovery) = source.recovery.as_mut().filter(|recovery| held.position <= recovery.after) {
                recovery.missing = recovery.missing.saturating_sub(1);
            }
            return self.end_recovery(id, false);
        }
        // What the server has forgotten to have handed out comes with a count of 1.
        held.redelivered = redelivered || (source.kind == Kind::Topic && held.position <= source.high);
        source.high = source.high.max(held.position);
        if let Some(recovery) = source.recovery.as_mut().filter(|recovery| held.position <= recovery.after) {
            recovery.missing = recovery.missing.saturating_sub(1);
        }
        source.wait(held);
        self.end_recovery(id, false);
    }

    /// Ends a recovery if all is here, or if it is known to be.
    pub(crate) fn end_recovery(&mut self, id: SourceId, complete: bool) {
        let Some(source) = self.sources.get_mut(&id) else { return };
        if source.recovery.as_ref().is_some_and(|recovery| complete || recovery.missing == 0) {
            source.recovery = None;
        }
        if source.recovery.is_none() {
            self.wake();
        }
    }

    /// What a source holds and is not being settled, by position: it is pending at the server, if that has not forgotten it.
    pub(crate) fn held(&self, id: SourceId) -> HashSet<u64> {
        let Some(source) = self.sources.get(&id) else { return HashSet::new() };
        let unsettled = |tag: &u64| self.out.get(tag).is_some_and(|out| out.settling.is_none());
        let open = source.open.iter().filter(|(_, tag)| unsettled(tag)).map(|(position, _)| *position);
        source.waiting.keys().copied().chain(open).collect()
    }

    /// Where to give back those of `positions` that are not here, when `number` was the last that the consumer sent.
    pub(crate) fn lost(&self, id: SourceId, positions: RangeInclusive<u64>, number: u64) -> Vec<Subject> {
        let Some(source) = self.sources.get(&id).filter(|source| !source.acked.prefix.is_empty()) else {
            return Vec::new();
        };
        let missing = |position: &u64| !source.waiting.contains_key(position) && !source.open.contains_key(position);
        let reply = |position| Subject::from(format!("{}.1.{position}.{number}.0.0", source.acked.prefix));
        positions.filter(missing).take(ASKED_FOR).map(reply).collect()
    }

    /// Hands nothing of a source out until it is known what was on its way to this instance and did not arrive.
    pub(crate) fn doubt(&mut self, id: SourceId) {
        if let Some(source) = self.sources.get_mut(&id) {
            source.recovery = Some(Recovery { after: u64::MAX, missing: u64::MAX, since: Instant::now() });
        }
    }

    // ---- Settling ----

    pub(crate) fn settle(&mut self, tag: Tag, settlement: Settlement, writer: &Writer) {
        let Some(out) = self.out.get(&tag.seq).filter(|_| self.lease(tag) != Lease::Lost) else {
            self.flushed.stale += 1;
            // What is still listed comes again when the server notices.
            return self.drop_out(tag.seq);
        };
        let (id, reply) = (out.source, out.held.reply());
        let delay = match settlement {
            Settlement::Ack => None,
            Settlement::Release { after } => Some(after),
            Settlement::Abandon => Some(ABANDONED_BACKOFF),
        };
        match delay {
            None if self.mode == Mode::Replay => {
                self.flushed.applied += 1;
                self.drop_out(tag.seq);
                self.wake();
            }
            None => self.settle_by(tag.seq, b"+ACK", Op::settle(id, reply, b"+ACK", tag.seq), writer),
            Some(delay) if self.mode == Mode::Shared => {
                self.settle_by(tag.seq, b"-NAK", Op::nak(id, reply, delay).with_tag(tag.seq), writer);
            }
            Some(delay) => self.put_back(tag.seq, delay),
        }
    }

    fn settle_by(&mut self, tag: u64, body: &'static [u8], op: Op, writer: &Writer) {
        if let Some(out) = self.out.get_mut(&tag) {
            out.settling = Some(body);
            writer.push(op);
        }
    }

    /// Keeps what was given back: it is nobody else's, and so it comes before what is newer.
    fn put_back(&mut self, tag: u64, delay: Duration) {
        let Some(mut out) = self.out.remove(&tag) else { return };
        self.flushed.applied += 1;
        if let Some(source) = self.sources.get_mut(&out.source) {
            source.open.remove(&out.held.position);
            out.held.redelivered = true;
            let far = Duration::from_secs(365 * 24 * 3600);
            out.held.due = (!delay.is_zero()).then(|| Instant::now() + delay.min(far));
            source.wait(out.held);
        }
        self.wake();
    }

    fn drop_out(&mut self, tag: u64) {
        self.unheard.remove(&tag);
        if let Some(out) = self.out.remove(&tag)
            && let Some(source) = self.sources.get_mut(&out.source)
        {
            source.open.remove(&out.held.position);
        }
    }

    pub(crate) fn lease(&self, tag: Tag) -> Lease {
        let Some(out) = self.out.get(&tag.seq).filter(|_| !self.dead) else { return Lease::Lost };
        let Some(source) = self.sources.get(&out.source) else { return Lease::Lost };
        if self.mode != Mode::Replay && source.lease_ends(out.held.received, self.ack_wait) <= Instant::now() {
            return Lease::Lost;
        }
        if source.revoking { Lease::Revoking } else { Lease::Live }
    }

    /// The server has done this.
    pub(crate) fn applied(&mut self, op: &Op) {
        if let Some(tag) = op.tag.filter(|tag| self.out.contains_key(tag)) {
            self.flushed.applied += 1;
            self.remember(tag);
            self.drop_out(tag);
        }
        if let Some((tick, source)) = op.tick.and_then(|tick| Some((tick, self.sources.get_mut(&op.source)?))) {
            source.confirmed = source.confirmed.max(tick);
        }
        if self.sources.values().any(|source| !source.waiting.is_empty()) || self.mode == Mode::Keyed {
            self.wake();
        }
    }

    fn remember(&mut self, tag: u64) {
        let Some(out) = self.out.get(&tag).filter(|out| out.settling == Some(b"+ACK")) else { return };
        if let (Some(source), Some(reply)) = (self.sources.get_mut(&out.source), &out.held.raw.reply) {
            source.acked.note(reply);
        }
    }

    /// After a cut: the server may have been killed, so it is told again what was acked lately.
    pub(crate) fn ack_again(&mut self, id: SourceId, writer: &Writer) {
        let Some(source) = self.sources.get_mut(&id) else { return };
        source.cut = Some(Instant::now());
        source.acked.replies().for_each(|reply| writer.push(Op::ack(id, reply)));
    }

    /// The consumer was built again and begins before what was read: what was acked here comes again, and what others were handed up to
    /// the position `last`.
    pub(crate) fn begun_again(&mut self, id: SourceId, last: u64) {
        let shared = self.mode == Mode::Shared;
        if let Some(source) = self.sources.get_mut(&id) {
            source.cut = Some(Instant::now());
            source.high = if shared { source.high.max(last) } else { source.high };
        }
    }

    /// `op` was not confirmed; whether what it settles is still to be settled.
    pub(crate) fn unheard(&mut self, op: &Op) -> bool {
        let Some(tag) = op.tag else { return true };
        let settling = self.out.get(&tag).is_some_and(|out| out.settling.is_some());
        if settling {
            self.unheard.insert(tag);
        }
        settling
    }

    /// How many settlements the server has not confirmed.
    pub(crate) fn settling(&self) -> usize {
        self.out.values().filter(|out| out.settling.is_some()).count()
    }

    // ---- Leases ----

    /// Extends all that is held, and gives up what could not be extended in time.
    pub(crate) fn extend(&mut self, writer: &Writer) {
        self.expire();
        self.give_back_unclaimed(writer);
        let tick = Instant::now();
        for (id, source) in &self.sources {
            let out = source.open.values().filter_map(|tag| self.out.get(tag)).map(|out| &out.held);
            for held in out.chain(source.waiting.values()) {
                writer.push(Op::progress(*id, held.reply(), tick));
            }
        }
    }

    fn expire(&mut self) {
        let (now, ack_wait) = (Instant::now(), self.ack_wait);
        let sources = &self.sources;
        let over = |source: SourceId, held: &Held| {
            sources.get(&source).is_none_or(|source| source.lease_ends(held.received, ack_wait) <= now)
        };
        let lost: Vec<u64> =
            self.out.iter().filter(|(_, out)| over(out.source, &out.held)).map(|(tag, _)| *tag).collect();
        for tag in &lost {
            let unknown = self.out.get(tag).is_some_and(|out| out.settling.is_some());
            self.flushed.unknown += u64::from(unknown);
            self.drop_out(*tag);
        }
        for source in self.sources.values_mut() {
            let confirmed = source.confirmed;
            source.waiting.retain(|_, held| held.received.max(confirmed) + ack_wait > now);
            source.delayed = source.waiting.values().filter(|held| held.due.is_some()).count();
        }
        if !lost.is_empty() {
            self.tell(Notice::Leases);
        }
    }

    /// What lies here and nobody comes for goes to other instances.
    fn give_back_unclaimed(&mut self, writer: &Writer) {
        if self.mode != Mode::Shared || self.woken.is_none_or(|woken| woken.elapsed() < UNCLAIMED) {
            return;
        }
        self.demand = false;
        let ids: Vec<_> = self.sources.keys().copied().collect();
        ids.into_iter().for_each(|id| self.give_back_waiting(id, writer));
    }

    /// Gives back what waits, in order.
    pub(crate) fn give_back_waiting(&mut self, id: SourceId, writer: &Writer) {
        let Some(source) = self.sources.get_mut(&id) else { return };
        source.delayed = 0;
        for (_, held) in std::mem::take(&mut source.waiting) {
            let left = held.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
            writer.push(Op::nak(id, held.reply(), left));
        }
    }

    /// Gives back all that is not settled, in order; what is out has lost its lease.
    pub(crate) fn give_back_all(&mut self, id: SourceId, writer: &Writer) {
        let lost: Vec<u64> =
            self.sources.get(&id).into_iter().flat_map(|source| source.open.values().copied()).collect();
        for tag in lost {
            self.unheard.remove(&tag);
            let unsettled = self.out.get(&tag).is_some_and(|out| out.settling.is_none());
            if let Some(out) = self.out.remove(&tag).filter(|_| unsettled)
                && let Some(source) = self.sources.get_mut(&id)
            {
                source.wait(out.held);
            }
        }
        if let Some(source) = self.sources.get_mut(&id) {
            source.open.clear();
        }
        if self.mode != Mode::Replay {
            self.give_back_waiting(id, writer);
        }
    }

    /// Forgets a source: what it has comes again, here or elsewhere.
    pub(crate) fn lose(&mut self, id: SourceId) {
        let Some(source) = self.sources.remove(&id) else { return };
        for tag in source.open.values() {
            self.unheard.remove(tag);
            let settling = self.out.remove(tag).is_some_and(|out| out.settling.is_some());
            self.flushed.unknown += u64::from(settling);
        }
        let is_out = source.is_out();
        self.former.insert(source.number, (source.high, source.acked));
        if is_out {
            self.tell(Notice::Leases);
        }
    }

    /// What a source has is lost, and its positions begin anew.
    pub(crate) fn reset(&mut self, id: SourceId) {
        let Some(source) = self.sources.get(&id) else { return };
        let fresh = Source::new(source.kind, source.slot, source.number, &source.stream);
        self.lose(id);
        self.former.remove(&fresh.number);
        self.sources.insert(id, fresh);
    }

    pub(crate) fn die(&mut self) {
        self.dead = true;
        self.flushed.unknown += self.settling() as u64;
        self.out.clear();
        self.unheard.clear();
        self.sources.clear();
        self.wake();
    }
}

/// How long a message is still to wait, by the time that it was stored.
fn not_due(raw: &Raw, stored: SystemTime) -> Option<Duration> {
    let delay = raw.headers.as_ref()?.get(wire::DELAY)?.as_str().parse().ok()?;
    let due = stored.checked_add(Duration::from_millis(delay))?;
    due.duration_since(SystemTime::now()).ok().filter(|left| !left.is_zero())
}

fn deliver(source: &Source, held: &Held, mode: Mode, names: &crate::names::Names, acker: Acker) -> Delivery {
    let origin =
        wire::Origin { topic: names.topic_of(&held.raw.subject), stream: &source.stream, position: held.position };
    Delivery {
        message: wire::decode(held.raw.headers.as_ref(), &held.raw.payload, &origin).into(),
        position: held.position,
        slot: source.number,
        redelivered: held.redelivered,
        replayed: mode == Mode::Replay,
        // The server counts what it has sent, which is not what was handed out here; and neither tells losses.
        hand_outs: None,
        lost: None,
        acker,
    }
}

#[cfg(test)]
mod tests;
