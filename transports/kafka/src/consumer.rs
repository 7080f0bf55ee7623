//! The thread of one instance: it polls, joins and leaves the group, commits, pauses. Handlers never run on it.

use crate::client::{KafkaContext, acquaint};
use crate::error::{client as failed, code as refused};
use crate::marks::{self, Marks};
use crate::part::{Item, Kind, Part};
use crate::state::{Mode, Told};
use crate::subscription::Instance;
use crate::topology::{TERMS, rung};
use crate::wire::{Decoder, Origin};
use foldhash::fast::RandomState;
use parking_lot::{Condvar, Mutex};
use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::types::{RDKafkaErrorCode as Code, RDKafkaRespErr};
use rdkafka::{Offset, TopicPartitionList};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidings_core::transport::{Notice, Start};
use tidings_core::{ErrorKind, Result, Topic};

/// How often the broker is told at least, while there is something to tell.
const COMMIT_INTERVAL: Duration = Duration::from_millis(50);
/// How often it looks where it waits for something that nobody tells.
const A_MOMENT: Duration = Duration::from_millis(10);
/// How long something that failed waits for its next try.
const AGAIN: Duration = Duration::from_millis(100);
/// How long what is read ahead may be enough before reading is paused, which throws away what the client holds.
const PAUSE_AFTER: Duration = Duration::from_millis(200);
/// After how long without a partition an instance says that it stands by.
const STAND_BY_AFTER: Duration = Duration::from_secs(1);
/// Which part of what is read ahead is taken in one turn: it is handled, and commits are made, while the next is taken.
const TURNS: usize = 8;

/// A partition: its topic and number.
type Place = (Arc<str>, i32);

/// Wakes the thread.
#[derive(Default)]
pub(crate) struct Signal {
    is_raised: AtomicBool,
    lock: Mutex<()>,
    condvar: Condvar,
}

impl Signal {
    pub(crate) fn raise(&self) {
        if !self.is_raised.swap(true, SeqCst) {
            let _guard = self.lock.lock();
            self.condvar.notify_one();
        }
    }

    fn wait(&self, at_most: Duration) {
        let mut guard = self.lock.lock();
        if !self.is_raised.load(SeqCst) && !at_most.is_zero() {
            self.condvar.wait_for(&mut guard, at_most);
        }
        self.is_raised.store(false, SeqCst);
    }
}

enum Happened {
    Assigned(Vec<Place>),
    Revoked(Vec<Place>),
    Committed(KafkaResult<()>),
}

/// What the member of a group tells.
pub(crate) struct GroupContext {
    base: KafkaContext,
    happened: Mutex<VecDeque<Happened>>,
    /// It is leaving: everything is let go at once.
    is_leaving: AtomicBool,
}

impl GroupContext {
    pub(crate) fn new(base: KafkaContext) -> Self {
        Self { base, happened: Mutex::default(), is_leaving: AtomicBool::new(false) }
    }

    fn push(&self, happened: Happened) {
        self.happened.lock().push_back(happened);
    }
}

impl ClientContext for GroupContext {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn log(&self, level: RDKafkaLogLevel, facility: &str, said: &str) {
        self.base.log(level, facility, said);
    }

    fn error(&self, failed: KafkaError, reason: &str) {
        self.base.error(failed, reason);
    }

    fn generate_oauth_token(&self, config: Option<&str>) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        self.base.generate_oauth_token(config)
    }
}

impl ConsumerContext for GroupContext {
    /// Only notes it: partitions are taken and let go when the thread has done what must be done before.
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let assigned = what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if !self.is_leaving.load(SeqCst) {
            let places = places(list);
            return self.push(if assigned { Happened::Assigned(places) } else { Happened::Revoked(places) });
        }
        let answered = if assigned { consumer.incremental_assign(list) } else { consumer.incremental_unassign(list) };
        if let Err(error) = answered {
            tracing::debug!(%error, "while leaving a group");
        }
    }
}

fn places(list: &TopicPartitionList) -> Vec<Place> {
    list.elements().iter().map(|elem| (elem.topic().into(), elem.partition())).collect()
}

fn list_of<'a>(places: impl IntoIterator<Item = &'a Place>) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (name, partition) in places {
        list.add_partition(name, *partition);
    }
    list
}

