//! Billing: an invoice for each order, as PDF.

use std::path::PathBuf;

use tidings::prelude::*;
use tokio::task::spawn_blocking;

use crate::events::{InvoiceCreated, OrderPlaced};
use crate::invoice;
use crate::journal::{Journal, Noted};
use crate::orders::{NOWHERE, Order};

/// Where invoices are kept; without a directory they are rendered all the same.
#[derive(Clone)]
pub(crate) struct Archive(pub(crate) Option<PathBuf>);

pub(crate) fn service(archive: Archive, journal: &Journal) -> Service {
    Service::new("billing").state(archive).state(journal.at("billing")).on(create_invoice)
}

async fn create_invoice(
    OrderPlaced { order }: OrderPlaced,
    State(archive): State<Archive>,
    _: Noted,
) -> Result<InvoiceCreated, HandlerError> {
    if order.customer.country == NOWHERE {
        let why = format!("order {}: no tax law for country {NOWHERE}", order.order_id);
        return Err(HandlerError::reject(why)); // no retry helps: a dead letter at once
    }
    spawn_blocking(move || archive.invoice(order)).await?
}

impl Archive {
    fn invoice(&self, order: Order) -> Result<InvoiceCreated, HandlerError> {
        let pdf = invoice::render(&order);
        let file = invoice::file_name(&order.order_id);
        if let Some(directory) = &self.0 {
            std::fs::write(directory.join(&file), &pdf)?; // transient: the disk may have room again later
        }
        Ok(InvoiceCreated {
            number: invoice::number(&order.order_id),
            total_cents: invoice::total_cents(&order),
            bytes: pdf.len(),
            file,
            order_id: order.order_id,
            currency: order.currency,
        })
    }
}
