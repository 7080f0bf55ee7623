//! What goes wrong between core and the broker.

use super::history::{Answer, History, Sent, To, What};
use super::plan::{Ev, ms};
use futures_util::FutureExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tidings::transport::{
    Acker, BoxFuture, Capabilities, Delivery, Destination, Fate, Flushed, Lease, Notice, Outgoing, Polled, Publisher,
    Receipt, Settle, Settlement, Subscription, SubscriptionSpec, Tag, submit_and_wait,
};
use tidings::{Error, ErrorKind, Message, Result, header};
use tidings_testing::wrap::{Tamper, settle};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

/// What goes wrong in one run of the simulation, for all that is connected.
pub(crate) struct Faults {
    pub(crate) history: Arc<History>,
    rng: Mutex<fastrand::Rng>,
    calm: AtomicBool,
    /// Receipts that are not answered until it is calm.
    silent: Mutex<Vec<Receipt>>,
}

/// The connection of one instance, or of the publishing application.
pub(crate) struct Connection {
    pub(crate) faults: Arc<Faults>,
    pub(crate) by: Option<usize>,
    inner: Mutex<Option<Box<dyn Subscription>>>,
    settle: Mutex<Weak<FaultySettle>>,
}

impl Faults {
    pub(crate) fn new(history: Arc<History>) -> Arc<Self> {
        let rng = Mutex::new(fastrand::Rng::with_seed(history.plan.seed ^ 0xfa17));
        Arc::new(Self { history, rng, calm: AtomicBool::new(false), silent: Mutex::default() })
    }

    /// From now on nothing goes wrong.
    pub(crate) fn end(&self) {
        self.calm.store(true, Relaxed);
        let silent = std::mem::take(&mut *self.silent.lock());
        drop(silent);
    }

    fn roll(&self, rate: u32) -> bool {
        !self.calm.load(Relaxed) && self.rng.lock().u32(0..1000) < rate
    }

    fn latency(&self) -> Duration {
        let most = self.history.plan.rates.latency;
        if most == 0 || self.calm.load(Relaxed) { Duration::ZERO } else { ms(self.rng.lock().u64(0..most)) }
    }

    /// What happens to something on its way to the broker: whether it arrives, and what is answered.
    fn fate(&self) -> (bool, Answer) {
        let rates = self.history.plan.rates;
        if self.calm.load(Relaxed) {
            (true, Answer::Confirms)
        } else if self.history.plan.refuses(self.history.now()) || self.roll(rates.refuse) {
            (false, Answer::Refused)
        } else if self.roll(rates.silence) {
            (self.roll(500), Answer::Never)
        } else if self.roll(rates.lose_answer) {
            (self.roll(700), Answer::Lost)
        } else {
            (true, Answer::Confirms)
        }
    }
}

impl Connection {
    pub(crate) fn new(faults: &Arc<Faults>, by: Option<usize>) -> Arc<Self> {
        Arc::new(Self { faults: Arc::clone(faults), by, inner: Mutex::default(), settle: Mutex::default() })
    }

    /// Some of its leases are lost, as where each delivery has one of its own that expires.
    pub(crate) fn lose_some(&self) {
        let settle = self.settle.lock().upgrade();
        if let Some(settle) = settle {
            settle.lose_some();
        }
    }

    /// Its process is dead: the broker sees that at once, and core sees nothing any more.
    pub(crate) fn kill(&self) {
        let inner = self.inner.lock().take();
        drop(inner);
    }
}

/// What is known of a message by its headers and its payload.
fn about(history: &History, to: &Destination, message: &Message) -> Sent {
    let number = |name| message.headers.get_str(name).and_then(|n| n.parse().ok()).unwrap_or(0);
    let id = message.id.to_string();
    let repeat = message.headers.get(header::REPEAT).is_some();
    let attempts = number(header::ATTEMPTS);
    if message.event_type.as_str() == "sim.done" {
        let text = String::from_utf8_lossy(&message.payload);
        let name = text.split('"').nth(3).unwrap_or_default();
        let index = text.trim_end_matches('}').rsplit(':').next().and_then(|n| n.parse().ok()).unwrap_or(u32::MAX);
        return Sent { to: To::Output, ev: ev(history, name), id, index, attempts, repeat };
    }
    let to = match to {
        Destination::Topic(_) => To::Topic,
        Destination::Subscription(_) => To::Aside,
        Destination::DeadLetter(_) => To::Dead,
    };
    Sent { to, ev: ev(history, &id), id, index: 0, attempts, repeat }
}

fn ev(history: &History, name: &str) -> Ev {
    history.plan.ev(name).unwrap_or_else(|| panic!("an unknown event {name}"))
}

// ---- Publishing ----

struct FaultyPublisher {
    inner: Arc<dyn Publisher>,
    connection: Arc<Connection>,
}

