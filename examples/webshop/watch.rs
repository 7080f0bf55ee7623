//! Watches a run until every order is accounted for, and tells how it went.

use std::io::{self, IsTerminal, Write};
use std::pin::pin;
use std::time::Duration;

use tidings::prelude::*;
use tidings::transport::DeadLetter;
use tidings::{BoxError, header};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep_until};

use crate::analytics::Totals;
use crate::crew::Crew;
use crate::events::OrderPlaced;
use crate::journal::{Journal, display};
use crate::ledger::{Ledger, Outcome, Step};
use crate::report::{self, Delays, Progress, Standing};
use crate::shop::{Checkout, Placed};
use crate::text;

/// The publisher, on its way.
type Placing = JoinHandle<Result<Placed, BoxError>>;

/// How often the watch looks around.
const LOOK: Duration = Duration::from_millis(50);
/// Without any progress for so long, the run is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A run and all that is known of it.
pub(crate) struct Watch {
    pub(crate) crew: Crew,
    pub(crate) ledger: Ledger,
    pub(crate) journal: Journal,
    /// How many orders there will be, if that is known.
    pub(crate) expected: Option<u64>,
    /// How many of them are poisoned.
    pub(crate) poison: u64,
    /// How long Billing is out.
    pub(crate) outage: Duration,
    /// Billing's instances, until they start.
    pub(crate) billing: Vec<Service>,
    /// One instance of each service is to be killed half-way.
    pub(crate) kills: bool,
    /// Dead letters are to be mended at the end.
    pub(crate) redrives: bool,
    /// A new service that all orders are replayed through at the end.
    pub(crate) replay: Option<(Service, Totals)>,
    /// Dead letters of this run's orders.
    pub(crate) letters: Vec<(&'static str, DeadLetter)>,
}

/// Why a run has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Complete,
    Stalled,
    Interrupted,
}

impl Watch {
    /// Runs until every order is accounted for; `true` if all ended as they should.
    pub(crate) async fn run(mut self, checkout: Checkout) -> Result<bool, BoxError> {
        let mut checkout = tokio::spawn(checkout.place_all());
        let mut placed = None;
        let end = self.watch(&mut checkout, &mut placed).await?;
        checkout.abort();
        self.conclude(end, placed.unwrap_or_default()).await
    }

    async fn watch(&mut self, checkout: &mut Placing, placed: &mut Option<Placed>) -> Result<End, BoxError> {
        let (mut look, mut interrupt) = (interval(LOOK), pin!(tokio::signal::ctrl_c()));
        let start = Instant::now();
        let opening = start + self.outage;
        let mut progress = Progress::new(io::stdout().is_terminal());
        let mut moved = (opening, Standing::default());
        let end = loop {
            tokio::select! {
                done = &mut *checkout, if placed.is_none() => *placed = Some(done??),
                () = sleep_until(opening), if !self.billing.is_empty() => self.start_billing().await?,
                _ = &mut interrupt => break End::Interrupted,
                _ = look.tick() => {}
            }
            let standing = self.look_around().await?;
            show(progress.show(start.elapsed(), &standing));
            if standing != moved.1 {
                moved = (opening.max(Instant::now()), standing);
            }
            self.kill_half_way(&standing, placed.is_some());
            let is_settled = self.ledger.standing().1 == 0 && standing.waiting == 0;
            match (is_settled, placed.is_some()) {
                (true, true) => break End::Complete,
                (true, false) => {} // an input may be as slow as it likes
                (false, _) if moved.0.elapsed() > PATIENCE => break End::Stalled,
                (false, _) => {}
            }
        };
        show(Some(progress.finish(start.elapsed(), &self.standing())));
        Ok(end)
    }

    async fn start_billing(&mut self) -> tidings::Result<()> {
        let billing = std::mem::take(&mut self.billing);
        self.crew.start_prepared("billing", billing).await
    }

    /// Half-way is when half of all that is placed has been handled.
    fn kill_half_way(&mut self, standing: &Standing, is_placed: bool) {
        if self.kills && is_placed && standing.handled > standing.placed && self.billing.is_empty() {
            self.kills = false;
            self.crew.kill_one_of_each();
        }
    }

    fn standing(&self) -> Standing {
        let (placed, _) = self.ledger.standing();
        let mut standing = Standing { placed, expected: self.expected, ..Standing::default() };
        for row in self.crew.rows(placed) {
            standing.handled += row.handled;
            standing.retried += row.retried;
            standing.dead_lettered += row.dead_lettered;
            standing.waiting += row.waiting;
        }
        standing
    }

    /// Where the run stands; new dead letters are read and entered in the ledger.
    async fn look_around(&mut self) -> tidings::Result<Standing> {
        let standing = self.standing();
        // What other processes dead-letter is seen at the broker only.
        if standing.dead_lettered > self.letters.len() as u64 || self.crew.is_spread() {
            self.read_dead_letters().await?;
        }
        Ok(standing)
    }

