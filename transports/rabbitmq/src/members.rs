//! Who else reads a subscription whose keys have owners, and who owns which slot.
//!
//! Ownership itself is the broker's: each queue has a single active consumer, the one with the highest priority, and it
//! hands over only what the former has settled. Nobody is told who is active, so instances greet each other with their
//! priorities, from which each knows. An instance that should have a slot takes it by a higher priority.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tidings_core::transport::{Role, share_slots};
use tokio::time::Instant;

/// How often an instance says that it lives.
pub(crate) const GREETING: Duration = Duration::from_secs(1);
/// After how long without a word it is taken for dead.
const SILENCE: Duration = Duration::from_millis(4_500);

/// What an instance says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    instance: u64,
    /// The priority of its consumer, by slot.
    priorities: Vec<i64>,
    /// It goes.
    farewell: bool,
}

/// This instance among the others.
#[derive(Debug)]
pub(crate) struct Members {
    instance: u64,
    /// Of this instance, by slot; lower for those that come later.
    priorities: Vec<i64>,
    others: BTreeMap<u64, (Vec<i64>, Instant)>,
}

/// What is to be done after something has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// The others do not know it yet.
    pub(crate) greet: bool,
}

impl Members {
    /// Joins at this time of day, in microseconds: who came first has the higher priority.
    pub(crate) fn join(slots: usize, now_us: i64) -> Self {
        Self { instance: fastrand::u64(..), priorities: vec![-now_us; slots], others: BTreeMap::new() }
    }

    pub(crate) fn priority(&self, slot: usize) -> i64 {
        self.priorities.get(slot).copied().unwrap_or_default()
    }

    pub(crate) fn greeting(&self, farewell: bool) -> Greeting {
        Greeting { instance: self.instance, priorities: self.priorities.clone(), farewell }
    }

    /// Somebody greets.
    pub(crate) fn heard(&mut self, greeting: Greeting, now: Instant) -> Changed {
        if greeting.instance == self.instance || greeting.priorities.len() != self.priorities.len() {
            return Changed::default();
        }
        if greeting.farewell {
            self.others.remove(&greeting.instance);
            return Changed::default();
        }
        let known = self.others.insert(greeting.instance, (greeting.priorities, now));
        Changed { greet: known.is_none() }
    }

    /// Forgets who has been silent for long.
    pub(crate) fn forget(&mut self, now: Instant) {
        self.others.retain(|_, (_, heard)| *heard + SILENCE > now);
    }

    /// Whether the broker prefers this instance: it owns the slot, or will once its owner has settled what it has.
    fn is_first(&self, slot: usize) -> bool {
        let own = (self.priority(slot), self.instance);
        self.others
            .iter()
            .all(|(instance, (priorities, _))| priorities.get(slot).is_none_or(|priority| (*priority, *instance) < own))
    }

    pub(crate) fn role(&self) -> Role {
        let slots: Vec<_> =
            (0..self.priorities.len()).filter(|slot| self.is_first(*slot)).map(|slot| slot as u32).collect();
        if slots.is_empty() { Role::StandBy } else { Role::Active { slots } }
    }

    /// The slots that are this instance's share and another's now.
    pub(crate) fn due(&self) -> Vec<usize> {
        if self.priorities.len() == 1 {
            return Vec::new();
        }
        let mut instances: Vec<_> = self.others.keys().copied().chain([self.instance]).collect();
        instances.sort_unstable();
        let shares = share_slots(self.priorities.len(), &instances);
        let own =
            |slot: &usize| shares.get(*slot).copied().flatten().and_then(|n| instances.get(n)) == Some(&self.instance);
        (0..self.priorities.len()).filter(own).filter(|slot| !self.is_first(*slot)).collect()
    }

    /// Takes a slot, with a priority above all others.
    pub(crate) fn take(&mut self, slot: usize, now_us: i64) {
        let highest = self.others.values().filter_map(|(priorities, _)| priorities.get(slot)).max();
        let above = highest.map_or(i64::MIN, |highest| highest.saturating_add(1));
        if let Some(priority) = self.priorities.get_mut(slot) {
            *priority = now_us.max(above);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meet(members: &mut [Members]) {
        let greetings: Vec<_> = members.iter().map(|member| member.greeting(false)).collect();
        for member in members {
            for greeting in &greetings {
                member.heard(greeting.clone(), Instant::now());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_slot_stays_with_who_came_first() {
        let mut members = [Members::join(1, 1000), Members::join(1, 2000)];
        assert!(members[0].heard(members[1].greeting(false), Instant::now()).greet, "it is new");
        meet(&mut members);
        assert_eq!(members[0].role(), Role::Active { slots: vec![0] });
        assert_eq!((members[1].role(), members[1].due()), (Role::StandBy, vec![]));
        let farewell = members[0].greeting(true);
        members[1].heard(farewell, Instant::now());
        assert_eq!(members[1].role(), Role::Active { slots: vec![0] });
        meet(&mut members);
        tokio::time::advance(SILENCE).await;
        members[1].forget(Instant::now());
        assert_eq!(members[1].role(), Role::Active { slots: vec![0] });
    }

    #[tokio::test(start_paused = true)]
    async fn slots_are_shared_evenly_and_again_when_somebody_comes() {
        for _ in 0..50 {
            let mut members = vec![Members::join(8, 1000)];
            for round in 0..4 {
                meet(&mut members);
                for member in &mut members {
                    member.due().into_iter().for_each(|slot| member.take(slot, 5_000 + round));
                }
                meet(&mut members);
                let owned = |member: &Members| match member.role() {
                    Role::Active { slots } => slots,
                    Role::StandBy => Vec::new(),
                };
                let mut all: Vec<_> = members.iter().flat_map(owned).collect();
                all.sort_unstable();
                assert_eq!(all, (0..8).collect::<Vec<_>>(), "each slot has one owner");
                let counts: Vec<_> = members.iter().map(|member| owned(member).len()).collect();
                assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
                members.push(Members::join(8, 2000 + round));
            }
        }
    }
}
