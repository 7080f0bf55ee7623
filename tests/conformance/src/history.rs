//! What the instances of a service do with each order, and whether that was right: order per key, nothing twice
//! without a mark, nothing lost.

use crate::env::{PATIENCE, eventually};
use crate::events::Order;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tidings::handler::{Delivered, State};
use tidings_core::{HandlerError, Service, SubscriptionConfig};
use tokio::time::sleep;

/// How a run of the handler goes.
pub(crate) enum Act {
    Pass,
    After(Duration),
    Fail,
    Reject,
    /// It never ends by itself.
    Hang,
}

/// How the run of an order goes, in its how-manieth attempt.
type Plan = dyn Fn(&Order, u32) -> Act + Send + Sync;

/// One instance's place in a history: the state of its handler.
#[derive(Clone)]
pub(crate) struct Desk {
    who: &'static str,
    history: History,
    plan: Arc<Plan>,
    attempts: u32,
}

/// The runs of all instances of one subscription. Clones are the same.
#[derive(Clone)]
pub(crate) struct History(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    ordered: bool,
    lanes: BTreeMap<String, Lane>,
    /// Instances that have died: what runs there runs no more.
    dead: HashSet<&'static str>,
    repeats: usize,
    wrong: Vec<String>,
}

#[derive(Default)]
struct Lane {
    begun: BTreeSet<u64>,
    passed: BTreeSet<u64>,
    gave_up: BTreeSet<u64>,
    /// Who runs which of its orders now.
    running: Vec<(&'static str, u64)>,
    /// Who has run any of its orders.
    owners: BTreeSet<&'static str>,
    /// The orders that have passed, in that order.
    sequence: Vec<u64>,
}

impl Lane {
    fn is_settled(&self, number: u64) -> bool {
        self.passed.contains(&number) || self.gave_up.contains(&number)
    }

    fn settled(&self) -> usize {
        self.passed.union(&self.gave_up).count()
    }
}

impl Inner {
    fn begin(&mut self, who: &'static str, order: &Order, delivered: &Delivered) {
        let Order { customer, number } = order;
        let lane = self.lanes.entry(customer.clone()).or_default();
        let marked = delivered.possible_duplicate || delivered.attempt > 1;
        let before: Vec<_> = (0..*number).filter(|n| !lane.is_settled(*n)).collect();
        if !lane.begun.insert(*number) {
            self.repeats += 1;
            if !marked {
                self.wrong.push(format!("{order:?} came again unmarked, to {who}"));
            }
        } else if self.ordered && !before.is_empty() {
            self.wrong.push(format!("{order:?} overtook {before:?}, in {who}"));
        }
        let others = lane.running.iter().find(|(other, _)| !self.dead.contains(other));
        if let Some(other) = others.filter(|_| self.ordered) {
            self.wrong.push(format!("{order:?} began in {who} while {other:?} ran"));
        }
        lane.running.push((who, *number));
        lane.owners.insert(who);
    }

    fn end(&mut self, who: &'static str, order: &Order, end: End) {
        let lane = self.lanes.entry(order.customer.clone()).or_default();
        if let Some(at) = lane.running.iter().position(|run| *run == (who, order.number)) {
            lane.running.remove(at);
        }
        match end {
            End::Open => {}
            End::GaveUp => drop(lane.gave_up.insert(order.number)),
            End::Passed => {
                lane.passed.insert(order.number);
                lane.sequence.push(order.number);
            }
        }
    }

    fn settled(&self) -> usize {
        self.lanes.values().map(Lane::settled).sum()
    }

    fn runs(&self) -> impl Iterator<Item = &(&'static str, u64)> {
        self.lanes.values().flat_map(|lane| &lane.running)
    }
}

impl History {
    /// In which events of a key are to be handled in their order.
    pub(crate) fn ordered() -> Self {
        Self(Arc::new(Mutex::new(Inner { ordered: true, ..Inner::default() })))
    }

    /// In which they may be handled in any order.
    pub(crate) fn unordered() -> Self {
        Self(Arc::default())
    }

    /// The place of one instance, which gives up after `attempts`.
    pub(crate) fn desk(
        &self,
        who: &'static str,
        attempts: u32,
        plan: impl Fn(&Order, u32) -> Act + Send + Sync + 'static,
    ) -> Desk {
        Desk { who, history: self.clone(), plan: Arc::new(plan), attempts }
    }

    /// The place of an instance in which everything passes.
    pub(crate) fn passing(&self, who: &'static str) -> Desk {
        self.desk(who, 1, |_, _| Act::Pass)
    }

