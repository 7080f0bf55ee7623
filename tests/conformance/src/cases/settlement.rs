//! Promises 2, 13 and 14: at least once, attempts that are counted truthfully, duplicates that are marked.

use super::cases;
use crate::env::{Env, Seen, dead_letters, drain, eventually, start, total};
use crate::events::{Invoice, Order, Viewed, order};
use crate::reader::{open, publish, said, saying, send_to, spec, topics, unordered};
use crate::services::{CRM_ORDERS, CRM_VIEWS, Runs, settings, soon};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;
use tidings::handler::{Delivered, State};
use tidings_core::transport::{ABANDONED_BACKOFF, Lease, Notice, SubscriptionSpec};
use tidings_core::{HandlerError, Service, header};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

cases!("settlement":
    an_ack_is_final,
    an_ack_is_final_through_a_cut [Cut],
    a_first_delivery_is_not_marked,
    what_is_released_comes_back_as_it_was_but_marked,
    a_released_delivery_is_not_early_and_holds_no_other_up,
    a_dropped_delivery_comes_back_marked_after_a_while,
    acks_out_of_order_lose_nothing,
    a_crash_before_the_ack_loses_nothing,
    a_stale_settlement_settles_no_other [Cut],
    a_lost_lease_shows [Cut],
    a_settlement_after_the_close_settles_nothing,
    closing_says_what_became_of_the_settlements,
    every_duplicate_is_marked [Cut],
    failed_runs_are_attempts,
    a_handler_says_when_it_runs_again,
    hand_outs_without_a_run_are_no_attempts,
    an_event_that_ends_its_process_is_found_out [CountsLosses],
    what_a_handler_returns_keeps_its_ids,
    a_cut_while_handlers_run_repeats_only_what_says_so [Cut],
    an_address_reaches_its_subscription_alone,
    what_is_due_earlier_waits_for_nothing_that_is_due_later,
    a_delay_outlives_its_connection,
    a_delay_outlives_a_restart_of_the_broker [Durable, Restart],
);

const ORDERS: &str = "suite.order.placed";
const VIEWS: &str = "suite.page.viewed";
const DELAY: Duration = Duration::from_millis(700);
const INVOICES: &str = "suite.invoice.created";

/// Also for the next instance, on a connection of its own.
async fn an_ack_is_final(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    assert_eq!(reader.texts(3).await, ["1", "2", "3"]);
    publish(env.transport(), ORDERS, "ada", &["4"]).await;
    reader.expect("4").await.acker.ack();
    assert_eq!(reader.close().await.applied, 4);
    publish(env.transport(), ORDERS, "ada", &["5"]).await;
    let other = env.connect().await;
    open(&other, spec(&env, "crm", &[ORDERS])).await.expect("5").await.acker.ack();
}

/// With a window of one, the next event comes when the broker was told of the ack before.
async fn an_ack_is_final_through_a_cut(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let window = SubscriptionSpec { max_in_flight: 1, ..spec(&env, "crm", &[ORDERS]) };
    let mut reader = open(env.transport(), window.clone()).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    reader.expect("1").await.acker.ack();
    let held = reader.expect("2").await;
    env.cut_off().await;
    assert!(reader.expect("2").await.redelivered, "it was handed out before");
    drop(held);
    publish(env.transport(), ORDERS, "bob", &["3"]).await;
    reader.close().await;
    open(env.transport(), window).await.ack_all(&["2", "3"]).await;
}

async fn a_first_delivery_is_not_marked(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    send_to(env.transport(), "crm", saying(ORDERS, "bob", "4"), None).await;
    for delivery in reader.take(4).await {
        assert!(!delivery.redelivered && !delivery.replayed, "{delivery:?}");
        assert!(delivery.hand_outs.is_none_or(|hand_outs| hand_outs == 1), "{delivery:?}");
        assert!(delivery.lost.is_none_or(|lost| lost == 0), "{delivery:?}");
        delivery.acker.ack();
    }
}

async fn what_is_released_comes_back_as_it_was_but_marked(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    let first = reader.next().await;
    let (message, place) = (first.message.clone(), (first.slot, first.position));
    first.acker.release(Duration::ZERO);
    for hand_outs in [2, 3] {
        let again = reader.next().await;
        assert_eq!((&again.message, (again.slot, again.position)), (&message, place));
        assert!(again.redelivered, "{again:?}");
        assert!(again.hand_outs.is_none_or(|times| times == hand_outs), "{again:?}");
        assert!(again.lost.is_none_or(|lost| lost == 0), "what is given back is not lost: {again:?}");
        again.acker.release(Duration::from_millis(10));
    }
    reader.expect("1").await.acker.ack();
}

