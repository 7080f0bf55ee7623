//! Publishing: the window of unconfirmed messages, and repeats with the same id that keep the order per key.

pub(crate) mod flight;
mod gate;
mod linger;

use crate::time::before;
use crate::transport::{Destination, Fate, Outgoing, PublishFailure, Publisher};
use crate::{Backoff, Error, ErrorKind, Message, header};
use flight::Flight;
use gate::{Gate, Pass};
use linger::Linger;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};

/// Between repeats of a publish.
const REPEATS: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// How many flights are kept to be used again.
const LANDED: usize = 64;

/// A message to be published.
#[derive(Clone, Debug)]
pub(crate) struct Post {
    pub(crate) destination: Destination,
    pub(crate) message: Arc<Message>,
    pub(crate) delay: Option<Duration>,
}

/// What was not confirmed, by index, ascending.
pub(crate) type Failures = Vec<(usize, PublishFailure)>;

/// How to send: who waits, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// The message settles a delivery, see [`Outgoing::owed`].
    pub(crate) owed: bool,
    pub(crate) deadline: Instant,
}

/// Posts that are sent together. One reference to it goes down through the futures of a publish, each of which would hold its
/// parts twice: those that wait for their confirmation are what a pipelined publisher's memory is.
pub(crate) struct Load<'a> {
    posts: &'a [Post],
    terms: Terms,
    /// The keys that are closed to others meanwhile.
    passes: Option<Arc<[Pass]>>,
}

impl<'a> Load<'a> {
    pub(crate) fn new(posts: &'a [Post], terms: Terms) -> Self {
        Self { posts, terms, passes: None }
    }
}

/// Takes posts to the transport, and repeats what failed for now.
pub(crate) struct Sender {
    publisher: Arc<dyn Publisher>,
    /// Unconfirmed messages of applications.
    window: Arc<Semaphore>,
    /// Unconfirmed messages that settle deliveries, never behind those that may wait for room.
    owed_window: Arc<Semaphore>,
    /// The most messages in one flight: a quarter of the window, so that one part is on its way while another is confirmed.
    part: usize,
    /// Flights that have landed, to be used again: publishing one message after another allocates none.
    landed: Mutex<Vec<Arc<Flight>>>,
    /// Only where the transport cannot repeat in order by itself.
    gate: Option<Arc<Gate>>,
    /// Only if what is published is to wait for more.
    linger: Option<Arc<Linger>>,
}

impl Sender {
    pub(crate) fn new(publisher: Arc<dyn Publisher>, window: usize, ordered_repeats: bool, linger: Duration) -> Self {
        let linger = (!linger.is_zero()).then(|| Linger::new(Arc::clone(&publisher), linger));
        Self {
            publisher,
            linger,
            window: Arc::new(Semaphore::new(window)),
            owed_window: Arc::new(Semaphore::new(window)),
            landed: Mutex::default(),
            part: (window / 4).clamp(1, Flight::MAX),
            gate: (!ordered_repeats).then(Arc::default),
        }
    }

    /// Sends all posts, in order. Dropping the future un-sends nothing, but ends the repeats.
    pub(crate) async fn send(&self, load: &Load<'_>) -> Failures {
        let keyed = |post: &Post| post.message.key.is_some() && matches!(post.destination, Destination::Topic(_));
        match &self.gate {
            Some(gate) if load.posts.iter().any(keyed) => match enter_now(gate, load) {
                Some(load) => self.send_again_and_again(&load).await,
                None => Box::pin(self.send_by_key(gate, load)).await,
            },
            Some(_) => self.send_again_and_again(load).await,
            // The transport repeats by itself.
            None => self.send_once(load).await,
        }
    }

    /// Sends posts of which each key has to wait for its turn.
    async fn send_by_key(&self, gate: &Arc<Gate>, load: &Load<'_>) -> Failures {
        let Load { posts, terms, .. } = *load;
        let mut failures = Vec::new();
        let mut start = 0;
        while start < posts.len() {
            let (end, keys) = distinct_keys(posts, start);
            let group = &posts[start..end];
            let passes = match keys.is_empty() {
                true => Ok(None),
                false => timeout_at(terms.deadline, enter_all(gate, keys)).await.map(|passes| Some(passes.into())),
            };
            let failed = match passes {
                Ok(passes) => self.send_again_and_again(&Load { posts: group, terms, passes }).await,
                Err(_) => (0..group.len()).map(|i| (i, too_late(&group[i], Fate::NotPersisted))).collect(),
            };
            failures.extend(failed.into_iter().map(|(index, failure)| (start + index, failure)));
            start = end;
        }
        failures
    }

