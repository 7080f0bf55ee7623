//! The conformance suite can fail: each defect is caught, by the cases that name the promise it breaks.
//!
//! Time is virtual, so that what hangs costs nothing.

use std::time::Duration;
use tidings_conformance::Suite;
use tidings_tests::broken::{Broken, Defect};

/// Runs all cases on memory with this defect; those named must be among those that fail.
fn caught(defect: Defect, by: &[&str]) {
    let suite = Suite::new().with(Broken(defect)).in_virtual_time().deadline(Duration::from_secs(300));
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
    let suite = Suite::new().with(Broken(Defect::None)).in_virtual_time().deadline(Duration::from_secs(300));
    let report = suite.report(&[]);
    assert!(report.failed.is_empty(), "{:#?}", report.failed);
}

caught! {
    loses_on_nack: LosesOnNack by "settlement::what_is_released_comes_back_as_it_was_but_marked",
        "lifecycle::closing_gives_back_the_unsettled_at_once_in_order",
        "lifecycle::a_drain_finishes_what_runs_and_repeats_nothing";
    acks_early: AcksEarly by "settlement::a_crash_before_the_ack_loses_nothing", "order::order_is_kept_across_a_crash",
        "groups::what_a_dead_instance_left_comes_again_marked", "flow::no_more_is_out_than_max_in_flight";
    acks_on_drop: AcksOnDrop by "settlement::a_dropped_delivery_comes_back_marked_after_a_while",
        "lifecycle::what_a_drain_cuts_off_at_its_deadline_comes_again";
    reorders_within_a_key: ReordersWithinAKey by "groups::every_subscription_gets_every_event",
        "lifecycle::closing_gives_back_the_unsettled_at_once_in_order";
    delivers_to_two_members: DeliversToTwoMembers by "groups::instances_share_the_work",
        "groups::two_first_instances_at_once_make_one_subscription";
    lets_a_new_owner_overtake: LetsANewOwnerOvertake by "order::order_is_kept_while_an_instance_dies",
        "composition::all_at_once_loses_and_reorders_nothing";
    delivers_a_duplicate_unmarked: UnmarkedDuplicate by "settlement::a_crash_before_the_ack_loses_nothing",
        "groups::what_a_dead_instance_left_comes_again_marked";
    forgets_the_delay: ForgetsTheDelay by "settlement::a_released_delivery_is_not_early_and_holds_no_other_up",
        "settlement::a_delay_outlives_its_connection", "publish::a_delayed_publish_is_not_early";
    delivers_early: DeliversEarly by "settlement::what_is_due_earlier_waits_for_nothing_that_is_due_later",
        "settlement::a_handler_says_when_it_runs_again", "publish::a_delayed_publish_is_not_early";
    resets_attempts: ResetsAttempts by "settlement::failed_runs_are_attempts",
        "composition::a_retry_aside_goes_on_in_the_next_instance_where_it_was";
    drops_the_dead_letters_headers: DropsTheDeadLettersHeaders by
        "dead_letter::a_dead_letter_is_the_original_and_tells_why";
    swallows_a_publish_failure: SwallowsAPublishFailure by "publish::failures_in_a_batch_are_named_by_index";
    confirms_before_storing: ConfirmsBeforeStoring by "publish::confirmed_means_kept",
        "publish::closing_keeps_what_was_submitted";
    hangs_on_close: HangsOnClose by "lifecycle::opening_and_closing_again_and_again_keeps_the_position",
        "lifecycle::a_drain_finishes_what_runs_and_repeats_nothing";
    ignores_max_in_flight: IgnoresMaxInFlight by "flow::no_more_is_out_than_max_in_flight";
    grows_without_bound: GrowsWithoutBound by "flow::what_is_settled_leaves_nothing_behind";
    replays_unmarked: ReplaysUnmarked by "replay::a_replay_reads_all_again_marked_and_moves_no_subscription";
    swallows_gaps: SwallowsGaps by "replay::a_gap_made_by_retention_is_told_and_not_jumped";
    shares_addresses: SharesAddresses by "settlement::an_address_reaches_its_subscription_alone",
        "dead_letter::a_redriven_event_reaches_its_subscription_alone_and_says_so";
    drops_headers: DropsHeaders by "data::every_attribute_comes_as_it_was_sent";
}