impl Publisher for FaultyPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing>) {
        // First all of it, because an iterator must not be driven while something is submitted.
        let all: Vec<_> = batch.map(|out| ((out.destination, out.message, out.delay, out.owed), out.receipt)).collect();
        for (out, receipt) in all {
            self.send(out, receipt);
        }
    }
}

impl FaultyPublisher {
    fn send(&self, out: (Destination, Arc<Message>, Option<Duration>, bool), receipt: Receipt) {
        let (faults, by) = (&self.connection.faults, self.connection.by);
        let post = about(&faults.history, &out.0, &out.1);
        let (arrives, answer) = faults.fate();
        faults.history.add(What::Sent { by, post: post.clone(), taken: arrives, answer });
        if arrives {
            let failures = submit_and_wait(&*self.inner, &[out]).now_or_never();
            assert!(failures.is_some_and(|failures| failures.is_empty()), "the broker has room for all");
        }
        let error = || Error::new(ErrorKind::Connection, "as planned");
        match answer {
            Answer::Confirms => {
                let (latency, history) = (faults.latency(), Arc::clone(&faults.history));
                let confirm = move || {
                    history.add(What::Confirmed { by, post });
                    receipt.confirm();
                };
                if latency.is_zero() {
                    return confirm();
                }
                tokio::spawn(async move {
                    sleep(latency).await;
                    confirm();
                });
            }
            Answer::Refused => receipt.fail(Fate::NotPersisted, error()),
            Answer::Lost => receipt.fail(Fate::PossiblyPersisted, error()),
            Answer::Never => faults.silent.lock().push(receipt),
        }
    }
}

// ---- Reading ----

/// A subscription whose deliveries take a while, and whose acks may be lost.
struct FaultySubscription {
    connection: Arc<Connection>,
    settle: Arc<FaultySettle>,
    /// What is under way, in order.
    pipe: VecDeque<(Instant, Piece)>,
    found: Polled,
    /// The slots that are held back: what is handed out of them keeps its order.
    holding: BTreeSet<u32>,
    sleep: Option<Pin<Box<Sleep>>>,
    over: bool,
}

enum Piece {
    Delivery(Box<Delivery>),
    Notice(Notice),
}

struct FaultySettle {
    connection: Arc<Connection>,
    by: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    ackers: BTreeMap<u64, (Acker, Ev)>,
    /// Whose lease was lost.
    gone: BTreeMap<u64, Ev>,
    last: u64,
}

impl FaultySubscription {
    /// Takes in what the broker has, as far as core has room for it.
    fn fill(&mut self, cx: &mut Context<'_>, max: usize) -> Result<()> {
        while !self.over && self.pipe.len() < max {
            let mut inner = self.connection.inner.lock();
            let Some(inner) = inner.as_mut() else { return Ok(()) };
            match inner.poll_batch(cx, max - self.pipe.len(), &mut self.found) {
                Poll::Pending => return Ok(()),
                Poll::Ready(read) => read?,
            }
            self.over = self.found.deliveries.is_empty() && self.found.notices.is_empty();
            for notice in &self.found.notices {
                match notice {
                    Notice::HoldBack { slot, .. } => drop(self.holding.insert(*slot)),
                    Notice::HoldBackOver { slot } => drop(self.holding.remove(slot)),
                    _ => {}
                }
            }
            let faults = &self.connection.faults;
            if faults.history.plan.rates.shuffle && self.holding.is_empty() {
                let mut ranks = BTreeMap::new();
                self.found.deliveries.sort_by_key(|delivery| {
                    let key = delivery.message.key.as_ref().map(|key| key.as_bytes().to_vec());
                    *ranks.entry(key).or_insert_with(|| faults.rng.lock().u32(..))
                });
            }
            let due =
                self.pipe.back().map_or_else(Instant::now, |(due, _)| *due).max(Instant::now() + faults.latency());
            let notices = self.found.notices.drain(..).map(Piece::Notice);
            let deliveries = self.found.deliveries.drain(..).map(|delivery| Piece::Delivery(Box::new(delivery)));
            self.pipe.extend(notices.chain(deliveries).map(|piece| (due, piece)));
        }
        Ok(())
    }

    /// Hands out what has arrived; a notice is alone with what comes after it.
    fn hand_out(&mut self, max: usize, out: &mut Polled) -> bool {
        let (now, mut handed) = (Instant::now(), 0);
        let before = out.notices.len();
        while let Some((due, piece)) = self.pipe.front() {
            let fits = match piece {
                Piece::Notice(_) => handed == 0,
                Piece::Delivery(_) => handed < max,
            };
            if *due > now || !fits {
                break;
            }
            match self.pipe.pop_front() {
                Some((_, Piece::Notice(notice))) => out.notices.push(notice),
                Some((_, Piece::Delivery(delivery))) => {
                    handed += 1;
                    out.deliveries.push(self.settle.open(*delivery));
                }
                None => {}
            }
        }
        handed > 0 || out.notices.len() > before
    }
}

