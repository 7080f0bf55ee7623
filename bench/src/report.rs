//! The numbers as a table.

use crate::measure::{Memory, Ranked, Sample as Measured};
use crate::scenario::{LIMITS, Loop, Row, Table};
use std::fmt::{Result, Write};
use std::time::Duration;

/// What the numbers hold for.
#[derive(Clone, Debug)]
pub struct Environment {
    pub broker: &'static str,
    pub versions: String,
    pub rounds: usize,
}

/// Markdown, for the screen and for `docs/benchmarks`.
pub fn markdown(environment: &Environment, tables: &[Table]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = head(&mut text, environment);
    for table in tables {
        let _ = one(&mut text, table);
    }
    text
}

fn head(text: &mut String, environment: &Environment) -> Result {
    let Environment { broker, versions, rounds } = environment;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    writeln!(text, "# Measured: {broker}\n")?;
    writeln!(text, "Written by `scripts/bench {broker}`; `bench/README.md` says how it measures.\n")?;
    writeln!(
        text,
        "- {versions}; Tidings {}; {}, {}, {cores} cores, the broker on the same machine.",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        processor().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
    )?;
    writeln!(text, "- tokio, multi-threaded, {cores} workers; load of the machine during the run: {}.", load())?;
    writeln!(text, "- Payload 256 bytes of JSON, if nothing else is said; at most {} unconfirmed.\n", LIMITS.window)?;
    writeln!(text, "![How fast it is, compared with raw, in {rounds} rounds]({broker}.svg)\n")
}

fn one(text: &mut String, table: &Table) -> Result {
    let effort = table.effort;
    writeln!(text, "## {}\n\n{}", table.name, table.what)?;
    writeln!(text, "{} rounds of {} events after {} to warm up.\n", effort.rounds, effort.count, effort.warm_up)?;
    let Some(base) = table.rows.first() else { return Ok(()) };
    let latencies = base.rounds.iter().any(|round| round.latency.is_some());
    if latencies {
        times(text, table, base)?;
    } else {
        speeds(text, table, base)?;
    }
    writeln!(text)?;
    for row in &table.rows {
        if let Loop::Raw(raw) = row.of {
            writeln!(text, "- *{}*: {}.", raw.name, raw.what)?;
        }
    }
    writeln!(text)
}

fn speeds(text: &mut String, table: &Table, base: &Row) -> Result {
    let first = first(base);
    write!(text, "| loop | msg/s: best | median | worst | to {first} | client CPU, us/msg | over {first} ")?;
    writeln!(text, "| allocations/msg | peak, KiB |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")?;
    for row in &table.rows {
        let speed = Ranked::new(row.rounds.iter().map(Measured::per_second));
        let (best, median, worst) = (speed.at(1.0), speed.median(), speed.at(0.0));
        let same = std::ptr::eq(row, base);
        let to = if same { "1".into() } else { ratio(row, base) };
        let over = if same { String::new() } else { format!("{:+.2}", over(row, base)) };
        write!(text, "| {} | {best:.0} | {median:.0} | {worst:.0} | {to} | {:.2} | {over} ", row.of.name(), cpu(row))?;
        writeln!(text, "| {} |", memory(row.memory))?;
    }
    Ok(())
}

fn times(text: &mut String, table: &Table, base: &Row) -> Result {
    write!(text, "| loop | p50, us | p99, us | added p50 | added p99 | client CPU, us/msg ")?;
    writeln!(text, "| allocations/msg | peak, KiB |\n|---|--:|--:|--:|--:|--:|--:|--:|")?;
    let [base_half, base_most] = micros(base);
    for row in &table.rows {
        let [half, most] = micros(row);
        let more = if std::ptr::eq(row, base) {
            "| ".into()
        } else {
            format!("{} | {}", added(&half, &base_half), added(&most, &base_most))
        };
        let (half, most) = (Ranked::new(half).median(), Ranked::new(most).median());
        write!(text, "| {} | {half:.0} | {most:.0} | {more} ", row.of.name())?;
        writeln!(text, "| {:.1} | {} |", cpu(row), memory(row.memory))?;
    }
    Ok(())
}

/// p50 and p99 of each round.
fn micros(row: &Row) -> [Vec<f64>; 2] {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let (half, most) = row.rounds.iter().filter_map(|round| round.latency).map(|(a, b)| (micros(a), micros(b))).unzip();
    [half, most]
}

/// What was added: the median, and between what the middle half of them lies.
fn added(of: &[f64], base: &[f64]) -> String {
    let ranked = Ranked::new(of.iter().zip(base).map(|(of, base)| of - base));
    format!("{:+.0} ({:+.0} to {:+.0})", ranked.median(), ranked.at(0.25), ranked.at(0.75))
}

/// What all are compared with.
fn first(base: &Row) -> &'static str {
    if matches!(base.of, Loop::Raw(_)) { "raw" } else { "the first" }
}

/// By round.
pub(crate) fn ratios(row: &Row, base: &Row) -> Ranked {
    Ranked::new(row.rounds.iter().zip(&base.rounds).map(|(of, base)| of.per_second() / base.per_second()))
}

fn ratio(row: &Row, base: &Row) -> String {
    let ratios = ratios(row, base);
    let (low, median, high) = (ratios.at(0.25), ratios.median(), ratios.at(0.75));
    let verdict = if (low..=high).contains(&1.0) { " *indistinguishable*" } else { "" };
    format!("{median:.2} ({low:.2} to {high:.2}){verdict}")
}

fn cpu(row: &Row) -> f64 {
    Ranked::new(row.rounds.iter().map(Measured::cpu_micros)).median()
}

/// How much more CPU it needs, by round, in microseconds.
fn over(row: &Row, base: &Row) -> f64 {
    Ranked::new(row.rounds.iter().zip(&base.rounds).map(|(of, base)| of.cpu_micros() - base.cpu_micros())).median()
}

fn memory(memory: Option<Memory>) -> String {
    memory.map_or("| ".into(), |Memory { allocations, peak }| format!("{allocations:.1} | {}", peak / 1024))
}

fn processor() -> Option<String> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpus.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").ok();
    load.and_then(|load| Some(load.split_whitespace().next()?.to_owned())).unwrap_or_else(|| "not known".into())
}
