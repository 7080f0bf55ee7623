//! Counts what each loop allocates: the same loops, with an allocator that counts. `scripts/bench` runs it.

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;

#[global_allocator]
static COUNTS: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() -> tidings_bench::Result<()> {
    tidings_bench::command::main()
}
