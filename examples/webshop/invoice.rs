//! The invoice of an order, as PDF.

use crate::orders::{Line, Order};
use crate::pdf::{self, Colour, Page, Style};
use crate::text::{money, stable_hash};

const INK: Colour = [0.13, 0.15, 0.19];
const GREY: Colour = [0.45, 0.48, 0.53];
const PALE: Colour = [0.94, 0.95, 0.97];
const BRAND: Colour = [0.05, 0.35, 0.42];
const WHITE: Colour = [1.0, 1.0, 1.0];

const BODY: Style = Style { size: 9.5, is_bold: false, colour: INK };
const STRONG: Style = Style { is_bold: true, ..BODY };
const SMALL: Style = Style { size: 7.5, is_bold: false, colour: GREY };
const HEAD: Style = Style { size: 8.5, is_bold: false, colour: WHITE };
const TITLE: Style = Style { size: 22.0, is_bold: true, colour: BRAND };
const NAME: Style = Style { size: 15.0, is_bold: true, colour: BRAND };

/// The columns of the table: left ends, then right ends.
const LEFT: f32 = 50.0;
const SKU: f32 = 80.0;
const DESCRIPTION: f32 = 145.0;
const QUANTITY: f32 = 382.0;
const PRICE: f32 = 462.0;
const RIGHT: f32 = 545.0;
/// Where a cell's text starts inside the table's edges.
const INSET: f32 = 6.0;
/// The lowest line of a page above its foot.
const BOTTOM: f32 = 95.0;

/// The file an invoice is kept in. Order ids come from outside: whatever is not a letter, a digit or `-` is written as
/// `_` and its code, so that no id leaves the directory and no two ids share a file.
pub(crate) fn file_name(order_id: &str) -> String {
    const LONGEST: usize = 180;
    let mut name = String::new();
    for byte in order_id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => name.push(char::from(byte)),
            _ => name.push_str(&format!("_{byte:02x}")),
        }
    }
    if name.len() > LONGEST {
        name.truncate(LONGEST);
        name.push_str(&format!("_{:016x}", stable_hash(order_id)));
    }
    format!("invoice-{name}.pdf")
}

/// The invoice's number: one per order, the same whenever it is asked for.
pub(crate) fn number(order_id: &str) -> String {
    format!("INV-{order_id}")
}

/// What is to be paid, in cents: the subtotal and the VAT of the customer's country.
pub(crate) fn total_cents(order: &Order) -> i64 {
    order.subtotal_cents().saturating_add(vat_cents(order))
}

/// Draws the invoice. The same order gives the same bytes; no order makes it panic.
pub(crate) fn render(order: &Order) -> Vec<u8> {
    let mut sheets = Sheets { order, pages: Vec::new(), y: 0.0 };
    sheets.first_page();
    for (i, line) in order.lines.iter().enumerate() {
        sheets.line(i + 1, line);
    }
    sheets.totals();
    pdf::document(&number(&order.order_id), sheets.finish())
}

fn vat_cents(order: &Order) -> i64 {
    let thousandths =
        i128::from(order.subtotal_cents()) * i128::from(vat_per_mille(&order.customer.country).unwrap_or(0));
    i64::try_from((thousandths + 500) / 1000).unwrap_or(i64::MAX)
}

/// The standard rate in a country of the EU (2026); none elsewhere: an export.
fn vat_per_mille(country: &str) -> Option<u16> {
    Some(match country {
        "LU" => 170,
        "MT" => 180,
        "CY" | "DE" => 190,
        "AT" | "BG" | "FR" => 200,
        "BE" | "CZ" | "ES" | "LT" | "LV" | "NL" | "RO" => 210,
        "IT" | "SI" => 220,
        "IE" | "PL" | "PT" | "SK" => 230,
        "EE" | "GR" => 240,
        "DK" | "HR" | "SE" => 250,
        "FI" => 255,
        "HU" => 270,
        _ => return None,
    })
}

fn vat_label(country: &str) -> String {
    match vat_per_mille(country) {
        Some(rate) if rate % 10 == 0 => format!("VAT {country} {} %", rate / 10),
        Some(rate) => format!("VAT {country} {}.{} %", rate / 10, rate % 10),
        None => "VAT 0 % (export)".to_owned(),
    }
}

/// The pages so far, and how far down the last one is written.
struct Sheets<'a> {
    order: &'a Order,
    pages: Vec<Page>,
    y: f32,
}