/// An offset as the client takes it.
fn at(offset: u64) -> Offset {
    Offset::Offset(i64::try_from(offset).unwrap_or(i64::MAX))
}

/// What the group has asked for, and is waiting for.
enum Change {
    Assign { places: Vec<Place>, not_before: Instant },
    Revoke { places: Vec<Place>, epochs: Vec<u32>, deadline: Instant },
}

/// What is read of a partition, and where it goes.
struct Source {
    epoch: u32,
    topic: Option<Topic>,
}

/// By topic and partition; looked up for each record.
type Sources = HashMap<Arc<str>, HashMap<i32, Source, RandomState>, RandomState>;

/// A record that was fetched.
struct Fetched {
    epoch: u32,
    item: Item,
}

/// Commits, on a thread of its own: the client tells what became of a commit only to who waits for it.
struct Committer {
    lists: mpsc::Sender<TopicPartitionList>,
    thread: JoinHandle<()>,
}

impl Committer {
    fn start(consumer: &Arc<BaseConsumer<GroupContext>>, signal: &Arc<Signal>) -> std::io::Result<Self> {
        let (lists, queue) = mpsc::channel::<TopicPartitionList>();
        let (consumer, signal) = (Arc::clone(consumer), Arc::clone(signal));
        let commit = move || {
            for list in queue {
                let result = consumer.commit(&list, CommitMode::Sync);
                consumer.context().push(Happened::Committed(result));
                signal.raise();
            }
        };
        let thread = std::thread::Builder::new().name("tidings-kafka-commit".into()).spawn(commit)?;
        Ok(Self { lists, thread })
    }

    /// Waits for the last commit.
    fn end(self) {
        drop(self.lists);
        if self.thread.join().is_err() {
            tracing::error!("the thread that commits has panicked");
        }
    }
}

pub(crate) struct Driver {
    consumer: Arc<BaseConsumer<GroupContext>>,
    committer: Option<Committer>,
    instance: Arc<Instance>,
    sources: Sources,
    decoder: Decoder,
    changes: VecDeque<Change>,
    /// What the broker is being told.
    telling: Option<Vec<Told>>,
    last_commit: Instant,
    not_before: Instant,
    last_fetch: Instant,
    /// Since when enough is read ahead.
    full_since: Option<Instant>,
    is_paused: bool,
    next_look: Instant,
    /// When to find out which partitions the client has given up.
    gaps_at: Option<Instant>,
    /// Until it is first told what it reads.
    unassigned_since: Option<Instant>,
    /// How many partitions of each number were read to their end.
    ends: HashMap<i32, usize>,
}

impl Driver {
    /// Starts the thread of a member of a group.
    pub(crate) fn start(consumer: BaseConsumer<GroupContext>, instance: &Arc<Instance>) -> Result<()> {
        Self::start_with(consumer, instance, Vec::new())
    }

    /// Starts the thread of an instance that reads these partitions.
    pub(crate) fn start_with(
        mut consumer: BaseConsumer<GroupContext>,
        instance: &Arc<Instance>,
        parts: Vec<Part>,
    ) -> Result<()> {
        let signal = Arc::clone(&instance.signal);
        consumer.set_nonempty_callback(move || signal.raise());
        let now = Instant::now();
        let no_thread = |e| crate::error::error(ErrorKind::Internal, "no thread can be started").with_source(e);
        let consumer = Arc::new(consumer);
        let committer = match instance.mode {
            Mode::Replay => None,
            _ => Some(Committer::start(&consumer, &instance.signal).map_err(no_thread)?),
        };
        let mut driver = Self {
            consumer,
            committer,
            instance: Arc::clone(instance),
            sources: Sources::default(),
            decoder: Decoder::default(),
            changes: VecDeque::new(),
            telling: None,
            last_commit: now,
            not_before: now,
            last_fetch: now,
            full_since: None,
            is_paused: false,
            next_look: now,
            gaps_at: None,
            unassigned_since: Some(now),
            ends: HashMap::new(),
        };
        if !parts.is_empty() {
            driver.take_on(parts)?;
        }
        let spawned = std::thread::Builder::new().name("tidings-kafka".into()).spawn(move || driver.run());
        spawned.map(drop).map_err(no_thread)
    }

    fn is_replay(&self) -> bool {
        self.instance.mode == Mode::Replay
    }

