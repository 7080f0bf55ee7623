//! An outage is not a poison: when everything fails for now, the subscription waits instead of dead-lettering.

use crate::{Backoff, MessageId};
use std::collections::{HashSet, VecDeque};
use std::time::Duration;
use tokio::time::Instant;

/// When a subscription takes failures for an outage of something its handlers depend on.
///
/// When the last `runs` runs, of at least `events` different events, all failed transiently (but for what had failed before the
/// last success already: that is poisoned, whatever else works), it pauses: it probes with
/// one event at a time, with back-off, and counts no attempts, until one succeeds. A database that is down for an hour
/// leaves no dead letters behind.
///
/// The default: 10 runs of at least 5 events; probes after 100 ms, then doubling up to 800 ms, so that full speed is back
/// within a second of the dependency's return.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutagePolicy {
    runs: usize,
    events: usize,
    probes: Backoff,
}

impl Default for OutagePolicy {
    fn default() -> Self {
        let probes = Backoff::new(Duration::from_millis(100), Duration::from_millis(800)).without_jitter();
        Self { runs: 10, events: 5, probes }
    }
}

impl OutagePolicy {
    /// After how many failed runs in a row, of how many different events at least. With one event, a poisoned event in a
    /// quiet subscription is taken for an outage, and is retried for ever.
    #[must_use]
    pub fn after(mut self, runs: usize, events: usize) -> Self {
        (self.runs, self.events) = (runs.max(1), events.clamp(1, runs.max(1)));
        self
    }

    /// How long between probes: `first`, then doubling up to `max`.
    #[must_use]
    pub fn probe_every(mut self, first: Duration, max: Duration) -> Self {
        self.probes = Backoff::new(first, max).without_jitter();
        self
    }
}

/// The last runs of one subscription, and the outage they amount to.
#[derive(Debug)]
pub(crate) struct Outage {
    /// `None` never pauses.
    policy: Option<OutagePolicy>,
    /// The events whose runs failed since the last success, the newest last; at most `runs`.
    failed: VecDeque<MessageId>,
    /// All events that failed since then for the first time, or once more; at most [`KNOWN`].
    since: HashSet<MessageId>,
    has_passed: bool,
    probing: Option<Probing>,
}

/// More than can fail without an outage, unless nothing ever succeeds.
const KNOWN: usize = 1_024;

#[derive(Debug)]
struct Probing {
    next: Instant,
    failures: u32,
}

/// What a run has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Nothing,
    /// An outage has begun.
    Began,
    /// It goes on.
    GoesOn,
    /// It is over.
    Over,
}

impl Outage {
    pub(crate) fn new(policy: Option<OutagePolicy>) -> Self {
        Self { policy, failed: VecDeque::new(), since: HashSet::new(), has_passed: false, probing: None }
    }

    /// A run has succeeded, or failed for good, which says that what it depends on is there.
    pub(crate) fn passed(&mut self) -> Told {
        self.failed.clear();
        self.since.clear();
        self.has_passed = true;
        if self.probing.take().is_some() { Told::Over } else { Told::Nothing }
    }

    /// A run of `event` has failed for now; `again` if it is not its first.
    pub(crate) fn failed(&mut self, event: &MessageId, again: bool, now: Instant) -> Told {
        let Some(policy) = self.policy else { return Told::Nothing };
        if let Some(probing) = &mut self.probing {
            // Runs that had begun before are no probes.
            if now >= probing.next {
                probing.failures = probing.failures.saturating_add(1);
                probing.next = now + policy.probes.delay(probing.failures);
            }
            return Told::GoesOn;
        }
        if self.is_poisoned(event, again) {
            return Told::Nothing;
        }
        if self.failed.len() == policy.runs {
            self.failed.pop_front();
        }
        self.failed.push_back(event.clone());
        let all = self.failed.len() == policy.runs;
        if !all || self.failed.iter().collect::<HashSet<_>>().len() < policy.events {
            return Told::Nothing;
        }
        self.probing = Some(Probing { next: now + policy.probes.delay(1), failures: 1 });
        Told::Began
    }

    /// Whether an event that fails had done so before the last success: then it proves nothing. A few of a hundred that always
    /// fail would be taken for an outage otherwise, whenever their retries have the time to themselves.
    fn is_poisoned(&mut self, event: &MessageId, again: bool) -> bool {
        if again && self.has_passed && !self.since.contains(event) {
            return true;
        }
        if self.since.len() < KNOWN {
            self.since.insert(event.clone());
        }
        false
    }

    /// When the next probe may start; `None` without an outage.
    pub(crate) fn next_probe(&self) -> Option<Instant> {
        self.probing.as_ref().map(|probing| probing.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> MessageId {
        format!("{n}").into()
    }

    #[tokio::test(start_paused = true)]
    async fn many_failures_of_many_events_are_an_outage_until_one_passes() {
        let mut outage = Outage::new(Some(OutagePolicy::default()));
        let now = Instant::now();
        assert!((0..9).all(|n| outage.failed(&id(n % 5), n >= 5, now) == Told::Nothing));
        assert_eq!(outage.failed(&id(1), true, now), Told::Began);
        let probe = outage.next_probe().unwrap();
        assert_eq!(probe, now + Duration::from_millis(100));
        assert_eq!((outage.failed(&id(2), true, now), outage.next_probe()), (Told::GoesOn, Some(probe)), "not a probe");
        assert_eq!(
            (outage.failed(&id(2), true, probe), outage.next_probe()),
            (Told::GoesOn, Some(probe + Duration::from_millis(200)))
        );
        assert_eq!((outage.passed(), outage.next_probe()), (Told::Over, None));
        assert_eq!(outage.passed(), Told::Nothing);
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_poisoned_events_are_no_outage() {
        let mut outage = Outage::new(Some(OutagePolicy::default()));
        assert!((0..1000).all(|n| outage.failed(&id(n % 4), n >= 4, Instant::now()) == Told::Nothing));
        let mut off = Outage::new(None);
        assert!((0..1000).all(|n| off.failed(&id(n), false, Instant::now()) == Told::Nothing));
        let mut mixed = Outage::new(Some(OutagePolicy::default()));
        for n in 0..1000 {
            assert_eq!(mixed.failed(&id(n), false, Instant::now()), Told::Nothing);
            if n % 9 == 8 {
                mixed.passed();
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_had_failed_before_the_last_success_is_no_evidence() {
        let mut outage = Outage::new(Some(OutagePolicy::default()));
        let now = Instant::now();
        assert!((0..8).all(|n| outage.failed(&id(n), false, now) == Told::Nothing));
        outage.passed();
        assert!((0..1000).all(|n| outage.failed(&id(n % 8), true, now) == Told::Nothing), "they are poisoned");
        assert!((0..9).all(|n| outage.failed(&id(10 + n % 5), n >= 5, now) == Told::Nothing));
        assert_eq!(outage.failed(&id(10), true, now), Told::Began, "all that is new fails too");
    }
}
