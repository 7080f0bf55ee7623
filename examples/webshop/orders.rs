//! Orders: what a customer bought, and reading them, one JSON object per line.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text;

/// The longest line that is read, in bytes, without its end.
const MAX_LINE: usize = 1024 * 1024;
/// The longest order id, in bytes.
const MAX_ID: usize = 64;
/// The largest subtotal, in cents: nobody buys for more than a billion.
const MAX_TOTAL_CENTS: i64 = 1_000_000_000 * 100;
/// How many orders are kept to repeat them when more are asked for than the input has.
const KEPT_FOR_REPEATS: usize = 10_000;

/// A country that no country has: ISO 3166-1 leaves `ZZ` to its users.
pub(crate) const NOWHERE: &str = "ZZ";

/// The sample that ships with the example.
const SAMPLE: &[u8] = include_bytes!("orders.jsonl");

/// What a customer ordered. Prices are without VAT, in cents of `currency`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) order_id: String,
    /// UTC, as `2026-01-05T06:34:06Z`.
    pub(crate) placed_at: String,
    pub(crate) customer: Customer,
    /// ISO 4217, as `EUR`.
    pub(crate) currency: String,
    pub(crate) lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Customer {
    pub(crate) name: String,
    pub(crate) email: String,
    pub(crate) street: String,
    pub(crate) postal_code: String,
    pub(crate) city: String,
    /// ISO 3166-1 alpha-2, as `DE`.
    pub(crate) country: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) sku: String,
    pub(crate) description: String,
    pub(crate) quantity: u32,
    pub(crate) unit_price_cents: i64,
}

impl Line {
    /// Quantity times price; the largest number instead of an overflow.
    pub(crate) fn amount_cents(&self) -> i64 {
        self.unit_price_cents.saturating_mul(i64::from(self.quantity))
    }

    fn check(&self) -> Result<(), String> {
        check_text("sku", &self.sku)?;
        check_text("description", &self.description)?;
        if self.quantity == 0 {
            return Err("quantity is zero".to_owned());
        }
        if self.unit_price_cents < 0 {
            return Err("unit_price_cents is negative".to_owned());
        }
        Ok(())
    }
}

impl Order {
    /// The sum of the lines, without VAT; the largest number instead of an overflow.
    pub(crate) fn subtotal_cents(&self) -> i64 {
        self.lines.iter().map(Line::amount_cents).fold(0, i64::saturating_add)
    }

    /// Why a shop could not take this order, if so.
    pub(crate) fn check(&self) -> Result<(), String> {
        check_text("order_id", &self.order_id)?;
        if self.order_id.len() > MAX_ID {
            return Err(format!("order_id is longer than {MAX_ID} bytes"));
        }
        check_time(&self.placed_at)?;
        self.customer.check()?;
        check_code("currency", &self.currency, 3)?;
        if self.lines.is_empty() {
            return Err("lines is empty".to_owned());
        }
        for (i, line) in self.lines.iter().enumerate() {
            line.check().map_err(|reason| format!("lines[{i}]: {reason}"))?;
        }
        if self.subtotal_cents() > MAX_TOTAL_CENTS {
            return Err(format!("the total is over {} {}", text::money(MAX_TOTAL_CENTS), self.currency));
        }
        Ok(())
    }
}

impl Customer {
    fn check(&self) -> Result<(), String> {
        check_text("customer.name", &self.name)?;
        check_text("customer.email", &self.email)?;
        check_text("customer.street", &self.street)?;
        check_text("customer.postal_code", &self.postal_code)?;
        check_text("customer.city", &self.city)?;
        check_code("customer.country", &self.country, 2)?;
        if self.email.contains('@') { Ok(()) } else { Err("customer.email has no @".to_owned()) }
    }
}

fn check_text(field: &str, value: &str) -> Result<(), String> {
    if value.trim().is_empty() {
        return Err(format!("{field} is empty"));
    }
    if value.chars().any(text::is_steering) {
        return Err(format!("{field} has a control character"));
    }
    Ok(())
}

