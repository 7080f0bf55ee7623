//! `scripts/bench [transport]`, and the process that counts what is allocated.

use crate::broker::Broker;
use crate::kafka::Kafka;
use crate::measure::{Memory as Allocated, counts};
use crate::memory::Memory;
use crate::nats::Nats;
use crate::picture::svg;
use crate::rabbitmq::Rabbit;
use crate::report::{Environment, markdown};
use crate::scenario::{self, Effort, Table};
use crate::{BoxError, Result};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const USAGE: &str = "scripts/bench [memory|nats|rabbitmq|kafka] [--rounds N] [--count N] [--only SCENARIO] [--loop LOOP] [--out DIR] [--dry]
    without a transport: all; a part of a name does for SCENARIO and LOOP, and with one of these or --dry nothing is written;
    DIR is docs/benchmarks";

#[derive(Clone)]
struct Options {
    transports: Vec<String>,
    effort: Effort,
    only: String,
    of: String,
    out: PathBuf,
    dry: bool,
}

/// # Errors
/// What was asked for is not known, or failed.
pub fn main() -> Result<()> {
    let options = options(std::env::args().skip(1)).map_err(|wrong| format!("{wrong}\nusage: {USAGE}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for transport in &options.transports {
        match transport.as_str() {
            "nats" => runtime.block_on(spawned(Nats::start()?, &options))?,
            "rabbitmq" => runtime.block_on(spawned(Rabbit::start()?, &options))?,
            "kafka" => runtime.block_on(spawned(Kafka::start()?, &options))?,
            _ => runtime.block_on(spawned(Memory, &options))?,
        }
    }
    Ok(())
}

fn options(mut words: impl Iterator<Item = String>) -> Result<Options> {
    // No events: as many as the broker has.
    let effort = Effort { rounds: 5, warm_up: 2_000, count: 0 };
    let (only, of, out) = (String::new(), String::new(), "docs/benchmarks".into());
    let mut options = Options { transports: Vec::new(), effort, only, of, out, dry: false };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| BoxError::from(format!("`{word}` needs a value")));
        match word.as_str() {
            "memory" | "nats" | "rabbitmq" | "kafka" => options.transports.push(word),
            "--rounds" => options.effort.rounds = value()?.parse()?,
            "--count" => options.effort.count = value()?.parse()?,
            "--only" => options.only = value()?,
            "--loop" => options.of = value()?,
            "--out" => options.out = value()?.into(),
            "--dry" => options.dry = true,
            _ => return Err(format!("`{word}` is not known").into()),
        }
    }
    if options.transports.is_empty() {
        options.transports = ["memory", "nats", "rabbitmq", "kafka"].map(String::from).into();
    }
    Ok(options)
}

/// On a worker of the runtime, where an application's work is.
async fn spawned<B: Broker>(broker: B, options: &Options) -> Result<()> {
    let mut options = options.clone();
    if options.effort.count == 0 {
        options.effort.count = B::COUNT;
    }
    tokio::spawn(async move { measured(&broker, &options).await }).await?
}

async fn measured<B: Broker>(broker: &B, options: &Options) -> Result<()> {
    let mut tables = scenario::all(broker, options.effort, &options.only, &options.of).await?;
    if counts() {
        print!("{}", counted(&tables)?);
        return Ok(());
    }
    count(B::NAME, options, &mut tables)?;
    let environment =
        Environment { broker: B::NAME, versions: broker.versions().await?, rounds: options.effort.rounds };
    let text = markdown(&environment, &tables);
    println!("{text}");
    if !options.dry && options.only.is_empty() && options.of.is_empty() {
        std::fs::create_dir_all(&options.out)?;
        std::fs::write(options.out.join(format!("{}.md", B::NAME)), text.trim_end().to_owned() + "\n")?;
        std::fs::write(options.out.join(format!("{}.svg", B::NAME)), svg(B::NAME, &tables))?;
    }
    Ok(())
}

/// Has another process, whose allocator counts and is slower for it, run each loop once.
fn count(transport: &str, options: &Options, tables: &mut [Table]) -> Result<()> {
    let count = (options.effort.count / 3).max(1).to_string();
    let mut other = Command::new(std::env::current_exe()?.with_file_name("tidings-bench-counted"));
    other.args([transport, "--rounds", "1", "--count", &count, "--only", &options.only, "--loop", &options.of]);
    let out = other.stderr(Stdio::inherit()).output().map_err(|why| format!("{other:?}: {why}"))?;
    let said = String::from_utf8(out.stdout)?;
    let mut lines = said.lines();
    for row in tables.iter_mut().flat_map(|table| &mut table.rows) {
        let line = lines.next().ok_or("what counts allocations failed")?;
        let (allocations, peak) = line.split_once(' ').ok_or("not what is counted")?;
        row.memory = Some(Allocated { allocations: allocations.parse()?, peak: peak.parse()? });
    }
    Ok(())
}

/// A line for each loop, as `count` reads it.
fn counted(tables: &[Table]) -> Result<String> {
    let mut text = String::new();
    for sample in tables.iter().flat_map(|table| &table.rows).filter_map(|row| row.rounds.first()) {
        writeln!(text, "{} {}", sample.memory.allocations, sample.memory.peak)?;
    }
    Ok(text)
}