    async fn send_again_and_again(&self, load: &Load<'_>) -> Failures {
        let failed = self.send_once(load).await;
        if failed.is_empty() {
            return failed;
        }
        // In a box, because it is rare, and each publish that waits would have room for it.
        Box::pin(self.repeat(load, failed)).await
    }

    async fn repeat(&self, load: &Load<'_>, mut failed: Failures) -> Failures {
        let terms = load.terms;
        let mut given_up = Vec::new();
        for round in 1.. {
            let delay = REPEATS.delay(round);
            let in_time = Instant::now() + delay < terms.deadline;
            let (again, lost): (Vec<_>, _) = failed.into_iter().partition(|(_, f)| in_time && f.error.is_transient());
            given_up.extend::<Failures>(lost);
            if again.is_empty() {
                break;
            }
            sleep(delay).await;
            let copies: Vec<_> =
                again.iter().map(|(index, failure)| repeat_of(&load.posts[*index], failure, round)).collect();
            let still = self.send_once(&Load { posts: &copies, terms, passes: load.passes.clone() }).await;
            failed = still.into_iter().map(|(n, failure)| (again[n].0, worse(&again[n].1, failure))).collect();
        }
        given_up.sort_by_key(|(index, _)| *index);
        given_up
    }

    /// Hands all posts over, as the window allows, and waits for the answers.
    async fn send_once(&self, load: &Load<'_>) -> Failures {
        if load.posts.len() > self.part {
            return Box::pin(self.send_parts(load)).await;
        }
        let submitted = match self.submit_now(load, load.posts) {
            Some(submitted) => submitted,
            None => Box::pin(self.submit(load, load.posts)).await,
        };
        submitted.answers(load.posts, load, &self.landed).await
    }

    async fn send_parts(&self, load: &Load<'_>) -> Failures {
        let mut flights = Vec::with_capacity(load.posts.len() / self.part + 1);
        for part in load.posts.chunks(self.part) {
            flights.push((part, self.submit(load, part).await));
        }
        let mut failures = Vec::new();
        for (n, (part, flight)) in flights.into_iter().enumerate() {
            let failed = flight.answers(part, load, &self.landed).await;
            failures.extend(failed.into_iter().map(|(index, failure)| (n * self.part + index, failure)));
        }
        failures
    }

    fn window(&self, load: &Load<'_>) -> &Arc<Semaphore> {
        if load.terms.owed { &self.owed_window } else { &self.window }
    }

    /// Hands posts over if there is room for them, as there mostly is: that needs no timer. None while others wait for room.
    fn submit_now(&self, load: &Load<'_>, posts: &[Post]) -> Option<Submitted> {
        // At most Flight::MAX, which fits.
        self.window(load).try_acquire_many(posts.len() as u32).ok()?.forget();
        Some(self.hand_over(load, posts))
    }

    /// Hands posts over when there is room for them.
    async fn submit(&self, load: &Load<'_>, posts: &[Post]) -> Submitted {
        if let Some(submitted) = self.submit_now(load, posts) {
            return submitted;
        }
        match timeout_at(load.terms.deadline, self.window(load).acquire_many(posts.len() as u32)).await {
            Ok(Ok(permits)) => permits.forget(),
            _ => return Submitted(None),
        }
        self.hand_over(load, posts)
    }

