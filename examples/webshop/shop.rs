//! The shop: places orders, and follows what becomes of them.

use std::io::{self, IsTerminal};
use std::num::NonZeroU32;
use std::time::{Duration, Instant, SystemTime};

use tidings::prelude::*;
use tidings::{BoxError, MessageId};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Interval;

use crate::events::{FollowUpScheduled, InvoiceCreated, LabelPrinted, OrderPlaced};
use crate::flags::Flags;
use crate::journal::{Journal, Noted};
use crate::ledger::{Ledger, Outcome, Step};
use crate::orders::{self, BadLine, NOWHERE, Order};
use crate::text;

/// How many customers are at the checkout at a time.
const CHECKOUTS: usize = 64;

/// The subscriber: what the others answer is entered in the ledger.
pub(crate) fn service(ledger: &Ledger, journal: &Journal) -> Service {
    Service::new("shop")
        .state(ledger.clone())
        .state(journal.at("shop"))
        .on(async |_: InvoiceCreated, State(ledger): State<Ledger>, message: Metadata, _: Noted| {
            enter(&ledger, &message, Step::Invoiced);
        })
        .on(async |_: LabelPrinted, State(ledger): State<Ledger>, message: Metadata, _: Noted| {
            enter(&ledger, &message, Step::Shipped);
        })
        .on(async |_: FollowUpScheduled, State(ledger): State<Ledger>, message: Metadata, _: Noted| {
            enter(&ledger, &message, Step::FollowedUp);
        })
}

fn enter(ledger: &Ledger, Metadata(message): &Metadata, step: Step) {
    if let Some(order) = &message.correlation_id {
        ledger.enter(order, step, Outcome::Done);
    }
}

/// How the publishing went.
#[derive(Default)]
pub(crate) struct Placed {
    /// How long each customer waited for the broker's confirmation.
    pub(crate) delays: Vec<Duration>,
    /// Why orders could not be placed.
    pub(crate) refused: Vec<String>,
    /// The input could not be read to its end.
    pub(crate) broke_off: bool,
}

/// The publisher.
pub(crate) struct Checkout {
    bus: Bus,
    ledger: Ledger,
    lines: mpsc::Receiver<Result<Order, BadLine>>,
    poison: usize,
    rate: Option<Interval>,
    open: JoinSet<tidings::Result<Duration>>,
    placed: Placed,
}

impl Checkout {
    pub(crate) fn new(bus: Bus, ledger: Ledger, flags: &Flags) -> io::Result<Self> {
        let (lines, rate) = (read(flags)?, flags.rate.map(every));
        Ok(Self { bus, ledger, lines, rate, poison: flags.poison, open: JoinSet::new(), placed: Placed::default() })
    }

    /// Places all orders of the input; the first `poison` of them are poisoned.
    pub(crate) async fn place_all(mut self) -> Result<Placed, BoxError> {
        let mut poisoned = Vec::new();
        while poisoned.len() < self.poison {
            let there = poisoned.len();
            let none = || format!("--poison {}: there are only {there} orders to poison", self.poison);
            poisoned.push(next(&mut self.lines, &mut self.placed).await.ok_or_else(none)?);
        }
        for mut order in poisoned {
            NOWHERE.clone_into(&mut order.customer.country);
            self.place(order, true).await;
        }
        while let Some(order) = next(&mut self.lines, &mut self.placed).await {
            self.place(order, false).await;
        }
        while let Some(confirmed) = self.open.join_next().await {
            self.placed.count(confirmed?);
        }
        Ok(self.placed)
    }

    /// Lets one customer to the checkout, when there is room.
    async fn place(&mut self, order: Order, is_poisoned: bool) {
        if let Some(rate) = &mut self.rate {
            rate.tick().await;
        }
        while self.open.len() >= CHECKOUTS {
            if let Some(Ok(confirmed)) = self.open.join_next().await {
                self.placed.count(confirmed);
            }
        }
        self.open.spawn(place(self.bus.clone(), self.ledger.clone(), order, is_poisoned));
    }
}

/// Publishes an order, and says how long that took.
async fn place(bus: Bus, ledger: Ledger, order: Order, is_poisoned: bool) -> tidings::Result<Duration> {
    // An id of our own, because the first answer may be here before the confirmation.
    let id = MessageId::new(SystemTime::now());
    ledger.open(id.clone(), order.order_id.clone(), is_poisoned);
    let start = Instant::now();
    let published = bus.publish_with(&OrderPlaced { order }, PublishOptions::default().with_id(id.clone())).await;
    published.inspect_err(|_| ledger.strike(&id))?;
    Ok(start.elapsed())
}

impl Placed {
    fn count(&mut self, confirmed: tidings::Result<Duration>) {
        match confirmed {
            Ok(delay) => self.delays.push(delay),
            Err(error) => self.refused.push(error.to_string()),
        }
    }
}

/// The next order; bad lines on the way to it are reported.
async fn next(lines: &mut mpsc::Receiver<Result<Order, BadLine>>, placed: &mut Placed) -> Option<Order> {
    loop {
        match lines.recv().await? {
            Ok(order) => return Some(order),
            Err(bad) => {
                placed.broke_off |= bad.is_last;
                // The live progress may stand in this line.
                let erase = if io::stdout().is_terminal() { "\r\x1b[K" } else { "" };
                eprintln!("{erase}{}", text::clean(&bad.to_string()));
            }
        }
    }
}

/// Reads the orders on a thread of its own, which may wait for standard input for ever.
fn read(flags: &Flags) -> io::Result<mpsc::Receiver<Result<Order, BadLine>>> {
    let orders = orders::open(&flags.orders.clone().unwrap_or_default())?;
    let orders: Box<dyn Iterator<Item = _> + Send> = match flags.count {
        Some(count) => Box::new(orders.exactly(count.get())),
        None => Box::new(orders),
    };
    let (sender, lines) = mpsc::channel(CHECKOUTS);
    std::thread::spawn(move || {
        for order in orders {
            if sender.blocking_send(order).is_err() {
                break; // the shop has closed
            }
        }
    });
    Ok(lines)
}

fn every(rate: NonZeroU32) -> Interval {
    tokio::time::interval(Duration::from_secs(1) / rate.get())
}
