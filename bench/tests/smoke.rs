//! The bench itself, on memory, for a second: its loops end, and see every event.

use tidings_bench::Result;
use tidings_bench::memory::Memory;
use tidings_bench::report::{Environment, markdown};
use tidings_bench::scenario::{Effort, all};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_scenario_runs_on_memory() -> Result<()> {
    let effort = Effort { rounds: 2, warm_up: 20, count: 200 };
    let tables = all(&Memory, effort, "", "").await?;
    assert_eq!(tables.len(), 6);
    for table in &tables {
        assert!(table.rows.iter().all(|row| row.rounds.len() == effort.rounds), "{}", table.name);
    }
    let environment = Environment { broker: "memory", versions: "of this test".into(), effort };
    let text = markdown(&environment, &tables);
    assert!(text.contains("| transport |") && !text.contains("NaN"), "{text}");
    Ok(())
}
