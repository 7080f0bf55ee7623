//! Replay: read again through a service's handlers, moving no subscription, and told to the handlers.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::time::{Duration, SystemTime};
use tidings::prelude::*;
use tidings::{DeadLetterReason, RetryMode};
use tidings_tests::faulty::Faulty;
use tidings_tests::{Invoice, Order, Seen, Viewed, bus, eventually, order};

/// What a handler was told: number, attempt, possible duplicate, replayed, position.
type Runs = Seen<(u64, u32, bool, bool, u64)>;

async fn handle(order: Order, delivered: Delivered, State(runs): State<Runs>) {
    let Delivered { attempt, possible_duplicate, replayed, position, .. } = delivered;
    runs.push((order.number, attempt, possible_duplicate, replayed, position));
}

fn billing(runs: &Runs) -> Service {
    Service::new("billing").state(runs.clone()).on(handle)
}

fn numbers(runs: &Runs) -> Vec<u64> {
    runs.all().into_iter().map(|run| run.0).collect()
}

async fn publish(bus: &Bus, numbers: std::ops::RangeInclusive<u64>) {
    let orders: Vec<_> = numbers.map(|number| order("ada", number)).collect();
    bus.publish_all(&orders).await.unwrap();
}

/// The numbers that a replay from there reads.
async fn replayed(bus: &Bus, from: ReplayFrom) -> Vec<u64> {
    let runs = Runs::default();
    billing(&runs).replay(bus, from).await.unwrap().finished().await.unwrap();
    numbers(&runs)
}

#[tokio::test(start_paused = true)]
async fn a_replay_reads_all_again_moves_no_subscription_and_tells() {
    let (bus, live, again) = (bus().await, Runs::default(), Runs::default());
    billing(&live).provision(&bus).await.unwrap();
    publish(&bus, 1..=600).await;
    let mut replay = billing(&again).replay(&bus, ReplayFrom::Beginning).await.unwrap();
    publish(&bus, 601..=610).await;
    replay.finished().await.unwrap();
    assert_eq!(numbers(&again), (1..=600).collect::<Vec<_>>(), "in order, and nothing that came after it began");
    assert!(again.all().iter().all(|(_, attempt, duplicate, replayed, _)| *attempt == 1 && *duplicate && *replayed));
    let stats: Vec<_> = replay.stats().map(|(name, stats)| (name.to_owned(), stats.handled, stats.in_flight)).collect();
    assert_eq!(stats, [("billing.shop.order.placed".into(), 600, 0)]);
    assert!(matches!(replay.health(), tidings::transport::Health::Up));
    assert_eq!(live.all(), [], "the service gets nothing of a replay");
    let _billing = billing(&live).start(&bus).await.unwrap();
    live.count(610).await;
    assert_eq!(numbers(&live), (1..=610).collect::<Vec<_>>(), "and lost nothing to it");
    assert!(live.all().iter().all(|(_, _, duplicate, replayed, _)| !duplicate && !replayed));
}

