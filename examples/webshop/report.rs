//! What the run shows: plain data in, text out.

use std::time::Duration;

use crate::text::{left, right, width};

/// What one service did.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServiceRow {
    pub(crate) service: String,
    pub(crate) published: u64,
    pub(crate) handled: u64,
    pub(crate) retried: u64,
    pub(crate) dead_lettered: u64,
    /// Events not settled yet.
    pub(crate) waiting: u64,
}

/// The table of the services.
pub(crate) fn service_table(services: &[ServiceRow]) -> String {
    let head = ["service", "published", "handled", "retried", "dead-lettered", "waiting"];
    let rows = services.iter().map(|row| {
        let counts = [row.published, row.handled, row.retried, row.dead_lettered, row.waiting];
        std::iter::once(row.service.clone()).chain(counts.map(|count| count.to_string())).collect()
    });
    table(&head, rows.collect())
}

/// The end-to-end delays of one event type, in any order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delays {
    pub(crate) event: String,
    pub(crate) delays: Vec<Duration>,
}

/// The table of the delays, exact.
pub(crate) fn delay_table(events: &[Delays]) -> String {
    let head = ["event", "count", "p50", "p95", "p99", "max"];
    let rows = events.iter().map(|event| {
        let mut sorted = event.delays.clone();
        sorted.sort_unstable();
        let count = sorted.len().to_string();
        let shown = [50, 95, 99, 100].map(|p| percentile(&sorted, p).map_or_else(|| "-".to_owned(), delay));
        [event.event.clone(), count].into_iter().chain(shown).collect()
    });
    table(&head, rows.collect())
}

/// The smallest value that `percent` of the values do not exceed (nearest rank); `sorted` must be.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// A duration in three figures or so: `850 µs`, `12.3 ms`, `3.01 s`.
fn delay(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    match micros {
        ..1e3 => format!("{micros:.0} µs"),
        ..1e6 => format!("{:.1} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

/// Aligned columns: the first to the left, the others to the right.
fn table(head: &[&str], mut rows: Vec<Vec<String>>) -> String {
    rows.insert(0, head.iter().map(ToString::to_string).collect());
    let column_width = |i: usize| rows.iter().filter_map(|row| row.get(i)).map(|cell| width(cell)).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(column_width).collect();
    rows.insert(1, widths.iter().map(|width| "-".repeat(*width)).collect());
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells: Vec<String> =
            cells.map(|(i, (cell, width))| if i == 0 { left(cell, *width) } else { right(cell, *width) }).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Events of one type that went from one service to another.
#[derive(Clone, Debug)]
pub(crate) struct Hop {
    pub(crate) event: String,
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) count: u64,
}

/// What went wrong with events of one type in the service that handled them.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    pub(crate) event: String,
    pub(crate) service: String,
    pub(crate) retries: u64,
    pub(crate) dead_letters: u64,
}

/// A Mermaid `sequenceDiagram`: an arrow for each event type between two services, in the order of the first, and a
/// note under the arrow where there was trouble.
pub(crate) fn sequence_diagram(hops: &[Hop], troubles: &[Trouble]) -> String {
    let hops = merged(hops);
    let names = hops.iter().flat_map(|hop| [&hop.from, &hop.to]).chain(troubles.iter().map(|trouble| &trouble.service));
    let mut participants = Participants::default();
    names.for_each(|name| participants.add(name));
    let mut text = format!("sequenceDiagram\n{}", participants.declarations());
    let mut troubles: Vec<&Trouble> = troubles.iter().collect();
    for hop in &hops {
        let (from, to, event) = (participants.id(&hop.from), participants.id(&hop.to), escaped(&hop.event));
        text.push_str(&format!("    {from}->>{to}: {event} ({}x)\n", hop.count));
        let here = troubles.extract_if(.., |trouble| trouble.service == hop.to && trouble.event == hop.event);
        here.for_each(|trouble| text.push_str(&note(&participants, trouble)));
    }
    troubles.into_iter().for_each(|trouble| text.push_str(&note(&participants, trouble)));
    text
}

fn merged(hops: &[Hop]) -> Vec<Hop> {
    let mut merged: Vec<Hop> = Vec::new();
    for hop in hops {
        let same =
            merged.iter_mut().find(|seen| (&seen.event, &seen.from, &seen.to) == (&hop.event, &hop.from, &hop.to));
        match same {
            Some(seen) => seen.count = seen.count.saturating_add(hop.count),
            None => merged.push(hop.clone()),
        }
    }
    merged
}

fn note(participants: &Participants, trouble: &Trouble) -> String {
    let counts =
        [counted(trouble.retries, "retry", "retries"), counted(trouble.dead_letters, "dead letter", "dead letters")];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    if counts.is_empty() {
        return String::new();
    }
    let (service, event) = (participants.id(&trouble.service), escaped(&trouble.event));
    format!("    Note over {service}: {event}: {}\n", counts.join(", "))
}

fn counted(count: u64, one: &str, many: &str) -> Option<String> {
    (count > 0).then(|| format!("{count} {}", if count == 1 { one } else { many }))
}

/// The participants of a diagram, in the order of their first appearance.
#[derive(Default)]
struct Participants(Vec<String>);

impl Participants {
    fn add(&mut self, name: &str) {
        if !self.0.iter().any(|known| known == name) {
            self.0.push(name.to_owned());
        }
    }

    /// The name itself where Mermaid takes it, else `participant_` and a number, which no plain name can be.
    fn id(&self, name: &str) -> String {
        if is_plain(name) {
            return name.to_owned();
        }
        let position = self.0.iter().position(|known| known == name).unwrap_or(self.0.len());
        format!("participant_{}", position + 1)
    }

    fn declarations(&self) -> String {
        let lines = self.0.iter().map(|name| match is_plain(name) {
            true => format!("    participant {name}\n"),
            false => format!("    participant {} as {}\n", self.id(name), escaped(name)),
        });
        lines.collect()
    }
}

/// Whether Mermaid reads a name as a participant: letters and digits, and none of its words (in any case).
fn is_plain(name: &str) -> bool {
    const WORDS: &str = "accdescr acctitle activate actor alt and as autonumber box break create critical deactivate destroy details else end \
        left link links loop note opt option over par participant properties rect right sequencediagram title";
    let is_word = || WORDS.split_whitespace().any(|word| word.eq_ignore_ascii_case(name));
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(|c| c.is_ascii_alphanumeric()) && !is_word()
}

/// Writes what could mean something to Mermaid (`;`, `#`, `%`, `<`, line ends ...) as its character code.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            c if c.is_alphanumeric() || "._-".contains(c) => escaped.push(c),
            c if c.is_whitespace() || c.is_control() => escaped.push(' '),
            c => escaped.push_str(&format!("#{};", u32::from(c))),
        }
    }
    escaped
}

