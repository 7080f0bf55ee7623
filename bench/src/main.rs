//! `scripts/bench [transport]`.

fn main() -> tidings_bench::Result<()> {
    tidings_bench::command::main()
}