    async fn read_dead_letters(&mut self) -> tidings::Result<()> {
        self.letters = self.crew.dead_letters().await?;
        let ledger = &self.ledger;
        self.letters.retain(|(_, letter)| {
            let order = letter.message.correlation_id.as_ref().unwrap_or(&letter.message.id);
            ledger.knows(order)
        });
        for (service, letter) in &self.letters {
            if let Some(step) = Step::of(service) {
                ledger.enter(&letter.message.id, step, Outcome::DeadLettered);
            }
        }
        Ok(())
    }

    /// Shows what happened, sends everyone home, and judges.
    async fn conclude(mut self, end: End, placed: Placed) -> Result<bool, BoxError> {
        self.read_dead_letters().await?;
        if self.redrives && end == End::Complete {
            self.redrive().await?;
        }
        let replayed = self.replay().await?;
        let complaints = self.complaints(end, &placed);
        println!("\n{}", report::service_table(&self.crew.rows(self.ledger.standing().0)));
        println!("{}", report::delay_table(&self.delays(placed.delays)));
        println!("{}", report::sequence_diagram(&self.journal.hops(), &self.crew.troubles()));
        self.letters.iter().for_each(show_letter);
        print!("{replayed}");
        println!("{}", self.ledger.balance());
        complaints.iter().for_each(|complaint| eprintln!("webshop: {complaint}"));
        self.crew.go_home().await?;
        Ok(complaints.is_empty())
    }

    /// Mends each dead letter, sends it back to Billing alone, and waits for its invoice.
    async fn redrive(&mut self) -> Result<(), BoxError> {
        let Some(bus) = self.crew.bus("billing") else { return Ok(()) };
        let letters = bus.dead_letters("billing.shop.order.placed").await?;
        for letter in letters.list(None, usize::MAX).await? {
            let payload = letters.show(letter.position).await?.payload;
            let mut event: OrderPlaced = serde_json::from_slice(&payload)?;
            event.order.customer.country = "NL".to_owned();
            letters.redrive_edited(letter.position, serde_json::to_vec(&event)?).await?;
            println!("redriven to Billing: order {}, now with a country", event.order.order_id);
        }
        self.ledger.mend();
        self.poison = 0;
        let (start, mut look) = (Instant::now(), interval(LOOK));
        while !self.ledger.suspects(1).is_empty() && start.elapsed() < PATIENCE {
            look.tick().await;
        }
        Ok(self.read_dead_letters().await?)
    }

    /// Replays all orders through a service that has never seen them.
    async fn replay(&mut self) -> tidings::Result<String> {
        let (Some((service, totals)), Some(bus)) = (self.replay.take(), self.crew.bus("shop")) else {
            return Ok(String::new());
        };
        let mut replay = service.replay(bus, ReplayFrom::Beginning).await?;
        replay.finished().await?;
        Ok(format!("replayed {} orders through a new service:\n{}\n", totals.orders(), totals.show(3)))
    }

    /// Why this run proves nothing, if so.
    fn complaints(&self, end: End, placed: &Placed) -> Vec<String> {
        let balance = self.ledger.balance();
        let (letters, unexpected) = (self.letters.len() as u64, balance.placed - balance.as_expected);
        let missing = self.expected.unwrap_or(balance.placed).saturating_sub(balance.placed);
        let refused = placed.refused.first().map(String::as_str).unwrap_or_default();
        let complaints = [
            (end == End::Interrupted, "interrupted".to_owned()),
            (end == End::Stalled, format!("nothing has moved for {} s", PATIENCE.as_secs())),
            (placed.broke_off, "there may be orders behind the last line that could be read".to_owned()),
            (!refused.is_empty(), format!("{} orders could not be placed: {refused}", placed.refused.len())),
            (balance.placed == 0, "no order was placed".to_owned()),
            (missing > 0, format!("{missing} orders were not placed")),
            (unexpected > 0, format!("{unexpected} orders did not end well: {}", self.ledger.suspects(5).join(", "))),
            (letters != self.poison, format!("{letters} dead letters where {} were expected", self.poison)),
        ];
        complaints.into_iter().filter_map(|(is_so, complaint)| is_so.then_some(complaint)).collect()
    }

    fn delays(&self, publishing: Vec<Duration>) -> Vec<Delays> {
        let mut delays = vec![Delays { event: "publish until confirmed".to_owned(), delays: publishing }];
        delays.extend(self.journal.delays());
        delays.push(Delays { event: "order until accounted for".to_owned(), delays: self.ledger.delays() });
        delays
    }
}

fn show(text: Option<String>) {
    if let Some(text) = text {
        print!("{text}");
        // Nobody may be looking any more.
        let _ = io::stdout().flush();
    }
}

fn show_letter((service, letter): &(&'static str, DeadLetter)) {
    let get = |name| letter.message.headers.get_str(name).unwrap_or("unknown");
    let (event, reason, error) = (&letter.message.event_type, get(header::REASON), get(header::ERROR));
    println!("dead letter of {}: {event} {reason}: {}", display(service), text::clean(error));
}