/// Where the run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Standing {
    pub(crate) placed: u64,
    /// How many orders there will be, if that is known.
    pub(crate) expected: Option<u64>,
    pub(crate) handled: u64,
    pub(crate) retried: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) waiting: u64,
}

/// The live progress: one line that is written over on a terminal, a line per second elsewhere.
pub(crate) struct Progress {
    is_terminal: bool,
    last_shown: Option<Duration>,
    last_width: usize,
}

impl Progress {
    pub(crate) fn new(is_terminal: bool) -> Self {
        Progress { is_terminal, last_shown: None, last_width: 0 }
    }

    /// What to print now, as it is (it brings its own line end), if it is time; `elapsed` is since the start.
    pub(crate) fn show(&mut self, elapsed: Duration, standing: &Standing) -> Option<String> {
        let pause = Duration::from_millis(if self.is_terminal { 100 } else { 1000 });
        let is_early = self.last_shown.is_some_and(|last| elapsed < last + pause);
        (!is_early).then(|| self.show_now(elapsed, standing))
    }

    /// The last standing, early or not, and the end of the line that was written over.
    pub(crate) fn finish(&mut self, elapsed: Duration, standing: &Standing) -> String {
        let line = self.show_now(elapsed, standing);
        if self.is_terminal { line + "\n" } else { line }
    }

    fn show_now(&mut self, elapsed: Duration, standing: &Standing) -> String {
        self.last_shown = Some(elapsed);
        let line = standing_line(elapsed, standing);
        if !self.is_terminal {
            return line + "\n";
        }
        let covering = left(&line, self.last_width);
        self.last_width = width(&line);
        format!("\r{covering}")
    }
}

