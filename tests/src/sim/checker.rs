//! Whether a history keeps the promises.

use super::history::{Answer, End as RunEnd, Entry, Sent, To, Told, What};
use super::plan::{Ev, Fate, Kind, Plan};
use super::world::End;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;
use tidings::transport::{DeadLetter, Ordering};
use tidings::{DeadLetterReason, header};

/// What the walk through a history has found so far.
struct Walk<'a> {
    plan: &'a Plan,
    wrong: Vec<String>,
    now: Duration,
    confirmed: HashSet<Ev>,
    /// By event.
    of: HashMap<Ev, About>,
    /// By instance.
    instances: HashMap<usize, Instance>,
    /// By run: its instance and how each event is to be counted.
    runs: HashMap<usize, Run>,
    /// By instance and event: what may settle it, and what has.
    supply: HashMap<(usize, Ev), Supply>,
    /// Ids of what was returned, by cause.
    outputs: HashMap<Ev, BTreeSet<String>>,
    /// Which index of which event was taken by the broker, by id.
    taken: HashMap<Ev, BTreeMap<String, u32>>,
    /// What was sent without an answer that says whether it was taken.
    unsure: HashSet<(Option<usize>, u8, String, u32)>,
    /// What an instance was handed, by position, since it last succeeded there.
    fresh: HashSet<(usize, u64)>,
    /// What has stepped aside.
    aside: HashSet<Ev>,
    /// What was dead-lettered first before an outage.
    buried: HashSet<(usize, Ev)>,
    /// The events of each key, in order, and how many of those are over, all before the first that is not.
    of_key: Vec<Vec<Ev>>,
    over: HashMap<usize, usize>,
}

#[derive(Default)]
struct About {
    /// What may make it be handled again, with a count that is less: a settlement that did not arrive, a second publish.
    credits: u32,
    /// Runs that have failed and were not counted, because of an outage.
    uncounted: u32,
    begun: BTreeMap<u32, u32>,
    failed: BTreeMap<u32, u32>,
    /// By attempt and position: a run failed without being counted, so that the next one is its repeat.
    repeats: HashSet<(u32, u64)>,
    /// Attempts that have begun unmarked.
    unmarked: HashSet<u32>,
    ended: u32,
    successes: u32,
    dead: bool,
}

#[derive(Default)]
struct Instance {
    outage: bool,
    stopped: Option<Duration>,
    going: HashSet<usize>,
    /// Which event failed for now, of the last runs since one passed.
    last: VecDeque<Ev>,
    /// All of them since then, but for what had failed before.
    since: HashSet<Ev>,
    has_passed: bool,
    /// What has passed and is to be acked.
    passed: HashMap<Ev, u32>,
    /// The last failure, until it is known whether it was counted.
    pending: Option<(Ev, (u32, u64))>,
}

impl Instance {
    fn success(&mut self) {
        self.last.clear();
        self.since.clear();
        self.has_passed = true;
    }
}

struct Run {
    by: usize,
    /// Which attempt, of what has which position.
    attempt: Option<(u32, u64)>,
}

#[derive(Default)]
struct Supply {
    successes: u32,
    dead: u32,
    aside: u32,
    acks: u32,
    /// Indices of what was returned, confirmed, by id.
    confirmed: BTreeMap<String, u32>,
}

/// What is wrong; nothing, if all promises were kept.
pub(crate) fn check(plan: &Plan, entries: &[Entry], end: &End) -> Vec<String> {
    let confirmed = entries.iter().filter_map(|entry| match entry.what {
        What::Published { ev, confirmed: true } => Some(ev),
        _ => None,
    });
    let mut walk = Walk {
        plan,
        wrong: Vec::new(),
        now: Duration::ZERO,
        confirmed: confirmed.collect(),
        of: HashMap::new(),
        instances: HashMap::new(),
        runs: HashMap::new(),
        supply: HashMap::new(),
        outputs: HashMap::new(),
        taken: HashMap::new(),
        unsure: HashSet::new(),
        fresh: HashSet::new(),
        aside: HashSet::new(),
        buried: HashSet::new(),
        of_key: plan.by_key(),
        over: HashMap::new(),
    };
    for entry in entries {
        walk.now = entry.at;
        walk.step(&entry.what);
    }
    walk.finish(end);
    walk.wrong
}

