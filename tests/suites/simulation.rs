//! Core under paused time and seeded randomness: what is promised holds whatever goes wrong.
//!
//! `TIDINGS_SIM_SEED=123` runs that seed alone and shows what happened; `TIDINGS_SIM_SEEDS=20000` runs more of them.

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

/// `TIDINGS_SIM_SEED=123 cargo test -p tidings-tests --test simulation`
#[test]
fn one_seed_alone() {
    if let Some(seed) = number("TIDINGS_SIM_SEED") {
        let report = run(seed);
        println!("{report}");
        assert_eq!(report.wrong(), [String::new(); 0], "seed {seed}");
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
