//! `scripts/bench [transport]`.

use std::path::Path;
use tidings_bench::broker::Broker;
use tidings_bench::kafka::Kafka;
use tidings_bench::memory::Memory;
use tidings_bench::nats::Nats;
use tidings_bench::rabbitmq::Rabbit;
use tidings_bench::report::{Environment, markdown};
use tidings_bench::scenario::{self, Effort};
use tidings_bench::{BoxError, Result};

const USAGE: &str = "scripts/bench [memory|nats|rabbitmq|kafka] [--rounds N] [--count N] [--only SCENARIO] [--loop LOOP] [--dry]
    without a transport: all; a part of a name does for SCENARIO and LOOP; with any of the last three nothing is written to
    docs/benchmarks";

#[derive(Clone)]
struct Options {
    transports: Vec<String>,
    effort: Effort,
    only: String,
    of: String,
    dry: bool,
}

fn main() -> Result<()> {
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
    let effort = Effort { rounds: 9, warm_up: 2_000, count: 60_000 };
    let mut options = Options { transports: Vec::new(), effort, only: String::new(), of: String::new(), dry: false };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| BoxError::from(format!("`{word}` needs a value")));
        match word.as_str() {
            "memory" | "nats" | "rabbitmq" | "kafka" => options.transports.push(word),
            "--rounds" => options.effort.rounds = value()?.parse()?,
            "--count" => options.effort.count = value()?.parse()?,
            "--only" => options.only = value()?,
            "--loop" => options.of = value()?,
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
    let options = options.clone();
    tokio::spawn(async move { measured(&broker, &options).await }).await?
}

async fn measured<B: Broker>(broker: &B, options: &Options) -> Result<()> {
    let tables = scenario::all(broker, options.effort, &options.only, &options.of).await?;
    let environment = Environment { broker: B::NAME, versions: broker.versions().await?, effort: options.effort };
    let text = markdown(&environment, &tables);
    println!("{text}");
    if !options.dry && options.only.is_empty() && options.of.is_empty() {
        let folder = Path::new("docs/benchmarks");
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join(format!("{}.md", B::NAME)), text.trim_end().to_owned() + "\n")?;
    }
    Ok(())
}
