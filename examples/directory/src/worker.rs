//! The thread that works on the files, one for each transport, so that no async thread ever waits for a disk.

use crate::error::{closed, error, failed};
use crate::reader::Reader;
use crate::settle::Desk;
use crate::store::Store;
use crate::wire::Stored;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tidings_core::transport::{Destination, Fate, Flushed, Health, Receipt};
use tidings_core::{Backoff, BusEvent, Error, ErrorKind, Events, Result, Text};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long the thread waits before it tries again what the disk refused.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));

/// How much longer than its deadline a call waits for a disk that answers nothing at all.
pub(crate) const GRACE: Duration = Duration::from_secs(1);

/// The most messages that are written before the folder is synced and they are confirmed.
const BATCH: usize = 256;

/// The largest payload that is taken.
pub(crate) const MAX_PAYLOAD: usize = 16 * 1024 * 1024;

/// Work for the thread; what is already done is not waited for.
type Task = Box<dyn FnOnce(&mut Disk) + Send>;

/// What the thread is asked to do, in order.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<Queued>,
    changed: Condvar,
}

#[derive(Default)]
struct Queued {
    posts: Vec<Post>,
    tasks: Vec<Task>,
    poked: bool,
    /// Nothing is taken any more.
    closed: bool,
    /// The thread has ended.
    ended: bool,
    /// All handles are gone.
    left: bool,
    /// Why it does not work at the moment.
    trouble: Option<(ErrorKind, String)>,
}

/// A message on its way to the disk.
pub(crate) struct Post {
    pub(crate) stored: Stored,
    pub(crate) delayed: bool,
    pub(crate) receipt: Receipt,
}

/// A handle to the thread, which ends when the last one is gone and nothing is left to do.
pub(crate) struct Link {
    pub(crate) queue: Arc<Queue>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.queue.state.lock().left = true;
        self.queue.poke();
    }
}

impl Queue {
    /// Makes the thread look at what it was told elsewhere.
    pub(crate) fn poke(&self) {
        self.state.lock().poked = true;
        self.changed.notify_one();
    }

    /// Hands messages over, in order; refuses them if it is closed.
    pub(crate) fn post(&self, posts: Vec<Post>) {
        let mut state = self.state.lock();
        if !state.closed {
            state.posts.extend(posts);
            drop(state);
            return self.poke();
        }
        drop(state);
        posts.into_iter().for_each(|post| refuse(post.receipt));
    }

    pub(crate) fn push(&self, task: Task) -> Result<()> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(closed());
        }
        state.tasks.push(task);
        drop(state);
        self.poke();
        Ok(())
    }

    /// Has the thread do something, and waits for the answer.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Disk) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        // Nobody waits any more if the answer cannot be given.
        let asked = self.push(Box::new(move |disk| drop(answer.send(work(disk)))));
        let answered = async { answered.await.unwrap_or_else(|_| Err(closed())) };
        match asked {
            Ok(()) => answered.await,
            Err(closed) => Err(closed),
        }
        .map_err(|error| error.with_operation(operation))
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.state.lock().closed { Err(closed()) } else { Ok(()) }
    }

    pub(crate) fn health(&self) -> Health {
        let state = self.state.lock();
        match &state.trouble {
            _ if state.closed => Health::Down(closed()),
            Some((ErrorKind::Codec, why)) => Health::Degraded(error(ErrorKind::Codec, why.clone())),
            Some((kind, why)) => Health::Down(error(*kind, why.clone()).with_transient(true)),
            None => Health::Up,
        }
    }

    /// Refuses what comes from now on, and has the thread finish what came before.
    pub(crate) async fn close(&self, deadline: Instant) -> Result<()> {
        let (done, closing) = oneshot::channel();
        {
            let mut state = self.state.lock();
            state.closed = true;
            if state.ended {
                return Ok(());
            }
            state.tasks.push(Box::new(move |disk: &mut Disk| disk.closing.push((deadline, done))));
        }
        self.poke();
        let late = "the disk did not answer before the deadline";
        match tokio::time::timeout_at(deadline + GRACE, closing).await {
            Ok(Ok(result)) => result,
            // The thread has ended meanwhile: closing again is fine.
            Ok(Err(_)) => Ok(()),
            Err(_) => Err(error(ErrorKind::Timeout, late)),
        }
        .map_err(|error| error.with_operation("close"))
    }

    fn wait(&self, time: Duration) -> MutexGuard<'_, Queued> {
        let mut state = self.state.lock();
        if !state.poked {
            self.changed.wait_for(&mut state, time);
        }
        state.poked = false;
        state
    }
}

