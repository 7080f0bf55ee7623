//! What happened, in order, and what can only be checked while it happens.

use super::plan::{Ev, Plan};
use futures_util::FutureExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;
use tidings::handler::Lease;
use tidings::{BusEvent, EventStream};
use tokio::time::Instant;

/// One thing that happened, at this virtual time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) at: Duration,
    pub(crate) what: What,
}

/// What happened; `by` is the instance, `None` the publishing application.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum What {
    /// The application was told how its publish ended.
    Published { ev: Ev, confirmed: bool },
    /// Core was handed a delivery.
    Handed { by: usize, ev: Ev, redelivered: bool, attempts: u32, place: (u32, u64) },
    /// A run of the handler began; batches tell no attempt.
    Began { by: usize, run: usize, evs: Vec<Ev>, told: Option<Told> },
    /// It ended.
    Ended { by: usize, run: usize, ends: Vec<(Ev, End)> },
    /// Core settled a delivery: whether its lease was live, and whether that was lost on its way.
    Settled { by: usize, ev: Ev, ack: bool, live: bool, lost: bool },
    /// Something was published: whether the broker took it, and what was answered.
    Sent { by: Option<usize>, post: Sent, taken: bool, answer: Answer },
    /// A confirm arrived.
    Confirmed { by: Option<usize>, post: Sent },
    /// An instance is killed, dropped or drained.
    Stopped { by: usize, how: &'static str },
    /// Core told of an outage.
    Outage { by: usize, on: bool },
    /// Anything else, for the reader.
    Said(String),
}

/// What a handler of one event is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) attempt: u32,
    pub(crate) duplicate: bool,
    pub(crate) position: u64,
}

/// What was published on behalf of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) to: To,
    /// The event itself, or the cause of what a handler returned.
    pub(crate) ev: Ev,
    pub(crate) id: String,
    /// The index of what a handler returned.
    pub(crate) index: u32,
    /// What the message says of failed runs.
    pub(crate) attempts: u32,
    pub(crate) repeat: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    Topic,
    Output,
    Aside,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Confirms,
    Refused,
    Lost,
    Never,
}

/// How a run ended for one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Success,
    Transient,
    Rejected,
    /// It was dropped with its process, at a deadline, or for taking too long.
    Dropped,
    TimedOut,
}

/// The shared record of one run of the simulation.
pub(crate) struct History {
    pub(crate) plan: Arc<Plan>,
    start: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    wrong: Vec<String>,
    running: BTreeMap<usize, Going>,
    runs: usize,
    /// How often a handler was given an event.
    counts: HashMap<Ev, u32>,
    tells: HashMap<usize, EventStream>,
}

/// Another run that goes on: whose, of what, and its lease, if it has one.
type Other = (usize, Vec<Ev>, Option<Arc<Lease>>);

struct Going {
    by: usize,
    evs: Vec<Ev>,
    lease: Option<Arc<Lease>>,
    began: Instant,
}

impl History {
    pub(crate) fn new(plan: Arc<Plan>) -> Arc<Self> {
        Arc::new(Self { plan, start: Instant::now(), state: Mutex::default() })
    }

    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn listen(&self, by: usize, events: EventStream) {
        self.state.lock().tells.insert(by, events);
    }

    pub(crate) fn add(&self, what: What) {
        let by = match &what {
            What::Handed { by, .. } | What::Settled { by, .. } => Some(*by),
            What::Sent { by, .. } | What::Confirmed { by, .. } => *by,
            _ => None,
        };
        self.state.lock().add(self.now(), by, what);
    }

    pub(crate) fn say(&self, what: impl Into<String>) {
        self.add(What::Said(what.into()));
    }

    pub(crate) fn wrong(&self, what: &str) {
        let at = self.now();
        self.state.lock().wrong.push(format!("{at:?}: {what}"));
    }

    /// A run begins; says which it is and how many runs each of its events had before.
    pub(crate) fn begin(&self, by: usize, evs: &[Ev], told: Option<Told>, lease: Option<Lease>) -> (usize, Vec<u32>) {
        let lease = lease.map(Arc::new);
        let mut state = self.state.lock();
        let others: Vec<_> = state.running.values().map(|g| (g.by, g.evs.clone(), g.lease.clone())).collect();
        let run = state.runs;
        state.runs += 1;
        state.running.insert(run, Going { by, evs: evs.to_vec(), lease, began: Instant::now() });
        let mut count = |ev: &Ev| {
            let count = state.counts.entry(*ev).or_default();
            *count += 1;
            *count - 1
        };
        let counts = evs.iter().map(&mut count).collect();
        state.add(self.now(), Some(by), What::Began { by, run, evs: evs.to_vec(), told });
        let here = state.running.values().filter(|going| going.by == by).count();
        if here > self.plan.concurrency {
            state.wrong.push(format!("{here} runs at a time in instance {by}, allowed are {}", self.plan.concurrency));
        }
        drop(state);
        self.check_overlap(evs, &others);
        (run, counts)
    }

    /// A key is not handled twice at a time, unless by one that has lost its lease.
    fn check_overlap(&self, evs: &[Ev], others: &[Other]) {
        if self.plan.ordering != tidings::transport::Ordering::Key {
            return;
        }
        let key = |ev: &Ev| self.plan.events[*ev].key;
        for (by, theirs, lease) in others {
            let shared = evs.iter().any(|ev| theirs.iter().any(|other| key(other) == key(ev)));
            if shared && lease.as_ref().is_some_and(|lease| !lease.is_lost()) {
                self.wrong(&format!("{evs:?} begins while {theirs:?} runs in instance {by} with a live lease"));
            }
        }
    }