fn check_code(field: &str, value: &str, length: usize) -> Result<(), String> {
    if value.len() == length && value.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Ok(());
    }
    Err(format!("{field} is not {length} capital letters: {value:?}"))
}

fn check_time(value: &str) -> Result<(), String> {
    const SHAPE: &str = "0000-00-00T00:00:00Z";
    let shape: String = value.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    if shape == SHAPE { Ok(()) } else { Err(format!("placed_at is not like 2026-01-05T06:34:06Z: {value:?}")) }
}

/// Where orders come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Source {
    #[default]
    Sample,
    Stdin,
    File(PathBuf),
}

impl FromStr for Source {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "-" { Source::Stdin } else { Source::File(text.into()) })
    }
}

/// Opens a source. Its lines are read when they are asked for.
pub(crate) fn open(source: &Source) -> io::Result<Orders<Box<dyn BufRead + Send>>> {
    let reader: Box<dyn BufRead + Send> = match source {
        Source::Sample => Box::new(SAMPLE),
        Source::Stdin => Box::new(BufReader::new(io::stdin())),
        Source::File(path) => Box::new(BufReader::new(open_file(path)?)),
    };
    Ok(Orders::new(reader))
}

fn open_file(path: &Path) -> io::Result<File> {
    File::open(path).map_err(|error| io::Error::new(error.kind(), format!("cannot open {}: {error}", path.display())))
}

/// A line that is no order.
#[derive(Debug, PartialEq)]
pub(crate) struct BadLine {
    /// Counted from 1.
    pub(crate) number: u64,
    pub(crate) reason: String,
    /// Whether the input could not be read on, so that there may be orders behind this line that nobody saw.
    pub(crate) is_last: bool,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.number, self.reason)
    }
}

/// The orders of an input, one by one. A bad line does not stop the rest; an input that cannot be read on does.
///
/// Memory grows by the ids alone: they are kept to notice one that comes twice.
pub(crate) struct Orders<R> {
    reader: R,
    line: Vec<u8>,
    number: u64,
    seen: HashSet<String>,
    ended: bool,
}

impl<R: BufRead> Orders<R> {
    pub(crate) fn new(reader: R) -> Self {
        Orders { reader, line: Vec::new(), number: 0, seen: HashSet::new(), ended: false }
    }

    /// Exactly `count` good orders: the input's, then the same ones again with fresh ids (`W-2026-000123-2`). Ends
    /// early only if the input has no good order at all.
    pub(crate) fn exactly(self, count: usize) -> Exactly<R> {
        Exactly { orders: self, kept: Vec::new(), left: count, next: 0, round: 2 }
    }

    /// Reads one line into `self.line`, without its end; `false` at the end of the input.
    fn read_line(&mut self) -> io::Result<bool> {
        self.line.clear();
        let limit = MAX_LINE as u64 + 2; // room for "\r\n"
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut self.line)? == 0 {
            return Ok(false);
        }
        self.number += 1;
        match self.line.strip_suffix(b"\n") {
            Some(line) => self.line.truncate(line.strip_suffix(b"\r").unwrap_or(line).len()),
            None if self.line.len() > MAX_LINE => self.skip_line()?,
            None => {}
        }
        if self.number == 1 && self.line.starts_with(b"\xef\xbb\xbf") {
            self.line.drain(..3);
        }
        Ok(true)
    }

    /// Reads up to the end of the line and keeps nothing of it.
    fn skip_line(&mut self) -> io::Result<()> {
        let mut skipped = Vec::new();
        loop {
            skipped.clear();
            let read = self.reader.by_ref().take(64 * 1024).read_until(b'\n', &mut skipped)?;
            if read == 0 || skipped.ends_with(b"\n") {
                return Ok(());
            }
        }
    }

    /// An over-long line is never blank: its end was not looked at.
    fn is_blank(&self) -> bool {
        self.line.len() <= MAX_LINE && self.line.trim_ascii().is_empty()
    }

    fn parse_line(&mut self) -> Result<Order, String> {
        if self.line.len() > MAX_LINE {
            return Err(format!("longer than {MAX_LINE} bytes"));
        }
        let order: Order = serde_json::from_slice(&self.line).map_err(|error| json_reason(&error))?;
        order.check()?;
        if !self.seen.insert(order.order_id.clone()) {
            return Err(format!("order_id {:?} came before", order.order_id));
        }
        Ok(order)
    }
}

