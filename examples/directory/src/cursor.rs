//! A reading position: what is read and not settled, and in which order it is handed out.

use crate::error::damaged;
use crate::settle::Ready;
use crate::store::{Damaged, Read, Store, after, nanos, read_bytes};
use crate::wire::Stored;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{ABANDONED_BACKOFF, Destination, Settlement};
use tidings_core::{Key, Message, Result, SubscriptionName, Topic, TopicPattern};

/// How many messages one look at the log passes that are for others, so that it keeps nobody waiting.
const LOOK: usize = 1000;

/// What belongs to a cursor.
pub(crate) struct Wanted {
    pub(crate) topics: Vec<TopicPattern>,
    /// Whose address; a replay has none.
    pub(crate) address: Option<SubscriptionName>,
    /// Whether a released event holds those of its key that come after it.
    pub(crate) ordered: bool,
    /// What arrived before is passed over.
    pub(crate) since: Option<SystemTime>,
    /// The last position that is read, if there is one.
    pub(crate) until: Option<u64>,
}

/// How far a subscription has read, and what of that is not settled. As a file it is the whole state of a subscription.
///
/// A broker that takes cumulative acks only is told the settled prefix
/// ([`PrefixTracker`](tidings_core::transport::PrefixTracker)); who keeps the state himself keeps what is *not* settled,
/// which stays small.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cursor {
    read_to: u64,
    open: BTreeMap<u64, Event>,
}

/// An event that is read and not settled.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Event {
    hand_outs: u32,
    lost: u32,
    /// An instance has it.
    out: bool,
    /// Given back, and not handed out before this time, in nanoseconds since 1970.
    due: Option<u64>,
    #[serde(skip)]
    lane: Option<Lane>,
    /// Read ahead; else it is read again when it is handed out.
    #[serde(skip)]
    message: Option<Message>,
}

/// What keeps its order: events of one topic with one key.
type Lane = (Topic, Key);

/// What a cursor looks at.
pub(crate) struct Look<'a> {
    pub(crate) wanted: &'a Wanted,
    pub(crate) store: &'a mut Store,
    /// Where it puts what cannot be read, which is then settled for it.
    pub(crate) bad: &'a mut Vec<Damaged>,
}

impl Look<'_> {
    /// Reads what was there before; `None` if it cannot be read any more.
    fn again(&mut self, position: u64) -> Result<Option<Message>> {
        let (path, bytes, why) = (self.store.log_file(position), Vec::new(), "it was there and is gone");
        match self.store.read(position)? {
            Read::Stored(stored) => return Ok(Some(stored.message)),
            Read::Damaged(damaged) => self.bad.push(damaged),
            Read::Hole | Read::End => self.bad.push(Damaged { path, bytes, why }),
        }
        Ok(None)
    }
}

impl Wanted {
    fn wants(&self, stored: &Stored) -> bool {
        let mine = match &stored.to {
            Destination::Topic(topic) => self.topics.iter().any(|pattern| pattern.matches(topic)),
            Destination::Subscription(name) => self.address.as_ref() == Some(name),
            Destination::DeadLetter(_) => false,
        };
        mine && self.since.is_none_or(|since| stored.received >= since)
    }

    fn lane(&self, message: &Message) -> Option<Lane> {
        let key = message.key.as_ref().filter(|_| self.ordered)?;
        Some((message.topic.clone(), key.clone()))
    }
}

impl Cursor {
    /// At the position behind `read_to`.
    pub(crate) fn at(read_to: u64) -> Self {
        Self { read_to, ..Self::default() }
    }

    /// Reads the state that the last owner left. What it had is lost to it; what cannot be read is put into `bad`.
    pub(crate) fn load(file: &Path, from: u64, look: &mut Look<'_>) -> Result<Self> {
        let Some(bytes) = read_bytes(file)? else { return Ok(Self::at(from)) };
        let mut cursor: Self = serde_json::from_slice(&bytes).map_err(|why| damaged(file, why))?;
        let last = cursor.open.last_key_value().map_or(cursor.read_to, |(last, _)| cursor.read_to.max(*last));
        if last > look.store.end()? {
            return Err(damaged(file, "it is ahead of the log, of which files are missing"));
        }
        for (position, event) in std::mem::take(&mut cursor.open) {
            cursor.reload(position, event, look)?;
        }
        Ok(cursor)
    }

    fn reload(&mut self, position: u64, mut event: Event, look: &mut Look<'_>) -> Result<()> {
        if std::mem::take(&mut event.out) {
            event.lost = event.lost.saturating_add(1);
        }
        if let Some(message) = look.again(position)? {
            event.lane = look.wanted.lane(&message);
            self.open.insert(position, event);
        }
        Ok(())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        // Numbers, booleans and strings: there is nothing in it that JSON cannot say.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(crate) fn out(&self) -> usize {
        self.open.values().filter(|event| event.out).count()
    }

