//! Analytics: one more subscriber, of which no publisher knows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tidings::prelude::*;

use crate::events::OrderPlaced;
use crate::journal::{Journal, Noted};
use crate::text::{left, money, right};

/// Orders and cents, by country and currency. An order that comes twice, as any may, would count twice; a real one
/// would keep the ids of its orders in the same database.
#[derive(Clone, Default)]
pub(crate) struct Totals(Arc<Mutex<ByCountry>>);

type ByCountry = BTreeMap<(String, String), (u64, i64)>;

pub(crate) fn service(totals: &Totals, journal: &Journal) -> Service {
    Service::new("analytics").state(totals.clone()).state(journal.at("analytics")).on(add_up)
}

async fn add_up(OrderPlaced { order }: OrderPlaced, State(totals): State<Totals>, _: Noted) {
    let cents = order.subtotal_cents();
    let mut totals = totals.0.lock().unwrap_or_else(PoisonError::into_inner);
    let (orders, total) = totals.entry((order.customer.country, order.currency)).or_default();
    *orders += 1;
    *total = total.saturating_add(cents);
}

impl Totals {
    /// All orders.
    pub(crate) fn orders(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().map(|(orders, _)| orders).sum()
    }

    /// The countries with the most orders.
    pub(crate) fn show(&self, most: usize) -> String {
        let totals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<_> = totals.iter().collect();
        rows.sort_by_key(|(_, (orders, _))| std::cmp::Reverse(*orders));
        let row = |((country, currency), (orders, cents)): (&(String, String), &(u64, i64))| {
            format!("{}{}{} {currency}\n", left(country, 7), right(&orders.to_string(), 7), right(&money(*cents), 16))
        };
        format!("country orders           total\n{}", rows.into_iter().take(most).map(row).collect::<String>())
    }
}
