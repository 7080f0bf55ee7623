//! The services of this run, each on a bus of its own, as if each were a program of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidings::prelude::*;
use tidings::transport::DeadLetter;
use tidings::{BoxError, Result, Running, Stats, SubscriptionName};

use crate::events::OrderPlaced;
use crate::journal::display;
use crate::report::{ServiceRow, Trouble, service_table};

/// How long handlers may finish, and connections flush, at the end.
const DEADLINE: Duration = Duration::from_secs(10);

/// A service and its connection.
pub(crate) struct Desk {
    pub(crate) name: &'static str,
    pub(crate) bus: Bus,
    /// Its instances, the oldest first.
    running: Vec<Running>,
    /// What instances that were killed had done.
    killed: Vec<(String, Stats)>,
    /// It runs in a process of its own.
    is_elsewhere: bool,
}

impl Desk {
    async fn connect(config: &Config, name: &'static str) -> Result<Self> {
        let bus = Bus::connect(config.clone().with_source(format!("/{name}"))).await?;
        Ok(Self { name, bus, running: Vec::new(), killed: Vec::new(), is_elsewhere: false })
    }

    pub(crate) async fn start(&mut self, service: Service) -> Result<()> {
        self.running.push(service.start(&self.bus).await?);
        Ok(())
    }

    /// Its subscriptions, by the topic they read, and what they have done.
    fn stats(&self) -> impl Iterator<Item = (&str, Stats)> {
        let killed = self.killed.iter().map(|(name, stats)| (name.as_str(), stats.clone()));
        let stats = self.running.iter().flat_map(Running::stats).chain(killed);
        stats.map(|(name, stats)| (name.get(self.name.len() + 1..).unwrap_or(name), stats))
    }

    fn sum(&self, number: fn(&Stats) -> u64) -> u64 {
        self.stats().map(|(_, stats)| number(&stats)).sum()
    }

    /// Ends its oldest instance without warning, if there is another.
    fn kill_one(&mut self) {
        if self.running.len() > 1 {
            let victim = self.running.remove(0);
            self.killed.extend(victim.stats().map(|(name, mut stats)| {
                stats.in_flight = 0; // what it had is handed to another
                (name.to_owned(), stats)
            }));
        }
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>> {
        const PAGE: usize = 1_000;
        let mut letters: Vec<DeadLetter> = Vec::new();
        let mut topics: BTreeSet<_> = self.stats().map(|(topic, _)| topic.to_owned()).collect();
        if self.is_elsewhere {
            topics.insert(OrderPlaced::TOPIC.to_owned());
        }
        for topic in topics {
            let name = SubscriptionName::new(format!("{}.{topic}", self.name))?;
            let here = self.bus.transport().dead_letters(&name).await?;
            let mut after = None;
            loop {
                let page = here.page(after, PAGE).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.position);
                letters.extend(page);
            }
        }
        Ok(letters)
    }
}

/// All services.
pub(crate) struct Crew {
    config: Config,
    desks: Vec<Desk>,
}

impl Crew {
    pub(crate) fn new(config: Config) -> Self {
        Self { config, desks: Vec::new() }
    }

    /// Connects a service and starts its instances.
    pub(crate) async fn start(&mut self, name: &'static str, services: Vec<Service>) -> Result<Bus> {
        let mut desk = Desk::connect(&self.config, name).await?;
        for service in services {
            desk.start(service).await?;
        }
        let bus = desk.bus.clone();
        self.desks.push(desk);
        Ok(bus)
    }

    /// Connects a service that is to start later; from now on the broker keeps events for it.
    pub(crate) async fn prepare(&mut self, name: &'static str, service: &Service) -> Result<()> {
        let desk = Desk::connect(&self.config, name).await?;
        service.provision(&desk.bus).await?;
        self.desks.push(desk);
        Ok(())
    }

    /// Connects to the broker as a service that runs in another process; from now on the broker keeps events for it.
    pub(crate) async fn expect_elsewhere(&mut self, name: &'static str, service: &Service) -> Result<()> {
        self.prepare(name, service).await?;
        self.desks.iter_mut().filter(|desk| desk.name == name).for_each(|desk| desk.is_elsewhere = true);
        Ok(())
    }

