//! Logistics, Billing, CRM and Analytics: each a few handlers that know events, and neither each other nor the broker.

use crate::events::{FollowUpScheduled, InvoiceCreated, LabelPrinted, OrderPlaced};
use crate::{invoice, label};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidings::prelude::*;

/// The carrier that Logistics calls: busy at random.
#[derive(Clone)]
pub(crate) struct Carrier {
    chance: Arc<Mutex<fastrand::Rng>>,
    busy: f64,
}

impl Carrier {
    pub(crate) fn new(busy: f64, seed: u64) -> Self {
        Self { chance: Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))), busy }
    }

    fn book(&self) -> Result<(), &'static str> {
        let chance = self.chance.lock().unwrap_or_else(PoisonError::into_inner).f64();
        if chance < self.busy { Err("the carrier is busy") } else { Ok(()) }
    }
}

async fn print_label(
    OrderPlaced { order }: OrderPlaced,
    State(carrier): State<Carrier>,
) -> Result<LabelPrinted, HandlerError> {
    carrier.book()?; // transient: runs again, in order, after a while
    let label::Label { carrier, tracking_number, .. } = label::print(&order);
    Ok(LabelPrinted { order_id: order.order_id, carrier: carrier.to_owned(), tracking_number })
}

pub(crate) fn logistics(carrier: Carrier) -> Service {
    // Twelve runs, because the carrier is busy that often and no good order may end as a dead letter.
    let patient = RetryPolicy::default().attempts(12).backoff(Duration::from_millis(10), Duration::from_millis(500));
    Service::new("logistics").state(carrier).on_with(SubscriptionConfig::default().retry(patient), print_label)
}

/// Where Billing keeps its invoices, if anywhere.
#[derive(Clone)]
pub(crate) struct Archive(pub(crate) Option<PathBuf>);

async fn create_invoice(
    OrderPlaced { order }: OrderPlaced,
    State(archive): State<Archive>,
) -> Result<InvoiceCreated, HandlerError> {
    if order.currency == "XXX" {
        return Err(HandlerError::reject("an invoice needs a currency, and XXX (ISO 4217) is none")); // no retry helps
    }
    let pdf = invoice::render(&order);
    let file = archive.0.map(|folder| folder.join(invoice::file_name(&order.order_id)));
    if let Some(file) = &file {
        tokio::fs::write(file, &pdf).await?; // a full disk is transient
    }
    Ok(InvoiceCreated {
        number: invoice::number(&order.order_id),
        total_cents: invoice::total_cents(&order),
        pdf_bytes: pdf.len(),
        file: file.map(|file| file.display().to_string()),
        order_id: order.order_id,
    })
}

pub(crate) fn billing(archive: Archive) -> Service {
    Service::new("billing").state(archive).on(create_invoice)
}

async fn schedule_follow_up(OrderPlaced { order }: OrderPlaced) -> FollowUpScheduled {
    FollowUpScheduled { order_id: order.order_id, email: order.customer.email, days: 14 }
}

pub(crate) fn crm() -> Service {
    Service::new("crm").on(schedule_follow_up)
}

/// Turnover by country and currency, in cents.
#[derive(Clone, Default)]
pub(crate) struct Turnover(Arc<Mutex<BTreeMap<(String, String), i64>>>);

impl Turnover {
    pub(crate) fn largest(&self, count: usize) -> Vec<((String, String), i64)> {
        let mut all: Vec<_> = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone().into_iter().collect();
        all.sort_by_key(|(_, cents)| std::cmp::Reverse(*cents));
        all.truncate(count);
        all
    }
}

async fn count_turnover(OrderPlaced { order }: OrderPlaced, State(turnover): State<Turnover>) {
    let cents = order.subtotal_cents();
    let mut all = turnover.0.lock().unwrap_or_else(PoisonError::into_inner);
    *all.entry((order.customer.country, order.currency)).or_default() += cents;
}

/// One more subscriber. The shop does not know of it.
pub(crate) fn analytics(turnover: Turnover) -> Service {
    Service::new("analytics").state(turnover).on(count_turnover)
}
