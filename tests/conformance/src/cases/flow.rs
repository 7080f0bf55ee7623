//! Promises 8 and 9: bounded memory, and long handlers are safe.

use super::cases;
use crate::env::{Env, Seen, drain, memory, start, total, until};
use crate::events::{Order, Viewed, order};
use crate::reader::{Reader, open, publish, publish_messages, saying, spec, topics, unordered};
use crate::services::{Gate, Runs, settings, soon};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings::handler::{Delivered, State};
use tidings_core::transport::{ABANDONED_BACKOFF, SubscriptionSpec};
use tidings_core::{Batch, BusConfig, HandlerError, Message, RawMessage, Service, SubscriptionConfig};
use tokio::sync::Barrier;
use tokio::time::{Instant, sleep};

cases!("flow":
    no_more_is_out_than_max_in_flight,
    the_window_opens_again_with_each_settlement,
    one_poll_adds_no_more_than_it_asked_for,
    a_service_holds_no_more_than_its_window,
    as_many_runs_go_on_as_there_may,
    a_slow_subscription_slows_no_other,
    a_slow_handler_and_many_publishers_stay_within_bounds [Alone],
    what_is_settled_leaves_nothing_behind [Alone],
    a_long_handler_is_not_handed_out_again,
    what_steps_aside_for_long_holds_nobody_up,
    a_whole_window_may_step_aside_at_once,
    an_abandoned_delivery_does_not_spin,
    handlers_of_batches_get_batches,
);

const ORDERS: &str = "suite.order.placed";
const LOAD: &str = "suite.load";
const MIB: usize = 1024 * 1024;

/// Nothing comes beyond the window, however long one waits and whoever asks.
async fn no_more_is_out_than_max_in_flight(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    for spec in [spec(&env, "ordered", &[ORDERS]), unordered(&env, "unordered", &[ORDERS])] {
        let mut reader = open(env.transport(), SubscriptionSpec { max_in_flight: 3, ..spec }).await;
        publish(env.transport(), ORDERS, "ada", &["1", "2", "3", "4", "5", "6", "7", "8", "9"]).await;
        let held = reader.take(3).await;
        let more = reader.next_within(Duration::from_millis(300)).await;
        assert!(more.is_none(), "three are out, and {more:?} came");
        held.into_iter().for_each(|delivery| delivery.acker.ack());
        assert_eq!(reader.texts(6).await, ["4", "5", "6", "7", "8", "9"]);
        reader.close().await;
    }
}

/// An ack, a release now or later, and a drop.
async fn the_window_opens_again_with_each_settlement(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader =
        open(env.transport(), SubscriptionSpec { max_in_flight: 2, ..unordered(&env, "crm", &[ORDERS]) }).await;
    publish(env.transport(), ORDERS, "", &["1", "2", "3", "4", "5", "6"]).await;
    let mut held = reader.take(2).await;
    for turn in 0.. {
        let delivery = held.remove(0);
        match turn {
            0 => delivery.acker.release(Duration::ZERO),
            1 => delivery.acker.release(Duration::from_millis(50)),
            2 => drop(delivery),
            _ => delivery.acker.ack(),
        }
        if turn == 8 {
            break;
        }
        // Nothing more than the other one that is held comes at the end.
        if turn < 7 {
            held.push(reader.next().await);
        }
    }
    publish(env.transport(), ORDERS, "", &["later"]).await;
    reader.expect("later").await.acker.ack();
}

