//! What was published and is not settled yet, and all that has happened.

use crate::faults::Faults;
use crate::timeline::{self, End, Entry, Number, Published, Retried, Run, Sent, What};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tidings_core::handler::Request;
use tidings_core::transport::{Destination, Fate, Outgoing, PublishFailure, SubscriptionSpec};
use tidings_core::{BusEvent, EventStream, Message, MessageId, SubscriptionName, Text, TopicPattern, header};
use tokio::sync::Notify;
use tokio::time::Instant;

/// What happens more often than this in one test never ends.
pub(crate) const LIMIT: usize = 100_000;

/// How long what may never come is waited for: a second copy, which some brokers drop, or one whose publish was not
/// confirmed.
const LULL: Duration = Duration::from_secs(1);

/// A message in a subscription: a retry of one is another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ident {
    source: Text,
    id: MessageId,
    attempts: u32,
}

impl Ident {
    pub(crate) fn of(message: &Message) -> Self {
        let attempts = message.headers.get_str(header::ATTEMPTS).and_then(|n| n.parse().ok()).unwrap_or(0);
        Self { source: message.source.clone(), id: message.id.clone(), attempts }
    }
}

/// Counts and records; everything in the harness shares one.
pub(crate) struct Tracker {
    start: Instant,
    /// The broker delivers every copy of a message, so that each is waited for.
    exact: bool,
    pub(crate) faults: Option<Faults>,
    events: Mutex<EventStream>,
    state: Mutex<State>,
    /// Something was settled, or failed.
    pub(crate) changed: Notify,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    numbers: HashMap<(Text, MessageId), Number>,
    by_id: HashMap<MessageId, Number>,
    /// Where the last run of each message in each subscription stands.
    last_runs: HashMap<(SubscriptionName, Number), usize>,
    subscriptions: BTreeMap<String, Watched>,
    /// What was submitted, and where to, unless the broker certainly has not got it.
    submitted: HashSet<(Destination, Ident)>,
    /// Until when copies that may never come are waited for.
    lull: Option<Instant>,
}

/// What is known of one subscription.
#[derive(Default)]
struct Watched {
    topics: Vec<TopicPattern>,
    /// Published to it and not acked, by how many copies.
    expected: HashMap<Ident, usize>,
    /// Handed out and not settled.
    out: usize,
    random: fastrand::Rng,
    /// Of each event that runs were failed on purpose, how many.
    failed: HashMap<(Text, MessageId), u32>,
    /// Whose last run has succeeded.
    succeeded: HashSet<Ident>,
    /// What has had its crash.
    crashed: HashSet<(Text, MessageId)>,
}

/// A message on its way to the broker.
pub(crate) struct Submitted {
    entry: Option<usize>,
    to: Destination,
    ident: Ident,
    /// It may never come.
    again: bool,
    /// The subscriptions that expect it.
    expected_by: Vec<String>,
}

/// What is left to happen.
pub(crate) enum Rest {
    Nothing,
    /// Nothing, if nothing comes until then.
    NothingAt(Instant),
    /// Something.
    Something,
    /// More than [`LIMIT`] things have happened.
    NoEnd,
}

/// What goes wrong with one run.
#[derive(Default)]
pub(crate) struct Mishap {
    pub(crate) delay: Duration,
    /// It fails before its handler begins.
    pub(crate) fails_before: bool,
    /// It fails after its handler has succeeded.
    pub(crate) fails_after: bool,
}

impl State {
    fn record(&mut self, at: Duration, what: What) -> Option<usize> {
        (self.entries.len() < LIMIT).then(|| {
            self.entries.push(Entry { at, what });
            self.entries.len() - 1
        })
    }

    fn number(&mut self, source: &Text, id: &MessageId) -> Number {
        let next = self.numbers.len() + 1;
        let number = *self.numbers.entry((source.clone(), id.clone())).or_insert(next);
        self.by_id.entry(id.clone()).or_insert(number);
        number
    }

