//! Reads a subscription into its lanes.

use super::Subscribed;
use super::lanes::Job;
use crate::transport::{Delivery, Notice, Polled, Subscription};
use crate::{BusEvent, Error, ErrorKind, Result};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// An open subscription and the end of its reading.
pub(crate) struct Pumped {
    pub(crate) subscription: Box<dyn Subscription>,
    /// Why it ended, if nobody asked it to.
    pub(crate) ended: Result<()>,
}

/// Reads until told to stop, or until the subscription ends.
pub(crate) async fn pump(
    mut subscription: Box<dyn Subscription>,
    subscribed: Arc<Subscribed>,
    mut stop: watch::Receiver<bool>,
) -> Pumped {
    let mut polled = Polled::default();
    let ended = loop {
        let (free, due) = subscribed.with_lanes(|lanes| (lanes.room(), lanes.wake_due(Instant::now())));
        let far = Instant::now() + super::worker::NO_LIMIT;
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break Ok(()),
            read = poll_fn(|cx| subscription.poll_batch(cx, free, &mut polled)), if free > 0 => {
                let nothing = polled.deliveries.is_empty() && polled.notices.is_empty();
                polled.notices.drain(..).for_each(|notice| subscribed.notice(notice));
                subscribed.admit(&mut polled.deliveries);
                match read {
                    Err(error) => break Err(error),
                    Ok(()) if nothing && subscribed.replays => break Ok(()),
                    Ok(()) if nothing => break Err(Error::new(ErrorKind::Closed, "the subscription ended by itself")),
                    Ok(()) => {}
                }
            }
            () = subscribed.pump.notified() => {}
            () = sleep_until(due.unwrap_or(far)), if due.is_some() => {}
        }
    };
    subscription.stop();
    Pumped { subscription, ended: ended.map_err(|error| error.with_context("subscription", &subscribed.name)) }
}

impl Subscribed {
    fn admit(&self, deliveries: &mut Vec<Delivery>) {
        let given_back = self.with_lanes(|lanes| {
            for delivery in deliveries.drain(..) {
                match self.route_of(&delivery.message.event_type) {
                    Some(route) => lanes.admit(delivery, route),
                    None => self.unrouted(delivery),
                }
            }
            lanes.isolate()
        });
        given_back.into_iter().for_each(Job::give_back);
    }

    fn unrouted(&self, delivery: Delivery) {
        self.counters.unrouted.fetch_add(1, Relaxed);
        let (id, event_type) = (delivery.message.id.clone(), delivery.message.event_type.clone());
        self.scope.bus.tell().tell(BusEvent::Unrouted { subscription: self.name.clone(), id, event_type });
        delivery.acker.ack();
    }

    fn notice(&self, notice: Notice) {
        let subscription = self.name.clone();
        match notice {
            // Handlers that run may ask; the other leases are asked for when it is their turn.
            Notice::Leases => self.leases.notify_waiters(),
            Notice::HoldBack { slot, after } => self.lanes.lock().hold_back(slot, after),
            Notice::HoldBackOver { slot } => {
                let given_back = self.with_lanes(|lanes| {
                    lanes.end_hold_back(slot);
                    lanes.isolate()
                });
                given_back.into_iter().for_each(Job::give_back);
            }
            // Nothing but itself takes part in a replay.
            Notice::Role(_) if self.replays => {}
            Notice::Role(role) => {
                *self.role.lock() = Some(role.clone());
                self.scope.bus.tell().tell(BusEvent::Role { subscription, role });
            }
            Notice::Gap { topic, missed_at_most, from, to } => {
                self.scope.bus.tell().tell(BusEvent::Gap { subscription, topic, missed_at_most, from, to });
            }
        }
    }
}