/// serde_json counts lines in what it was given, which here is always one.
fn json_reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    format!("{message} (column {})", error.column())
}

impl<R: BufRead> Iterator for Orders<R> {
    type Item = Result<Order, BadLine>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            match self.read_line() {
                Ok(false) => self.ended = true,
                Ok(true) if self.is_blank() => {}
                Ok(true) => {
                    let number = self.number;
                    return Some(self.parse_line().map_err(|reason| BadLine { number, reason, is_last: false }));
                }
                Err(error) => {
                    self.ended = true;
                    let reason = format!("cannot read on: {error}");
                    return Some(Err(BadLine { number: self.number + 1, reason, is_last: true }));
                }
            }
        }
        None
    }
}

/// See [`Orders::exactly`].
pub(crate) struct Exactly<R> {
    orders: Orders<R>,
    kept: Vec<Order>,
    left: usize,
    next: usize,
    round: usize,
}

impl<R: BufRead> Exactly<R> {
    fn repeat(&mut self) -> Option<Order> {
        if self.next == self.kept.len() {
            self.next = 0;
            self.round += 1;
        }
        let mut order = self.kept.get(self.next)?.clone();
        self.next += 1;
        order.order_id = self.fresh_id(&order.order_id);
        Some(order)
    }

    fn fresh_id(&mut self, id: &str) -> String {
        let mut id = format!("{id}-{}", self.round);
        while !self.orders.seen.insert(id.clone()) {
            id.push('x');
        }
        id
    }
}

impl<R: BufRead> Iterator for Exactly<R> {
    type Item = Result<Order, BadLine>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let order = match self.orders.next() {
            Some(Ok(order)) => {
                if self.kept.len() < KEPT_FOR_REPEATS {
                    self.kept.push(order.clone());
                }
                order
            }
            Some(bad) => return Some(bad),
            None => self.repeat()?,
        };
        self.left -= 1;
        Some(Ok(order))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn order(id: &str) -> Order {
        let customer = Customer {
            name: "Łukasz Żółć".to_owned(),
            email: "lukasz@example.com".to_owned(),
            street: "ul. Długa 1".to_owned(),
            postal_code: "80-831".to_owned(),
            city: "Gdańsk".to_owned(),
            country: "PL".to_owned(),
        };
        let placed_at = "2026-01-05T06:34:06Z".to_owned();
        Order { order_id: id.to_owned(), placed_at, customer, currency: "PLN".to_owned(), lines: vec![line(2, 995)] }
    }

    pub(crate) fn line(quantity: u32, unit_price_cents: i64) -> Line {
        Line { sku: "S-1".to_owned(), description: "Moka pot".to_owned(), quantity, unit_price_cents }
    }

    fn json(order: &Order) -> String {
        serde_json::to_string(order).expect("an order is plain data")
    }

    fn read(input: impl AsRef<[u8]>) -> Vec<Result<String, String>> {
        let orders = Orders::new(input.as_ref());
        orders.map(|order| order.map(|order| order.order_id).map_err(|bad| bad.to_string())).collect()
    }

    fn refusal(change: impl FnOnce(&mut Order)) -> String {
        let mut order = order("W-1");
        change(&mut order);
        order.check().expect_err("this order should be refused")
    }

    #[test]
    fn every_order_of_the_sample_is_good() {
        let orders = open(&Source::Sample).expect("it is in the program");
        let good: Vec<Order> = orders.map(|order| order.expect("the sample has a bad line")).collect();
        assert_eq!(good.len(), 300);
    }

    #[test]
    fn a_bad_line_does_not_stop_the_rest() {
        let input = format!("{}\nnot json\n\n{}\n{}", json(&order("a")), json(&order("a")), json(&order("b")));
        let read = read(input);
        assert_eq!(read[0], Ok("a".to_owned()));
        assert_eq!(read[1], Err("line 2: expected ident (column 2)".to_owned()));
        assert_eq!(read[2], Err("line 4: order_id \"a\" came before".to_owned()));
        assert_eq!(read[3..], [Ok("b".to_owned())]);
    }

