//! What happens in one run of the simulation, drawn from its seed.

use fastrand::Rng;
use std::collections::HashMap;
use std::time::Duration;
use tidings::DeadLetterReason;
use tidings::prelude::*;

/// An event, by its place in the plan.
pub(crate) type Ev = usize;

/// How long a run of a handler may take.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(2);

/// When publishing, faults and actions are over, in milliseconds of virtual time.
const ACTIVE: u64 = 6_000;

/// All that a seed decides.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) slots: u32,
    pub(crate) redelivery_delay: Duration,
    pub(crate) ordered_repeats: bool,
    pub(crate) ordering: Ordering,
    /// Retries hold their key.
    pub(crate) in_order: bool,
    pub(crate) attempts: u32,
    pub(crate) backoff: (Duration, Duration),
    pub(crate) kind: Kind,
    pub(crate) concurrency: usize,
    pub(crate) max_in_flight: usize,
    pub(crate) batch: usize,
    pub(crate) linger: Duration,
    /// When what the handlers depend on is down.
    pub(crate) outage: Option<(Duration, Duration)>,
    pub(crate) rates: Rates,
    /// When all that is published is refused.
    pub(crate) refusals: Vec<(Duration, Duration)>,
    pub(crate) events: Vec<Planned>,
    pub(crate) actions: Vec<(Duration, Action)>,
    by_name: HashMap<String, Ev>,
}

/// What the handler takes and returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One event.
    Single,
    /// A batch that ends as one.
    Batch,
    /// A batch with a result for each.
    Each,
}

/// How often something goes wrong, in a thousand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    pub(crate) lose_ack: u32,
    pub(crate) lose_answer: u32,
    pub(crate) refuse: u32,
    pub(crate) silence: u32,
    /// The longest that a delivery, or a confirm, is under way, in milliseconds.
    pub(crate) latency: u64,
    /// Deliveries are reordered across keys.
    pub(crate) shuffle: bool,
}

/// One event and what its handler will do.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) key: usize,
    pub(crate) number: u64,
    /// When it is published; the next ones of its key with the same time are on their way together with it.
    pub(crate) at: Duration,
    /// How many runs fail for now; `u32::MAX` for all.
    pub(crate) fails: u32,
    pub(crate) style: Style,
    /// It is rejected after those.
    pub(crate) rejected: bool,
    pub(crate) takes: Duration,
    pub(crate) outputs: u32,
    /// Its payload cannot be decoded.
    pub(crate) bad: bool,
}

/// How a run fails.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    Error,
    Panic,
    Hang,
    RetryAfter(Duration),
}

/// What is done to the instances; each takes the one at this place, as far as there are some.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    Start,
    /// The process is killed.
    Kill(usize),
    /// It is dropped without a drain.
    Drop(usize),
    Drain(usize, Duration),
    /// Its connection is cut for a moment.
    Cut(usize),
    /// All instances lose their leases.
    LoseLeases,
    /// One loses some of its leases; where keys have an order, all.
    LoseSome(usize),
}

/// How an event ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Handled,
    /// Dead-lettered with this reason after this many failed runs.
    Dead(DeadLetterReason, u32),
}

