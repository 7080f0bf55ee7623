//! The harness under test: it waits for all that an event causes, tells what happened, and lets things go wrong.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tidings::handler::Each;
use tidings::prelude::*;
use tidings::testing::{Faults, Harness, Test};
use tidings::{DeadLetterReason, Message, MessageId, Topic};

const MINUTE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "test.a.happened", key = key)]
struct A {
    key: String,
}

#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "test.b.happened", key = key)]
struct B {
    key: String,
}

#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "test.c.happened")]
struct C {
    key: String,
}

fn a(key: &str) -> A {
    A { key: key.into() }
}

/// Makes a B of each A.
fn first() -> Service {
    Service::new("first").on(async |a: A| B { key: a.key })
}

/// Makes a C of each B, in its third run, each ten minutes after the one before.
fn second() -> Service {
    let retry = RetryPolicy::default().backoff(10 * MINUTE, 10 * MINUTE).without_jitter().aside();
    Service::new("second").on_with(
        SubscriptionConfig::default().retry(retry).without_outage(),
        async |b: B, Attempt(attempt): Attempt| -> Result<C, HandlerError> {
            if attempt < 3 { Err(format!("not in run {attempt}").into()) } else { Ok(C { key: b.key }) }
        },
    )
}

/// The text of the panic that `failing` ends with.
async fn panic_of(failing: impl Future<Output = ()> + Send + 'static) -> String {
    let panic = tokio::spawn(failing).await.expect_err("it should have failed").into_panic();
    *panic.downcast::<String>().expect("a text")
}

fn panic_in(failing: impl FnOnce()) -> String {
    let panic = std::panic::catch_unwind(AssertUnwindSafe(failing)).expect_err("it should have failed");
    *panic.downcast::<String>().expect("a text")
}

#[tokio::test]
async fn publish_returns_when_a_chain_has_settled_ten_minute_retries_included() {
    let (real, test) = (Instant::now(), Harness::memory().start([first(), second()]).await);
    test.publish(&a("x")).await;
    assert_eq!(test.published::<C>().one(), C { key: "x".into() });
    test.handled::<A>("first.test.a.happened").once();
    assert_eq!(test.handled::<B>("second.test.b.happened").all(), [3]);
    let retries: Vec<_> = test.retried("second.test.b.happened").times(2).iter().map(|retry| retry.delay).collect();
    assert_eq!(retries, [10 * MINUTE, 10 * MINUTE]);
    assert!(test.elapsed() >= 20 * MINUTE && real.elapsed() < Duration::from_secs(5), "{:?}", test.elapsed());
    test.dead_letters().none();
}

#[tokio::test]
async fn a_failed_assertion_tells_what_has_happened_and_where_it_stands() {
    let test = Harness::memory().start([first(), second()]).await;
    test.publish(&a("x")).await;
    let text = panic_in(|| test.published::<C>().none());
    let place = format!("at {}:{}", file!(), line!() - 1);
    for expected in [
        "expected 0 `test.c.happened` published, found 1",
        &place,
        "+0.000 published test.a.happened #1 key=x\n",
        "+0.000 first.test.a.happened run 1 of #1 succeeded\n",
        "+0.000 published test.b.happened #2 key=x because of #1\n",
        "+0.000 second.test.b.happened run 1 of #2 failed: not in run 1; again in 600s\n",
        "+600.0",
        "second.test.b.happened run 2 of #2 failed: not in run 2; again in 600s\n",
        "+1200.0",
        "second.test.b.happened run 3 of #2 succeeded\n",
        "published test.c.happened #3 because of #2\n",
    ] {
        assert!(text.contains(expected), "no `{expected}` in:\n{text}");
    }
    let text = panic_in(|| test.handled::<A>("first.test.a").once());
    assert!(text.contains("there are: first.test.a.happened, second.test.b.happened"), "{text}");
}

