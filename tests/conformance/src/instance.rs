//! An instance of a service as another process would run it: with a connection and a runtime of its own, so that it can
//! die.

use crate::env::{Env, drain, eventually, start, within};
use crate::history::Desk;
use std::thread::JoinHandle;
use std::time::Duration;
use tidings_core::transport::Role;
use tidings_core::{Bus, Drained, Running, Service, Stats, SubscriptionConfig};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// A running instance.
pub(crate) struct Instance {
    place: Place,
    desk: Option<Desk>,
}

enum Place {
    /// On a thread of its own.
    Apart { ask: mpsc::UnboundedSender<Ask>, thread: JoinHandle<()> },
    /// In this runtime, where time is paused.
    Here { running: Running, bus: Bus },
}

enum Ask {
    Stats(oneshot::Sender<Stats>),
    Drain(oneshot::Sender<Drained>),
    Die,
}

impl Instance {
    /// Starts a service in an instance of its own.
    pub(crate) async fn start(env: &Env, service: Service) -> Self {
        if env.is_paused() {
            let bus = env.another_bus().await;
            return Self { place: Place::Here { running: start(service, &bus).await, bus }, desk: None };
        }
        let (ask, asked) = mpsc::unbounded_channel();
        let (ready, started) = oneshot::channel();
        let env = env.clone();
        let thread = std::thread::spawn(move || live(&env, service, ready, asked));
        within("the instance starts", started).await.expect("the instance starts");
        Self { place: Place::Apart { ask, thread }, desk: None }
    }

    /// Starts the service of a desk.
    pub(crate) async fn of(env: &Env, desk: &Desk, config: SubscriptionConfig) -> Self {
        Self { desk: Some(desk.clone()), ..Self::start(env, desk.service(config)).await }
    }

    /// Whose desk it is.
    pub(crate) fn who(&self) -> &'static str {
        self.desk.as_ref().map_or("", Desk::who)
    }

    /// Ends it as a kill does: it says nothing to its broker, and nothing of it runs any more.
    pub(crate) async fn die(self) {
        if let Some(desk) = &self.desk {
            desk.bury();
        }
        match self.place {
            Place::Apart { ask, thread } => {
                let _ = ask.send(Ask::Die);
                let joined = tokio::task::spawn_blocking(|| thread.join());
                within("the instance dies", joined).await.expect("joined").expect("no panic in the instance");
            }
            Place::Here { running, bus } => {
                drop(running);
                drop(bus);
            }
        }
    }

    /// Drains it, then disconnects.
    pub(crate) async fn drain(self) -> Drained {
        match self.place {
            Place::Apart { ask, .. } => {
                let (answer, drained) = oneshot::channel();
                let _ = ask.send(Ask::Drain(answer));
                within("the instance drains", drained).await.expect("the instance drains")
            }
            Place::Here { running, bus } => part(running, &bus).await,
        }
    }

    /// What the first subscription of the service has done.
    pub(crate) async fn stats(&self) -> Stats {
        match &self.place {
            Place::Apart { ask, .. } => {
                let (answer, stats) = oneshot::channel();
                let _ = ask.send(Ask::Stats(answer));
                within("the instance answers", stats).await.expect("the instance lives")
            }
            Place::Here { running, .. } => stats(running),
        }
    }

    /// The slots that it owns; `None` if it stands by or has not been told.
    pub(crate) async fn slots(&self) -> Option<Vec<u32>> {
        match self.stats().await.role {
            Some(Role::Active { slots }) => Some(slots),
            _ => None,
        }
    }
}

/// Waits until each of two instances owns a share of the slots, none of them both.
pub(crate) async fn shared(one: &Instance, two: &Instance, slots: usize) {
    let are = || async {
        let (Some(one), Some(two)) = (one.slots().await, two.slots().await) else { return false };
        let all: std::collections::BTreeSet<_> = one.iter().chain(&two).collect();
        !one.is_empty() && !two.is_empty() && one.len() + two.len() == slots && all.len() == slots
    };
    eventually("both own slots", are).await;
}

/// Waits until one of two instances is active and the other stands by; the active one first.
pub(crate) async fn ranked(one: Instance, two: Instance) -> (Instance, Instance) {
    let active = |instance: Stats| matches!(instance.role, Some(Role::Active { .. }));
    let standing_by = |instance: Stats| instance.role == Some(Role::StandBy);
    let first = std::sync::atomic::AtomicBool::new(false);
    let are = || async {
        let (one, two) = (one.stats().await, two.stats().await);
        first.store(active(one.clone()), std::sync::atomic::Ordering::Relaxed);
        active(one.clone()) && standing_by(two.clone()) || active(two) && standing_by(one)
    };
    eventually("one is active and the other stands by", are).await;
    if first.into_inner() { (one, two) } else { (two, one) }
}

fn stats(running: &Running) -> Stats {
    running.stats().next().expect("a subscription").1
}

async fn part(running: Running, bus: &Bus) -> Drained {
    let drained = drain(running).await;
    let _ = timeout(Duration::from_secs(30), bus.close(Duration::from_secs(10))).await;
    drained
}

fn live(env: &Env, service: Service, ready: oneshot::Sender<()>, mut asked: mpsc::UnboundedReceiver<Ask>) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let left = runtime.block_on(async {
        let bus = env.another_bus().await;
        let running = start(service, &bus).await;
        let _ = ready.send(());
        loop {
            match asked.recv().await {
                Some(Ask::Stats(answer)) => drop(answer.send(stats(&running))),
                Some(Ask::Drain(answer)) => {
                    let _ = answer.send(part(running, &bus).await);
                    return None;
                }
                Some(Ask::Die) | None => return Some((running, bus)),
            }
        }
    });
    // Before what it ran, so that nothing says goodbye.
    runtime.shutdown_background();
    drop(left);
}