    fn run(mut self) {
        let mut more = false;
        loop {
            self.instance.signal.wait(if more { Duration::ZERO } else { self.patience() });
            more = self.fetch();
            if self.gaps_at.is_some_and(|at| at <= Instant::now()) {
                self.gaps_at = (!self.find_gaps()).then(|| Instant::now() + AGAIN);
            }
            self.heed();
            self.change();
            self.commit();
            self.open();
            self.balance();
            if self.may_end() {
                break;
            }
        }
        self.leave();
    }

    fn patience(&self) -> Duration {
        let is_due = self.gaps_at.is_some() || self.full_since.is_some();
        if is_due || !self.changes.is_empty() || self.instance.opening.lock().is_some() {
            return A_MOMENT;
        }
        let (dirty, urgent) = self.instance.state.lock().is_dirty();
        match self.telling {
            None if urgent => self.not_before.saturating_duration_since(Instant::now()),
            None if dirty => COMMIT_INTERVAL,
            _ => Duration::from_millis(100),
        }
    }

    // ---- Reading ----

    /// Takes what the client has; whether there may be more.
    fn fetch(&mut self) -> bool {
        let room = self.room();
        let happened = || self.consumer.context().happened.lock().len();
        let mut before = happened();
        let (mut fetched, mut empty, mut troubles) = (Vec::new(), false, Vec::new());
        while fetched.len() < room && !empty {
            match self.consumer.poll(Duration::ZERO) {
                Some(Ok(record)) => fetched.extend(take(&self.sources, &mut self.decoder, &record)),
                Some(Err(error)) => troubles.push(error),
                // What was polled may have been something that happened.
                None => {
                    let now = happened();
                    empty = now == before;
                    before = now;
                }
            }
        }
        let any = !fetched.is_empty();
        if any {
            self.deliver(fetched);
            self.last_fetch = Instant::now();
        }
        troubles.into_iter().for_each(|error| self.trouble(error));
        if room == 0 {
            self.full_since.get_or_insert_with(Instant::now);
        } else if !self.is_paused {
            self.full_since = None;
        }
        !empty && room > 0
    }

    /// How many records may be taken: many at a time, or none until enough was handed out or a moment has gone.
    fn room(&self) -> usize {
        let limit = self.instance.read_ahead();
        let mut state = self.instance.state.lock();
        let ready = state.ready();
        if self.is_paused {
            state.call_at = Some(limit / 4);
            return limit / TURNS;
        }
        let was_full = self.full_since.is_some() && ready > limit / 2;
        let is_full = ready >= limit || (was_full && self.last_fetch.elapsed() < A_MOMENT);
        state.call_at = is_full.then_some(limit / 2);
        if is_full { 0 } else { (limit - ready).min(limit / TURNS) }
    }

    fn deliver(&self, fetched: Vec<Fetched>) {
        let mut state = self.instance.state.lock();
        for Fetched { epoch, mut item } in fetched {
            let Some(part) = state.parts.get_mut(&epoch) else { continue };
            let read = part.end.is_some_and(|end| item.offset >= end);
            if part.fetched(item.offset) && !read {
                item.marked = item.offset < part.before.handed;
                part.push(item);
            }
        }
        state.wake();
    }

    fn trouble(&mut self, error: KafkaError) {
        let code = error.rdkafka_error_code();
        match error {
            KafkaError::PartitionEOF(partition) => self.read_to_the_end(partition),
            KafkaError::MessageConsumptionFatal(code) => {
                self.instance.state.lock().fail(refused("the group has refused this instance for good", code));
            }
            _ if code == Some(Code::AutoOffsetReset) => self.gaps_at = Some(Instant::now()),
            _ if matches!(code, Some(Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed)) => {
                tracing::warn!(%error, subscription = %self.instance.spec.name, "the cluster refuses to be read");
                if let Some(opening) = self.instance.opening.lock().take() {
                    opening.answer(Err(failed("the cluster refuses to be read", error)));
                }
            }
            _ => tracing::debug!(%error, subscription = %self.instance.spec.name, "while reading"),
        }
    }

    /// Notes where a replay ends although no record stands there.
    fn read_to_the_end(&mut self, partition: i32) {
        let ends = self.ends.entry(partition).or_default();
        *ends += 1;
        let mut state = self.instance.state.lock();
        if *ends < state.parts.values().filter(|part| part.partition == partition).count() {
            return;
        }
        for part in state.parts.values_mut().filter(|part| part.partition == partition) {
            part.read_to = part.read_to.max(part.end.unwrap_or(0));
        }
        state.wake();
    }