async fn a_released_delivery_is_not_early_and_holds_no_other_up(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    for spec in [spec(&env, "ordered", &[ORDERS]), unordered(&env, "unordered", &[ORDERS])] {
        let mut reader = open(env.transport(), spec).await;
        publish(env.transport(), ORDERS, "ada", &["late"]).await;
        let late = reader.expect("late").await;
        let (released, delay) = (Instant::now(), Duration::from_secs(1));
        late.acker.release(delay);
        publish(env.transport(), ORDERS, "bob", &["1", "2", "3"]).await;
        for text in ["1", "2", "3"] {
            reader.expect(text).await.acker.ack();
        }
        reader.expect("late").await.acker.ack();
        assert!(released.elapsed() >= delay, "it came after {:?}", released.elapsed());
        reader.close().await;
    }
}

async fn a_dropped_delivery_comes_back_marked_after_a_while(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    let first = reader.expect("1").await;
    // Before it is given back: the delay may have begun when this goes on.
    let dropped = Instant::now();
    drop(first);
    let again = reader.expect("1").await;
    assert!(again.redelivered, "{again:?}");
    assert!(dropped.elapsed() >= ABANDONED_BACKOFF, "after {:?}", dropped.elapsed());
    assert!(again.lost.is_none_or(|lost| lost == 1), "{again:?}");
    again.acker.ack();
}

/// No later ack stands for an earlier event. With a window of ten, five more come when five acks were told to the broker.
async fn acks_out_of_order_lose_nothing(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let window = SubscriptionSpec { max_in_flight: 10, ..spec(&env, "crm", &[ORDERS]) };
    let one = env.connect().await;
    let mut reader = open(&one, window.clone()).await;
    let texts: Vec<_> = (0..15).map(|n| n.to_string()).collect();
    publish(env.transport(), ORDERS, "ada", &texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut held = reader.take(10).await;
    for index in [9, 7, 5, 3, 1] {
        held.remove(index).acker.ack();
    }
    held.extend(reader.take(5).await);
    let mut missing: HashSet<_> = held.iter().map(|delivery| said(delivery).to_owned()).collect();
    reader.crash(held);
    drop(one);
    let mut heir = open(env.transport(), window).await;
    while !missing.is_empty() {
        let delivery = heir.next().await;
        missing.remove(said(&delivery));
        assert!(delivery.redelivered, "it was handed out before: {delivery:?}");
        delivery.acker.ack();
    }
}

async fn a_crash_before_the_ack_loses_nothing(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["nobody reads this"]).await;
    for lost in 0..2 {
        let one = env.connect().await;
        let mut reader = open(&one, spec(&env, "crm", &[ORDERS])).await;
        if lost == 0 {
            publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
        }
        let held = reader.take(3).await;
        assert!(held.iter().all(|d| d.redelivered == (lost > 0) && d.lost.is_none_or(|l| l == lost)), "{held:?}");
        reader.crash(held);
    }
    let mut heir = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["later"]).await;
    heir.ack_all(&["1", "2", "3", "later"]).await;
}

/// Tags begin anew on a new connection: the old ones are of no use there.
async fn a_stale_settlement_settles_no_other(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    let old = reader.take(3).await;
    env.cut_off().await;
    let new = reader.take(3).await;
    assert!(new.iter().all(|delivery| delivery.redelivered && delivery.acker.lease() == Lease::Live), "{new:?}");
    assert!(old.iter().all(|delivery| delivery.acker.lease() == Lease::Lost));
    for (n, delivery) in old.into_iter().enumerate() {
        if n == 0 { delivery.acker.release(Duration::ZERO) } else { delivery.acker.ack() }
    }
    // None of the new ones was settled.
    reader.crash(new);
    let mut heir = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    heir.ack_all(&["1", "2", "3"]).await;
}

async fn a_lost_lease_shows(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    let held = reader.take(3).await;
    assert!(held.iter().all(|delivery| delivery.acker.lease() == Lease::Live));
    env.cut_off().await;
    reader.notice("leases are lost", |notice| matches!(notice, Notice::Leases).then_some(())).await;
    assert!(held.iter().all(|delivery| delivery.acker.lease() == Lease::Lost));
    held.into_iter().for_each(|delivery| delivery.acker.ack());
    assert_eq!(reader.close().await.stale, 3, "their acks were too late");
    open(env.transport(), spec(&env, "crm", &[ORDERS])).await.ack_all(&["1", "2", "3"]).await;
}