#[tokio::test(start_paused = true)]
async fn a_replay_starts_at_a_time_or_a_position() {
    let (bus, live) = (bus().await, Runs::default());
    let _billing = billing(&live).start(&bus).await.unwrap();
    publish(&bus, 1..=3).await;
    tokio::time::advance(Duration::from_secs(3_600)).await;
    let time = SystemTime::now() + Duration::from_secs(1_800);
    publish(&bus, 4..=6).await;
    let position = live.count(6).await[4].4;
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(replayed(&bus, ReplayFrom::Beginning).await, [1, 2, 3, 4, 5, 6]);
    assert_eq!(replayed(&bus, ReplayFrom::Time(time)).await, [4, 5, 6]);
    assert_eq!(replayed(&bus, ReplayFrom::Position(position)).await, [5, 6]);
    assert_eq!(live.all().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_replay_of_nothing_ends() {
    let bus = bus().await;
    assert_eq!(replayed(&bus, ReplayFrom::Beginning).await, [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_in_a_replay_is_retried_in_order_then_dead_lettered_as_replayed() {
    let (bus, live) = (bus().await, Runs::default());
    let _live = billing(&live).start(&bus).await.unwrap();
    publish(&bus, 1..=3).await;
    live.count(3).await;
    let runs: Seen<(u64, u32)> = Seen::default();
    let patient = SubscriptionConfig::default()
        .retry(RetryPolicy::default().attempts(3).backoff(Duration::from_secs(60), Duration::from_secs(600)).aside());
    let failing = Service::new("billing").state(runs.clone()).on_with(
        patient,
        async |order: Order,
               Attempt(attempt): Attempt,
               State(runs): State<Seen<(u64, u32)>>|
               -> Result<(), HandlerError> {
            runs.push((order.number, attempt));
            if order.number == 2 { Err("the bank is closed".into()) } else { Ok(()) }
        },
    );
    let mut replay = failing.replay(&bus, ReplayFrom::Beginning).await.unwrap();
    replay.finished().await.unwrap();
    assert_eq!(runs.all(), [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)], "never {:?}", RetryMode::Aside);
    assert_eq!(live.all().len(), 3, "no copy reached the service");
    let letters = bus.dead_letters("billing.shop.order.placed").await.unwrap();
    let letter = letters.list(None, 10).await.unwrap().remove(0);
    assert_eq!((letter.reason, letter.attempts, letter.replayed), (Some(DeadLetterReason::Exhausted), 3, true));
    letters.redrive(letter.position).await.unwrap();
    let (number, attempt, duplicate, replayed, _) = live.count(4).await[3];
    assert_eq!((number, attempt, duplicate, replayed), (2, 1, true, false));
}

#[tokio::test(start_paused = true)]
async fn what_handlers_return_in_a_replay_is_published_again_with_the_same_ids() {
    let (bus, seen) = (bus().await, Seen::<(tidings::MessageId, bool)>::default());
    let billing = || Service::new("billing").on(async |o: Order| Invoice { customer: o.customer, number: o.number });
    let crm = Service::new("crm").state(seen.clone()).on(
        async |_: Invoice,
               Metadata(message): Metadata,
               delivered: Delivered,
               State(seen): State<Seen<(tidings::MessageId, bool)>>| {
            seen.push((message.id, delivered.possible_duplicate));
        },
    );
    let _running = (billing().start(&bus).await.unwrap(), crm.start(&bus).await.unwrap());
    publish(&bus, 1..=1).await;
    seen.count(1).await;
    billing().replay(&bus, ReplayFrom::Beginning).await.unwrap().finished().await.unwrap();
    let seen = seen.count(2).await;
    assert_eq!(seen[0].0, seen[1].0);
    assert_eq!((seen[0].1, seen[1].1), (false, true), "and the second is told apart");
}

#[tokio::test(start_paused = true)]
async fn a_replay_reads_the_topics_of_every_handler_and_a_position_is_of_one_subscription() {
    let (bus, runs, views) = (bus().await, Runs::default(), Seen::<u64>::default());
    let both = || {
        let viewed = async |view: Viewed, State(views): State<Seen<u64>>| views.push(view.page);
        billing(&runs).state(views.clone()).on(viewed)
    };
    publish(&bus, 1..=2).await;
    bus.publish(&Viewed { page: 1 }).await.unwrap();
    let error = both().replay(&bus, ReplayFrom::Position(1)).await.unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Config, Some("replay")));
    both().replay(&bus, ReplayFrom::Beginning).await.unwrap().finished().await.unwrap();
    assert_eq!((numbers(&runs), views.all()), (vec![1, 2], vec![1]));
}

#[tokio::test(start_paused = true)]
async fn a_replay_can_be_drained_before_it_ends() {
    let bus = bus().await;
    publish(&bus, 1..=10).await;
    let (stuck, runs) = (Seen::<u64>::default(), Runs::default());
    let slow = Service::new("billing").state(stuck.clone()).on(async |order: Order, State(stuck): State<Seen<u64>>| {
        stuck.push(order.number);
        std::future::pending::<()>().await;
    });
    let replay = slow.replay(&bus, ReplayFrom::Beginning).await.unwrap();
    stuck.count(1).await;
    let drained = replay.drain(Duration::from_secs(1)).await;
    assert_eq!((drained.abandoned, drained.given_back), (1, 9));
    billing(&runs).replay(&bus, ReplayFrom::Beginning).await.unwrap().finished().await.unwrap();
    assert_eq!(runs.all().len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_no_replay_does_not_finish() {
    let (bus, runs) = (bus().await, Runs::default());
    let mut running = billing(&runs).start(&bus).await.unwrap();
    publish(&bus, 1..=1).await;
    eventually("handled", || async { runs.all().len() == 1 }).await;
    assert!(tokio::time::timeout(Duration::from_secs(60), running.finished()).await.is_err());
    bus.close(Duration::from_secs(1)).await.unwrap();
    assert_eq!(running.finished().await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_transport_that_cannot_replay_refuses_with_the_way_out() {
    let (bus, _) = Faulty::bus(|can| can.replay = false).await;
    let error = billing(&Runs::default()).replay(&bus, ReplayFrom::Beginning).await.unwrap_err();
    assert_eq!((error.kind(), error.transport()), (ErrorKind::Unsupported, Some("memory")));
}