    /// Tells what retention took before it was read, and goes on behind it; whether every partition is read again. The client has given one
    /// up and does not say which, nor does it read that again by itself: so all are read on, also those that have lost nothing.
    fn find_gaps(&mut self) -> bool {
        let mut all = true;
        // Each tells its end again.
        self.ends.clear();
        let parts: Vec<(u32, Place, u64)> = {
            let state = self.instance.state.lock();
            state.parts.iter().map(|(e, p)| (*e, (Arc::clone(&p.name), p.partition), p.read_to)).collect()
        };
        for (epoch, (name, partition), read_to) in parts {
            let Ok((low, high)) = self.instance.catalog.ends(&name, partition) else {
                all = false;
                continue;
            };
            let place = (name, partition);
            if read_to > high {
                self.begin_anew(&place, epoch, (low, high));
                continue;
            }
            if let Err(error) = self.go_on(&place, read_to.max(low)) {
                tracing::warn!(%error, "a partition cannot be read on");
                all = false;
                continue;
            }
            let mut state = self.instance.state.lock();
            let Some(part) = state.parts.get_mut(&epoch).filter(|_| read_to < low) else { continue };
            part.skip_to(low);
            let topic = part.topic.clone();
            state.tell(Notice::Gap { topic, missed_at_most: low - read_to, from: read_to, to: low });
        }
        all
    }

    /// Reads a partition from its beginning: its log ends before where it was read to, so it was made anew, or has lost its end.
    /// What is there may have been handed out.
    fn begin_anew(&mut self, place: &Place, epoch: u32, (low, high): (u64, u64)) {
        let part = Part::new(&place.0, place.1, self.kind(place), self.instance.mode == Mode::Keyed);
        self.instance.state.lock().remove(&[epoch]);
        let unassigned =
            self.consumer.incremental_unassign(&list_of([place])).map_err(|e| failed("it cannot be let go", e));
        let taken = unassigned.and_then(|()| self.take_on(vec![part.starting_at(low, Marks::handed_out(high))]));
        tracing::warn!(topic = %place.0, partition = place.1, ?taken, "a log ends before what was read of it: it is read anew");
        self.instance.state.lock().tell_role();
    }

    /// Reads a partition from another offset on. The client seeks none that it has given up.
    fn go_on(&self, place: &Place, offset: u64) -> KafkaResult<()> {
        let mut list = list_of([place]);
        // After a try that failed it may be unassigned already.
        let _ = self.consumer.incremental_unassign(&list);
        list.set_partition_offset(&place.0, place.1, at(offset))?;
        self.consumer.incremental_assign(&list)
    }

    // ---- The group ----

    fn heed(&mut self) {
        loop {
            let next = self.consumer.context().happened.lock().pop_front();
            match next {
                None => return,
                Some(Happened::Committed(result)) => self.committed(&result),
                Some(Happened::Assigned(mut places)) => {
                    self.extend(&mut places);
                    self.changes.push_back(Change::Assign { places, not_before: Instant::now() });
                }
                Some(Happened::Revoked(places)) => self.revoked(places),
            }
        }
    }

    /// Who reads the anchor reads what is sent to the subscription too.
    fn extend(&self, places: &mut Vec<Place>) {
        let instance = &self.instance;
        if !places.iter().any(|(name, partition)| *name == instance.anchor && *partition == 0) {
            return;
        }
        if instance.anchor != instance.address {
            places.push((Arc::clone(&instance.address), 0));
        }
        places.extend((0..TERMS).map(|rung| (Arc::clone(&instance.later), rung)));
    }

    fn revoked(&mut self, mut places: Vec<Place>) {
        self.extend(&mut places);
        let mut state = self.instance.state.lock();
        let epochs: Vec<u32> = places.iter().filter_map(|(name, partition)| state.find(name, *partition)).collect();
        if !self.consumer.assignment_lost() {
            state.revoke(&epochs);
        }
        let deadline = Instant::now() + self.instance.catalog.config.revoke_timeout;
        self.changes.push_back(Change::Revoke { places, epochs, deadline });
    }

