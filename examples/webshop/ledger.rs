//! Which orders were placed and what became of each: the proof that none is lost.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tidings::MessageId;

/// What has to become of an order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Step {
    Invoiced,
    Shipped,
    FollowedUp,
}

impl Step {
    /// The step that a service takes.
    pub(crate) fn of(service: &str) -> Option<Self> {
        match service {
            "billing" => Some(Self::Invoiced),
            "logistics" => Some(Self::Shipped),
            "crm" => Some(Self::FollowedUp),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Outcome {
    Done,
    DeadLettered,
}

struct Account {
    order_id: String,
    is_poisoned: bool,
    placed: Instant,
    steps: [Option<Outcome>; 3],
    accounted_after: Option<Duration>,
}

/// The accounts of all orders, by the id of the message that told of the order: everything that follows from an order
/// carries it as its correlation id. Events of earlier runs, which a real broker may still have, are not in it.
#[derive(Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Accounts>>);

#[derive(Default)]
struct Accounts {
    by_id: HashMap<MessageId, Account>,
    open: u64,
}

/// The ledger in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Balance {
    pub(crate) placed: u64,
    pub(crate) accounted: u64,
    pub(crate) invoiced: u64,
    pub(crate) shipped: u64,
    pub(crate) followed_up: u64,
    /// Orders in a dead letter.
    pub(crate) dead_lettered: u64,
    /// Orders that ended as they should: good ones everywhere, poisoned ones in one dead letter, of Billing.
    pub(crate) as_expected: u64,
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { placed, accounted, invoiced, shipped, followed_up, dead_lettered, .. } = self;
        write!(f, "{placed} orders placed, {accounted} accounted for: {invoiced} invoiced, {shipped} shipped, ")?;
        write!(f, "{followed_up} followed up, {dead_lettered} dead-lettered.")
    }
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An order is about to be placed.
    pub(crate) fn open(&self, id: MessageId, order_id: String, is_poisoned: bool) {
        let placed = Instant::now();
        let account = Account { order_id, is_poisoned, placed, steps: [None; 3], accounted_after: None };
        let mut accounts = self.lock();
        accounts.by_id.insert(id, account);
        accounts.open += 1;
    }

    /// An order could not be placed.
    pub(crate) fn strike(&self, id: &MessageId) {
        let mut accounts = self.lock();
        let struck = accounts.by_id.remove(id);
        if struck.is_some_and(|account| account.accounted_after.is_none()) {
            accounts.open -= 1;
        }
    }

    /// Enters what became of an order. Entering it again changes nothing: events may come twice.
    pub(crate) fn enter(&self, id: &MessageId, step: Step, outcome: Outcome) {
        let mut accounts = self.lock();
        let Some(account) = accounts.by_id.get_mut(id) else { return };
        let entered = account.steps[step as usize].get_or_insert(outcome);
        if outcome == Outcome::Done {
            *entered = outcome; // a dead letter was mended
        }
        if account.accounted_after.is_none() && account.steps.iter().all(Option::is_some) {
            account.accounted_after = Some(account.placed.elapsed());
            accounts.open -= 1;
        }
    }

    /// The poisoned orders were mended: from now on they are to end like the others.
    pub(crate) fn mend(&self) {
        self.lock().by_id.values_mut().for_each(|account| account.is_poisoned = false);
    }

    pub(crate) fn knows(&self, id: &MessageId) -> bool {
        self.lock().by_id.contains_key(id)
    }

    /// How many orders are placed, and how many of these are not accounted for.
    pub(crate) fn standing(&self) -> (u64, u64) {
        let accounts = self.lock();
        (accounts.by_id.len() as u64, accounts.open)
    }

    pub(crate) fn balance(&self) -> Balance {
        let accounts = self.lock();
        let count =
            |is: &dyn Fn(&Account) -> bool| accounts.by_id.values().filter(|account| is(account)).count() as u64;
        let took = |step: Step| count(&|account| account.steps[step as usize] == Some(Outcome::Done));
        Balance {
            placed: accounts.by_id.len() as u64,
            accounted: count(&|account| account.accounted_after.is_some()),
            invoiced: took(Step::Invoiced),
            shipped: took(Step::Shipped),
            followed_up: took(Step::FollowedUp),
            dead_lettered: count(&|account| account.steps.contains(&Some(Outcome::DeadLettered))),
            as_expected: count(&Account::is_as_expected),
        }
    }

    /// From being placed to being accounted for.
    pub(crate) fn delays(&self) -> Vec<Duration> {
        self.lock().by_id.values().filter_map(|account| account.accounted_after).collect()
    }

    /// The ids of some orders that did not end as they should.
    pub(crate) fn suspects(&self, most: usize) -> Vec<String> {
        let accounts = self.lock();
        let suspects = accounts.by_id.values().filter(|account| !account.is_as_expected());
        suspects.take(most).map(|account| account.order_id.clone()).collect()
    }
}

impl Account {
    fn is_as_expected(&self) -> bool {
        let billing = if self.is_poisoned { Outcome::DeadLettered } else { Outcome::Done };
        self.steps == [billing, Outcome::Done, Outcome::Done].map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Outcome::{DeadLettered, Done};
    use Step::{FollowedUp, Invoiced, Shipped};

    fn ledger(orders: &[(&str, bool)]) -> Ledger {
        let ledger = Ledger::default();
        orders.iter().for_each(|(id, is_poisoned)| ledger.open((*id).into(), (*id).to_owned(), *is_poisoned));
        ledger
    }

    #[test]
    fn an_order_is_accounted_for_when_all_three_steps_have_ended() {
        let ledger = ledger(&[("good", false), ("poisoned", true)]);
        for (step, billing) in [(Shipped, Done), (FollowedUp, Done), (Invoiced, DeadLettered)] {
            assert_eq!(ledger.standing(), (2, 2));
            ledger.enter(&"good".into(), step, Done);
            ledger.enter(&"poisoned".into(), step, billing);
        }
        assert_eq!(ledger.standing(), (2, 0));
        let balance = ledger.balance();
        assert_eq!((balance.accounted, balance.as_expected, balance.dead_lettered), (2, 2, 1));
        assert_eq!((balance.invoiced, balance.shipped, balance.followed_up), (1, 2, 2));
        assert_eq!(ledger.delays().len(), 2);
    }

    #[test]
    fn what_comes_twice_or_from_elsewhere_changes_nothing() {
        let ledger = ledger(&[("good", false)]);
        for _ in 0..3 {
            ledger.enter(&"good".into(), Invoiced, Done);
            ledger.enter(&"of an earlier run".into(), Invoiced, Done);
        }
        assert_eq!((ledger.standing(), ledger.balance().invoiced), ((1, 1), 1));
        assert!(!ledger.knows(&"of an earlier run".into()));
    }

    #[test]
    fn a_good_order_in_a_dead_letter_is_accounted_for_but_not_as_expected() {
        let ledger = ledger(&[("good", false)]);
        for (step, outcome) in [(Invoiced, Done), (Shipped, DeadLettered), (FollowedUp, Done)] {
            ledger.enter(&"good".into(), step, outcome);
        }
        let balance = ledger.balance();
        assert_eq!((balance.accounted, balance.dead_lettered, balance.as_expected), (1, 1, 0));
        assert_eq!(ledger.suspects(5), ["good"]);
    }

    #[test]
    fn an_order_that_could_not_be_placed_is_none() {
        let ledger = ledger(&[("refused", false)]);
        ledger.strike(&"refused".into());
        assert_eq!(ledger.standing(), (0, 0));
    }
}