    /// Whether all that a replay reads is settled.
    pub(crate) fn is_over(&self, wanted: &Wanted) -> bool {
        self.open.is_empty() && wanted.until.is_some_and(|until| self.read_to >= until)
    }

    // ---- Settling ----

    /// Whether there was anything to settle.
    pub(crate) fn settle(&mut self, position: u64, settlement: Settlement) -> bool {
        let Some(event) = self.open.get_mut(&position).filter(|event| event.out) else { return false };
        match settlement {
            Settlement::Ack => drop(self.open.remove(&position)),
            Settlement::Release { after } => event.release(after),
            Settlement::Abandon => {
                event.lost = event.lost.saturating_add(1);
                event.release(ABANDONED_BACKOFF);
            }
        }
        true
    }

    /// What was handed out and never taken was not handed out.
    pub(crate) fn take_back(&mut self, position: u64) {
        if let Some(event) = self.open.get_mut(&position) {
            (event.out, event.hand_outs) = (false, event.hand_outs.saturating_sub(1));
        }
    }

    /// Gives all back that is out.
    pub(crate) fn release_all(&mut self) {
        self.open.values_mut().for_each(|event| event.out = false);
    }

    // ---- Handing out ----

    /// Up to `room` events, in order; those of a key wait while one before them is given back and not yet due.
    ///
    /// Older ones first: all that is open was read before what follows in the log.
    pub(crate) fn hand_out(&mut self, room: usize, look: &mut Look<'_>, ready: &mut Vec<Ready>) -> Result<()> {
        let (now, mut held) = (nanos(SystemTime::now()), HashSet::new());
        let may_go = |(position, event): (&u64, &Event)| event.may_go(now, &mut held).then_some(*position);
        let mut picked: Vec<u64> = self.open.iter().filter_map(may_go).take(room).collect();
        for _ in 0..LOOK {
            if picked.len() >= room || !self.read_on(look)? {
                break;
            }
            let event = self.open.get(&self.read_to);
            picked.extend(event.filter(|event| event.may_go(now, &mut held)).map(|_| self.read_to));
        }
        for position in picked {
            ready.extend(self.take(position, look)?);
        }
        // What waits in a lane is read again when its turn comes.
        self.open.values_mut().filter(|event| !event.out).for_each(|event| event.message = None);
        Ok(())
    }

    /// Reads the next position of the log; whether there was one.
    fn read_on(&mut self, look: &mut Look<'_>) -> Result<bool> {
        let position = self.read_to + 1;
        if look.wanted.until.is_some_and(|until| position > until) {
            return Ok(false);
        }
        match look.store.read(position)? {
            Read::End => return Ok(false),
            Read::Hole => {}
            Read::Damaged(damaged) => look.bad.push(damaged),
            Read::Stored(stored) if look.wanted.wants(&stored) => {
                let lane = look.wanted.lane(&stored.message);
                let event = Event { lane, message: Some(stored.message), ..Event::default() };
                self.open.insert(position, event);
            }
            Read::Stored(_) => {}
        }
        self.read_to = position;
        Ok(true)
    }

    /// Marks an event as handed out; `None` if it cannot be read any more.
    fn take(&mut self, position: u64, look: &mut Look<'_>) -> Result<Option<Ready>> {
        let Some(event) = self.open.get_mut(&position) else { return Ok(None) };
        let message = match event.message.take() {
            None => look.again(position)?,
            read => read,
        };
        let Some(message) = message else {
            self.open.remove(&position);
            return Ok(None);
        };
        (event.out, event.due) = (true, None);
        event.hand_outs = event.hand_outs.saturating_add(1);
        Ok(Some(Ready { position, hand_outs: event.hand_outs, lost: event.lost, message }))
    }
}

impl Event {
    fn release(&mut self, delay: Duration) {
        self.out = false;
        self.due = (!delay.is_zero()).then(|| nanos(after(delay)));
    }

    /// Whether it can be handed out now; if it has to wait, its lane is `held` from here on.
    fn may_go(&self, now: u64, held: &mut HashSet<Lane>) -> bool {
        if self.out {
            return false;
        }
        let waits = self.due.is_some_and(|due| due > now);
        match &self.lane {
            Some(lane) if waits => {
                held.insert(lane.clone());
                false
            }
            Some(lane) => !held.contains(lane),
            None => !waits,
        }
    }
}