    /// Does the next thing that the group waits for, if it can be done now.
    fn change(&mut self) {
        // Not every group tells who gets nothing.
        if self.unassigned_since.is_some_and(|since| since.elapsed() >= STAND_BY_AFTER) {
            self.unassigned_since = None;
            self.instance.state.lock().tell_role();
        }
        while let Some(change) = self.changes.pop_front() {
            let open = match change {
                Change::Assign { places, not_before } => self.assign(places, not_before),
                Change::Revoke { places, epochs, deadline } => self.let_go(places, epochs, deadline),
            };
            if let Some(open) = open {
                self.changes.push_front(open);
                return;
            }
        }
    }

    fn assign(&mut self, places: Vec<Place>, not_before: Instant) -> Option<Change> {
        if not_before > Instant::now() {
            return Some(Change::Assign { places, not_before });
        }
        match self.begin(&places) {
            Ok(()) => {
                self.unassigned_since = None;
                self.instance.state.lock().tell_role();
                None
            }
            Err(error) => {
                tracing::debug!(%error, subscription = %self.instance.spec.name, "partitions cannot be read yet");
                Some(Change::Assign { places, not_before: Instant::now() + AGAIN })
            }
        }
    }

    /// Begins to read partitions where the owner before has ended.
    fn begin(&mut self, places: &[Place]) -> Result<()> {
        let why = "committed positions cannot be looked up";
        let timeout = self.instance.catalog.config.request_timeout;
        let committed = self.consumer.committed_offsets(list_of(places), timeout).map_err(|e| failed(why, e))?;
        let mut parts = Vec::with_capacity(places.len());
        for elem in committed.elements() {
            elem.error().map_err(|e| failed(why, e))?;
            let place = (Arc::from(elem.topic()), elem.partition());
            let (start, before) = match elem.offset() {
                Offset::Offset(offset) => self.continued(&place, u64::try_from(offset).unwrap_or(0), &elem)?,
                _ => (self.start_of(&place)?, Marks::default()),
            };
            let kind = self.kind(&place);
            let keyed = self.instance.mode == Mode::Keyed;
            parts.push(Part::new(&place.0, place.1, kind, keyed).starting_at(start, before));
        }
        self.take_on(parts)
    }

    fn kind(&self, (name, _): &Place) -> Kind {
        match name {
            name if *name == self.instance.address => Kind::Address,
            name if *name == self.instance.later => Kind::Later,
            _ => Kind::Topic,
        }
    }

    /// Where the owner before has ended. What is not in the log yet it cannot have handed out.
    fn continued(&self, place: &Place, offset: u64, elem: &TopicPartitionListElem<'_>) -> Result<(u64, Marks)> {
        // The client panics at metadata that is not UTF-8, which is nobody's that can be read.
        let metadata = catch_unwind(AssertUnwindSafe(|| elem.metadata().to_owned())).unwrap_or_else(|_| "?".into());
        let mut before = marks::decode(offset, &metadata);
        if before.handed > offset {
            before.handed = before.handed.min(self.instance.catalog.ends(&place.0, place.1)?.1);
        }
        Ok((offset, before))
    }

    /// Where a partition begins of which nothing was committed: at its beginning, unless the subscription is being created.
    fn start_of(&self, place: &Place) -> Result<u64> {
        let instance = &self.instance;
        if self.kind(place) != Kind::Topic {
            return Ok(0);
        }
        let (low, high) = instance.catalog.ends(&place.0, place.1)?;
        if !instance.is_created()? {
            return Ok(if instance.spec.start == Start::New { high } else { low });
        }
        if low > 0 {
            let topic = instance.catalog.names.topic_of(&place.0);
            instance.state.lock().tell(Notice::Gap { topic, missed_at_most: low, from: 0, to: low });
        }
        Ok(low)
    }