/// All that the thread owns.
pub(crate) struct Disk {
    pub(crate) store: Store,
    pub(crate) readers: Vec<Reader>,
    queue: Arc<Queue>,
    events: Events,
    /// What is to be written, the first first. Only from here on is it written again if the disk fails: that keeps the order.
    outbox: VecDeque<Post>,
    /// Written, and confirmed when the folder is synced.
    written: Vec<Receipt>,
    /// The outbox could not be written.
    stuck: bool,
    /// How often in a row anything failed.
    failures: u32,
    closing: Vec<(Instant, oneshot::Sender<Result<()>>)>,
}

impl Disk {
    /// Starts the thread.
    pub(crate) fn start(store: Store, poll: Duration, events: Events) -> Result<Arc<Link>> {
        let queue = Arc::new(Queue::default());
        let link = Arc::new(Link { queue: Arc::clone(&queue) });
        let (readers, outbox, written, closing) = (Vec::new(), VecDeque::new(), Vec::new(), Vec::new());
        let disk = Self { store, readers, queue, events, outbox, written, stuck: false, failures: 0, closing };
        let thread = thread::Builder::new().name("tidings-directory".into());
        thread.spawn(move || disk.run(poll)).map_err(failed(Path::new("a thread")))?;
        Ok(link)
    }

    fn run(mut self, poll: Duration) {
        loop {
            let wait = if self.failures == 0 { poll } else { BACKOFF.delay(self.failures) };
            let closing = self.closing.first().map(|(deadline, _)| deadline.saturating_duration_since(Instant::now()));
            let mut queued = self.queue.wait(closing.unwrap_or(wait).min(wait));
            self.outbox.extend(queued.posts.drain(..));
            let (tasks, left) = (std::mem::take(&mut queued.tasks), queued.left);
            drop(queued);
            tasks.into_iter().for_each(|task| task(&mut self));
            let worked = self.work();
            self.tell(worked);
            if self.close_when_done() || (left && self.is_idle()) {
                return self.end();
            }
        }
    }

    /// Everything once; what fails is tried again next time, and keeps nothing else from being done.
    fn work(&mut self) -> Result<()> {
        let published = self.publish();
        self.stuck = published.is_err();
        let moved = self.store.move_due();
        let read = self.read();
        published.and(moved).and(read)
    }

    /// One turn of each reader.
    pub(crate) fn read(&mut self) -> Result<()> {
        let mut done = Ok(());
        for reader in &mut self.readers {
            let turn = reader.turn(&mut self.store, &self.events);
            done = done.and(turn);
        }
        self.readers.retain(|reader| !reader.over);
        done
    }

    /// Ends an instance, and says how that went to whoever waits.
    pub(crate) fn close_reader(&mut self, desk: &Arc<Desk>, deadline: Instant, done: oneshot::Sender<Flushed>) {
        if let Some(reader) = self.readers.iter_mut().find(|reader| Arc::ptr_eq(&reader.desk, desk)) {
            reader.close(deadline, done);
        }
    }

    // ---- Publishing ----

    fn publish(&mut self) -> Result<()> {
        while !self.outbox.is_empty() || !self.written.is_empty() {
            let (outbox, written, again) = (&mut self.outbox, &mut self.written, self.stuck);
            let stored = self.store.locked(|store| write(store, outbox, written, again));
            if written.is_empty() {
                stored?;
            }
            self.store.sync()?;
            self.written.drain(..).for_each(Receipt::confirm);
        }
        Ok(())
    }

    // ---- Telling ----

    fn tell(&mut self, worked: Result<()>) {
        let before = self.failures;
        let trouble = worked.err().map(|error| (error.kind(), error.to_string()));
        // A damaged file keeps nothing else from working.
        let failed = trouble.as_ref().is_some_and(|(kind, _)| *kind != ErrorKind::Codec);
        self.failures = if failed { before.saturating_add(1) } else { 0 };
        match &trouble {
            Some((_, why)) if failed && before == 0 => {
                self.events.tell(BusEvent::Disconnected { reason: Text::from(why.as_str()) });
            }
            _ if !failed && before > 0 => self.events.tell(BusEvent::Connected),
            _ => {}
        }
        self.queue.state.lock().trouble = trouble;
    }