    /// The number of an id whose source is not known.
    fn number_of(&self, id: &MessageId) -> Number {
        self.by_id.get(id).copied().unwrap_or(0)
    }
}

impl Tracker {
    pub(crate) fn new(events: EventStream, exact: bool, faults: Option<Faults>) -> Self {
        let (state, changed) = (Mutex::default(), Notify::new());
        Self { start: Instant::now(), exact, faults, events: Mutex::new(events), state, changed }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn watch(&self, spec: &SubscriptionSpec) {
        let random = self.faults.as_ref().map(|faults| faults.random(spec.name.as_str())).unwrap_or_default();
        let watched = Watched { topics: spec.topics.clone(), random, ..Watched::default() };
        self.state.lock().subscriptions.entry(spec.name.to_string()).or_insert(watched);
    }

    /// A message is about to be submitted: from now on those it goes to expect it.
    pub(crate) fn submitting(&self, out: &Outgoing) -> Submitted {
        self.pull();
        let (message, ident) = (&*out.message, Ident::of(&out.message));
        let mut state = self.state.lock();
        let expects = |name: &str, watched: &Watched| match &out.destination {
            Destination::Topic(topic) => watched.topics.iter().any(|pattern| pattern.matches(topic)),
            Destination::Subscription(to) => to.as_str() == name,
            Destination::DeadLetter(_) => false,
        };
        // What was sent there before may be dropped by the broker: that it comes is hoped for, not expected.
        let again = !state.submitted.insert((out.destination.clone(), ident.clone())) && !self.exact;
        let mut expected_by = Vec::new();
        for (name, watched) in &mut state.subscriptions {
            if !again && expects(name, watched) {
                *watched.expected.entry(ident.clone()).or_default() += 1;
                expected_by.push(name.clone());
            }
        }
        let number = state.number(&message.source, &message.id);
        if let Destination::DeadLetter(name) = &out.destination
            && let Some(run) = state.last_run(name, number).filter(|run| run.end == End::Succeeded)
        {
            run.but.push(number);
        }
        let cause = message.causation_id.as_ref().map(|id| state.number_of(id)).filter(|number| *number > 0);
        let aside =
            matches!(out.destination, Destination::Subscription(_)) && ident.attempts > 0 && out.delay.is_some();
        let entry = if aside {
            None
        } else {
            let (to, message) = (out.destination.clone(), Message::clone(message));
            let published = Published { to, message, number, cause, delay: out.delay, sent: Sent::Unconfirmed };
            state.record(self.elapsed(), What::Published(Box::new(published)))
        };
        Submitted { entry, to: out.destination.clone(), ident, again, expected_by }
    }

    /// The broker has answered.
    pub(crate) fn answered(&self, submitted: Submitted, failure: Option<&PublishFailure>) {
        let Submitted { entry, to, ident, again, expected_by } = submitted;
        let mut state = self.state.lock();
        let possibly = failure.is_some_and(|failure| failure.fate == Fate::PossiblyPersisted);
        if failure.is_some() {
            for name in expected_by {
                state.subscriptions.entry(name).and_modify(|watched| watched.came(&ident));
            }
        }
        if failure.is_some() && !possibly {
            state.submitted.remove(&(to, ident));
        }
        if again || possibly {
            state.lull = Some(Instant::now() + LULL);
        }
        let sent = failure.map_or(Sent::Confirmed, |failure| Sent::Failed(failure.error.to_string()));
        if let Some(What::Published(published)) = entry.map(|entry| &mut state.entries[entry].what) {
            published.sent = sent;
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// A delivery is handed out.
    pub(crate) fn handed_out(&self, subscription: &str, ident: &Ident) {
        if let Some(watched) = self.state.lock().subscriptions.get_mut(subscription) {
            watched.out += 1;
            watched.expected.entry(ident.clone()).or_insert(1);
        }
    }

    /// A delivery was settled.
    pub(crate) fn settled(&self, subscription: &str, ident: &Ident, acked: bool) {
        self.pull();
        if let Some(watched) = self.state.lock().subscriptions.get_mut(subscription) {
            watched.out = watched.out.saturating_sub(1);
            if acked {
                watched.succeeded.remove(ident);
                watched.came(ident);
            }
        }
        self.changed.notify_waiters();
    }

    /// Whether a delivery is to come a second time.
    pub(crate) fn duplicates(&self, subscription: &str) -> bool {
        let share = self.faults.as_ref().map_or(0.0, |faults| faults.duplicate);
        let mut state = self.state.lock();
        state.subscriptions.get_mut(subscription).is_some_and(|watched| share > 0.0 && watched.random.f64() < share)
    }

    /// Whether the ack of an event is to be lost.
    pub(crate) fn crashes(&self, subscription: &str, ident: &Ident) -> bool {
        let share = self.faults.as_ref().map_or(0.0, |faults| faults.crash_after_handle);
        let mut state = self.state.lock();
        let Some(watched) = state.subscriptions.get_mut(subscription).filter(|_| share > 0.0) else { return false };
        let event = (ident.source.clone(), ident.id.clone());
        if !watched.succeeded.contains(ident) || watched.crashed.contains(&event) || watched.random.f64() >= share {
            return false;
        }
        watched.crashed.insert(event);
        let number = state.number(&ident.source, &ident.id);
        let text = format!("{subscription} crashed after #{number} was handled: it comes again");
        state.record(self.elapsed(), What::Note(text));
        true
    }

    /// A run begins.
    pub(crate) fn began(&self, request: &Request) -> Option<usize> {
        self.pull();
        let mut state = self.state.lock();
        let event = |message: &Arc<Message>| (state.number(&message.source, &message.id), message.event_type.clone());
        let events: Vec<_> = request.messages.iter().map(event).collect();
        let numbers: Vec<_> = events.iter().map(|(number, _)| *number).collect();
        let (subscription, attempt) = (request.subscription.clone(), request.attempt);
        let (took, end, but, again) = (Duration::ZERO, End::Running, Vec::new(), None);
        let run = Run { subscription: subscription.clone(), events, attempt, took, end, but, again };
        let entry = state.record(self.elapsed(), What::Run(run))?;
        state.last_runs.extend(numbers.into_iter().map(|number| ((subscription.clone(), number), entry)));
        Some(entry)
    }

    /// What goes wrong with it.
    pub(crate) fn mishap(&self, request: &Request) -> Mishap {
        let Some(faults) = &self.faults else { return Mishap::default() };
        let mut state = self.state.lock();
        let watched = state.subscriptions.get_mut(request.subscription.as_str());
        let (Some(watched), Some(first)) = (watched, request.messages.first()) else { return Mishap::default() };
        let delay = faults.delay.mul_f64(watched.random.f64());
        let failed = watched.failed.entry((first.source.clone(), first.id.clone())).or_default();
        let fails = *failed < faults.fail_first;
        *failed += u32::from(fails);
        let before = watched.random.bool();
        Mishap { delay, fails_before: fails && before, fails_after: fails && !before }
    }

    /// A run has ended.
    pub(crate) fn ended(&self, entry: Option<usize>, messages: &[Ident], end: End) {
        let mut state = self.state.lock();
        let (succeeded, now) = (end == End::Succeeded, self.elapsed());
        let Some(Entry { at, what: What::Run(run) }) = entry.map(|entry| &mut state.entries[entry]) else { return };
        run.took = now.saturating_sub(*at);
        run.end = end;
        let subscription = run.subscription.to_string();
        if let Some(watched) = state.subscriptions.get_mut(&subscription).filter(|_| succeeded) {
            watched.succeeded.extend(messages.iter().cloned());
        }
    }

    /// Takes in what the bus has told since the last time.
    pub(crate) fn pull(&self) {
        let mut events = self.events.lock();
        loop {
            let next = pin!(events.next());
            let Poll::Ready(Some(event)) = next.poll(&mut Context::from_waker(Waker::noop())) else { return };
            self.told(&event);
        }
    }

    fn told(&self, event: &BusEvent) {
        let mut state = self.state.lock();
        let at = self.elapsed();
        let text = match event {
            BusEvent::Retry { subscription, id, delay, error, .. } => {
                let (subscription, number, delay) = (subscription.clone(), state.number_of(id), *delay);
                return state.retried(at, Retried { subscription, number, delay, error: error.to_string() });
            }
            BusEvent::Unrouted { subscription, id, event_type } => {
                format!("{subscription} acked #{}, which no handler takes: {event_type}", state.number_of(id))
            }
            BusEvent::OutageBegan { subscription, error } => {
                format!("{subscription} takes this for an outage, and probes: {error}")
            }
            BusEvent::OutageOver { subscription } => format!("{subscription}: the outage is over"),
            BusEvent::PublishStalled { .. } | BusEvent::Gap { .. } | BusEvent::Disconnected { .. } => {
                format!("{event:?}")
            }
            _ => return,
        };
        state.record(at, What::Note(text));
    }

    pub(crate) fn rest(&self) -> Rest {
        self.pull();
        let state = self.state.lock();
        if state.entries.len() >= LIMIT {
            return Rest::NoEnd;
        }
        if state.subscriptions.values().any(|watched| watched.out > 0 || !watched.expected.is_empty()) {
            return Rest::Something;
        }
        match state.lull {
            Some(until) if until > Instant::now() => Rest::NothingAt(until),
            _ => Rest::Nothing,
        }
    }

    /// What is left to happen, for people.
    pub(crate) fn describe_rest(&self) -> String {
        let mut state = self.state.lock();
        let State { subscriptions, numbers, .. } = &mut *state;
        let mut text = String::new();
        for (name, watched) in subscriptions.iter().filter(|(_, watched)| !watched.expected.is_empty()) {
            let number = |ident: &Ident| numbers.get(&(ident.source.clone(), ident.id.clone())).copied().unwrap_or(0);
            let mut left: Vec<_> = watched.expected.keys().map(number).collect();
            left.sort_unstable();
            let left: Vec<_> = left.iter().take(10).map(|number| format!("#{number}")).collect();
            let (all, out) = (watched.expected.len(), watched.out);
            text.push_str(&format!("  {name} has {all} unsettled, {out} of them in its hands: {}\n", left.join(" ")));
        }
        text
    }

    pub(crate) fn timeline(&self) -> String {
        self.pull();
        timeline::write(&self.state.lock().entries)
    }

    /// The names of the subscriptions under test.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state.lock().subscriptions.keys().cloned().collect()
    }

    /// What `pick` finds among all that has happened, in order.
    pub(crate) fn collect<R>(&self, mut pick: impl FnMut(&What) -> Vec<R>) -> Vec<R> {
        self.pull();
        self.state.lock().entries.iter().flat_map(|entry| pick(&entry.what)).collect()
    }
}

impl State {
    /// The last run of a message in a subscription.
    fn last_run(&mut self, subscription: &SubscriptionName, number: Number) -> Option<&mut Run> {
        let entry = *self.last_runs.get(&(subscription.clone(), number))?;
        if let What::Run(run) = &mut self.entries[entry].what { Some(run) } else { None }
    }

    /// Notes a retry beside the run that it follows, if one was seen.
    fn retried(&mut self, at: Duration, retried: Retried) {
        match self.last_run(&retried.subscription, retried.number) {
            Some(run) if run.again.is_none() && matches!(run.end, End::Failed(_) | End::CutOff) => {
                run.again = Some(retried.delay);
                run.end = End::Failed(retried.error);
                return;
            }
            Some(run) if run.end == End::Succeeded => run.but.push(retried.number),
            _ => {}
        }
        self.record(at, What::Retried(retried));
    }
}

impl Watched {
    /// One copy less is expected.
    fn came(&mut self, ident: &Ident) {
        if let Some(copies) = self.expected.get_mut(ident) {
            *copies -= 1;
            if *copies == 0 {
                self.expected.remove(ident);
            }
        }
    }
}