async fn a_settlement_after_the_close_settles_nothing(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let held = reader.take(2).await;
    reader.close().await;
    assert!(held.iter().all(|delivery| delivery.acker.lease() == Lease::Lost), "it was given back");
    held.into_iter().for_each(|delivery| delivery.acker.ack());
    let mut heir = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    heir.ack_all(&["1", "2"]).await;
}

async fn closing_says_what_became_of_the_settlements(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3", "4", "5"]).await;
    let mut held = reader.take(5).await;
    held.remove(0).acker.ack();
    held.remove(0).acker.ack();
    held.remove(2).acker.release(Duration::ZERO);
    let flushed = reader.close().await;
    assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (3, 0, 0), "two acks and a release");
    drop(held);
    publish(env.transport(), ORDERS, "ada", &["later"]).await;
    let mut heir = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    assert_eq!(heir.texts(4).await, ["3", "4", "5", "later"]);
}

/// Acked, released, dropped and cut off in turns: what comes again says so.
async fn every_duplicate_is_marked(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    for key in 0..10 {
        let texts: Vec<_> = (0..20).map(|n| format!("{key}-{n}")).collect();
        let texts: Vec<_> = texts.iter().map(String::as_str).collect();
        publish(env.transport(), ORDERS, &key.to_string(), &texts).await;
    }
    let (mut seen, mut acked) = (HashSet::new(), HashSet::new());
    for turn in 0.. {
        let delivery = reader.next().await;
        let text = said(&delivery).to_owned();
        assert!(seen.insert(text.clone()) || delivery.redelivered, "`{text}` came again and did not say so");
        if matches!(turn, 50 | 100 | 150) {
            env.cut().await;
        }
        match turn % 11 {
            1 => drop(delivery),
            4 => delivery.acker.release(Duration::ZERO),
            7 => delivery.acker.release(Duration::from_millis(20)),
            _ => {
                delivery.acker.ack();
                acked.insert(text);
            }
        }
        if acked.len() == 200 {
            break;
        }
    }
}

/// An error, a panic and a run that takes too long count; in the lane and aside.
async fn failed_runs_are_attempts(env: Env) {
    for (name, policy) in [("a", soon(4).in_order()), ("b", soon(4).aside())] {
        let (bus, runs) = (env.bus(), Runs::default());
        let config = settings(&env).retry(policy).timeout(Duration::from_millis(500));
        let handler = async |order: Order, told: Delivered, State(runs): State<Runs>| -> Result<(), HandlerError> {
            runs.push((order.number, told.attempt, told.possible_duplicate));
            match told.attempt {
                1 => Err("not yet".into()),
                2 => panic!("a panic on purpose"),
                3 => std::future::pending().await,
                _ => Ok(()),
            }
        };
        let running = start(Service::new(name).state(runs.clone()).on_with(config, handler), &bus).await;
        bus.publish(&order("ada", 7)).await.unwrap();
        assert_eq!(runs.count(4).await, [(7, 1, false), (7, 2, false), (7, 3, false), (7, 4, false)]);
        eventually("it is handled", || async { total(&running, |stats| stats.handled) == 1 }).await;
        drain(running).await;
    }
}

async fn a_handler_says_when_it_runs_again(env: Env) {
    for (name, policy) in [("a", soon(2).in_order()), ("b", soon(2).aside())] {
        let (bus, seen) = (env.bus(), Seen::<Instant>::default());
        let handler = async |_: Order, told: Delivered, State(seen): State<Seen<Instant>>| {
            seen.push(Instant::now());
            if told.attempt == 1 { Err(HandlerError::retry_after(DELAY, "later")) } else { Ok(()) }
        };
        let config = settings(&env).retry(policy);
        let running = start(Service::new(name).state(seen.clone()).on_with(config, handler), &bus).await;
        bus.publish(&order("ada", 1)).await.unwrap();
        let seen = seen.count(2).await;
        assert!(seen[1] - seen[0] >= DELAY, "{name}: after {:?}", seen[1] - seen[0]);
        drain(running).await;
    }
}