    fn take_on(&mut self, parts: Vec<Part>) -> Result<()> {
        let why = "partitions cannot be read";
        let mut list = TopicPartitionList::with_capacity(parts.len());
        for part in &parts {
            let added = list.add_partition_offset(&part.name, part.partition, at(part.read_to));
            added.map_err(|e| failed(why, e))?;
        }
        let taken =
            if self.is_replay() { self.consumer.assign(&list) } else { self.consumer.incremental_assign(&list) };
        taken.map_err(|e| failed(why, e))?;
        // What was paused when it was lost is still paused for the client when it comes back.
        if let Err(error) = self.consumer.resume(&list) {
            // Else it could not be taken on by the next try.
            let _ = self.consumer.incremental_unassign(&list);
            return Err(failed(why, error));
        }
        let is_new = |part: &&Part| self.is_replay() || part.kind != Kind::Topic;
        acquaint(&*self.consumer, parts.iter().filter(is_new).map(|part| &*part.name).collect::<BTreeSet<_>>());
        let mut state = self.instance.state.lock();
        for part in parts {
            let place = (Arc::clone(&part.name), part.partition);
            let epoch = state.add(part, &self.instance.catalog.names);
            let topic = state.parts.get(&epoch).and_then(|part| part.topic.clone());
            self.sources.entry(place.0).or_default().insert(place.1, Source { epoch, topic });
        }
        Ok(())
    }

    /// Lets partitions go when nothing of them is out, or it takes too long, and the broker was told; at once if they are lost.
    fn let_go(&mut self, places: Vec<Place>, epochs: Vec<u32>, deadline: Instant) -> Option<Change> {
        let now = Instant::now();
        if !self.consumer.assignment_lost() && now < deadline + self.instance.catalog.config.request_timeout {
            let state = self.instance.state.lock();
            let is_out = state.are_out(&epochs) && now < deadline;
            let is_dirty = epochs.iter().any(|epoch| state.parts.get(epoch).is_some_and(|part| part.dirty));
            if is_out || is_dirty || self.telling.is_some() {
                drop(state);
                return Some(Change::Revoke { places, epochs, deadline });
            }
        }
        for (name, partition) in &places {
            self.sources.get_mut(name).map(|partitions| partitions.remove(partition));
        }
        self.instance.state.lock().remove(&epochs);
        if let Err(error) = self.consumer.incremental_unassign(&list_of(&places)) {
            tracing::debug!(%error, "partitions cannot be let go");
        }
        None
    }

    // ---- Telling the broker ----

    fn commit(&mut self) {
        let now = Instant::now();
        if self.is_replay() || self.telling.is_some() || now < self.not_before {
            return;
        }
        let closing = self.instance.is_closing();
        let told = {
            let mut state = self.instance.state.lock();
            let (dirty, urgent) = state.is_dirty();
            if !dirty || !(urgent || closing || now >= self.last_commit + COMMIT_INTERVAL) {
                return;
            }
            state.commits(closing, now < self.last_commit + COMMIT_INTERVAL)
        };
        let mut list = TopicPartitionList::with_capacity(told.len());
        for told in &told {
            let mut elem = list.add_partition(&told.name, told.partition);
            // It fits, because it came from there.
            let _ = elem.set_offset(at(told.offset));
            elem.set_metadata(&told.metadata);
        }
        self.last_commit = now;
        self.telling = Some(told);
        if let Some(committer) = &self.committer {
            // It ends after this one.
            let _ = committer.lists.send(list);
        }
    }

    fn committed(&mut self, result: &KafkaResult<()>) {
        let Some(told) = self.telling.take() else { return };
        let mut state = self.instance.state.lock();
        told.iter().for_each(|told| state.told(told, result.is_ok()));
        if let Err(error) = result {
            tracing::debug!(%error, subscription = %self.instance.spec.name, "a commit is repeated");
            self.not_before = Instant::now() + AGAIN;
        }
    }

    // ---- Opening ----

    /// Answers who opened a new subscription once every partition has a position.
    fn open(&mut self) {
        let now = Instant::now();
        let expected = match &*self.instance.opening.lock() {
            Some(opening) if now >= self.next_look => opening.expected.clone(),
            _ => return,
        };
        self.next_look = now + Duration::from_millis(25);
        let mut list = TopicPartitionList::new();
        for (name, partitions) in &expected {
            for partition in 0..i32::try_from(*partitions).unwrap_or(i32::MAX) {
                list.add_partition(name, partition);
            }
        }
        let timeout = self.instance.catalog.config.request_timeout;
        let Ok(committed) = self.consumer.committed_offsets(list, timeout) else { return };
        let has_position = |elem: &TopicPartitionListElem<'_>| matches!(elem.offset(), Offset::Offset(_));
        if committed.elements().iter().all(has_position)
            && let Some(opening) = self.instance.opening.lock().take()
        {
            opening.answer(Ok(()));
        }
    }