impl Sheets<'_> {
    fn first_page(&mut self) {
        let mut page = Page::new();
        draw_company(&mut page);
        draw_address(&mut page, self.order);
        draw_facts(&mut page, self.order);
        self.pages.push(page);
        self.table_head(560.0);
    }

    fn next_page(&mut self) {
        let mut page = Page::new();
        let title = format!("Invoice {}, continued", number(&self.order.order_id));
        page.left(STRONG, LEFT, 790.0, &fit(STRONG, &title, RIGHT - LEFT));
        self.pages.push(page);
        self.table_head(765.0);
    }

    fn page(&mut self) -> &mut Page {
        if self.pages.is_empty() {
            self.pages.push(Page::new());
        }
        let last = self.pages.len() - 1;
        &mut self.pages[last]
    }

    /// Begins a new page if there is no room for `height` on this one.
    fn reserve(&mut self, height: f32) {
        if self.y - height < BOTTOM {
            self.next_page();
        }
    }

    fn table_head(&mut self, y: f32) {
        self.y = y - 20.0;
        let page = self.page();
        page.fill(BRAND, (LEFT, y - 6.0), (RIGHT - LEFT, 19.0));
        page.left(HEAD, LEFT + INSET, y, "#");
        page.left(HEAD, SKU, y, "Item");
        page.left(HEAD, DESCRIPTION, y, "Description");
        page.right(HEAD, QUANTITY, y, "Quantity");
        page.right(HEAD, PRICE, y, "Unit price");
        page.right(HEAD, RIGHT - INSET, y, "Amount");
    }

    fn line(&mut self, position: usize, line: &Line) {
        const LEADING: f32 = 12.0;
        let description = pdf::wrap(&line.description, BODY.size, QUANTITY - DESCRIPTION - 45.0, 3);
        let height = LEADING * description.len().max(1) as f32 + 8.0;
        self.reserve(height);
        let y = self.y;
        self.y -= height;
        let page = self.page();
        page.left(SMALL, LEFT + INSET, y, &position.to_string());
        page.left(BODY, SKU, y, &fit(BODY, &line.sku, DESCRIPTION - SKU - 5.0));
        for (i, part) in description.iter().enumerate() {
            page.left(BODY, DESCRIPTION, y - LEADING * i as f32, part);
        }
        page.right(BODY, QUANTITY, y, &line.quantity.to_string());
        page.right(BODY, PRICE, y, &money(line.unit_price_cents));
        page.right(BODY, RIGHT - INSET, y, &money(line.amount_cents()));
        page.fill(PALE, (LEFT, y - height + 13.5), (RIGHT - LEFT, 0.8));
    }

    fn totals(&mut self) {
        const LABEL: f32 = 345.0;
        self.reserve(110.0);
        let (order, y) = (self.order, self.y - 6.0);
        let page = self.page();
        page.left(BODY, LABEL, y, "Subtotal");
        page.right(BODY, RIGHT - INSET, y, &money(order.subtotal_cents()));
        page.left(BODY, LABEL, y - 16.0, &vat_label(&order.customer.country));
        page.right(BODY, RIGHT - INSET, y - 16.0, &money(vat_cents(order)));
        page.fill(PALE, (LABEL - INSET, y - 43.0), (RIGHT - LABEL + INSET, 20.0));
        page.left(STRONG, LABEL, y - 37.0, &format!("Total {}", order.currency));
        page.right(STRONG, RIGHT - INSET, y - 37.0, &money(total_cents(order)));
        page.left(BODY, LEFT, y - 75.0, "Paid at checkout: nothing is left to pay. Thank you for your order!");
        page.left(SMALL, LEFT, y - 89.0, "Returns are free within 30 days, with the label in your parcel.");
    }

    fn finish(mut self) -> Vec<Page> {
        let count = self.pages.len();
        for (i, page) in self.pages.iter_mut().enumerate() {
            draw_foot(page, i + 1, count);
        }
        self.pages
    }
}

fn draw_company(page: &mut Page) {
    page.fill(BRAND, (0.0, pdf::PAGE.1 - 8.0), (pdf::PAGE.0, 8.0));
    for (i, height) in [12.0, 20.0, 15.0].into_iter().enumerate() {
        page.fill(BRAND, (LEFT + 8.0 * i as f32, 778.0), (5.0, height));
    }
    page.left(NAME, LEFT + 32.0, 780.0, "Tidewater Goods");
    page.right(TITLE, RIGHT, 778.0, "INVOICE");
}

fn draw_address(page: &mut Page, order: &Order) {
    let customer = &order.customer;
    let town = format!("{} {}", customer.postal_code, customer.city);
    page.left(SMALL, LEFT, 714.0, "Tidewater Goods GmbH · Am Sandtorkai 12 · 20457 Hamburg");
    page.fill(GREY, (LEFT, 709.0), (207.0, 0.4));
    page.left(STRONG, LEFT, 692.0, &fit(STRONG, &customer.name, 260.0));
    page.left(BODY, LEFT, 678.0, &fit(BODY, &customer.street, 260.0));
    page.left(BODY, LEFT, 664.0, &fit(BODY, &town, 260.0));
    page.left(BODY, LEFT, 650.0, &customer.country);
}

