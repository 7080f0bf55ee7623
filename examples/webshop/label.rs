//! The shipping label of an order, as text.

use crate::orders::Order;
use crate::text::{left, right, stable_hash};

/// What goes on the parcel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Label {
    pub(crate) carrier: &'static str,
    pub(crate) tracking_number: String,
    /// The label, ready to print.
    pub(crate) text: String,
}

/// Makes the label. The same order gives the same label.
pub(crate) fn print(order: &Order) -> Label {
    const COLUMNS: usize = 46;
    let carrier = carrier(&order.customer.country);
    let tracking_number = tracking_number(&order.order_id);
    let customer = &order.customer;
    let head_room = COLUMNS - carrier.len();
    let rows = [
        format!("{carrier}{}", right(&tracking_number, head_room)),
        String::new(),
        format!("To:   {}", customer.name),
        format!("      {}", customer.street),
        format!("      {} {}", customer.postal_code, customer.city),
        format!("      {}", customer.country),
        String::new(),
        "From: Tidewater Goods, 20457 Hamburg, DE".to_owned(),
        format!("Ref:  {}", order.order_id),
    ];
    let edge = format!("+{}+\n", "-".repeat(COLUMNS + 2));
    let body: String = rows.iter().map(|row| format!("| {} |\n", left(row, COLUMNS))).collect();
    Label { carrier, tracking_number, text: format!("{edge}{body}{edge}") }
}

fn carrier(country: &str) -> &'static str {
    match country {
        "DE" => "Hansepost",
        "AT" | "BE" | "CH" | "CZ" | "DK" | "FR" | "LU" | "NL" | "PL" => "Nachbarkurier",
        _ => "Albatros Air",
    }
}

/// `TW`, 16 digits derived from the order id, and a check digit.
pub(crate) fn tracking_number(order_id: &str) -> String {
    let digits = format!("{:016}", stable_hash(order_id) % 10_000_000_000_000_000);
    let check = check_digit(&digits);
    format!("TW{digits}{check}")
}

/// The check digit of GS1 (General Specifications, 7.9): weights 3 and 1 from the right, up to the next ten.
fn check_digit(digits: &str) -> u32 {
    let weights = [3, 1].into_iter().cycle();
    let digits = digits.chars().rev().filter_map(|c| c.to_digit(10));
    let sum: u32 = digits.zip(weights).map(|(digit, weight)| digit * weight).sum();
    (10 - sum % 10) % 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orders::tests::order;
    use crate::text::width;

    #[test]
    fn the_check_digit_is_that_of_gs1() {
        assert_eq!(check_digit("629104150021"), 3); // an EAN-13 that GS1 shows
        assert_eq!(check_digit("37610425002123456"), 9); // and an SSCC
    }

    #[test]
    fn a_tracking_number_is_derived_from_the_order() {
        let number = tracking_number("W-2026-000123");
        assert_eq!(number.len(), 19);
        assert_eq!(number, tracking_number("W-2026-000123"));
        assert_ne!(number, tracking_number("W-2026-000124"));
        assert!(number[18..] == check_digit(&number[2..18]).to_string());
    }

    #[test]
    fn the_frame_stands_straight() {
        let mut order = order("W-1");
        order.customer.city = "東京都渋谷区\n".to_owned();
        let label = print(&order);
        assert!(label.text.contains(&label.tracking_number) && label.text.contains("Łukasz Żółć"));
        assert!(label.text.lines().all(|line| width(line) == 50), "{}", label.text);
        assert_eq!(label.carrier, "Nachbarkurier");
    }
}