    /// Waits until `count` different orders have passed or were given up, as they should.
    pub(crate) async fn settled(&self, count: usize) {
        let enough = || async { self.0.lock().settled() >= count || !self.0.lock().wrong.is_empty() };
        let waiting = tokio::time::timeout(PATIENCE - Duration::from_secs(1), eventually("settled", enough)).await;
        self.check();
        assert!(waiting.is_ok(), "only {} of {count} were handled: {}", self.count(), self.tell());
    }

    /// Waits until `who` hangs in as many runs.
    pub(crate) async fn running(&self, who: &'static str, count: usize) {
        let runs = || self.0.lock().runs().filter(|(other, _)| *other == who).count();
        eventually(&format!("{count} run in {who}"), || async { runs() >= count }).await;
    }

    /// That all was right so far.
    pub(crate) fn check(&self) {
        let wrong = &self.0.lock().wrong;
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// How many orders came again.
    pub(crate) fn repeats(&self) -> usize {
        self.0.lock().repeats
    }

    /// How many orders have passed or were given up.
    pub(crate) fn count(&self) -> usize {
        self.0.lock().settled()
    }

    /// The orders of a customer that have begun, were given up, and have passed (in that order).
    pub(crate) fn begun(&self, customer: &str) -> Vec<u64> {
        self.0.lock().lanes.get(customer).into_iter().flat_map(|lane| lane.begun.iter().copied()).collect()
    }

    pub(crate) fn passed(&self, customer: &str) -> Vec<u64> {
        self.0.lock().lanes.get(customer).map(|lane| lane.sequence.clone()).unwrap_or_default()
    }

    pub(crate) fn gave_up(&self) -> BTreeSet<(String, u64)> {
        let inner = self.0.lock();
        let of = |(key, lane): (&String, &Lane)| lane.gave_up.iter().map(|n| (key.clone(), *n)).collect::<Vec<_>>();
        inner.lanes.iter().flat_map(of).collect()
    }

    /// By key, which instances have run any of its orders.
    pub(crate) fn owners(&self) -> Vec<BTreeSet<&'static str>> {
        self.0.lock().lanes.values().map(|lane| lane.owners.clone()).collect()
    }

    /// How many keys an instance has run orders of.
    pub(crate) fn keys_of(&self, who: &str) -> usize {
        self.owners().iter().filter(|owners| owners.contains(who)).count()
    }

    fn tell(&self) -> String {
        let inner = self.0.lock();
        let of = |(key, lane): (&String, &Lane)| format!("{key}: {} of {}", lane.settled(), lane.begun.len());
        inner.lanes.iter().map(of).collect::<Vec<_>>().join(", ")
    }
}

#[derive(Clone, Copy)]
enum End {
    /// It failed, or was cut off.
    Open,
    Passed,
    GaveUp,
}

/// A run, which ends when this is dropped.
struct Run<'a> {
    desk: &'a Desk,
    order: &'a Order,
    end: End,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.desk.history.0.lock().end(self.desk.who, self.order, self.end);
    }
}

impl Desk {
    /// Runs one order as planned.
    pub(crate) async fn run(&self, order: &Order, delivered: &Delivered) -> Result<(), HandlerError> {
        self.history.0.lock().begin(self.who, order, delivered);
        let mut run = Run { desk: self, order, end: End::Open };
        match (self.plan)(order, delivered.attempt) {
            Act::Pass => tokio::task::yield_now().await,
            Act::After(time) => sleep(time).await,
            Act::Hang => pending().await,
            Act::Fail => {
                run.end = if delivered.attempt >= self.attempts { End::GaveUp } else { End::Open };
                return Err("not now".into());
            }
            Act::Reject => {
                run.end = End::GaveUp;
                return Err(HandlerError::reject("never"));
            }
        }
        run.end = End::Passed;
        Ok(())
    }

    /// The service `billing` with this as its only handler.
    pub(crate) fn service(&self, config: SubscriptionConfig) -> Service {
        Service::new("billing").state(self.clone()).on_with(config, handle)
    }

    pub(crate) fn who(&self) -> &'static str {
        self.who
    }

    /// What still runs there, runs no more.
    pub(crate) fn bury(&self) {
        self.history.0.lock().dead.insert(self.who);
    }
}

async fn handle(order: Order, delivered: Delivered, State(desk): State<Desk>) -> Result<(), HandlerError> {
    desk.run(&order, &delivered).await
}