impl Subscription for FaultySubscription {
    fn poll_batch(&mut self, cx: &mut Context<'_>, max: usize, out: &mut Polled) -> Poll<Result<()>> {
        loop {
            self.fill(cx, max)?;
            if self.hand_out(max, out) {
                return Poll::Ready(Ok(()));
            }
            let Some((due, _)) = self.pipe.front() else {
                return if self.over { Poll::Ready(Ok(())) } else { Poll::Pending };
            };
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(*due)));
            if sleep.deadline() != *due {
                sleep.as_mut().reset(*due);
            }
            ready!(sleep.as_mut().poll(cx));
        }
    }

    fn stop(&mut self) {
        if let Some(inner) = self.connection.inner.lock().as_mut() {
            inner.stop();
        }
    }

    fn close(mut self: Box<Self>, deadline: Instant) -> BoxFuture<Flushed> {
        for (_, piece) in self.pipe.drain(..) {
            if let Piece::Delivery(delivery) = piece {
                delivery.acker.release(Duration::ZERO);
            }
        }
        let inner = self.connection.inner.lock().take();
        Box::pin(async move {
            match inner {
                Some(inner) => inner.close(deadline).await,
                None => Flushed::default(),
            }
        })
    }
}

/// Dropped without a close, its process is dead.
impl Drop for FaultySubscription {
    fn drop(&mut self) {
        self.connection.kill();
    }
}

impl FaultySettle {
    fn lose_some(&self) {
        let faults = &self.connection.faults;
        let lost: Vec<_> = self.open.lock().ackers.extract_if(.., |_, _| faults.roll(400)).collect();
        for (seq, (acker, ev)) in lost {
            self.open.lock().gone.insert(seq, ev);
            faults.history.add(What::Settled { by: self.by, ev, ack: false, live: false, lost: true });
            acker.release(faults.latency());
        }
    }

    fn open(self: &Arc<Self>, mut delivery: Delivery) -> Delivery {
        let history = &self.connection.faults.history;
        let sent = about(history, &Destination::Topic(delivery.message.topic.clone()), &delivery.message);
        let place = (delivery.slot, delivery.position);
        let (redelivered, attempts, ev) = (delivery.redelivered, sent.attempts, sent.ev);
        history.add(What::Handed { by: self.by, ev, redelivered, attempts, place });
        let mut open = self.open.lock();
        open.last += 1;
        let tag = Tag { epoch: 0, seq: open.last };
        let ours = Acker::new(Arc::clone(self) as Arc<dyn Settle>, tag);
        open.ackers.insert(tag.seq, (std::mem::replace(&mut delivery.acker, ours), ev));
        delivery
    }
}

impl Settle for FaultySettle {
    fn settle(&self, tag: Tag, settlement: Settlement) {
        let (faults, ack) = (&self.connection.faults, settlement == Settlement::Ack);
        let gone = self.open.lock().gone.remove(&tag.seq);
        if let Some(ev) = gone {
            return faults.history.add(What::Settled { by: self.by, ev, ack, live: false, lost: false });
        }
        let removed = self.open.lock().ackers.remove(&tag.seq);
        let Some((acker, ev)) = removed else { return };
        let live = acker.lease() == Lease::Live;
        let lost = ack && live && faults.roll(faults.history.plan.rates.lose_ack);
        faults.history.add(What::Settled { by: self.by, ev, ack, live, lost });
        if lost {
            let after = ms([0, 50, 1000][faults.rng.lock().usize(0..3)]);
            acker.release(after);
        } else {
            settle(acker, settlement);
        }
    }

    fn lease(&self, tag: Tag) -> Lease {
        self.open.lock().ackers.get(&tag.seq).map_or(Lease::Lost, |(acker, _)| acker.lease())
    }
}

/// The tamper of one connection.
pub(crate) struct Faulty(pub(crate) Arc<Connection>);

impl Tamper for Faulty {
    fn capabilities(&self, can: &mut Capabilities) {
        can.ordered_repeats = self.0.faults.history.plan.ordered_repeats;
    }

    fn publisher(&self, inner: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        Arc::new(FaultyPublisher { inner, connection: Arc::clone(&self.0) })
    }

    fn subscription(&self, _: &SubscriptionSpec, inner: Box<dyn Subscription>) -> Box<dyn Subscription> {
        let connection = Arc::clone(&self.0);
        *connection.inner.lock() = Some(inner);
        let by = connection.by.unwrap_or_default();
        let settle = Arc::new(FaultySettle { connection: Arc::clone(&connection), by, open: Mutex::default() });
        *connection.settle.lock() = Arc::downgrade(&settle);
        Box::new(FaultySubscription {
            connection,
            settle,
            pipe: VecDeque::new(),
            found: Polled::default(),
            holding: BTreeSet::new(),
            sleep: None,
            over: false,
        })
    }
}
