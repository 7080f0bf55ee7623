//! How many instructions and allocations a message costs on memory, held to what is recorded.
//!
//! Neither depends on the load of the machine, so that a test command can fail when one of them grows. Instructions are
//! counted by valgrind; allocations, by this process.

mod recorded;
mod scenarios;

use recorded::{Cost, Scale};
use std::process::{Command, ExitCode};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = BoxError> = std::result::Result<T, E>;

const USAGE: &str = "tidings-instructions [--write | --scale | --run SCENARIO]
    compares with what is recorded, and fails if anything has grown; --write records; --scale writes docs/benchmarks/scale.md;
    --run runs one scenario alone, to profile it";

/// Until rooms that are reused have grown, and caches are full.
const WARM_UP: u64 = 10_240;
const COUNT: u64 = 10_240;

fn main() -> Result<ExitCode> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => compare(),
        ["--write"] => recorded::write(&costs()?).map(|()| ExitCode::SUCCESS),
        ["--scale"] => recorded::write_scale(&scales()?).map(|()| ExitCode::SUCCESS),
        ["--run", name] => run(name),
        _ => Err(format!("usage: {USAGE}").into()),
    }
}

fn compare() -> Result<ExitCode> {
    let (costs, recorded) = (costs()?, recorded::read()?);
    let (text, grown) = recorded::compared(&costs, &recorded);
    println!("{text}");
    Ok(if grown { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn costs() -> Result<Vec<Cost>> {
    let valgrind = Command::new("valgrind").arg("--version").output().is_ok_and(|out| out.status.success());
    if !valgrind {
        println!("NOT COUNTED: instructions, because valgrind is not installed; only allocations are compared");
    }
    scenarios::ALL
        .iter()
        .map(|(name, _)| {
            let instructions = if valgrind { Some(instructions(name)?) } else { None };
            Ok(Cost { name: (*name).into(), instructions, allocations: allocations(name)? })
        })
        .collect()
}

/// For each scale how many there were of what grows, and what one message cost.
fn scales() -> Result<Vec<Scale>> {
    let at = |what: &str, many: usize| Ok((many, instructions(&format!("{what}/{many}"))?));
    scenarios::SCALES
        .iter()
        .map(|(what, manys, _)| Ok((*what, manys.iter().map(|many| at(what, *many)).collect::<Result<_>>()?)))
        .collect()
}

fn allocations(name: &str) -> Result<f64> {
    let mut work = scenarios::prepare(name, WARM_UP + COUNT)?;
    work(WARM_UP)?;
    let mut result = Ok(());
    let info = allocation_counter::measure(|| result = measured(&mut work, COUNT));
    result.map(|()| info.count_total as f64 / COUNT as f64)
}

fn instructions(name: &str) -> Result<f64> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured*"]);
    let out = valgrind.arg(std::env::current_exe()?).args(["--run", name]).output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :")).map(|(_, count)| count.trim());
    match collected.and_then(|count| count.parse::<f64>().ok()) {
        Some(collected) if out.status.success() && collected > 0.0 => Ok(collected / COUNT as f64),
        _ => Err(format!("valgrind counted nothing in `{name}`: {said}").into()),
    }
}

fn run(name: &str) -> Result<ExitCode> {
    let mut work = scenarios::prepare(name, WARM_UP + COUNT)?;
    work(WARM_UP)?;
    measured(&mut work, COUNT)?;
    Ok(ExitCode::SUCCESS)
}

/// What is counted is counted in here: valgrind knows it by its name.
#[inline(never)]
fn measured(work: &mut scenarios::Work, count: u64) -> Result<()> {
    work(count)
}
