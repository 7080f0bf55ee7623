//! The shop: places orders, and keeps account of what became of each.

use crate::events::{FollowUpScheduled, InvoiceCreated, LabelPrinted, OrderPlaced};
use crate::orders::{BadLine, Order};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidings::prelude::*;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// How many orders are being placed at a time.
const CHECKOUTS: usize = 32;

/// What became of each order.
#[derive(Clone, Default)]
pub(crate) struct Ledger(Arc<(Mutex<Accounts>, Notify)>);

#[derive(Default)]
pub(crate) struct Accounts {
    placed: HashSet<String>,
    shipped: HashSet<String>,
    invoiced: HashSet<String>,
    followed_up: HashSet<String>,
    checkouts: Vec<Duration>,
    refused: u64,
    input_broke_off: bool,
}

impl Ledger {
    pub(crate) fn accounts(&self) -> MutexGuard<'_, Accounts> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note<R>(&self, change: impl FnOnce(&mut Accounts) -> R) {
        change(&mut self.accounts());
        self.0.1.notify_one();
    }

    /// Something has changed, or a while has passed.
    pub(crate) async fn changed(&self) {
        let _ = tokio::time::timeout(Duration::from_millis(200), self.0.1.notified()).await;
    }
}

impl Accounts {
    pub(crate) fn placed(&self) -> usize {
        self.placed.len()
    }

    /// How much has happened in all; it grows while anything goes on.
    pub(crate) fn steps(&self) -> usize {
        self.placed.len() + self.shipped.len() + self.invoiced.len() + self.followed_up.len()
    }

    /// Orders that are placed and lack something, beside those that are `dead` for a service: what they lack.
    pub(crate) fn open(&self, dead: &HashMap<&'static str, HashSet<String>>) -> Vec<(String, &'static str)> {
        let done = [("logistics", &self.shipped), ("billing", &self.invoiced), ("crm", &self.followed_up)];
        let mut open = Vec::new();
        for (service, done) in done {
            let dead = |order: &String| dead.get(service).is_some_and(|dead| dead.contains(order));
            open.extend(
                self.placed.iter().filter(|order| !done.contains(*order) && !dead(order)).map(|o| (o.clone(), service)),
            );
        }
        open.sort();
        open
    }

    pub(crate) fn summary(&self) -> String {
        let (placed, shipped) = (self.placed.len(), self.shipped.len());
        let (invoiced, followed_up) = (self.invoiced.len(), self.followed_up.len());
        format!("{placed} orders placed: {shipped} shipped, {invoiced} invoiced, {followed_up} followed up")
    }

    /// How long customers waited for "thank you", sorted.
    pub(crate) fn checkouts(&self) -> Vec<Duration> {
        let mut checkouts = self.checkouts.clone();
        checkouts.sort_unstable();
        checkouts
    }

    /// Whether all of the input was placed, malformed lines excepted.
    pub(crate) fn is_complete(&self) -> bool {
        self.refused == 0 && !self.input_broke_off
    }
}

/// The shop's own subscriptions: it keeps account of what the others answer.
pub(crate) fn accounting(ledger: Ledger) -> Service {
    Service::new("shop")
        .state(ledger)
        .on(async |label: LabelPrinted, State(ledger): State<Ledger>| {
            ledger.note(|accounts| accounts.shipped.insert(label.order_id));
        })
        .on(async |invoice: InvoiceCreated, State(ledger): State<Ledger>| {
            ledger.note(|accounts| accounts.invoiced.insert(invoice.order_id));
        })
        .on(async |follow_up: FollowUpScheduled, State(ledger): State<Ledger>| {
            ledger.note(|accounts| accounts.followed_up.insert(follow_up.order_id));
        })
}

/// Places all orders, many at a time, at most `rate` a second; the first `poison` of them in a currency that is none.
pub(crate) async fn place_orders(
    bus: Bus,
    ledger: Ledger,
    orders: Box<dyn Iterator<Item = Result<Order, BadLine>> + Send>,
    (poison, rate): (usize, Option<u32>),
) {
    let mut pace = rate.map(|rate| tokio::time::interval(Duration::from_secs(1) / rate));
    let (mut checkouts, mut poisoned) = (JoinSet::new(), 0);
    for order in orders {
        let mut order = match order {
            Ok(order) => order,
            Err(bad) => {
                eprintln!("{bad}");
                ledger.note(|accounts| accounts.input_broke_off |= bad.is_last);
                continue;
            }
        };
        if poisoned < poison {
            order.currency = "XXX".into();
            poisoned += 1;
        }
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        if checkouts.len() == CHECKOUTS {
            checkouts.join_next().await;
        }
        checkouts.spawn(check_out(bus.clone(), ledger.clone(), order));
    }
    checkouts.join_all().await;
}

/// The customer waits until the order is confirmed, and for nothing else.
async fn check_out(bus: Bus, ledger: Ledger, order: Order) {
    let (order_id, start) = (order.order_id.clone(), Instant::now());
    match bus.publish(&OrderPlaced { order }).await {
        Ok(_) => ledger.note(|accounts| {
            accounts.checkouts.push(start.elapsed());
            accounts.placed.insert(order_id);
        }),
        Err(error) => {
            eprintln!("order {order_id} could not be placed: {error}");
            ledger.note(|accounts| accounts.refused += 1);
        }
    }
}