impl Plan {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let r = &mut rng;
        let keyed = r.u32(0..4) > 0;
        let outage = (r.u32(0..6) == 0).then(|| {
            let from = r.u64(500..1500);
            (ms(from), ms(from + r.u64(2000..60_000)))
        });
        let in_order = if keyed { r.u32(0..4) > 0 } else { r.bool() };
        let kind = match r.u32(0..10) {
            _ if outage.is_some() => Kind::Single,
            0 | 1 => Kind::Batch,
            2 | 3 => Kind::Each,
            _ => Kind::Single,
        };
        let attempts = if outage.is_some() { 6 } else { r.u32(1..6) };
        let backoff = match r.u32(0..3) {
            _ if outage.is_some() => (ms(200), ms(3_000)),
            0 if !in_order => (Duration::from_secs(600), Duration::from_secs(1200)),
            1 => (ms(1), ms(50)),
            _ => (ms(100), ms(2_000)),
        };
        // An outage must be told from a few that fail: there is room for all, and no lane is crowded.
        let concurrency = if outage.is_some() { r.usize(4..9) } else { r.usize(1..5) };
        let quiet = r.u32(0..4) == 0;
        let mut rate = |max: u32| if quiet || r.bool() { 0 } else { r.u32(0..max) };
        let rates = Rates {
            lose_ack: rate(100),
            lose_answer: rate(100),
            refuse: rate(150),
            silence: rate(20),
            latency: u64::from(rate(60)),
            shuffle: rate(2) == 1,
        };
        let mut plan = Self {
            seed,
            slots: if keyed && outage.is_none() && r.bool() { r.u32(2..5) } else { 1 },
            redelivery_delay: [ms(0), ms(0), ms(300), ms(2000)][r.usize(0..4)],
            ordered_repeats: r.bool(),
            ordering: if keyed { Ordering::Key } else { Ordering::None },
            in_order,
            attempts,
            backoff,
            kind,
            concurrency,
            max_in_flight: if outage.is_some() { 256 } else { concurrency + r.usize(0..16) },
            batch: r.usize(1..6),
            linger: if r.bool() { ms(0) } else { ms(r.u64(1..100)) },
            outage,
            rates,
            refusals: Vec::new(),
            events: Vec::new(),
            actions: Vec::new(),
            by_name: HashMap::new(),
        };
        plan.draw_events(r);
        if !quiet {
            plan.draw_faults(r);
        }
        plan.by_name = plan.events.iter().enumerate().map(|(ev, event)| (event.name.clone(), ev)).collect();
        plan
    }

    fn draw_events(&mut self, r: &mut Rng) {
        let keys = if self.outage.is_some() { r.usize(6..9) } else { r.usize(3..7) };
        let count = r.usize(30..60);
        let mut numbers = vec![0; keys];
        let mut at = vec![0; keys];
        let troubled = self.outage.is_none();
        for n in 0..count {
            // The first few of an outage's events are one for each key.
            let key = if self.outage.is_some() { n % keys } else { r.usize(0..keys) };
            if r.bool() {
                at[key] += r.u64(0..400);
            }
            let mut event = Planned {
                name: format!("k{key}/{}", numbers[key]),
                key,
                number: numbers[key],
                at: ms(at[key]),
                fails: 0,
                style: Style::Error,
                rejected: false,
                takes: ms([0, 0, r.u64(0..10), r.u64(0..300), r.u64(0..1800)][r.usize(0..5)]),
                outputs: [0, 0, 1, 2, 3][r.usize(0..5)],
                bad: troubled && r.u32(0..40) == 0,
            };
            if troubled && r.u32(0..3) == 0 {
                event.style =
                    [Style::Error, Style::Panic, Style::Hang, Style::RetryAfter(ms(r.u64(0..500)))][r.usize(0..4)];
                event.rejected = r.u32(0..4) == 0;
                event.fails = match r.u32(0..4) {
                    _ if self.kind != Kind::Single && event.rejected => 0,
                    0 if !event.rejected => u32::MAX,
                    _ => r.u32(0..self.attempts),
                };
            }
            numbers[key] += 1;
            self.events.push(event);
        }
    }

    fn draw_faults(&mut self, r: &mut Rng) {
        for _ in 0..r.usize(0..3) {
            let from = r.u64(0..ACTIVE - 2000);
            self.refusals.push((ms(from), ms(from + r.u64(100..2000))));
        }
        let mut deaths = 0;
        for _ in 0..r.usize(0..10) {
            let at = ms(r.u64(0..ACTIVE));
            let which = r.usize(0..3);
            let action = match r.u32(0..10) {
                // Fewer than would make anything suspect of more than a few crashes.
                0 | 1 if deaths < 6 => {
                    deaths += 1;
                    Action::Kill(which)
                }
                2 if deaths < 6 => {
                    deaths += 1;
                    Action::Drop(which)
                }
                3 => Action::Drain(which, ms(r.u64(0..4000))),
                4 => Action::Cut(which),
                5 => Action::LoseLeases,
                6 | 7 => Action::LoseSome(which),
                _ => Action::Start,
            };
            self.actions.push((at, action));
        }
        self.actions.sort_by_key(|(at, _)| *at);
    }

    /// The settings and the events, for a reader.
    pub(crate) fn head(&self) -> String {
        let events = self.events.iter().map(|event| format!("\n  {event:?}")).collect::<String>();
        let settings = (self.ordering, self.slots, self.redelivery_delay, self.ordered_repeats, self.kind);
        let retries = (self.in_order, self.attempts, self.backoff);
        let limits = (self.concurrency, self.max_in_flight, self.batch, self.linger);
        let faults = (self.rates, &self.refusals, self.outage);
        format!(
            "ordering, slots, redelivery delay, ordered repeats, kind: {settings:?}\n\
             retries in order, attempts, back-off: {retries:?}\n\
             concurrency, in flight, batch, linger: {limits:?}\n\
             faults, refusals, outage: {faults:?}\nactions: {:?}{events}",
            self.actions
        )
    }

    pub(crate) fn retry(&self) -> RetryPolicy {
        let policy = RetryPolicy::default().attempts(self.attempts).backoff(self.backoff.0, self.backoff.1);
        let policy = if self.outage.is_some() { policy.without_jitter() } else { policy };
        let policy = policy.hold_at_most(Duration::from_secs(24 * 3600));
        if self.in_order { policy.in_order() } else { policy.aside() }
    }

    pub(crate) fn ev(&self, name: &str) -> Option<Ev> {
        self.by_name.get(name).copied()
    }

    /// Whether nothing comes twice, so that it can be told what core must take for an outage.
    pub(crate) fn is_steady(&self) -> bool {
        let Rates { lose_ack, lose_answer, silence, .. } = self.rates;
        self.actions.is_empty() && lose_ack + lose_answer + silence == 0
    }

    /// How many instances end without a drain.
    pub(crate) fn deaths(&self) -> usize {
        self.actions.iter().filter(|(_, action)| matches!(action, Action::Kill(_) | Action::Drop(_))).count()
    }

    /// The events of each key, in order.
    pub(crate) fn by_key(&self) -> Vec<Vec<Ev>> {
        let keys = self.events.iter().map(|event| event.key + 1).max().unwrap_or(0);
        let of = |key| (0..self.events.len()).filter(|ev| self.events[*ev].key == key).collect();
        (0..keys).map(of).collect()
    }

    /// When nothing goes wrong any more.
    pub(crate) fn calm(&self) -> Duration {
        self.outage.map_or(ms(ACTIVE), |(_, to)| to.max(ms(ACTIVE)))
    }

    pub(crate) fn is_down(&self, now: Duration) -> bool {
        self.outage.is_some_and(|(from, to)| from <= now && now < to)
    }

    pub(crate) fn refuses(&self, now: Duration) -> bool {
        self.refusals.iter().any(|(from, to)| *from <= now && now < *to)
    }

    pub(crate) fn fate(&self, ev: Ev) -> Fate {
        let event = &self.events[ev];
        if event.bad {
            Fate::Dead(DeadLetterReason::Undecodable, 0)
        } else if event.fails >= self.attempts {
            Fate::Dead(DeadLetterReason::Exhausted, self.attempts)
        } else if event.rejected {
            Fate::Dead(DeadLetterReason::Rejected, event.fails + 1)
        } else {
            Fate::Handled
        }
    }

    /// The payloads of what its handler returns.
    pub(crate) fn outputs(&self, ev: Ev) -> impl Iterator<Item = super::service::Done> {
        let event = &self.events[ev];
        // Two of three are equal.
        (0..event.outputs).map(|n| super::service::Done { name: event.name.clone(), index: n.min(1) })
    }
}

pub(crate) const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
