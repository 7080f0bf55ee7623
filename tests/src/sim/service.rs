//! The handlers, which do what the plan says.

use super::history::{End, History, Told};
use super::plan::{Ev, Kind, Plan, Style, TIMEOUT};
use std::sync::Arc;
use std::time::Duration;
use tidings::handler::Each;
use tidings::prelude::*;
use tidings::{OutagePolicy, Result, Running};

/// The event.
#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "sim.step", key = key)]
pub(crate) struct Step {
    pub(crate) key: String,
    pub(crate) name: String,
}

/// What is returned for it.
#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "sim.done", key = name)]
pub(crate) struct Done {
    pub(crate) name: String,
    pub(crate) index: u32,
}

/// The subscription.
pub(crate) const NAME: &str = "sim.sim.step";

#[derive(Clone)]
struct Here {
    by: usize,
    history: Arc<History>,
}

/// Ends a run when it is dropped.
struct Guard {
    run: usize,
    history: Arc<History>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.history.dropped(self.run);
    }
}

impl Guard {
    fn end(&self, ends: Vec<(Ev, End)>) {
        self.history.end(self.run, ends);
    }
}

/// What a run of one event comes to.
enum Verdict {
    Success,
    Rejected,
    Fails(Style),
}

fn verdict(plan: &Plan, ev: Ev, failed: u32, now: Duration) -> Verdict {
    let event = &plan.events[ev];
    if plan.is_down(now) {
        Verdict::Fails(Style::Error)
    } else if failed < event.fails {
        Verdict::Fails(event.style)
    } else if event.rejected {
        Verdict::Rejected
    } else {
        Verdict::Success
    }
}

fn error(style: Style) -> HandlerError {
    match style {
        Style::RetryAfter(delay) => HandlerError::retry_after(delay, "later"),
        _ => "for now".into(),
    }
}

/// Takes its time; all of it, if this run of the simulation will never come to rest otherwise.
async fn take(history: &History, time: Duration) {
    tokio::time::sleep(if history.is_too_long() { TIMEOUT * 2 } else { time }).await;
}

async fn single(
    step: Step,
    delivered: Delivered,
    lease: Lease,
    State(here): State<Here>,
) -> Result<Vec<Done>, HandlerError> {
    let history = here.history;
    let plan = Arc::clone(&history.plan);
    let ev = plan.ev(&step.name).ok_or("unknown")?;
    let Delivered { attempt, possible_duplicate: duplicate, position, .. } = delivered;
    let told = Told { attempt, duplicate, position };
    let (run, _) = history.begin(here.by, &[ev], Some(told), Some(lease));
    let guard = Guard { run, history: Arc::clone(&history) };
    take(&history, plan.events[ev].takes).await;
    match verdict(&plan, ev, delivered.attempt - 1, history.now()) {
        Verdict::Success => {
            guard.end(vec![(ev, End::Success)]);
            Ok(plan.outputs(ev).collect())
        }
        Verdict::Rejected => {
            guard.end(vec![(ev, End::Rejected)]);
            Err(HandlerError::reject("never"))
        }
        Verdict::Fails(Style::Hang) => {
            tokio::time::sleep(TIMEOUT * 2).await;
            Ok(Vec::new())
        }
        Verdict::Fails(style) => {
            guard.end(vec![(ev, End::Transient)]);
            if matches!(style, Style::Panic) {
                // No hook is called, so nothing is printed.
                std::panic::resume_unwind(Box::new("as planned"));
            }
            Err(error(style))
        }
    }
}

/// The events of a batch, its run and what each comes to.
async fn batch_of(steps: &[Step], here: &Here) -> Result<(Guard, Vec<(Ev, Verdict)>), HandlerError> {
    let (history, plan) = (&here.history, &here.history.plan);
    let evs = steps.iter().map(|step| plan.ev(&step.name)).collect::<Option<Vec<_>>>().ok_or("unknown")?;
    let (run, counts) = history.begin(here.by, &evs, None, None);
    let guard = Guard { run, history: Arc::clone(history) };
    let longest = evs.iter().map(|ev| plan.events[*ev].takes).max().unwrap_or_default();
    take(history, longest).await;
    let now = history.now();
    let verdicts = evs.iter().zip(counts).map(|(ev, count)| (*ev, verdict(plan, *ev, count, now)));
    Ok((guard, verdicts.collect()))
}

async fn batch(Batch(steps): Batch<Step>, State(here): State<Here>) -> Result<Vec<Done>, HandlerError> {
    let (guard, verdicts) = batch_of(&steps, &here).await?;
    let worst = verdicts.iter().find(|(_, verdict)| !matches!(verdict, Verdict::Success));
    let all = |end| verdicts.iter().map(|(ev, _)| (*ev, end)).collect();
    match worst.map(|(_, verdict)| verdict) {
        None => {
            guard.end(all(End::Success));
            Ok(verdicts.iter().flat_map(|(ev, _)| here.history.plan.outputs(*ev)).collect())
        }
        Some(Verdict::Rejected) => {
            guard.end(all(End::Rejected));
            Err(HandlerError::reject("never"))
        }
        Some(Verdict::Fails(style)) => {
            guard.end(all(End::Transient));
            Err(error(*style))
        }
        Some(Verdict::Success) => unreachable!("it is no success"),
    }
}

async fn each(Batch(steps): Batch<Step>, State(here): State<Here>) -> Each<Vec<Done>> {
    let (guard, verdicts) = match batch_of(&steps, &here).await {
        Ok(ran) => ran,
        Err(error) => return Each(vec![Err(error)]),
    };
    let end = |verdict: &Verdict| match verdict {
        Verdict::Success => End::Success,
        Verdict::Rejected => End::Rejected,
        Verdict::Fails(_) => End::Transient,
    };
    guard.end(verdicts.iter().map(|(ev, verdict)| (*ev, end(verdict))).collect());
    let result = |(ev, verdict): &(Ev, Verdict)| match verdict {
        Verdict::Success => Ok(here.history.plan.outputs(*ev).collect()),
        Verdict::Rejected => Err(HandlerError::reject("never")),
        Verdict::Fails(style) => Err(error(*style)),
    };
    Each(verdicts.iter().map(result).collect())
}

/// Starts an instance.
pub(crate) async fn start(bus: &Bus, by: usize, history: &Arc<History>) -> Result<Running> {
    let plan = &history.plan;
    let config = SubscriptionConfig::default()
        .concurrency(plan.concurrency)
        .max_in_flight(plan.max_in_flight)
        .ordering(plan.ordering)
        .retry(plan.retry())
        .timeout(TIMEOUT)
        .batch(plan.batch)
        .linger(plan.linger);
    let config = if plan.outage.is_some() { config.outage(OutagePolicy::default()) } else { config.without_outage() };
    let service = Service::new("sim").state(Here { by, history: Arc::clone(history) });
    let service = match plan.kind {
        Kind::Single => service.on_with(config, single),
        Kind::Batch => service.on_with(config, batch),
        Kind::Each => service.on_with(config, each),
    };
    service.start(bus).await
}
