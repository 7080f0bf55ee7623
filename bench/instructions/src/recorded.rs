//! The file of what was measured before.

use crate::Result;
use std::fmt::Write;
use std::path::PathBuf;

/// What grows by more fails.
const MARGIN: f64 = 0.05;
/// Allocations of tokio's own, once in many messages.
const FEW: f64 = 0.02;

const HEAD: &str =
    "# Instructions and allocations for one message, on memory, in one thread, as `scripts/instructions` counts them.
# They depend on the compiler: what CI has. `scripts/instructions --write` writes this file.
";

pub(crate) struct Cost {
    pub(crate) name: String,
    /// Not known where there is no valgrind.
    pub(crate) instructions: Option<f64>,
    pub(crate) allocations: f64,
}

/// What grows; how many there were, and what one message cost.
pub(crate) type Scale = (&'static str, Vec<(usize, f64)>);

fn path() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "recorded.txt"].iter().collect()
}

pub(crate) fn write(costs: &[Cost]) -> Result<()> {
    let mut text = HEAD.to_owned();
    for Cost { name, instructions, allocations } in costs {
        let instructions = instructions.ok_or("nothing is recorded without valgrind")?;
        writeln!(text, "{name:<16} {instructions:>6.0} {allocations:>6.2}")?;
    }
    print!("{text}");
    Ok(std::fs::write(path(), text)?)
}

const SCALE: &str = "# Measured: how the cost of a message grows

Written by `scripts/instructions --scale`: instructions for one message on memory, in one thread, by valgrind; they do not depend on the load
of the machine. Allocating, hashing and walking show here; what caches miss does not. With one subscription the publish itself is in each delivery.
";

/// A table of what grows, and by how much the cost does.
pub(crate) fn write_scale(scales: &[Scale]) -> Result<()> {
    let mut text = SCALE.to_owned();
    for (what, costs) in scales {
        let least = costs.iter().map(|(_, cost)| *cost).fold(f64::INFINITY, f64::min);
        writeln!(text, "\n| {what} | instructions | to the least |\n|--:|--:|--:|")?;
        for (many, cost) in costs {
            writeln!(text, "| {many} | {cost:.0} | {:.2} |", cost / least)?;
        }
    }
    print!("{text}");
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../../docs/benchmarks/scale.md"].iter().collect();
    Ok(std::fs::write(path, text)?)
}

pub(crate) fn read() -> Result<Vec<Cost>> {
    let text = std::fs::read_to_string(path())?;
    text.lines().filter(|line| !line.starts_with('#')).map(parse).collect()
}

fn parse(line: &str) -> Result<Cost> {
    let mut words = line.split_whitespace();
    let mut next = || words.next().ok_or_else(|| format!("recorded.txt: `{line}` has not three words"));
    Ok(Cost { name: next()?.into(), instructions: Some(next()?.parse()?), allocations: next()?.parse()? })
}

/// A table, and whether anything has grown by more than it may.
pub(crate) fn compared(costs: &[Cost], recorded: &[Cost]) -> (String, bool) {
    let (mut text, mut any) = (format!("{:<16} {:>14} {:>14}\n", "per message", "instructions", "allocations"), false);
    for cost in costs {
        let Some(before) = recorded.iter().find(|before| before.name == cost.name) else {
            text += &format!("{:<16} not recorded: scripts/instructions --write\n", cost.name);
            any = true;
            continue;
        };
        let was = before.instructions.unwrap_or(f64::NAN);
        let grown = cost.instructions.is_some_and(|now| now > was * (1.0 + MARGIN))
            || cost.allocations > before.allocations * (1.0 + MARGIN) + FEW;
        let shrunk = cost.instructions.is_some_and(|now| now < was * (1.0 - MARGIN));
        let verdict = match (grown, shrunk) {
            (true, _) => "GROWN",
            (_, true) => "less: record it",
            _ => "",
        };
        any |= grown;
        let now = cost.instructions.map_or("?".into(), |now| format!("{now:.0}"));
        let (allocations, had) = (cost.allocations, before.allocations);
        text += &format!("{:<16} {now:>6} ({was:>5.0}) {allocations:>6.2} ({had:.2}) {verdict}\n", cost.name);
    }
    (text, any)
}