    // ---- Ending ----

    fn is_idle(&self) -> bool {
        self.outbox.is_empty() && self.written.is_empty() && self.readers.is_empty()
    }

    /// Whether it was closed, and that is done: what was published is on the disk, or it is too late.
    fn close_when_done(&mut self) -> bool {
        let Some((deadline, _)) = self.closing.first() else { return false };
        let (deadline, flushed) = (*deadline, self.outbox.is_empty() && self.written.is_empty());
        if !flushed && deadline > Instant::now() {
            return false;
        }
        let left = self.outbox.len() + self.written.len();
        for reader in &mut self.readers {
            // Nobody waits for the answer: the deadline is the transport's.
            reader.close(deadline, oneshot::channel().0);
        }
        let given_back = self.read();
        if !self.readers.is_empty() && deadline > Instant::now() {
            return false;
        }
        let why = || error(ErrorKind::Timeout, format!("{left} publishes were not on the disk before the deadline"));
        let mut result = if left > 0 { Err(why()) } else { given_back };
        for (_, done) in self.closing.drain(..) {
            let _ = done.send(std::mem::replace(&mut result, Ok(())));
        }
        true
    }

    fn end(mut self) {
        let mut queued = self.queue.state.lock();
        (queued.closed, queued.ended) = (true, true);
        let (posts, tasks) = (std::mem::take(&mut queued.posts), std::mem::take(&mut queued.tasks));
        drop(queued);
        // Whoever waits for a task that is dropped is told that it is closed.
        drop(tasks);
        self.outbox.drain(..).chain(posts).for_each(|post| refuse(post.receipt));
        let late = || error(ErrorKind::Timeout, "the folder was not synced before the deadline");
        self.written.drain(..).for_each(|receipt| receipt.fail(Fate::PossiblyPersisted, late()));
    }
}

/// Writes a batch in order, up to the first that the disk refuses. Nothing is un-sent, but what is tried `again`
/// and nobody waits for any more is dropped.
fn write(store: &mut Store, outbox: &mut VecDeque<Post>, written: &mut Vec<Receipt>, again: bool) -> Result<()> {
    while let Some(post) = outbox.front().filter(|_| written.len() < BATCH) {
        let refusal = if again && post.receipt.is_abandoned() { Some(abandoned()) } else { refusal(store, post)? };
        if refusal.is_none() {
            write_one(store, post)?;
        }
        let Some(post) = outbox.pop_front() else { return Ok(()) };
        match refusal {
            None => written.push(post.receipt),
            Some(error) => post.receipt.fail(Fate::NotPersisted, error.with_operation("publish")),
        }
    }
    Ok(())
}

fn write_one(store: &mut Store, post: &Post) -> Result<()> {
    match &post.stored.to {
        Destination::DeadLetter(name) => store.bury(name, &post.stored),
        _ if post.delayed => store.delay(&post.stored),
        _ => store.append(&post.stored),
    }
}

/// Why a message can never be written, if so.
fn refusal(store: &Store, post: &Post) -> Result<Option<Error>> {
    let size = post.stored.message.payload.len();
    Ok(match &post.stored.to {
        _ if size > MAX_PAYLOAD => {
            Some(error(ErrorKind::TooLarge, format!("a payload of {size} bytes, allowed are {MAX_PAYLOAD}")))
        }
        Destination::Subscription(name) if !store.is_subscription(name)? => {
            let why = "the subscription does not exist; subscribe or provision it first";
            Some(error(ErrorKind::NotFound, why).with_context("subscription", name))
        }
        Destination::DeadLetter(_) if post.delayed => {
            let why = "dead letters are not delayed; publish to the subscription's address instead";
            Some(error(ErrorKind::Unsupported, why))
        }
        _ => None,
    })
}

fn abandoned() -> Error {
    error(ErrorKind::Timeout, "nobody waited any more when the disk could be written again")
}

fn refuse(receipt: Receipt) {
    receipt.fail(Fate::NotPersisted, closed().with_operation("publish"));
}