    /// Whether some of them run in processes of their own.
    pub(crate) fn is_spread(&self) -> bool {
        self.desks.iter().any(|desk| desk.is_elsewhere)
    }

    /// Runs one service until it is told to stop (SIGINT, SIGTERM), then drains it.
    pub(crate) async fn serve(mut self, name: &'static str, service: Service) -> Result<bool, BoxError> {
        self.start(name, vec![service]).await?;
        println!("{} is open", display(name));
        stopped().await?;
        println!("{}", service_table(&self.rows(0)));
        self.go_home().await?;
        Ok(true)
    }

    /// Starts the instances of a service that was prepared.
    pub(crate) async fn start_prepared(&mut self, name: &str, services: Vec<Service>) -> Result<()> {
        if let Some(desk) = self.desks.iter_mut().find(|desk| desk.name == name) {
            for service in services {
                desk.start(service).await?;
            }
        }
        Ok(())
    }

    /// Ends one instance of each service that has more, without warning.
    pub(crate) fn kill_one_of_each(&mut self) {
        self.desks.iter_mut().for_each(Desk::kill_one);
    }

    /// The bus of a service.
    pub(crate) fn bus(&self, name: &str) -> Option<&Bus> {
        self.desks.iter().find(|desk| desk.name == name).map(|desk| &desk.bus)
    }

    /// What each service did, after `placed` orders.
    pub(crate) fn rows(&self, placed: u64) -> Vec<ServiceRow> {
        let answers = self.desks.iter().map(|desk| desk.sum(|stats| stats.published)).sum();
        let row = |desk: &Desk| {
            let (published, sent) =
                if desk.name == "shop" { (placed, answers) } else { (desk.sum(|stats| stats.published), placed) };
            let (handled, dead_lettered) = (desk.sum(|stats| stats.handled), desk.sum(|stats| stats.dead_lettered));
            let in_flight = desk.sum(|stats| stats.in_flight as u64);
            let unhandled = sent.saturating_sub(handled + dead_lettered);
            // What a killed instance did last is not known: then only what is here counts, and the ledger proves the rest.
            let waiting = if desk.killed.is_empty() { unhandled.max(in_flight) } else { in_flight };
            let retried = desk.sum(|stats| stats.retried);
            ServiceRow { service: display(desk.name), published, handled, retried, dead_lettered, waiting }
        };
        self.desks.iter().filter(|desk| !desk.is_elsewhere).map(row).collect()
    }

    /// What went wrong, by service and event type, which here is the topic.
    pub(crate) fn troubles(&self) -> Vec<Trouble> {
        let troubles = self.desks.iter().flat_map(|desk| {
            let mut by_topic: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
            for (topic, stats) in desk.stats() {
                let (retries, dead_letters) = by_topic.entry(topic).or_default();
                *retries += stats.retried;
                *dead_letters += stats.dead_lettered;
            }
            by_topic.into_iter().map(|(topic, (retries, dead_letters))| Trouble {
                event: topic.to_owned(),
                service: display(desk.name),
                retries,
                dead_letters,
            })
        });
        troubles.collect()
    }

    /// All dead letters, with the service that could not handle them, read back from the broker.
    pub(crate) async fn dead_letters(&self) -> Result<Vec<(&'static str, DeadLetter)>> {
        let mut letters = Vec::new();
        for desk in &self.desks {
            letters.extend(desk.dead_letters().await?.into_iter().map(|letter| (desk.name, letter)));
        }
        Ok(letters)
    }

    /// Lets everyone finish what runs, then disconnects.
    pub(crate) async fn go_home(self) -> Result<()> {
        for desk in self.desks {
            for running in desk.running {
                running.drain(DEADLINE).await;
            }
            desk.bus.close(DEADLINE).await?;
        }
        Ok(())
    }
}

/// Waits for SIGINT or, on Unix, SIGTERM.
async fn stopped() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted,
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
