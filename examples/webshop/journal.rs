//! What is observed where events arrive: from whom, what, how late.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tidings::Message;
use tidings::handler::{Context, Extract, Setup};
use tidings::prelude::*;

use crate::report::{Delays, Hop};

/// Events of one type that one service had from another.
#[derive(Clone)]
struct Flow {
    event: String,
    from: String,
    to: &'static str,
    delays: Vec<Duration>,
}

/// What one service, or all together, have observed.
#[derive(Clone, Default)]
pub(crate) struct Journal {
    service: &'static str,
    flows: Arc<Mutex<Vec<Flow>>>,
}

impl Journal {
    /// The same journal, written by `service`.
    pub(crate) fn at(&self, service: &'static str) -> Self {
        Self { service, flows: Arc::clone(&self.flows) }
    }

    fn note(&self, message: &Message) {
        let recorded = message.recorded_time.unwrap_or_else(SystemTime::now);
        let delay = recorded.elapsed().unwrap_or_default();
        let (event, from, to) = (message.event_type.as_str(), message.source.trim_start_matches('/'), self.service);
        let mut flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        match flows.iter_mut().find(|flow| (flow.event.as_str(), flow.from.as_str(), flow.to) == (event, from, to)) {
            Some(flow) => flow.delays.push(delay),
            None => flows.push(Flow { event: event.to_owned(), from: from.to_owned(), to, delays: vec![delay] }),
        }
    }

    fn flows(&self) -> Vec<Flow> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who had what from whom, in the order of the first.
    pub(crate) fn hops(&self) -> Vec<Hop> {
        let hop = |flow: Flow| Hop {
            event: flow.event,
            from: display(&flow.from),
            to: display(flow.to),
            count: flow.delays.len() as u64,
        };
        self.flows().into_iter().map(hop).collect()
    }

    /// From being published to the first run of its handler, by event type and receiver.
    pub(crate) fn delays(&self) -> Vec<Delays> {
        let delays =
            |flow: Flow| Delays { event: format!("{} at {}", flow.event, display(flow.to)), delays: flow.delays };
        self.flows().into_iter().map(delays).collect()
    }
}

/// The name of a service as people write it.
pub(crate) fn display(service: &str) -> String {
    if service == "crm" {
        return "CRM".to_owned();
    }
    let mut letters = service.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// As an argument of a handler, notes the event in the [`Journal`]; and shows how to write an argument of your own.
pub(crate) struct Noted;

impl Extract for Noted {
    fn check(setup: &Setup<'_>) -> tidings::Result<()> {
        State::<Journal>::check(setup)
    }

    fn extract(cx: &Context<'_>) -> tidings::Result<Self> {
        let State(journal) = State::<Journal>::extract(cx)?;
        if cx.attempt() == 1 {
            journal.note(cx.message());
        }
        Ok(Self)
    }
}
