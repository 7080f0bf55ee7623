//! The thread's side of an instance: who is active, what is handed out, what is saved.

use crate::cursor::{Cursor, Look, Wanted};
use crate::settle::{Asked, Desk, End, Ready, is_given_back};
use crate::store::{Damaged, Store, open_lock, replace, sync, try_lock};
use crate::wire::Stored;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use tidings_core::transport::{Destination, Flushed, Notice, Role};
use tidings_core::{BusEvent, DeadLetterReason, Events, Message, Result, SubscriptionName, Topic, header, to_rfc3339};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// One instance of a subscription, or a replay.
pub(crate) struct Reader {
    pub(crate) desk: Arc<Desk>,
    max_in_flight: usize,
    wanted: Wanted,
    /// `None` for a replay: what it reads is nobody else's, and forgotten with it.
    place: Option<Place>,
    /// `None` on stand-by.
    cursor: Option<Cursor>,
    told: bool,
    /// What the cursor has that the disk has not.
    dirty: bool,
    /// Handed out as soon as it is saved.
    ready: Vec<Ready>,
    bad: Vec<Damaged>,
    /// Whoever closes it waits here for the end, until the deadline.
    closing: Option<(Instant, oneshot::Sender<Flushed>)>,
    /// Nobody needs it any more.
    pub(crate) over: bool,
}

/// Where a subscription is kept.
pub(crate) struct Place {
    name: SubscriptionName,
    folder: PathBuf,
    /// Locked by the active instance. The system unlocks it when the process dies, however it dies.
    lock: File,
    /// Where it began.
    from: u64,
}

impl Place {
    pub(crate) fn open(store: &Store, name: SubscriptionName, from: u64) -> Result<Self> {
        let folder = store.subscription(&name);
        let lock = open_lock(&folder.join("active"))?;
        Ok(Self { name, folder, lock, from })
    }

    fn is_mine(&self) -> Result<bool> {
        try_lock(&self.lock, &self.folder.join("active"))
    }

    fn save(&self, cursor: &Cursor, store: &Store) -> Result<()> {
        // What was read must not be forgotten before the fact that it was read.
        store.sync_log()?;
        replace(&self.folder.join("state.new"), &self.folder.join("state.json"), &cursor.bytes())?;
        sync(&self.folder)
    }

    /// Nothing vanishes silently: a file that cannot be read becomes a dead letter that names it.
    fn bury(&self, damaged: &Damaged, store: &mut Store, events: &Events) -> Result<()> {
        let (error, reason, now) = (damaged.error().to_string(), DeadLetterReason::Undecodable, SystemTime::now());
        let file = damaged.path.file_name().unwrap_or_default().to_string_lossy();
        let id = format!("damaged-{file}").into();
        let topic = Topic::new("damaged-file")?;
        let mut message = Message::new(id, "/tidings/directory", "damaged-file", topic);
        message.payload = damaged.bytes.clone().into();
        for (name, value) in [
            (header::REASON, reason.to_string()),
            (header::ERROR, error.replace(char::is_control, " ")),
            (header::SUBSCRIPTION, self.name.to_string()),
            (header::TIME, to_rfc3339(now)),
        ] {
            message.headers.append_unchecked(name, value);
        }
        let (id, to) = (message.id.clone(), Destination::DeadLetter(self.name.clone()));
        let stored = Stored { to, received: now, message };
        store.locked(|store| store.bury(&self.name, &stored))?;
        store.sync()?;
        events.tell(BusEvent::DeadLettered { subscription: self.name.clone(), id, reason, error: error.into() });
        Ok(())
    }
}

impl Reader {
    pub(crate) fn subscription(desk: Arc<Desk>, max_in_flight: usize, wanted: Wanted, place: Place) -> Self {
        Self::new(desk, max_in_flight, wanted, (Some(place), None))
    }

    pub(crate) fn replay(desk: Arc<Desk>, max_in_flight: usize, wanted: Wanted, from: u64) -> Self {
        Self::new(desk, max_in_flight, wanted, (None, Some(Cursor::at(from.saturating_sub(1)))))
    }

    fn new(
        desk: Arc<Desk>,
        max_in_flight: usize,
        wanted: Wanted,
        (place, cursor): (Option<Place>, Option<Cursor>),
    ) -> Self {
        let (told, ready, bad) = (place.is_none(), Vec::new(), Vec::new());
        Self { desk, max_in_flight, wanted, place, cursor, told, dirty: false, ready, bad, closing: None, over: false }
    }