/// Two instances die that had them, and had begun with none.
async fn hand_outs_without_a_run_are_no_attempts(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, CRM_ORDERS, &[ORDERS])).await);
    for number in 0..10 {
        env.bus().publish(&order("ada", number)).await.unwrap();
    }
    for _ in 0..2 {
        let one = env.connect().await;
        let mut reader = open(&one, spec(&env, CRM_ORDERS, &[ORDERS])).await;
        let held = reader.take(10).await;
        reader.crash(held);
    }
    let (bus, runs) = (env.bus(), Runs::default());
    let handler = async |order: Order, told: Delivered, State(runs): State<Runs>| {
        runs.push((order.number, told.attempt, told.possible_duplicate));
    };
    let running = start(Service::new("crm").state(runs.clone()).on_with(settings(&env), handler), &bus).await;
    let mut runs = runs.count(10).await;
    runs.sort_unstable();
    assert_eq!(runs, (0..10).map(|number| (number, 1, true)).collect::<Vec<_>>());
    drain(running).await;
}

/// Ends its instance at each run; its neighbours lose no attempt by that.
async fn an_event_that_ends_its_process_is_found_out(env: Env) {
    let (crash, mut crashed) = mpsc::unbounded_channel::<()>();
    let seen = Seen::<(u64, u32)>::default();
    let instance = async || {
        let handler = async |view: Viewed,
                             told: Delivered,
                             crash: State<mpsc::UnboundedSender<()>>,
                             seen: State<Seen<(u64, u32)>>| {
            if view.page == 5 {
                crash.0.send(()).unwrap();
                std::future::pending::<()>().await;
            }
            seen.0.push((view.page, told.attempt));
        };
        let config = settings(&env).max_deliveries(1);
        let service = Service::new("crm").state(crash.clone()).state(seen.clone()).on_with(config, handler);
        start(service, &env.another_bus().await).await
    };
    let mut running = instance().await;
    env.bus().publish_all(&(0..10).map(|page| Viewed { page }).collect::<Vec<_>>()).await.unwrap();
    let mut crashes = 0;
    let letters = loop {
        tokio::select! {
            letters = dead_letters(env.transport(), CRM_VIEWS, 1) => break letters,
            _ = crashed.recv() => {
                crashes += 1;
                assert!(crashes <= 5, "three are forgiven, then it runs alone, and once more");
                drop(running);
                running = instance().await;
            }
        }
    };
    assert_eq!(crashes, 3 + 1 + 1);
    assert_eq!(letters[0].message.headers.get_str(header::REASON), Some("suspect"));
    // One that had ended when its instance died may come again.
    let handled = || seen.all().into_iter().collect::<BTreeSet<_>>();
    eventually("the others", || async { handled().len() >= 9 }).await;
    assert_eq!(handled(), (0..10).filter(|page| *page != 5).map(|page| (page, 1)).collect(), "in their first attempts");
    drain(running).await;
}