fn standing_line(elapsed: Duration, standing: &Standing) -> String {
    let Standing { placed, expected, handled, retried, dead_lettered, waiting } = standing;
    let expected = expected.map_or_else(String::new, |expected| format!("/{expected}"));
    let seconds = elapsed.as_secs_f64();
    format!(
        "{seconds:5.1} s  placed {placed}{expected}  handled {handled}  retried {retried}  dead {dead_lettered}  waiting {waiting}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(event: &str, from: &str, to: &str, count: u64) -> Hop {
        Hop { event: event.to_owned(), from: from.to_owned(), to: to.to_owned(), count }
    }

    fn trouble(event: &str, service: &str, retries: u64, dead_letters: u64) -> Trouble {
        Trouble { event: event.to_owned(), service: service.to_owned(), retries, dead_letters }
    }

    fn millis(values: impl IntoIterator<Item = u64>) -> Vec<Duration> {
        values.into_iter().map(Duration::from_millis).collect()
    }

    #[test]
    fn the_services_are_aligned() {
        let row = |service: &str, handled| ServiceRow { service: service.to_owned(), handled, ..ServiceRow::default() };
        let expected = "\
service  published  handled  retried  dead-lettered  waiting
-------  ---------  -------  -------  -------------  -------
Küche            0     1000        0              0        0
物流             0        7        0              0        0
";
        assert_eq!(service_table(&[row("Küche", 1000), row("物流", 7)]), expected);
    }

    #[test]
    fn percentiles_are_exact() {
        let sorted = millis(1..=200);
        assert_eq!(
            [50, 95, 99, 100].map(|p| percentile(&sorted, p)),
            [100, 190, 198, 200].map(|ms| Some(Duration::from_millis(ms)))
        );
        assert_eq!(percentile(&sorted[..1], 50), Some(Duration::from_millis(1)));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn delays_need_not_be_sorted() {
        let delays = vec![
            Delays { event: "shop.order.placed".to_owned(), delays: millis((1..=100).rev()) },
            Delays { event: "none".to_owned(), delays: Vec::new() },
        ];
        let expected = "\
event              count      p50      p95      p99       max
-----------------  -----  -------  -------  -------  --------
shop.order.placed    100  50.0 ms  95.0 ms  99.0 ms  100.0 ms
none                   0        -        -        -         -
";
        assert_eq!(delay_table(&delays), expected);
        assert_eq!(
            [850, 12_340, 3_014_000].map(|us| delay(Duration::from_micros(us))),
            ["850 µs", "12.3 ms", "3.01 s"]
        );
    }

    #[test]
    fn the_diagram_merges_hops_and_notes_troubles() {
        let hops = [
            hop("shop.order.placed", "Shop", "Billing", 299),
            hop("shop.invoice.created", "Billing", "CRM", 297),
            hop("shop.order.placed", "Shop", "Billing", 1),
        ];
        let troubles = [
            trouble("shop.order.placed", "Billing", 57, 3),
            trouble("shop.order.placed", "CRM", 1, 0),
            trouble("shop.invoice.created", "CRM", 0, 0),
        ];
        let expected = "\
sequenceDiagram
    participant Shop
    participant Billing
    participant CRM
    Shop->>Billing: shop.order.placed (300x)
    Note over Billing: shop.order.placed: 57 retries, 3 dead letters
    Billing->>CRM: shop.invoice.created (297x)
    Note over CRM: shop.order.placed: 1 retry
";
        assert_eq!(sequence_diagram(&hops, &troubles), expected);
    }

    #[test]
    fn the_diagram_escapes_what_mermaid_cannot_take() {
        let expected = "\
sequenceDiagram
    participant participant_1 as order-desk
    participant participant_2 as End
    participant_1->>participant_2: a#59; b#35;c #37;#37;#123;x#125; (1x)
    participant_2->>participant_2: ü (2x)
";
        let hops = [hop("a; b#c\n%%{x}", "order-desk", "End", 1), hop("ü", "End", "End", 2)];
        assert_eq!(sequence_diagram(&hops, &[]), expected);
    }

    #[test]
    fn a_terminal_gets_one_line_written_over() {
        let mut progress = Progress::new(true);
        let standing = |placed| Standing { placed, expected: Some(9), ..Standing::default() };
        let first = progress.show(Duration::ZERO, &standing(1000)).expect("the first is due");
        assert_eq!(first, "\r  0.0 s  placed 1000/9  handled 0  retried 0  dead 0  waiting 0");
        assert_eq!(progress.show(Duration::from_millis(99), &standing(2)), None);
        let second = progress.show(Duration::from_millis(100), &standing(2)).expect("the second is due");
        assert_eq!(second.len(), first.len(), "it covers the first");
        assert!(progress.finish(Duration::from_millis(101), &standing(3)).ends_with('\n'));
    }

    #[test]
    fn elsewhere_there_is_a_line_per_second() {
        let mut progress = Progress::new(false);
        let shown: Vec<String> = millis((0..=2000).step_by(250))
            .into_iter()
            .filter_map(|at| progress.show(at, &Standing::default()))
            .collect();
        assert_eq!(shown.len(), 3);
        assert!(shown.iter().all(|line| line.ends_with('\n') && !line.contains('\r')));
    }
}
