//! The conformance suite can fail: each defect is caught, by the cases that name the promise it breaks.
//!
//! Time is virtual, so that what hangs costs nothing.

use std::time::Duration;
use tidings_conformance::Suite;
use tidings_tests::broken::{Broken, Defect};

/// Runs all cases on memory with this defect; those named must be among those that fail.
fn caught(defect: Defect, by: &[&str]) {
    let suite = Suite::new().with(Broken(defect)).in_virtual_time().deadline(Duration::from_secs(900));
    let report = suite.report(&[]);
    let failed: Vec<_> = report.failed.iter().map(|(name, _)| name.as_str()).collect();
    println!("{defect:?} fails {} of {}:", failed.len(), failed.len() + report.passed.len());
    for (name, why) in &report.failed {
        println!("    {name}: {}", why.lines().next().unwrap_or_default());
    }
    let missed: Vec<_> = by.iter().filter(|case| !failed.contains(case)).collect();
    assert!(missed.is_empty(), "{defect:?} passes {missed:?}");
    assert!(!report.passed.is_empty(), "a suite in which everything fails tells nothing");
}

macro_rules! caught {
    ($($test:ident: $defect:ident by $($case:literal),+;)+) => {
        $(#[test]
        fn $test() {
            caught(Defect::$defect, &[$($case),+]);
        })+
    };
}

#[test]
fn wrapping_alone_breaks_nothing() {
    let suite = Suite::new().with(Broken(Defect::None)).in_virtual_time().deadline(Duration::from_secs(900));
    let report = suite.report(&[]);
    assert!(report.failed.is_empty(), "{:#?}", report.failed);
}

caught! {
    loses_on_nack: LosesOnNack by "publish::confirmed_means_kept";
    acks_early: AcksEarly by "publish::confirmed_means_kept";
    acks_on_drop: AcksOnDrop by "publish::confirmed_means_kept";
    reorders_within_a_key: ReordersWithinAKey by "publish::one_batch_keeps_its_order";
    delivers_to_two_members: DeliversToTwoMembers by "publish::confirmed_means_kept";
    lets_a_new_owner_overtake: LetsANewOwnerOvertake by "publish::confirmed_means_kept";
    delivers_a_duplicate_unmarked: UnmarkedDuplicate by "publish::confirmed_means_kept";
    forgets_the_delay: ForgetsTheDelay by "publish::a_delayed_publish_is_not_early";
    delivers_early: DeliversEarly by "publish::a_delayed_publish_is_not_early";
    resets_attempts: ResetsAttempts by "publish::confirmed_means_kept";
    drops_the_dead_letters_headers: DropsTheDeadLettersHeaders by "publish::confirmed_means_kept";
    swallows_a_publish_failure: SwallowsAPublishFailure by "publish::failures_in_a_batch_are_named_by_index";
    confirms_before_storing: ConfirmsBeforeStoring by "publish::confirmed_means_kept";
    hangs_on_close: HangsOnClose by "publish::one_publisher_keeps_its_order";
    ignores_max_in_flight: IgnoresMaxInFlight by "publish::confirmed_means_kept";
    grows_without_bound: GrowsWithoutBound by "publish::confirmed_means_kept";
    replays_unmarked: ReplaysUnmarked by "publish::confirmed_means_kept";
    swallows_gaps: SwallowsGaps by "publish::confirmed_means_kept";
    shares_addresses: SharesAddresses by "publish::confirmed_means_kept";
    drops_headers: DropsHeaders by "publish::confirmed_means_kept";
}