    #[test]
    fn a_byte_order_mark_and_crlf_are_tolerated() {
        let input = format!("\u{feff}{}\r\n \t\r\n{}\r\n", json(&order("a")), json(&order("b")));
        assert_eq!(read(input), [Ok("a".to_owned()), Ok("b".to_owned())]);
    }

    #[test]
    fn a_line_over_the_limit_is_refused_and_the_next_is_read() {
        let good = json(&order("a"));
        for padding in [MAX_LINE + 1, MAX_LINE + 2, MAX_LINE + 3, 3 * MAX_LINE] {
            let read = read(format!("{}\n{good}", " ".repeat(padding - 1) + "x"));
            assert_eq!(read, [Err("line 1: longer than 1048576 bytes".to_owned()), Ok("a".to_owned())]);
        }
        let exactly = format!("{}{good}\r\n", " ".repeat(MAX_LINE - good.len()));
        assert_eq!(read(exactly), [Ok("a".to_owned())]);
    }

    #[test]
    fn outside_bytes_never_panic() {
        assert!(read(b"\xff\xfe{\n[[[[\n{}\nnull\n\"\n").iter().all(Result::is_err));
        assert!(read("[".repeat(100_000)).iter().all(Result::is_err));
        assert!(read(json(&order("a")) + " trailing").iter().all(Result::is_err));
    }

    #[test]
    fn an_input_that_fails_says_so_and_ends() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("the disk is gone"))
            }
        }
        let mut orders = Orders::new(BufReader::new(Broken));
        let bad = orders.next().expect("a report").expect_err("no order");
        assert_eq!((bad.to_string().as_str(), bad.is_last), ("line 1: cannot read on: the disk is gone", true));
        assert!(orders.next().is_none());
    }

    #[test]
    fn what_no_shop_can_take_is_refused() {
        assert_eq!(refusal(|o| o.order_id = " ".to_owned()), "order_id is empty");
        assert_eq!(refusal(|o| o.order_id = "x".repeat(65)), "order_id is longer than 64 bytes");
        assert_eq!(refusal(|o| o.customer.name = "a\x1b[2J".to_owned()), "customer.name has a control character");
        assert_eq!(refusal(|o| o.customer.email = "nobody".to_owned()), "customer.email has no @");
        assert_eq!(refusal(|o| o.currency = "eur".to_owned()), "currency is not 3 capital letters: \"eur\"");
        assert!(refusal(|o| o.placed_at = "yesterday".to_owned()).starts_with("placed_at is not like"));
        assert_eq!(refusal(|o| o.lines.clear()), "lines is empty");
        assert_eq!(refusal(|o| o.lines.push(line(0, 5))), "lines[1]: quantity is zero");
        assert_eq!(refusal(|o| o.lines.push(line(1, -5))), "lines[1]: unit_price_cents is negative");
        let overflowing = || line(u32::MAX, i64::MAX);
        let reason = refusal(|o| o.lines = vec![overflowing(), overflowing()]);
        assert_eq!(reason, "the total is over 1,000,000,000.00 PLN");
    }

    #[test]
    fn repeats_with_fresh_ids_until_there_are_enough() {
        let ids = |input: &str, count| -> Vec<String> {
            let orders = Orders::new(input.as_bytes()).exactly(count);
            orders.filter_map(Result::ok).map(|order| order.order_id).collect()
        };
        let input = format!("{}\nbad\n{}\n", json(&order("a")), json(&order("a-2")));
        assert_eq!(ids(&input, 1), ["a"]);
        assert_eq!(ids(&input, 5), ["a", "a-2", "a-2x", "a-2-2", "a-3"]);
        assert!(ids("bad\n", 5).is_empty());
    }

    #[test]
    fn a_dash_is_standard_input() {
        assert_eq!("-".parse(), Ok(Source::Stdin));
        assert_eq!("a.jsonl".parse(), Ok(Source::File("a.jsonl".into())));
    }
}
