//! Core under paused time and seeded randomness: what is promised holds whatever goes wrong.
//!
//! `TIDINGS_SIM_SEED=123` runs that seed alone and shows what happened; `TIDINGS_SIM_SEEDS=20000` runs more of them, from
//! `TIDINGS_SIM_FIRST`. How a run is made and what is checked says [`tidings_tests::sim`].
//!
//! # Why threads are not simulated
//!
//! A run has one thread, so it shows what the order of *tasks* can break, not what two threads can. That is enough as
//! long as core decides nothing outside of a lock:
//! - the lanes, the outage and what is recent of a subscription are plain data behind one mutex; `runs` is an atomic for
//!   its type alone, read and written under that mutex; the counters decide nothing;
//! - a [`PrefixTracker`](tidings::transport::PrefixTracker) is `&mut self`;
//! - `publish/gate.rs` and `publish/flight.rs` are one mutex each. A flight is used again only through `Arc::get_mut`, which a
//!   receipt that still answers denies; a pass is sent outside of the lock, and comes back by its `Drop` if nobody takes it;
//! - the acker owns its settlement by value; whether a lease is live may change right after it was asked, which is why what
//!   follows must be right either way. That is the one place where threads can do what tasks cannot: between *its lease is
//!   lost* and *it is settled* a copy may come. Core gives that copy back instead of acking it (`Published::Nothing`).
//!
//! `loom` and `shuttle` replace the mutex, the atomics, `Semaphore`, `Notify` and `oneshot` of what they check: in core that is
//! a `cfg` at each, and tokio's own are out of their reach without its private one. The suites *instances* and memory's *chaos*
//! run the same on real threads instead.

use tidings_tests::sim::run;

/// How many tests share the seeds, so that all cores have something to do.
const SHARES: u64 = 4;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}: not a number: {text}")))
}

/// Runs every fourth seed.
fn share(of: u64) {
    if number("TIDINGS_SIM_SEED").is_some() {
        return;
    }
    let seeds = number("TIDINGS_SIM_SEEDS").unwrap_or(1_000);
    let first = number("TIDINGS_SIM_FIRST").unwrap_or(0);
    let mut failed = Vec::new();
    for seed in (first + of..first + seeds).step_by(SHARES as usize) {
        let report = run(seed);
        if !report.wrong().is_empty() {
            if failed.is_empty() {
                println!("{report}");
            }
            failed.push((seed, report.wrong()[0].clone()));
        }
    }
    assert!(failed.is_empty(), "{} seeds failed: {failed:#?}", failed.len());
}

#[test]
fn all_promises_hold_whatever_goes_wrong_1() {
    share(0);
}

#[test]
fn all_promises_hold_whatever_goes_wrong_2() {
    share(1);
}

#[test]
fn all_promises_hold_whatever_goes_wrong_3() {
    share(2);
}

#[test]
fn all_promises_hold_whatever_goes_wrong_4() {
    share(3);
}

/// Seeds that showed a defect of core, each by the mutation that brings it back.
const DEFECTS: [(u64, &str); 4] = [
    (226, "a batch of which the first has lost its lease does not publish what it returned, and acks the others"),
    (158, "what steps aside of a possible duplicate is not marked"),
    (178, "what steps aside of a possible duplicate is not marked"),
    (7748, "behind an event of a batch that was left to another instance, a later one of its key is settled"),
];

#[test]
fn defects_that_were_found_stay_away() {
    for (seed, defect) in DEFECTS {
        let report = run(seed);
        assert!(report.wrong().is_empty(), "{defect}:\n{report}");
    }
}

/// `TIDINGS_SIM_SEED=123 cargo test -p tidings-tests --test simulation`
#[test]
fn one_seed_alone() {
    if let Some(seed) = number("TIDINGS_SIM_SEED") {
        let report = run(seed);
        println!("{report}");
        assert!(report.wrong().is_empty(), "seed {seed}");
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 0..20 {
        let (one, other) = (run(seed), run(seed));
        assert!(one.len() > 100, "seed {seed}: {} entries", one.len());
        assert_eq!(one.timeline(), other.timeline(), "seed {seed}");
    }
}
