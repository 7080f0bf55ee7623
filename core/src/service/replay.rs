//! A service's handlers on what was published before.

use super::{Planned, Running, Service, Subscribed};
use crate::handler::{Next, Scope};
use crate::transport::{ReplayFrom, ReplaySpec};
use crate::{Bus, Error, ErrorKind, Result, RetryMode, Text};
use std::sync::Arc;

impl Service {
    /// Reads its topics again, from the beginning, a time or a position, through its handlers. It moves no subscription,
    /// creates none, and ends by itself when all that was there when it began is handled: wait for that with
    /// [`Running::finished`]. To replay a part of a service, give only those handlers to a `Service` of its name.
    ///
    /// Handlers are told ([`Delivered::replayed`](crate::handler::Delivered)), and what they do is done again: **what they
    /// return is published again**, to everybody, with the same ids as the first time. A handler for which that is wrong
    /// asks and returns nothing. The service itself may run meanwhile, here or elsewhere; order per key is kept within
    /// the replay, not between the two. Starting a replay in two processes replays twice.
    ///
    /// A failed run is retried as the policy says, but never aside, because the copy would reach the subscription as
    /// something new: it holds its key, for as long as its delays take. Then it is dead-lettered among the
    /// subscription's own, [marked](crate::header::REPLAYED) so; redriven, it goes to the subscription itself.
    ///
    /// # Errors
    /// As [`start`](Self::start); [`ErrorKind::Unsupported`] if the transport cannot replay, or not these topics;
    /// [`ErrorKind::Config`] for a position if the service has several subscriptions, as each counts its own.
    ///
    /// # Cancel safety
    /// Nothing is read before it returns.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tidings_core::{Bus, Event, Result, Service};
    /// # use tidings_core::transport::ReplayFrom;
    /// # async fn example<OrderPlaced: Event>(bus: Bus) -> Result<()> {
    /// # async fn count<OrderPlaced: Event>(_order: OrderPlaced) {}
    /// let reports = Service::new("reports").on(count::<OrderPlaced>);
    /// reports.replay(&bus, ReplayFrom::Beginning).await?.finished().await
    /// # }
    /// ```
    pub async fn replay(self, bus: &Bus, from: ReplayFrom) -> Result<Running> {
        let here = |error: Error| error.with_operation("replay").with_context("service", &self.name);
        let planned = self.plan_on(bus).map_err(here)?;
        let transport = bus.transport();
        if !transport.capabilities().replay {
            let why = "what was published cannot be read again; retain the topics, or replay on another transport";
            return Err(here(Error::new(ErrorKind::Unsupported, why).with_transport(transport.name())));
        }
        if planned.len() > 1 && matches!(from, ReplayFrom::Position(_)) {
            let why = "a position is one subscription's; replay a service with the handlers of one, or from a time";
            return Err(here(Error::new(ErrorKind::Config, why)));
        }
        let source = Text::from(format!("/{}", self.name));
        let scope = Arc::new(Scope { states: self.states, bus: bus.clone() });
        let layers = Next::stack(&self.layers);
        let mut running = Running::new();
        let mut opened = Vec::with_capacity(planned.len());
        for planned in planned {
            opened.push((transport.replay(planned.replay(from)).await?, planned));
        }
        for (subscription, planned) in opened {
            let subscribed = Subscribed::new(
                planned.for_replay(),
                Arc::clone(&scope),
                source.clone(),
                layers.clone(),
                running.crew(),
            );
            running.spawn(Arc::new(Subscribed { replays: true, ..subscribed }), subscription);
        }
        Ok(running)
    }
}

impl Planned {
    fn replay(&self, from: ReplayFrom) -> ReplaySpec {
        let (topics, max_in_flight) = (self.spec.topics.clone(), self.spec.max_in_flight);
        ReplaySpec { topics, from, follow: false, max_in_flight }
    }

    /// Retries in order, whatever the policy says, for as long as its delays take.
    fn for_replay(mut self) -> Self {
        let retry = &mut self.config.retry;
        retry.mode = Some(RetryMode::InOrder);
        retry.hold_at_most = retry.hold_at_most.max(retry.longest_hold());
        self
    }
}