#[tokio::test]
async fn what_is_rejected_undecodable_or_exhausted_is_a_dead_letter_with_its_reason() {
    let poison = Service::new("s").on(async |a: A| -> Result<(), HandlerError> {
        if a.key == "bad" { Err(HandlerError::reject("bad")) } else { Err("never works".into()) }
    });
    let test = Harness::memory().start([poison]).await;
    test.publish(&a("bad")).await;
    let letter = test.dead_letters().one();
    assert_eq!((letter.reason, letter.error.as_str(), letter.attempts), (Some(DeadLetterReason::Rejected), "bad", 1));
    test.retried("s.test.a.happened").none();

    let topic = Topic::new("test.a.happened").unwrap();
    let message = Message::new(MessageId::from("m"), "/elsewhere", "test.a.happened", topic);
    test.publish_raw(message.with_payload("application/json", &b"{"[..])).await;
    test.publish_all(&[a("x"), a("y")]).await;
    let reasons: Vec<_> = test.dead_letters().all().into_iter().filter_map(|letter| letter.reason).collect();
    let exhausted = DeadLetterReason::Exhausted;
    assert_eq!(reasons, [DeadLetterReason::Rejected, DeadLetterReason::Undecodable, exhausted, exhausted]);
    assert_eq!(test.retried("s.test.a.happened").all().len(), 8, "{}", test.timeline());
    test.handled::<A>("s.test.a.happened").none();
    let text = panic_in(|| test.dead_letters().of("s.test.a.happened").none());
    assert!(text.contains("expected 0 dead letters of `s.test.a.happened`, found 4"), "{text}");
    assert!(text.contains("s.test.a.happened dead-lettered #1: rejected after 1 failed run(s): bad"), "{text}");
}

#[tokio::test]
async fn what_never_settles_fails_at_the_deadline_and_says_what_is_left() {
    let stuck = Service::new("stuck").on(async |_: A| std::future::pending::<()>().await);
    let real = Instant::now();
    let text = panic_of(async move {
        let test = Harness::memory().real_time().deadline(Duration::from_millis(100)).start([stuck]).await;
        test.publish(&a("x")).await;
    })
    .await;
    assert!(real.elapsed() < Duration::from_secs(5));
    for expected in [
        "not settled within 100ms of real time",
        "stuck.test.a.happened has 1 unsettled, 1 of them in its hands: #1",
        "stuck.test.a.happened run 1 of #1 GOES ON",
        &format!("at {}:", file!()),
    ] {
        assert!(text.contains(expected), "no `{expected}` in:\n{text}");
    }
}

#[tokio::test]
async fn the_deadline_is_real_even_where_the_clock_stands_still() {
    let text = panic_of(async move {
        let test = Harness::memory().deadline(Duration::from_millis(100)).start([first()]).await;
        test.services()[0].pause("first.test.a.happened").unwrap();
        test.publish(&a("x")).await;
    })
    .await;
    assert!(text.contains("not settled within 100ms of real time") && text.contains("it is paused"), "{text}");
}

#[tokio::test]
async fn a_handler_that_hangs_times_out_at_once() {
    let stuck = Service::new("stuck").on(async |_: A| std::future::pending::<()>().await);
    let test = Harness::memory().start([stuck]).await;
    test.publish(&a("x")).await;
    assert!(test.dead_letters().one().error.contains("took longer than"));
}

#[tokio::test]
async fn what_goes_on_for_ever_fails_too() {
    let echo = Service::new("echo").on(async |a: A| a);
    let text = panic_of(async move {
        let test = Harness::memory().deadline(Duration::from_secs(2)).start([echo]).await;
        test.publish(&a("x")).await;
    })
    .await;
    assert!(text.contains("no end of it: 100000 things") || text.contains("not settled within 2s"), "{text}");
    assert!(text.contains("earlier lines)"), "{text}");
}