impl Walk<'_> {
    fn wrong(&mut self, ev: Ev, what: &str) {
        self.wrong.push(format!("{:?}: {}: {what}", self.now, self.plan.events[ev].name));
    }

    fn of(&mut self, ev: Ev) -> &mut About {
        self.of.entry(ev).or_default()
    }

    fn step(&mut self, what: &What) {
        match what {
            What::Published { .. } | What::Said(_) => {}
            What::Handed { by, place, .. } => drop(self.fresh.insert((*by, place.1))),
            What::Stopped { by, .. } => self.instances.entry(*by).or_default().stopped = Some(self.now),
            What::Outage { by, on } => self.outage(*by, *on),
            What::Began { by, run, evs, told } => {
                self.count_pending(*by);
                self.begin(*by, *run, evs);
                for ev in evs {
                    self.check_order(*ev, evs);
                }
                let attempt = told.map(|told| (told.attempt, told.position));
                self.runs.insert(*run, Run { by: *by, attempt });
                if let (Some(told), [ev]) = (told, &evs[..]) {
                    self.check_begin(*ev, *told);
                    if !self.fresh.contains(&(*by, told.position)) {
                        self.wrong(*ev, &format!("is run twice by [{by}] instead of being settled with its copy"));
                    }
                }
            }
            What::Ended { by, run, ends } => {
                self.count_pending(*by);
                self.end(*run, ends);
            }
            What::Settled { by, ev, ack, live, lost } => {
                self.count_pending(*by);
                self.settled(*by, *ev, (*ack, *live, *lost));
            }
            What::Sent { by, post, taken, answer } => {
                if let Some(by) = by {
                    self.count_pending(*by);
                }
                self.sent(*by, post, *taken, *answer);
            }
            What::Confirmed { by, post } => {
                if let Some(by) = by {
                    self.count_pending(*by);
                    self.confirm(*by, post);
                }
            }
        }
    }

    // ---- Runs ----

    fn begin(&mut self, by: usize, run: usize, evs: &[Ev]) {
        let instance = self.instances.entry(by).or_default();
        let probes = instance.outage && !instance.going.is_empty();
        let stopped = instance.stopped;
        instance.going.insert(run);
        if probes {
            self.wrong(evs[0], "begins beside another in an outage");
        }
        // A drain begins when its task has its turn.
        if stopped.is_some_and(|stopped| stopped < self.now) {
            self.wrong(evs[0], &format!("begins in [{by}], which has been stopped"));
        }
    }

    /// In the order of its key: what was confirmed before it has ended, or goes before it in the same batch.
    fn check_order(&mut self, ev: Ev, batch: &[Ev]) {
        let event = &self.plan.events[ev];
        if self.plan.ordering != Ordering::Key {
            return;
        }
        let (key, number) = (event.key, event.number);
        let before = batch.iter().position(|other| *other == ev).unwrap_or(0);
        let mut over = self.over.get(&key).copied().unwrap_or(0);
        while self.of_key[key].get(over).is_some_and(|older| !self.confirmed.contains(older) || self.is_over(*older)) {
            over += 1;
        }
        self.over.insert(key, over);
        let older = self.of_key[key].iter().skip(over).take_while(|older| self.plan.events[**older].number < number);
        let open = older
            .copied()
            .find(|older| self.confirmed.contains(older) && !batch[..before].contains(older) && !self.is_over(*older));
        if let Some(open) = open {
            let open = self.plan.events[open].name.clone();
            self.wrong(ev, &format!("begins, or is acked, before {open} has ended"));
        }
    }

    /// Whether newer events of its key may begin: it is handled or dead, or, if retries step aside, has failed once.
    fn is_over(&self, ev: Ev) -> bool {
        let Some(about) = self.of.get(&ev) else { return false };
        about.dead || (about.successes > 0 && self.has_outputs(ev)) || (!self.plan.in_order && self.aside.contains(&ev))
    }

    fn has_outputs(&self, ev: Ev) -> bool {
        let wanted: Vec<u32> = self.plan.outputs(ev).map(|done| done.index).collect();
        let mut taken: Vec<u32> = self.taken.get(&ev).map_or_else(Vec::new, |taken| taken.values().copied().collect());
        taken.sort_unstable();
        is_part(&wanted, &taken)
    }

    fn check_begin(&mut self, ev: Ev, told: Told) {
        let Told { attempt, duplicate, position } = told;
        // Without an order, instances may handle the one that is marked before the one that is not.
        let ordered = self.plan.ordering == Ordering::Key;
        let about = self.of(ev);
        let begun = about.begun.entry(attempt).or_insert(0);
        *begun += 1;
        let first = if ordered { *begun == 1 } else { duplicate || about.unmarked.insert(attempt) };
        let repeated = !about.repeats.contains(&(attempt, position)) && !first;
        let failed = attempt == 1 || about.failed.get(&(attempt - 1)).is_some_and(|failed| *failed > 0);
        if repeated && !duplicate {
            self.wrong(ev, &format!("attempt {attempt} begins again, unmarked"));
        }
        if !failed {
            self.wrong(ev, &format!("attempt {attempt} begins, but attempt {} has not failed", attempt - 1));
        }
    }

    fn end(&mut self, run: usize, ends: &[(Ev, RunEnd)]) {
        let Some(Run { by, attempt }) = self.runs.get(&run) else { return };
        let (by, attempt) = (*by, *attempt);
        self.instances.entry(by).or_default().going.remove(&run);
        for (ev, end) in ends {
            self.of(*ev).ended += 1;
            let failed = matches!(end, RunEnd::Transient | RunEnd::TimedOut);
            match end {
                RunEnd::Success => {
                    self.of(*ev).successes += 1;
                    if let Some((_, position)) = attempt {
                        self.fresh.remove(&(by, position));
                    }
                    self.supply.entry((by, *ev)).or_default().successes += 1;
                }
                RunEnd::Dropped => self.of(*ev).credits += 1,
                _ => {}
            }
            if let Some(attempt) = attempt.filter(|_| failed || *end == RunEnd::Rejected) {
                // Known when core has had its turn, before anything else of this instance.
                let instance = self.instances.entry(by).or_default();
                if *end == RunEnd::Rejected {
                    *self.of(*ev).failed.entry(attempt.0).or_insert(0) += 1;
                } else {
                    instance.pending = Some((*ev, attempt));
                }
            }
            let instance = self.instances.entry(by).or_default();
            if *end == RunEnd::Success {
                *instance.passed.entry(*ev).or_insert(0) += 1;
            }
            let again = attempt.is_some_and(|(attempt, _)| attempt > 1);
            let poisoned = again && instance.has_passed && !instance.since.contains(ev);
            if failed && !instance.outage && !poisoned {
                instance.since.insert(*ev);
                instance.last.push_back(*ev);
                if instance.last.len() > 10 {
                    instance.last.pop_front();
                }
            }
        }
    }

    /// Counts the last failure of an instance, or not, in an outage.
    fn count_pending(&mut self, by: usize) {
        let instance = self.instances.entry(by).or_default();
        let outage = instance.outage;
        let Some((ev, attempt)) = instance.pending.take() else { return };
        let about = self.of(ev);
        if outage {
            about.uncounted += 1;
            about.repeats.insert(attempt);
        } else {
            *about.failed.entry(attempt.0).or_insert(0) += 1;
            if self.plan.outage.is_some() && self.plan.is_steady() && self.has_outage(by) {
                self.wrong(ev, &format!("is counted by [{by}] as failed, but this is an outage"));
            }
        }
    }

    /// Whether the last 10 runs, of at least 5 different events, failed for now, without what had failed before one passed.
    fn has_outage(&self, by: usize) -> bool {
        let last = self.instances.get(&by).map(|instance| &instance.last);
        last.is_some_and(|last| last.len() == 10 && last.iter().collect::<HashSet<_>>().len() >= 5)
    }

    fn outage(&mut self, by: usize, on: bool) {
        let instance = self.instances.entry(by).or_default();
        instance.outage = on;
        if on {
            // What runs now is no probe.
            instance.going.clear();
            if self.plan.is_steady() && !self.has_outage(by) {
                self.wrong.push(format!("{:?}: [{by}] tells of an outage, and there is none", self.now));
            }
        } else {
            instance.success();
        }
    }

    // ---- Settlements ----

    fn settled(&mut self, by: usize, ev: Ev, (ack, live, lost): (bool, bool, bool)) {
        if !ack || !live || lost {
            self.of(ev).credits += 1;
        }
        let instance = self.instances.entry(by).or_default();
        if let Some(passed) = instance.passed.get_mut(&ev).filter(|passed| **passed > 0) {
            *passed -= 1;
            instance.success();
        }
        if !ack {
            // Only what may have ended instances again and again makes room for itself.
            let stopped = self.instances.get(&by).is_some_and(|instance| instance.stopped.is_some());
            if live && !stopped && self.plan.deaths() < 4 {
                self.wrong(ev, &format!("is given back by [{by}], which goes on and has its lease"));
            }
            return;
        }
        let single = self.plan.kind != Kind::Batch;
        let supply = self.supply.entry((by, ev)).or_default();
        supply.acks += 1;
        let by_success = supply.acks > supply.dead + supply.aside;
        let enough = supply.acks <= supply.successes + supply.dead + supply.aside;
        let mut confirmed: Vec<u32> = supply.confirmed.values().copied().collect();
        confirmed.sort_unstable();
        let wanted: Vec<u32> = self.plan.outputs(ev).map(|done| done.index).collect();
        if !enough {
            self.wrong(ev, &format!("is acked by [{by}] without having been handled, sent aside or buried"));
        } else if live && by_success && !is_part(&wanted, &confirmed) {
            self.wrong(
                ev,
                &format!("is acked by [{by}] before what its handler returned was confirmed: {confirmed:?}"),
            );
        }
        if live && by_success && enough {
            self.check_order(ev, &[]);
        }
        if single && live && by_success && confirmed.len() > wanted.len() {
            self.wrong(ev, "a repeated run returned other ids");
        }
    }

    fn sent(&mut self, by: Option<usize>, post: &Sent, taken: bool, answer: Answer) {
        let ev = post.ev;
        let place = (by, post.to as u8, post.id.clone(), post.attempts);
        if self.unsure.contains(&place) && !post.repeat && post.to != To::Dead {
            self.wrong(ev, &format!("{post:?} is sent again without knowing whether the first arrived, unmarked"));
        }
        match answer {
            Answer::Lost | Answer::Never => drop(self.unsure.insert(place)),
            Answer::Confirms => drop(self.unsure.remove(&place)),
            Answer::Refused => {}
        }
        if taken && (answer != Answer::Confirms || post.repeat) {
            self.of(ev).credits += 1;
        }
        if let Some(by) = by.filter(|by| post.to == To::Dead && !self.buried.contains(&(*by, ev))) {
            if self.instances.get(&by).is_some_and(|instance| instance.outage) {
                self.wrong(ev, "is dead-lettered in an outage");
            }
            self.buried.insert((by, ev));
        }
        match post.to {
            To::Topic => {}
            To::Output => {
                self.outputs.entry(ev).or_default().insert(post.id.clone());
                if taken {
                    self.taken.entry(ev).or_default().insert(post.id.clone(), post.index);
                }
            }
            To::Aside => {
                if taken {
                    self.aside.insert(ev);
                }
            }
            To::Dead => self.of(ev).dead |= taken,
        }
        if post.to == To::Aside || post.to == To::Dead {
            let counted = post.attempts == 0
                || self.of(ev).failed.get(&post.attempts).is_some_and(|failed| *failed > 0)
                || self.plan.kind != Kind::Single;
            if !counted {
                self.wrong(ev, &format!("{:?} says {} attempts, that many have not failed", post.to, post.attempts));
            }
        }
    }

    fn confirm(&mut self, by: usize, post: &Sent) {
        let supply = self.supply.entry((by, post.ev)).or_default();
        match post.to {
            To::Topic => {}
            To::Output => drop(supply.confirmed.insert(post.id.clone(), post.index)),
            To::Aside => supply.aside += 1,
            To::Dead => supply.dead += 1,
        }
    }

    // ---- The end ----

    fn finish(&mut self, end: &End) {
        let (stored, retained, dead) = end.stored;
        if stored != retained + dead || end.in_flight > 0 {
            let in_flight = end.in_flight;
            self.wrong.push(format!("not settled: {in_flight} in flight, {} bytes stored", stored - retained - dead));
        }
        let mut letters: HashMap<Ev, Vec<&DeadLetter>> = HashMap::new();
        for letter in &end.letters {
            match self.plan.ev(&letter.message.id.to_string()) {
                Some(ev) => letters.entry(ev).or_default().push(letter),
                None => self.wrong.push(format!("an unknown dead letter: {letter:?}")),
            }
        }
        for ev in 0..self.plan.events.len() {
            let letters = letters.remove(&ev).unwrap_or_default();
            self.check_end(ev, &letters);
            self.check_counts(ev);
            self.check_outputs(ev);
        }
    }

    fn check_end(&mut self, ev: Ev, letters: &[&DeadLetter]) {
        let mut fate = self.plan.fate(ev);
        if self.plan.outage.is_some() && !letters.is_empty() {
            // Too few events failed to tell an outage.
            fate = Fate::Dead(DeadLetterReason::Exhausted, self.plan.attempts);
        }
        let (confirmed, successes) = (self.confirmed.contains(&ev), self.of(ev).successes);
        if confirmed && letters.is_empty() && (successes == 0 || fate != Fate::Handled) {
            self.wrong(ev, &format!("is lost: it should be {fate:?}"));
        }
        if confirmed && fate == Fate::Handled && !self.has_outputs(ev) {
            self.wrong(ev, "what its handler returned is lost");
        }
        if letters.len() as u32 > 1 + self.of(ev).credits {
            self.wrong(ev, &format!("has {} dead letters", letters.len()));
        }
        for letter in letters {
            let told = letter.message.headers.get_str(header::REASON).and_then(DeadLetterReason::from_name);
            let attempts = letter.message.headers.get_str(header::ATTEMPTS).and_then(|n| n.parse().ok());
            if told.zip(attempts).map(|(reason, attempts)| Fate::Dead(reason, attempts)) != Some(fate) {
                self.wrong(ev, &format!("is dead by {told:?} after {attempts:?}, should be {fate:?}"));
            }
            let bad = &letter.message.payload[..] == b"{";
            if bad != self.plan.events[ev].bad {
                self.wrong(ev, "its dead letter does not carry what was published");
            }
        }
    }

    /// No more runs of an attempt than failures before it, and what went wrong, account for.
    fn check_counts(&mut self, ev: Ev) {
        let about = self.of(ev);
        let allowed = |attempt: u32| match attempt {
            1 => 1,
            _ => about.failed.get(&(attempt - 1)).copied().unwrap_or(0),
        };
        let more = about.credits + about.uncounted;
        let over = about.begun.iter().find(|(attempt, begun)| **begun > allowed(**attempt) + more);
        if let Some((attempt, begun)) = over {
            let why = format!("attempt {attempt} was begun {begun} times, {more} accounted for");
            self.wrong(ev, &why);
        }
    }

    /// However often it was handled, what its handler returned has the same ids.
    fn check_outputs(&mut self, ev: Ev) {
        let ids = self.outputs.get(&ev).map_or(0, BTreeSet::len);
        let wanted = self.plan.outputs(ev).count();
        if self.plan.kind != Kind::Batch && ids > wanted {
            self.wrong(ev, &format!("{ids} ids for the {wanted} events that its handler returns"));
        }
    }
}

/// Whether `some`, ascending, is a part of `all`, ascending.
fn is_part(some: &[u32], all: &[u32]) -> bool {
    let mut all = all.iter();
    some.iter().all(|one| all.any(|other| other == one))
}