async fn one_poll_adds_no_more_than_it_asked_for(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let texts: Vec<_> = (0..20).map(|n| n.to_string()).collect();
    publish(env.transport(), ORDERS, "ada", &texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut left = 20;
    while left > 0 {
        let polled = reader.poll_for(2).await;
        assert!((1..=2).contains(&polled.len()), "{} at once", polled.len());
        left -= polled.len();
        polled.into_iter().for_each(|delivery| delivery.acker.ack());
    }
}

async fn a_service_holds_no_more_than_its_window(env: Env) {
    let (bus, gate, runs) = (env.bus(), Gate::closed(), Runs::default());
    let handler = async |order: Order, State(gate): State<Gate>, State(runs): State<Runs>| {
        gate.passed().await;
        runs.push((order.number, 1, false));
    };
    let config = settings(&env).concurrency(2).max_in_flight(5);
    let service = Service::new("crm").state(gate.clone()).state(runs.clone()).on_with(config, handler);
    let running = start(service, &bus).await;
    bus.publish_all(&(0..40).map(|number| order(format!("c{number}"), number)).collect::<Vec<_>>()).await.unwrap();
    until(&running, "the window is full", |stats| stats.in_flight as u64, 5).await;
    gate.open();
    for _ in 0..1_000 {
        let (in_flight, runs) = (total(&running, |s| s.in_flight as u64), total(&running, |s| s.running as u64));
        assert!(in_flight <= 5 && runs <= 2, "{in_flight} in flight, {runs} running");
        tokio::task::yield_now().await;
    }
    let mut all = runs.count(40).await;
    all.sort_unstable();
    assert_eq!(all, (0..40).map(|number| (number, 1, false)).collect::<Vec<_>>());
    drain(running).await;
}

/// How many run now, how many did at the most; and four meet.
#[derive(Clone)]
struct Meeting(Arc<(AtomicUsize, AtomicUsize, Barrier)>);

/// Four at a time: no fewer, or they would never meet, and no more.
async fn as_many_runs_go_on_as_there_may(env: Env) {
    let (bus, meeting) = (env.bus(), Meeting(Arc::new((AtomicUsize::new(0), AtomicUsize::new(0), Barrier::new(4)))));
    let handler = async |_: Order, State(meeting): State<Meeting>| {
        let (now, most, all_four) = &*meeting.0;
        most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
        all_four.wait().await;
        now.fetch_sub(1, SeqCst);
    };
    let service = Service::new("crm").state(meeting.clone()).on_with(settings(&env).concurrency(4), handler);
    let running = start(service, &bus).await;
    bus.publish_all(&(0..40).map(|number| order(format!("c{number}"), number)).collect::<Vec<_>>()).await.unwrap();
    until(&running, "all are handled", |stats| stats.handled, 40).await;
    assert_eq!((meeting.0.1.load(SeqCst), total(&running, |stats| stats.failed)), (4, 0));
    drain(running).await;
}

/// One that handles nothing at all.
async fn a_slow_subscription_slows_no_other(env: Env) {
    let (bus, gate, runs) = (env.bus(), Gate::closed(), Runs::default());
    let config = settings(&env).concurrency(1).max_in_flight(1);
    let slow = Service::new("slow").state(gate.clone());
    let slow = start(slow.on_with(config, async |_: Order, State(gate): State<Gate>| gate.passed().await), &bus).await;
    let handler = async |order: Order, State(runs): State<Runs>| runs.push((order.number, 1, false));
    let fast = start(Service::new("fast").state(runs.clone()).on_with(settings(&env), handler), &bus).await;
    bus.publish_all(&(0..200).map(|number| order("ada", number)).collect::<Vec<_>>()).await.unwrap();
    runs.count(200).await;
    assert_eq!(total(&slow, |stats| stats.handled), 0);
    gate.open();
    until(&slow, "the slow one catches up", |stats| stats.handled, 200).await;
    drain(slow).await;
    drain(fast).await;
}

/// A message of 64 KiB, none of which is shared with another.
fn load(n: usize) -> Message {
    let mut message = saying(LOAD, "", n);
    message.payload = vec![n as u8; 64 * 1024].into();
    message
}

/// That what is in memory has not grown by more than this, where it can be told.
fn grown_at_most(before: Option<usize>, limit: usize) {
    if let (Some(before), Some(now)) = (before, memory()) {
        let grown = now.saturating_sub(before);
        assert!(grown <= limit, "it grew by {} MiB, allowed are {}", grown / MIB, limit / MIB);
    }
}

/// 64 MiB wait at the broker, and not here. (Where the broker is in this process, that cannot be told apart.)
async fn a_slow_handler_and_many_publishers_stay_within_bounds(env: Env) {
    topics(env.transport(), &[LOAD]).await;
    let bus = env.bus_with(env.connect().await, BusConfig { max_unconfirmed: 32, ..BusConfig::default() });
    let gate = Gate::closed();
    let handler = async |_: RawMessage, State(gate): State<Gate>| gate.passed().await;
    let config = SubscriptionConfig::named("load").topics([LOAD]).concurrency(2).max_in_flight(16);
    let running = start(Service::new("crm").state(gate.clone()).on_with(config, handler), &bus).await;
    let before = memory();
    let publishers = (0..8).map(|_| {
        let bus = bus.clone();
        tokio::spawn(async move {
            for n in 0..128 {
                bus.publish_raw(load(n)).await.unwrap();
            }
        })
    });
    for publisher in publishers.collect::<Vec<_>>() {
        crate::env::within("the publisher", publisher).await.unwrap();
    }
    until(&running, "the window is full", |stats| stats.in_flight as u64, 16).await;
    if !env.factory().in_process() {
        grown_at_most(before, 24 * MIB);
    }
    gate.open();
    until(&running, "all are handled", |stats| stats.handled, 8 * 128).await;
    drain(running).await;
}

/// 32 MiB to warm up, then 96 more: they are read, acked and forgotten.
async fn what_is_settled_leaves_nothing_behind(env: Env) {
    topics(env.transport(), &[LOAD]).await;
    let mut reader = open(env.transport(), unordered(&env, "crm", &[LOAD])).await;
    pass(&env, &mut reader, 32).await;
    let before = memory();
    pass(&env, &mut reader, 96).await;
    grown_at_most(before, 32 * MIB);
    reader.close().await;
}

/// Publishes this many MiB, reads and acks them.
async fn pass(env: &Env, reader: &mut Reader, mib: usize) {
    for _ in 0..mib {
        publish_messages(env.transport(), &(0..16).map(load).collect::<Vec<_>>()).await;
        for _ in 0..16 {
            reader.next().await.acker.ack();
        }
    }
}

/// Nor is what waits behind it; with another instance that would take it.
async fn a_long_handler_is_not_handed_out_again(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let (runs, lease) = (Runs::default(), env.factory().lease());
    let handler = async |order: Order, told: Delivered, State(runs): State<Runs>, State(lease): State<Duration>| {
        sleep(if order.number == 0 { lease * 5 / 2 } else { lease / 4 }).await;
        runs.push((order.number, told.attempt, told.possible_duplicate));
    };
    let config = settings(&env).concurrency(1).max_in_flight(3);
    let service = || Service::new("crm").state(runs.clone()).state(lease).on_with(config.clone(), handler);
    let one = start(service(), &env.bus()).await;
    for number in 0..3 {
        env.bus().publish(&order("ada", number)).await.unwrap();
    }
    until(&one, "all three are here", |stats| stats.in_flight as u64, 3).await;
    let two = start(service(), &env.another_bus().await).await;
    runs.count(3).await;
    env.bus().publish(&order("ada", 3)).await.unwrap();
    assert_eq!(runs.count(4).await, [(0, 1, false), (1, 1, false), (2, 1, false), (3, 1, false)]);
    drain(one).await;
    drain(two).await;
}

/// 2,000 for ten minutes; twenty for less, which the next instance handles.
async fn what_steps_aside_for_long_holds_nobody_up(env: Env) {
    const SHORT: Duration = Duration::from_secs(3);
    let runs = Seen::<(u64, u32, Instant)>::default();
    let handler = async |view: Viewed, told: Delivered, State(runs): State<Seen<(u64, u32, Instant)>>| {
        runs.push((view.page, told.attempt, Instant::now()));
        match (view.page, told.attempt) {
            (0..20, 1) => Err(HandlerError::retry_after(SHORT, "soon")),
            (20..2_000, 1) => Err(HandlerError::retry_after(Duration::from_secs(600), "not today")),
            _ => Ok(()),
        }
    };
    let config = settings(&env).retry(soon(3).aside()).max_in_flight(100);
    let service = || Service::new("crm").state(runs.clone()).on_with(config.clone(), handler);
    let one = env.another_bus().await;
    let running = start(service(), &one).await;
    let views: Vec<_> = (0..2_200).rev().map(|page| Viewed { page }).collect();
    for part in views[200..].chunks(200) {
        env.bus().publish_all(part).await.unwrap();
    }
    until(&running, "all have stepped aside", |stats| stats.retried, 2_000).await;
    env.bus().publish_all(&views[..200]).await.unwrap();
    until(&running, "the others are handled", |stats| stats.handled, 200).await;
    drain(running).await;
    one.close(Duration::from_secs(10)).await.unwrap();
    let running = start(service(), &env.bus()).await;
    let all = runs.count(2_200 + 20).await;
    for (page, attempt, again) in all.iter().filter(|(page, attempt, _)| *page < 2_000 && *attempt > 1) {
        let (.., first) = all.iter().find(|(other, ..)| other == page).unwrap();
        assert!(
            (*page, *attempt) < (20, 3) && *again - *first >= SHORT,
            "{page} ran again after {:?}",
            *again - *first
        );
    }
    drain(running).await;
}

/// The first copies that a new subscription sends aside are many: what they need is there once, and for all.
async fn a_whole_window_may_step_aside_at_once(env: Env) {
    const ALL: u64 = 400;
    let bus = env.bus();
    let handler = async |_: Viewed, told: Delivered| match told.attempt {
        1 => Err(HandlerError::from("not yet")),
        _ => Ok(()),
    };
    let all = ALL as usize;
    let config = settings(&env).retry(soon(2).aside()).max_in_flight(all).concurrency(all);
    let service = Service::new("crm").on_with(config, handler);
    service.provision(&bus).await.unwrap();
    bus.publish_all(&(0..ALL).map(|page| Viewed { page }).collect::<Vec<_>>()).await.unwrap();
    let running = start(service, &bus).await;
    until(&running, "all are over", |stats| stats.handled + stats.dead_lettered, ALL).await;
    let ended = total(&running, |stats| stats.handled);
    assert_eq!((ended, total(&running, |stats| stats.retried)), (ALL, ALL), "none is a dead letter");
    drain(running).await;
}

async fn an_abandoned_delivery_does_not_spin(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    let first = reader.expect("1").await;
    // Before it is given back: the delay may have begun when this goes on.
    let start = Instant::now();
    drop(first);
    for times in 1..6 {
        drop(reader.expect("1").await);
        assert!(start.elapsed() >= ABANDONED_BACKOFF * times, "{times} times after {:?}", start.elapsed());
    }
    reader.expect("1").await.acker.ack();
}

/// What its batches were: their pages.
type Batches = Seen<Vec<u64>>;

async fn handlers_of_batches_get_batches(env: Env) {
    let (bus, batches) = (env.bus(), Batches::default());
    let config = SubscriptionConfig::default().batch(10).linger(Duration::from_millis(500)).concurrency(2);
    let handler = async |views: Batch<Viewed>, State(batches): State<Batches>| {
        batches.push(views.0.iter().map(|view| view.page).collect());
    };
    let service = Service::new("crm").state(batches.clone()).on_with(config, handler);
    service.provision(&bus).await.unwrap();
    bus.publish_all(&(0..50).map(|page| Viewed { page }).collect::<Vec<_>>()).await.unwrap();
    let running = start(service, &bus).await;
    until(&running, "all are handled", |stats| stats.handled, 50).await;
    let batches = batches.all();
    assert!(batches.iter().all(|batch| batch.len() <= 10) && batches.len() <= 25, "{batches:?}");
    let mut pages: Vec<_> = batches.into_iter().flatten().collect();
    pages.sort_unstable();
    assert_eq!(pages, (0..50).collect::<Vec<_>>());
    drain(running).await;
}