#[tokio::test]
async fn time_passes_when_asked_and_by_steps() {
    let test = Harness::memory().start([first(), second()]).await;
    test.bus().publish(&a("x")).await.unwrap();
    test.advance(5 * MINUTE).await;
    test.retried("second.test.b.happened").times(1);
    test.advance(6 * MINUTE).await;
    test.retried("second.test.b.happened").times(2);
    test.settle().await;
    test.handled::<B>("second.test.b.happened").once();
    let options = PublishOptions::default().with_delay(60 * MINUTE);
    let before = test.elapsed();
    test.publish_with(&a("late"), options).await;
    assert!(test.elapsed() - before >= 60 * MINUTE);
    test.published::<C>().times(2);
}

#[tokio::test]
async fn panics_and_time_outs_are_told_as_what_they_are() {
    let config = SubscriptionConfig::default().timeout(Duration::from_secs(5));
    let service = Service::new("s").on_with(config, async |_: A, Attempt(attempt): Attempt| match attempt {
        1 => panic!("oh no"),
        2 => std::future::pending().await,
        _ => {}
    });
    let test = Harness::memory().start([service]).await;
    test.publish(&a("x")).await;
    let errors: Vec<_> = test.retried("s.test.a.happened").times(2).iter().map(|retry| retry.error.clone()).collect();
    assert_eq!(errors, ["handler panicked: oh no", "handler took longer than 5s"]);
    assert!(test.timeline().contains("took longer than 5s (took 5"), "{}", test.timeline());
}

#[tokio::test]
async fn each_event_of_a_batch_counts_by_its_own_result() {
    let config = SubscriptionConfig::default().batch(10);
    let service = Service::new("s").on_with(config, async |Batch(all): Batch<C>| {
        let result = |c: C| match c.key.as_str() {
            "never" => Err(HandlerError::reject("never")),
            key => Ok(B { key: key.to_owned() }),
        };
        Each(all.into_iter().map(result).collect())
    });
    let test = Harness::memory().start([service]).await;
    let events: Vec<_> = ["a", "never", "b"].map(|key| C { key: key.to_owned() }).into();
    test.publish_all(&events).await;
    test.handled::<C>("s.test.c.happened").times(2);
    test.dead_letters().one();
    test.published::<B>().times(2);
    assert!(test.timeline().contains("of #1 #2 #3 succeeded, but not for #2\n"), "{}", test.timeline());
}

#[tokio::test]
async fn instances_of_a_service_are_counted_as_one() {
    let test = Harness::memory().start([first(), first(), second()]).await;
    let events: Vec<_> = (0..1000).map(|n| a(&n.to_string())).collect();
    test.publish_all(&events).await;
    test.handled::<A>("first.test.a.happened").times(1000);
    test.published::<C>().times(1000);
}

/// Counts each A once, whatever comes, if it remembers ids; and how often it was run.
fn counting(by_id: bool) -> (Service, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (counted, runs) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let known = Arc::new(std::sync::Mutex::new(std::collections::HashSet::new()));
    let (count, run) = (Arc::clone(&counted), Arc::clone(&runs));
    let handler = move |a: A, Metadata(message): Metadata, delivered: Delivered| {
        run.fetch_add(1, SeqCst);
        let new = known.lock().expect("no panic inside").insert(message.id);
        assert!(new || delivered.possible_duplicate || delivered.attempt > 1, "an unmarked duplicate");
        if new || !by_id {
            count.fetch_add(1, SeqCst);
        }
        async move { B { key: a.key } }
    };
    (Service::new("counting").on(handler), counted, runs)
}

async fn troubled(faults: Faults, by_id: bool) -> (Test, usize, usize) {
    let (service, counted, runs) = counting(by_id);
    let test = Harness::memory().faults(faults).start([service]).await;
    let events: Vec<_> = (0..50).map(|n| a(&format!("{}", n % 7))).collect();
    test.publish_all(&events).await;
    test.published::<B>().times(50);
    test.dead_letters().none();
    let (counted, runs) = (counted.load(SeqCst), runs.load(SeqCst));
    (test, counted, runs)
}