    fn hand_over(&self, load: &Load<'_>, posts: &[Post]) -> Submitted {
        let Load { terms, passes, .. } = load;
        let window = self.window(load);
        if posts.is_empty() {
            return Submitted(None);
        }
        let landed = self.landed.lock().pop();
        let flight = Flight::take_off(landed, posts.len(), Some(Arc::clone(window)), passes.clone());
        if let Some(linger) = self.linger.as_ref().filter(|_| !terms.owed) {
            linger.add(posts.iter().zip(0..).map(|(post, index)| (post.clone(), flight.receipt(index))));
            return Submitted(Some(flight));
        }
        self.publisher.submit(&mut posts.iter().zip(0..).map(|(post, index)| Outgoing {
            destination: post.destination.clone(),
            message: Arc::clone(&post.message),
            delay: post.delay,
            owed: terms.owed,
            receipt: flight.receipt(index),
        }));
        Submitted(Some(flight))
    }
}

/// Posts handed to the transport; `None` if the window had no room for them in time.
struct Submitted(Option<Arc<Flight>>);

impl Submitted {
    async fn answers(mut self, posts: &[Post], load: &Load<'_>, landed: &Mutex<Vec<Arc<Flight>>>) -> Failures {
        let Some(flight) = &self.0 else {
            return posts.iter().map(|post| too_late(post, Fate::NotPersisted)).enumerate().collect();
        };
        let answers = before(|| load.terms.deadline, poll_fn(|cx| flight.poll_answers(cx)));
        if let Some(mut failures) = answers.await {
            failures.sort_by_key(|(index, _)| *index);
            let flight = self.0.take().and_then(|mut flight| flight.land().then_some(flight));
            let mut landed = landed.lock();
            let room = landed.len() < LANDED;
            landed.extend(flight.filter(|_| room));
            return failures;
        }
        let (mut failures, unanswered) = flight.abandon();
        failures.extend(unanswered.map(|index| (index, too_late(&posts[index], Fate::PossiblyPersisted))));
        failures.sort_by_key(|(index, _)| *index);
        failures
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        if let Some(flight) = &self.0 {
            drop(flight.abandon());
        }
    }
}

/// The end of the longest part of `posts` from `start` in which no key occurs twice, and its keys.
fn distinct_keys(posts: &[Post], start: usize) -> (usize, BTreeSet<(crate::Topic, crate::Key)>) {
    let mut keys = BTreeSet::new();
    for (index, post) in posts.iter().enumerate().skip(start) {
        if let (Destination::Topic(topic), Some(key)) = (&post.destination, &post.message.key)
            && !keys.insert((topic.clone(), key.clone()))
        {
            return (index, keys);
        }
    }
    (posts.len(), keys)
}

/// The load of one post, if its key is free, as it mostly is: that needs neither a timer nor a future of its own.
fn enter_now<'a>(gate: &Arc<Gate>, load: &Load<'a>) -> Option<Load<'a>> {
    let [Post { destination: Destination::Topic(topic), message, .. }] = load.posts else { return None };
    let pass = gate.enter_now(&(topic.clone(), message.key.clone()?))?;
    Some(Load { passes: Some(Arc::new([pass])), ..*load })
}

/// Enters in ascending order, so that two senders never wait for each other.
async fn enter_all(gate: &Arc<Gate>, keys: BTreeSet<(crate::Topic, crate::Key)>) -> Vec<Pass> {
    let mut passes = Vec::with_capacity(keys.len());
    for key in keys {
        passes.push(gate.enter(key).await);
    }
    passes
}

/// The post as it is sent again: marked, if the first may have arrived.
pub(crate) fn repeat_of(post: &Post, failure: &PublishFailure, round: u32) -> Post {
    let mut copy = post.clone();
    if failure.fate == Fate::PossiblyPersisted {
        Arc::make_mut(&mut copy.message).headers.set(header::REPEAT, round.to_string());
    }
    copy
}

/// A later failure does not make an earlier copy that may have arrived unhappen.
fn worse(before: &PublishFailure, mut now: PublishFailure) -> PublishFailure {
    if before.fate == Fate::PossiblyPersisted {
        now.fate = Fate::PossiblyPersisted;
    }
    now
}

fn too_late(post: &Post, fate: Fate) -> PublishFailure {
    let why = match fate {
        Fate::NotPersisted => "no room to send it in before the deadline; the broker is down, full or slow",
        Fate::PossiblyPersisted => "not confirmed before the deadline; it may or may not be kept",
    };
    PublishFailure { fate, error: Error::new(ErrorKind::Timeout, why).with_context("topic", &post.message.topic) }
}