/// However often it runs; and two equal ones of one run are two.
async fn what_a_handler_returns_keeps_its_ids(env: Env) {
    topics(env.transport(), &[VIEWS, INVOICES]).await;
    let mut reader = open(env.transport(), spec(&env, "reader", &[INVOICES])).await;
    let (bus, runs) = (env.another_bus().await, Runs::default());
    let handler = async |view: Viewed, told: Delivered, State(runs): State<Runs>| {
        runs.push((view.page, told.attempt, told.possible_duplicate));
        let invoice = || Invoice { customer: "ada".into(), number: view.page };
        (invoice(), invoice())
    };
    let running = start(Service::new("crm").state(runs.clone()).on_with(settings(&env), handler), &bus).await;
    let mut cause = saying(VIEWS, "", r#"{"page":1}"#);
    (cause.event_type, cause.content_type) = ("suite.page.viewed".into(), "application/json".into());
    for time in ["1970-01-01T00:00:01Z", "1970-01-01T00:00:02Z"] {
        let mut again = cause.clone();
        again.headers.append_unchecked(header::REDRIVEN, time);
        send_to(env.transport(), CRM_VIEWS, again, None).await;
    }
    assert_eq!(runs.count(2).await, [(1, 1, true), (1, 1, true)]);
    eventually("all is published", || async { total(&running, |stats| stats.published) == 4 }).await;
    publish(env.transport(), INVOICES, "ada", &["the end"]).await;
    let mut ids = HashSet::new();
    loop {
        let delivery = reader.next().await;
        if said(&delivery) == "the end" {
            break;
        }
        assert_eq!(delivery.message.causation_id.as_ref(), Some(&cause.id));
        ids.insert(delivery.message.id.clone());
        delivery.acker.ack();
    }
    assert_eq!(ids.len(), 2, "{ids:?}");
    drain(running).await;
}

/// Each order is billed; what is billed again has the same id, and stems from a run that was told so.
async fn a_cut_while_handlers_run_repeats_only_what_says_so(env: Env) {
    topics(env.transport(), &[INVOICES]).await;
    let mut invoices = open(&env.connect().await, spec(&env, "reader", &[INVOICES])).await;
    let runs = Runs::default();
    let handler = async |order: Order, told: Delivered, State(runs): State<Runs>| {
        runs.push((order.number, told.attempt, told.possible_duplicate));
        sleep(Duration::from_millis(10)).await;
        Invoice { customer: order.customer, number: order.number }
    };
    let service = Service::new("crm").state(runs.clone()).on_with(settings(&env).concurrency(2), handler);
    let running = start(service, &env.another_bus().await).await;
    env.bus().publish_all(&(0..60).map(|n| order(format!("c{}", n % 7), n)).collect::<Vec<_>>()).await.unwrap();
    for so_far in [5, 20, 40] {
        runs.count(so_far).await;
        env.cut().await;
    }
    let mut ids = BTreeMap::new();
    while ids.len() < 60 {
        let delivery = invoices.next().await;
        let id = ids.entry(delivery.message.payload.clone()).or_insert_with(|| delivery.message.id.clone());
        assert_eq!(*id, delivery.message.id, "the same invoice has the same id");
        delivery.acker.ack();
    }
    let mut first = HashSet::new();
    for (number, attempt, marked) in runs.all() {
        assert!(attempt == 1 && (first.insert(number) || marked), "{number} ran again and did not say so");
    }
    drain(running).await;
}

async fn an_address_reaches_its_subscription_alone(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut one = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let mut other = open(env.transport(), spec(&env, "billing", &[ORDERS])).await;
    send_to(env.transport(), "crm", saying(ORDERS, "ada", "1"), None).await;
    send_to(env.transport(), "crm", saying(ORDERS, "ada", "2"), Some(Duration::from_millis(50))).await;
    assert_eq!(one.texts(2).await, ["1", "2"]);
    publish(env.transport(), ORDERS, "ada", &["3"]).await;
    one.expect("3").await.acker.ack();
    other.expect("3").await.acker.ack();
}

/// Whatever was sent first; and none is early.
async fn what_is_due_earlier_waits_for_nothing_that_is_due_later(env: Env) {
    /// On a machine with much else to do, sending takes as long as what was sent before is delayed.
    const SLACK: Duration = Duration::from_secs(1);
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    for never in [3600, 900, 300].map(Duration::from_secs) {
        send_to(env.transport(), "crm", saying(ORDERS, "ada", "never"), Some(never)).await;
    }
    let mut sent = Vec::new();
    for delay in [4_000, 500, 0].map(Duration::from_millis) {
        let before = Instant::now();
        send_to(env.transport(), "crm", saying(ORDERS, "ada", delay.as_millis()), Some(delay)).await;
        sent.push((delay.as_millis().to_string(), before + delay, Instant::now() + delay));
    }
    while !sent.is_empty() {
        let delivery = reader.next().await;
        let at = sent.iter().position(|(text, ..)| text == said(&delivery)).expect("what is due, and no repeat");
        let (text, earliest, _) = sent.remove(at);
        assert!(earliest <= Instant::now(), "{text} ms were not over");
        let late = sent.iter().find(|(_, _, latest)| *latest + SLACK < earliest);
        assert!(late.is_none(), "{text} came before {late:?}");
        delivery.acker.ack();
    }
}

/// It is neither forgotten nor shortened.
async fn a_delay_outlives_its_connection(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let one = env.connect().await;
    let reader = open(&one, spec(&env, "crm", &[ORDERS])).await;
    let start = Instant::now();
    send_to(&one, "crm", saying(ORDERS, "ada", "retry"), Some(DELAY)).await;
    reader.crash(Vec::new());
    drop(one);
    open(env.transport(), spec(&env, "crm", &[ORDERS])).await.expect("retry").await.acker.ack();
    assert!(start.elapsed() >= DELAY, "it came after {:?}", start.elapsed());
}

async fn a_delay_outlives_a_restart_of_the_broker(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    let start = Instant::now();
    send_to(env.transport(), "crm", saying(ORDERS, "ada", "retry"), Some(DELAY)).await;
    env.restart().await;
    let after = env.connect().await;
    open(&after, spec(&env, "crm", &[ORDERS])).await.expect("retry").await.acker.ack();
    assert!(start.elapsed() >= DELAY, "it came after {:?}", start.elapsed());
}
