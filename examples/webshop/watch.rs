//! Watches a run until every order is accounted for, and tells how it went.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tidings::prelude::*;
use tidings::transport::DeadLetter;
use tidings::{BoxError, header};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::crew::Crew;
use crate::journal::{Journal, display};
use crate::ledger::{Ledger, Outcome, Step};
use crate::report::{self, Delays, Progress, Standing};
use crate::shop::{Checkout, Placed};
use crate::text;

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
    pub(crate) async fn run(
        mut self,
        checkout: Checkout,
        outage: Duration,
        billing: Service,
    ) -> Result<bool, BoxError> {
        let (start, mut late) = (Instant::now(), Some(billing));
        let mut progress = Progress::new(io::stdout().is_terminal());
        let mut checkout = tokio::spawn(checkout.place_all());
        let mut placed = None;
        let mut moved = (start + outage, Standing::default());
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            tokio::select! {
                done = &mut checkout, if placed.is_none() => placed = Some(done??),
                () = sleep_until(start + outage), if late.is_some() => {
                    if let Some(billing) = late.take() {
                        self.crew.start_prepared("billing", billing).await?;
                    }
                }
                _ = tokio::signal::ctrl_c() => break End::Interrupted,
                _ = look.tick() => {}
            }
            let standing = self.look_around().await?;
            show(progress.show(start.elapsed(), &standing));
            if standing != moved.1 {
                moved = (Instant::now().max(start + outage), standing);
            }
            if placed.is_some() && self.ledger.standing().1 == 0 && standing.waiting == 0 {
                break End::Complete;
            }
            // An input may be as slow as it likes, once everything it gave is accounted for.
            if standing.waiting > 0 && moved.0.elapsed() > PATIENCE {
                break End::Stalled;
            }
        };
        show(Some(progress.finish(start.elapsed(), &self.standing())));
        checkout.abort();
        self.conclude(end, placed.unwrap_or_default()).await
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
        if standing.dead_lettered > self.letters.len() as u64 {
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
        println!("\n{}", report::service_table(&self.crew.rows(self.ledger.standing().0)));
        println!("{}", report::delay_table(&self.delays(placed.delays)));
        println!("{}", report::sequence_diagram(&self.journal.hops(), &self.crew.troubles()));
        self.letters.iter().for_each(show_letter);
        self.crew.go_home().await?;
        let (broke_off, refused) = (placed.broke_off, &placed.refused);
        if let Some(first) = refused.first() {
            eprintln!("{} orders could not be placed, the first because: {first}", refused.len());
        }
        let balance = self.ledger.balance();
        println!(
            "{} orders placed, {} accounted for: {} invoiced, {} shipped, {} followed up, {} dead-lettered.",
            balance.placed,
            balance.accounted,
            balance.invoiced,
            balance.shipped,
            balance.followed_up,
            balance.dead_lettered
        );
        let is_all = self.expected.is_none_or(|expected| expected == balance.placed);
        let is_proven = balance.as_expected == balance.placed && self.letters.len() as u64 == self.poison;
        let is_good = end == End::Complete && is_all && is_proven && !broke_off && refused.is_empty();
        if !is_good {
            let suspects = self.ledger.suspects(5).join(", ");
            eprintln!("This run is no proof: {end:?}, {} dead letters, suspects: {suspects}", self.letters.len());
        }
        Ok(is_good)
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