fn draw_facts(page: &mut Page, order: &Order) {
    const LABEL: f32 = 325.0;
    let facts = [
        ("Invoice", number(&order.order_id)),
        ("Date", order.placed_at.get(..10).unwrap_or(&order.placed_at).to_owned()),
        ("Order", order.order_id.clone()),
        ("Currency", order.currency.clone()),
        ("E-mail", order.customer.email.clone()),
    ];
    for (i, (label, value)) in facts.iter().enumerate() {
        let y = 692.0 - 14.0 * i as f32;
        page.left(Style { colour: GREY, ..BODY }, LABEL, y, label);
        page.left(BODY, LABEL + 55.0, y, &fit(BODY, value, RIGHT - LABEL - 55.0));
    }
    page.left(BODY, LEFT, 595.0, "Your order is on its way. All prices are without VAT, which is shown below.");
}

fn draw_foot(page: &mut Page, number: usize, count: usize) {
    page.fill(GREY, (LEFT, 62.0), (RIGHT - LEFT, 0.4));
    page.left(SMALL, LEFT, 50.0, "Tidewater Goods GmbH, Hamburg");
    page.left(SMALL, LEFT, 40.0, "HRB 000000 · VAT ID DE000000000");
    page.left(SMALL, 215.0, 50.0, "hello@tidewater.example");
    page.left(SMALL, 215.0, 40.0, "An invented shop: an example of Tidings");
    page.right(SMALL, RIGHT, 50.0, &format!("Page {number} of {count}"));
}

/// The text on one line, cut where the room ends.
fn fit(style: Style, text: &str, room: f32) -> String {
    pdf::wrap(text, style.size, room, 1).pop().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orders::tests::{line, order};

    fn count(haystack: &[u8], needle: &str) -> usize {
        haystack.windows(needle.len()).filter(|window| *window == needle.as_bytes()).count()
    }

    #[test]
    fn file_names_stay_in_their_directory() {
        assert_eq!(file_name("W-2026-000123"), "invoice-W-2026-000123.pdf");
        assert_eq!(file_name("../../etc/passwd"), "invoice-_2e_2e_2f_2e_2e_2fetc_2fpasswd.pdf");
        assert_eq!(file_name("a\0b"), "invoice-a_00b.pdf");
        assert_ne!(file_name("ü"), file_name("_c3_bc"));
        let long = |end: &str| file_name(&("é".repeat(5000) + end));
        assert!(long("a").len() < 255);
        assert_ne!(long("a"), long("b"));
    }

    #[test]
    fn adds_the_vat_of_the_country() {
        let mut order = order("W-1");
        assert_eq!((order.subtotal_cents(), total_cents(&order)), (1990, 2448)); // 23 % of 19.90 is 4.577
        order.customer.country = "JP".to_owned();
        assert_eq!(total_cents(&order), 1990);
        assert_eq!(vat_label("FI"), "VAT FI 25.5 %");
        assert_eq!(vat_label("DE"), "VAT DE 19 %");
        assert_eq!(vat_label("JP"), "VAT 0 % (export)");
    }

    #[test]
    fn is_a_pdf_with_what_was_bought() {
        let pdf = render(&order("W-1"));
        assert!(pdf.starts_with(b"%PDF-1.") && pdf.trim_ascii_end().ends_with(b"%%EOF"));
        for text in ["(INV-W-1)", "(Moka pot)", "(19.90)", "(Total PLN)", "(24.48)", "(Page 1 of 1)"] {
            assert_eq!(count(&pdf, text).min(1), 1, "{text} is missing");
        }
        assert_eq!(pdf, render(&order("W-1")));
    }

    #[test]
    fn breaks_pages_and_keeps_every_line() {
        let mut order = order("W-1");
        order.lines = vec![line(1, 5); 100];
        let pdf = render(&order);
        assert_eq!(count(&pdf, "(Moka pot)"), 100);
        assert_eq!(count(&pdf, " of 4)"), 4);
    }

    #[test]
    fn no_order_makes_it_panic() {
        let mut order = order("(\\)\0\u{202e}🦊");
        order.customer.name = "名".repeat(10_000);
        order.placed_at = "あ".repeat(9);
        order.customer.country = String::new();
        order.lines = vec![line(u32::MAX, i64::MAX), line(0, i64::MIN), line(u32::MAX, i64::MIN)];
        order.lines[0].description = "()\\".repeat(10_000);
        assert!(render(&order).starts_with(b"%PDF"));
        order.lines.clear();
        assert!(render(&order).starts_with(b"%PDF"));
    }
}