    pub(crate) fn close(&mut self, deadline: Instant, done: oneshot::Sender<Flushed>) {
        self.desk.stop();
        self.closing.get_or_insert((deadline, done));
    }

    /// One turn: settles what was settled, hands out what is wanted, saves both, and only then tells.
    pub(crate) fn turn(&mut self, store: &mut Store, events: &Events) -> Result<()> {
        let asked = self.desk.ask();
        let leaving = asked.dropped || self.closing.is_some();
        self.settle(&asked);
        let mut done = Ok(());
        if !asked.stopped && !leaving {
            done = self.take_over(store).and_then(|()| self.hand_out(asked.wanted, store));
        }
        if self.closing.is_some() {
            self.give_all_back();
        }
        let saved = self.save(store, events);
        if leaving {
            self.leave(saved.is_ok());
        }
        saved.and(done)
    }

    fn settle(&mut self, asked: &Asked) {
        let Some(cursor) = &mut self.cursor else { return };
        asked.untaken.iter().for_each(|position| cursor.take_back(*position));
        if asked.settled.iter().any(|(_, how)| is_given_back(how)) {
            self.ready.drain(..).for_each(|ready| cursor.take_back(ready.position));
        }
        let settled = asked.settled.iter().filter(|(position, how)| cursor.settle(*position, *how)).count();
        self.desk.count(settled as u64, (asked.settled.len() - settled) as u64);
        self.dirty |= !(asked.untaken.is_empty() && asked.settled.is_empty());
    }

    /// Becomes active if nobody else is, and goes on where the last one ended.
    fn take_over(&mut self, store: &mut Store) -> Result<()> {
        let (Some(place), None) = (&self.place, &self.cursor) else { return Ok(()) };
        if place.is_mine()? {
            self.bad.clear();
            let mut look = Look { wanted: &self.wanted, store, bad: &mut self.bad };
            self.cursor = Some(Cursor::load(&place.folder.join("state.json"), place.from, &mut look)?);
            (self.dirty, self.told) = (true, true);
            self.desk.give([], [Notice::Role(Role::Active { slots: vec![0] })]);
        } else if !self.told {
            self.told = true;
            self.desk.give([], [Notice::Role(Role::StandBy)]);
        }
        Ok(())
    }

    fn hand_out(&mut self, wanted: usize, store: &mut Store) -> Result<()> {
        let Some(cursor) = &mut self.cursor else { return Ok(()) };
        let room = self.max_in_flight.saturating_sub(cursor.out()).min(wanted.saturating_sub(self.ready.len()));
        if room == 0 {
            return Ok(());
        }
        let mut look = Look { wanted: &self.wanted, store, bad: &mut self.bad };
        let handed_out = cursor.hand_out(room, &mut look, &mut self.ready);
        self.dirty |= !(self.ready.is_empty() && self.bad.is_empty());
        handed_out
    }

    fn give_all_back(&mut self) {
        let Some(cursor) = &mut self.cursor else { return };
        self.ready.drain(..).for_each(|ready| cursor.take_back(ready.position));
        cursor.release_all();
        self.dirty = true;
    }

    /// Writes down what has changed; what was waiting for that becomes visible.
    fn save(&mut self, store: &mut Store, events: &Events) -> Result<()> {
        let Some(cursor) = &self.cursor else { return Ok(()) };
        if let (Some(place), true) = (&self.place, self.dirty) {
            while let Some(damaged) = self.bad.last() {
                place.bury(damaged, store, events)?;
                self.bad.pop();
            }
            place.save(cursor, store)?;
        }
        self.dirty = false;
        self.desk.give(self.ready.drain(..), []);
        if let Some(damaged) = self.bad.pop() {
            self.desk.end(End::Failed(damaged.error()));
        } else if cursor.is_over(&self.wanted) {
            self.desk.end(End::Over);
        }
        Ok(())
    }

    /// Ends, and says how that went to whoever has closed it.
    fn leave(&mut self, saved: bool) {
        let late = self.closing.as_ref().is_none_or(|(deadline, _)| *deadline <= Instant::now());
        if !saved && !late {
            return;
        }
        self.over = true;
        self.desk.end(End::Closed);
        if let Some((_, done)) = self.closing.take() {
            // Nobody waits if the closing was given up.
            let _ = done.send(self.desk.flushed());
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.desk.end(End::Closed);
    }
}