    // ---- Back-pressure ----

    fn balance(&mut self) {
        let limit = self.instance.read_ahead();
        let ready = self.instance.state.lock().ready();
        let is_long = self.full_since.is_some_and(|since| since.elapsed() >= PAUSE_AFTER);
        if !self.is_paused && is_long {
            self.is_paused = true;
        } else if self.is_paused && ready <= limit / 4 {
            (self.is_paused, self.full_since) = (false, None);
        }
        let (mut pause, mut resume) = (Vec::new(), Vec::new());
        for part in self.instance.state.lock().parts.values_mut() {
            let place = || (Arc::clone(&part.name), part.partition);
            let wanted = match part.kind {
                Kind::Later => part.has_enough(limit),
                _ => self.is_paused && (part.is_paused || part.ready() > 0),
            };
            match (part.is_paused, wanted) {
                (false, true) => pause.push(place()),
                (true, false) => resume.push(place()),
                _ => {}
            }
            part.is_paused = wanted;
        }
        if !pause.is_empty()
            && let Err(error) = self.consumer.pause(&list_of(&pause))
        {
            tracing::debug!(%error, "partitions cannot be paused");
        }
        if !resume.is_empty()
            && let Err(error) = self.consumer.resume(&list_of(&resume))
        {
            tracing::debug!(%error, "partitions cannot be resumed");
        }
    }

    // ---- Ending ----

    /// Whether it is to end, and has told the broker what there was to tell, or has no more time for that.
    fn may_end(&mut self) -> bool {
        let Some(deadline) = self.instance.ends_at() else { return false };
        let mut state = self.instance.state.lock();
        if Instant::now() >= deadline || self.is_replay() {
            return true;
        }
        if !self.instance.is_exact.swap(true, SeqCst) {
            state.parts.values_mut().for_each(|part| part.dirty = true);
            return false;
        }
        self.telling.is_none() && !state.is_dirty().0
    }

    fn leave(mut self) {
        self.consumer.context().is_leaving.store(true, SeqCst);
        for change in std::mem::take(&mut self.changes) {
            let answered = match &change {
                Change::Assign { places, .. } => self.consumer.incremental_assign(&list_of(places)),
                Change::Revoke { places, .. } => self.consumer.incremental_unassign(&list_of(places)),
            };
            if let Err(error) = answered {
                tracing::debug!(%error, "while leaving a group");
            }
        }
        let instance = Arc::clone(&self.instance);
        instance.state.lock().end();
        if let Some(committer) = self.committer.take() {
            committer.end();
        }
        // It leaves the group, which takes as long as the cluster does.
        drop(self);
        instance.ended();
    }
}

/// A record as it is kept.
fn take(sources: &Sources, decoder: &mut Decoder, record: &BorrowedMessage<'_>) -> Option<Fetched> {
    let (name, partition, offset) = (record.topic(), record.partition(), record.offset());
    let source = sources.get(name)?.get(&partition)?;
    let origin = Origin { topic: source.topic.as_ref(), name, partition, offset };
    let decoded = decoder.decode(record, &origin);
    let offset = u64::try_from(offset).ok()?;
    let (due, further) = decoded.due.map_or((None, None), |due| due_at(due, record));
    let item = Item { message: Arc::new(decoded.message), offset, hand_outs: 0, marked: false, due, further };
    Some(Fetched { epoch: source.epoch, item })
}

/// When an event is due that is so at `due`, as far as its partition can tell; and whether it must be sent on then.
fn due_at(due: u64, record: &BorrowedMessage<'_>) -> (Option<tokio::time::Instant>, Option<u64>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let stored = record.timestamp().to_millis().and_then(|millis| u64::try_from(millis).ok()).unwrap_or(now);
    let rung = rung(record.partition()).map_or(0, |rung| u64::try_from(rung.as_millis()).unwrap_or(u64::MAX));
    let last = record.partition() == TERMS - 1;
    let further = (last && due > stored.saturating_add(rung).saturating_add(1_000)).then_some(due);
    let due = if further.is_some() { stored.saturating_add(rung) } else { due };
    // However the clocks of others go, nobody waits longer than the partition is for.
    let wait = Duration::from_millis(due.saturating_sub(now).min(rung.saturating_add(1_000)));
    ((!wait.is_zero()).then(|| tokio::time::Instant::now() + wait), further)
}
