//! The numbers as a table.

use crate::measure::{Ranked, Sample as Measured};
use crate::scenario::{Effort, LIMITS, Loop, Row, Table};
use std::fmt::Write;

/// What the numbers hold for.
#[derive(Clone, Debug)]
pub struct Environment {
    pub broker: &'static str,
    pub versions: String,
    pub effort: Effort,
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

fn head(text: &mut String, environment: &Environment) -> std::fmt::Result {
    let Environment { broker, versions, effort } = environment;
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
    writeln!(
        text,
        "- Payload 256 bytes of JSON; window {}, in flight {}; {} rounds of {} events after {} to warm up.\n",
        LIMITS.window, LIMITS.in_flight, effort.rounds, effort.count, effort.warm_up
    )
}

fn one(text: &mut String, table: &Table) -> std::fmt::Result {
    writeln!(text, "## {}\n\n{}\n", table.name, table.what)?;
    writeln!(text, "| loop | msg/s: best | median | worst | to raw | client CPU, us/msg | over raw |")?;
    writeln!(text, "|---|--:|--:|--:|--:|--:|--:|")?;
    let Some(base) = table.rows.first() else { return Ok(()) };
    for row in &table.rows {
        let speed = Ranked::new(row.rounds.iter().map(Measured::per_second));
        let cpu = Ranked::new(row.rounds.iter().map(Measured::cpu_micros));
        let (best, median, worst) = (speed.at(1.0), speed.median(), speed.at(0.0));
        write!(text, "| {} | {best:.0} | {median:.0} | {worst:.0} ", row.of.name())?;
        if std::ptr::eq(row, base) {
            writeln!(text, "| 1 | {:.1} | |", cpu.median())?;
            continue;
        }
        writeln!(text, "| {} | {:.1} | {:+.1} |", ratio(row, base), cpu.median(), over(row, base))?;
    }
    writeln!(text)?;
    for row in &table.rows {
        if let Loop::Raw(raw) = row.of {
            writeln!(text, "- *{}*: {}.", raw.name, raw.what)?;
        }
    }
    writeln!(text)
}

/// The median of the ratios by round, and between what the middle half of them lies.
fn ratio(row: &Row, base: &Row) -> String {
    let ratios = row.rounds.iter().zip(&base.rounds).map(|(of, base)| of.per_second() / base.per_second());
    let ratios = Ranked::new(ratios);
    let (low, median, high) = (ratios.at(0.25), ratios.median(), ratios.at(0.75));
    let verdict = if (low..=high).contains(&1.0) { " *indistinguishable*" } else { "" };
    format!("{median:.2} ({low:.2} to {high:.2}){verdict}")
}

/// How much more CPU it needs, by round, in microseconds.
fn over(row: &Row, base: &Row) -> f64 {
    Ranked::new(row.rounds.iter().zip(&base.rounds).map(|(of, base)| of.cpu_micros() - base.cpu_micros())).median()
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