#[tokio::test]
async fn each_fault_happens_and_an_idempotent_handler_does_not_mind() {
    for (name, faults) in [
        ("duplicate", Faults::seeded(7).duplicate(0.3)),
        ("crash", Faults::seeded(7).crash_after_handle(0.3)),
        ("fail", Faults::seeded(7).fail_first(2)),
        ("all", Faults::seeded(7).duplicate(0.3).crash_after_handle(0.3).fail_first(2).delay(MINUTE)),
    ] {
        let (test, counted, runs) = troubled(faults.clone(), true).await;
        assert_eq!(counted, 50, "{name}");
        assert!(runs > 55, "{name}: {runs}");
        let (_, counted, _) = troubled(faults, false).await;
        assert!(counted > 55, "{name}: a handler that is not idempotent is found out: {counted}");
        if name == "crash" {
            assert!(test.timeline().contains("crashed after #"), "{}", test.timeline());
        }
    }
    let (test, counted, _) = troubled(Faults::seeded(7).delay(MINUTE), false).await;
    assert_eq!(counted, 50);
    assert!(test.elapsed() > MINUTE, "{:?}", test.elapsed());
}

#[tokio::test]
async fn a_seed_hits_the_same_events_again_and_is_printed() {
    let faults = |seed| Faults::seeded(seed).duplicate(0.3).crash_after_handle(0.3).fail_first(1);
    let (one, _, runs) = troubled(faults(7), true).await;
    let (other, _, again) = troubled(faults(7), true).await;
    assert_eq!((runs, one.timeline()), (again, other.timeline()));
    assert_ne!(one.timeline(), troubled(faults(8), true).await.0.timeline());
    let text = panic_in(|| one.dead_letters().once());
    assert!(text.ends_with("faults: seed 7, duplicate 0.3, crash_after_handle 0.3, fail_first 1\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_cannot_be_stopped_is_said_and_real_time_works_there() {
    let text = panic_of(async { drop(Harness::memory().start([first()]).await) }).await;
    assert!(text.contains("use `#[tokio::test]` without a flavor, or `Harness::memory().real_time()`"), "{text}");
    let second = Service::new("second").on(async |b: B, Attempt(attempt): Attempt| -> Result<C, HandlerError> {
        if attempt < 3 && b.key == "13" { Err("not yet".into()) } else { Ok(C { key: b.key }) }
    });
    let test = Harness::memory().real_time().start([first(), second]).await;
    let events: Vec<_> = (0..100).map(|n| a(&n.to_string())).collect();
    test.publish_all(&events).await;
    test.published::<C>().times(100);
}

#[tokio::test]
async fn a_service_that_refuses_to_start_says_why() {
    let service = Service::new("s").on(async |_: A, State(_): State<u8>| {});
    let text = panic_of(async { drop(Harness::memory().start([service]).await) }).await;
    assert!(text.contains("the test could not start") && text.contains("State<u8>"), "{text}");
    assert!(text.contains(&format!("at {}:", file!())), "{text}");
}

#[tokio::test]
async fn two_tests_in_one_and_a_clock_that_is_stopped_already() {
    tokio::time::pause();
    for _ in 0..2 {
        let test = Harness::memory().start([first()]).await;
        test.publish(&a("x")).await;
        test.published::<B>().one();
    }
}

#[tokio::test]
async fn what_was_dead_lettered_can_be_redriven_and_settles_again() {
    let mended = Arc::new(AtomicUsize::new(0));
    let service = Service::new("s").state(Arc::clone(&mended)).on(
        async |_: A, State(mended): State<Arc<AtomicUsize>>| -> Result<(), HandlerError> {
            if mended.load(SeqCst) == 0 { Err(HandlerError::reject("broken")) } else { Ok(()) }
        },
    );
    let test = Harness::memory().start([service]).await;
    test.publish(&a("x")).await;
    mended.store(1, SeqCst);
    let letters = test.bus().dead_letters("s.test.a.happened").await.unwrap();
    letters.redrive(letters.list(None, 1).await.unwrap()[0].position).await.unwrap();
    test.settle().await;
    test.handled::<A>("s.test.a.happened").once();
    assert!(test.timeline().contains("sent #1 to s.test.a.happened alone"), "{}", test.timeline());
}