    /// A run ends, if it had not.
    pub(crate) fn end(&self, run: usize, ends: Vec<(Ev, End)>) {
        let mut state = self.state.lock();
        if let Some(going) = state.running.remove(&run) {
            let by = going.by;
            state.add(self.now(), Some(by), What::Ended { by, run, ends });
        }
    }

    /// A run was dropped, if it had not ended.
    pub(crate) fn dropped(&self, run: usize) {
        let mut state = self.state.lock();
        if let Some(going) = state.running.remove(&run) {
            let end = if going.began.elapsed() >= super::plan::TIMEOUT { End::TimedOut } else { End::Dropped };
            let (by, ends) = (going.by, going.evs.into_iter().map(|ev| (ev, end)).collect());
            state.add(self.now(), Some(by), What::Ended { by, run, ends });
        }
    }

    /// An instance is dead: nothing of it runs any more.
    pub(crate) fn died(&self, by: usize) {
        let mut state = self.state.lock();
        let dead: Vec<_> = state.running.iter().filter(|(_, going)| going.by == by).map(|(run, _)| *run).collect();
        for run in dead {
            if let Some(going) = state.running.remove(&run) {
                let ends = going.evs.into_iter().map(|ev| (ev, End::Dropped)).collect();
                state.add(self.now(), Some(by), What::Ended { by, run, ends });
            }
        }
    }

    /// Whether this will never come to rest.
    pub(crate) fn is_too_long(&self) -> bool {
        self.state.lock().entries.len() > 8_000
    }

    /// All entries and what was found wrong.
    pub(crate) fn take(&self) -> (Vec<Entry>, Vec<String>) {
        let mut state = self.state.lock();
        (std::mem::take(&mut state.entries), std::mem::take(&mut state.wrong))
    }
}

impl State {
    fn add(&mut self, at: Duration, by: Option<usize>, what: What) {
        if let Some(by) = by {
            self.hear(at, by);
        }
        self.entries.push(Entry { at, what });
    }

    /// Notes what core has told since the last entry of an instance.
    fn hear(&mut self, at: Duration, by: usize) {
        let Some(tells) = self.tells.get_mut(&by) else { return };
        while let Some(Some(told)) = tells.next().now_or_never() {
            let what = match told {
                BusEvent::OutageBegan { .. } => What::Outage { by, on: true },
                BusEvent::OutageOver { .. } => What::Outage { by, on: false },
                BusEvent::Retry { id, attempts, delay, .. } => {
                    What::Said(format!("[{by}] retries {id} in {delay:?}, {attempts} failed"))
                }
                BusEvent::DeadLettered { id, reason, .. } => What::Said(format!("[{by}] {id} is dead: {reason:?}")),
                BusEvent::Role { role, .. } => What::Said(format!("[{by}] is {role:?}")),
                BusEvent::PublishStalled { .. } => What::Said(format!("[{by}] publishing stalls")),
                _ => continue,
            };
            self.entries.push(Entry { at, what });
        }
    }
}

/// The history as a reader wants it: one line for each entry.
pub(crate) fn timeline(plan: &Plan, entries: &[Entry]) -> String {
    let mut text = String::new();
    let name = |ev: &Ev| plan.events[*ev].name.as_str();
    let who = |by: &Option<usize>| by.map_or("app".to_owned(), |by| format!("[{by}]"));
    for Entry { at, what } in entries {
        let line = match what {
            What::Published { ev, confirmed } => {
                format!("app: {} is {}", name(ev), if *confirmed { "confirmed" } else { "not confirmed" })
            }
            What::Handed { by, ev, redelivered, attempts, place } => format!(
                "[{by}] is handed {} (slot {}, position {}, {attempts} failed{})",
                name(ev),
                place.0,
                place.1,
                if *redelivered { ", redelivered" } else { "" }
            ),
            What::Began { by, run, evs, told } => {
                let names: Vec<_> = evs.iter().map(name).collect();
                let told = told.map_or_else(String::new, |told| {
                    let marked = if told.duplicate { ", marked" } else { "" };
                    format!(" attempt {} at {}{marked}", told.attempt, told.position)
                });
                format!("[{by}] run {run} begins: {names:?}{told}")
            }
            What::Ended { by, run, ends } => {
                let ends: Vec<_> = ends.iter().map(|(ev, end)| format!("{} {end:?}", name(ev))).collect();
                format!("[{by}] run {run} ends: {ends:?}")
            }
            What::Settled { by, ev, ack, live, lost } => format!(
                "[{by}] {} {}{}{}",
                if *ack { "acks" } else { "gives back" },
                name(ev),
                if *live { "" } else { ", stale" },
                if *lost { ", lost on its way" } else { "" }
            ),
            What::Sent { by, post, taken, answer } => {
                format!("{} sends {post:?} of {}: taken {taken}, {answer:?}", who(by), name(&post.ev))
            }
            What::Confirmed { by, post } => {
                format!("{} has a confirm of {:?} {} ({})", who(by), post.to, name(&post.ev), post.id)
            }
            What::Stopped { by, how } => format!("[{by}] is {how}"),
            What::Outage { by, on } => format!("[{by}] outage {}", if *on { "begins" } else { "is over" }),
            What::Said(text) => text.clone(),
        };
        let _ = writeln!(text, "{:>12.3} {line}", at.as_secs_f64() * 1000.0);
    }
    text
}
