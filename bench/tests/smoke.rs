//! The bench itself, on memory, for a few seconds: its loops end, and see every event.

use std::process::Command;
use tidings_bench::Result;
use tidings_bench::memory::Memory;
use tidings_bench::picture::svg;
use tidings_bench::report::{Environment, markdown};
use tidings_bench::scenario::{Effort, all};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_scenario_runs_on_memory() -> Result<()> {
    let effort = Effort { rounds: 2, warm_up: 20, count: 200 };
    let tables = all(&Memory, effort, "", "").await?;
    assert_eq!(tables.len(), 18);
    for table in &tables {
        assert!(table.rows.iter().all(|row| row.rounds.len() == effort.rounds), "{}", table.name);
    }
    let timed = tables.iter().filter(|table| table.name == "round trip").flat_map(|table| &table.rows);
    assert!(timed.flat_map(|row| &row.rounds).all(|round| round.latency.is_some()));
    let environment = Environment { broker: "memory", versions: "of this test".into(), rounds: 2 };
    let (text, picture) = (markdown(&environment, &tables), svg("memory", &tables));
    assert!(text.contains("| transport |") && text.contains("| added p50 |"), "{text}");
    assert!(picture.contains("transport</text>") && picture.ends_with("</svg>\n"), "{picture}");
    assert!(!text.contains("NaN") && !picture.contains("NaN"), "{text}{picture}");
    Ok(())
}

#[test]
fn another_process_counts_what_is_allocated() -> Result<()> {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_tidings-bench"));
    bench.args(["memory", "--rounds", "1", "--count", "600", "--only", "publish, one at a time"]);
    let out = bench.output()?;
    let said = String::from_utf8(out.stdout)?;
    let allocated = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(&format!("| {name} |")))?;
        line.rsplit('|').nth(2)?.trim().parse::<f64>().ok()
    };
    // The event's two strings, its payload, and what the answer is given through.
    assert!(allocated("raw").is_some_and(|count| count >= 3.0), "{said}");
    assert!(allocated("SDK").is_some_and(|count| (3.0..20.0).contains(&count)), "{said}");
    Ok(())
}
