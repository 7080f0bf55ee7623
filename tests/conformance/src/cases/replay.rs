//! Promise 12: what was published can be read again; and promise 7: what retention took is told.

use super::cases;
use crate::env::{Env, Seen, drain, eventually, start, within};
use crate::events::{Invoice, ORDERS, Order, orders};
use crate::history::History;
use crate::reader::{Reader, open, provision, publish, replay, replay_of, said, spec, topics};
use std::time::Duration;
use tidings::handler::{Delivered, Metadata, State};
use tidings_core::transport::{Notice, ReplayFrom, ReplaySpec};
use tidings_core::{BusEvent, ErrorKind, MessageId, Service, SubscriptionConfig};
use tokio::time::{sleep, timeout};

cases!("replay":
    a_replay_reads_all_again_marked_and_moves_no_subscription [Replay],
    a_replay_can_start_at_a_time [Replay],
    a_replay_can_start_at_a_position [Replay],
    a_position_of_a_subscription_is_one_of_its_replay [Replay, LogPositions],
    a_replay_can_follow_what_is_published_next [Replay],
    a_replay_ends_when_all_that_was_there_is_settled [Replay],
    what_a_replay_gives_back_comes_again_within_it [Replay],
    a_replay_of_nothing_ends [Replay],
    a_replay_of_a_pattern_reads_all_its_topics [Replay],
    a_service_replays_through_its_handlers [Replay],
    what_handlers_return_in_a_replay_has_the_same_ids [Replay],
    a_replay_is_refused_with_the_way_out [NoReplay],
    a_gap_made_by_retention_is_told_and_not_jumped [Retention],
    a_gap_made_by_retention_is_told_to_the_bus [Retention],
);

/// Acks all texts in their order, then the replay ends.
async fn read_to_the_end(mut replay: Reader, texts: &[&str]) {
    for text in texts {
        replay.expect(text).await.acker.ack();
    }
    replay.end().await;
    replay.close().await;
}

async fn a_replay_reads_all_again_marked_and_moves_no_subscription(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    let first = reader.expect("1").await;
    let (id, key) = (first.message.id.clone(), first.message.key.clone());
    first.acker.ack();
    let mut again = replay(&env.connect().await, replay_of(&[ORDERS], ReplayFrom::Beginning)).await;
    for text in ["1", "2", "3"] {
        let delivery = again.expect(text).await;
        assert!(delivery.replayed, "it says that it is replayed");
        assert!(text != "1" || (&delivery.message.id, &delivery.message.key) == (&id, &key));
        delivery.acker.ack();
    }
    again.end().await;
    again.close().await;
    for text in ["2", "3"] {
        let delivery = reader.expect(text).await;
        assert!(!delivery.replayed && !delivery.redelivered, "the subscription goes on where it was");
        delivery.acker.ack();
    }
}

async fn a_replay_can_start_at_a_time(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    // The clocks of the broker and of this case may be a little apart.
    sleep(Duration::from_millis(600)).await;
    let time = env.now();
    sleep(Duration::from_millis(600)).await;
    publish(env.transport(), ORDERS, "ada", &["3", "4"]).await;
    let from = |time| replay(env.transport(), replay_of(&[ORDERS], ReplayFrom::Time(time)));
    read_to_the_end(from(time).await, &["3", "4"]).await;
    read_to_the_end(from(time - Duration::from_secs(3600)).await, &["1", "2", "3", "4"]).await;
    sleep(Duration::from_millis(10)).await;
    read_to_the_end(from(time + Duration::from_secs(3600)).await, &[]).await;
}

async fn a_replay_can_start_at_a_position(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3", "4"]).await;
    let mut all = replay(env.transport(), replay_of(&[ORDERS], ReplayFrom::Beginning)).await;
    let positions: Vec<_> = all.take(4).await.iter().map(|delivery| delivery.position).collect();
    assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
    let from = |position| replay(env.transport(), replay_of(&[ORDERS], ReplayFrom::Position(position)));
    read_to_the_end(from(positions[2]).await, &["3", "4"]).await;
    read_to_the_end(from(positions[3] + 1).await, &[]).await;
    assert_eq!(from(positions[1]).await.expect("2").await.position, positions[1], "the same each time");
}

async fn a_position_of_a_subscription_is_one_of_its_replay(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    let position = reader.take(3).await[1].position;
    let again = replay(env.transport(), replay_of(&[ORDERS], ReplayFrom::Position(position))).await;
    read_to_the_end(again, &["2", "3"]).await;
}

async fn a_replay_can_follow_what_is_published_next(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let spec = ReplaySpec { follow: true, ..replay_of(&[ORDERS], ReplayFrom::Beginning) };
    let mut again = replay(env.transport(), spec).await;
    again.expect("1").await.acker.ack();
    again.expect("2").await.acker.ack();
    publish(env.transport(), ORDERS, "ada", &["3"]).await;
    let live = again.expect("3").await;
    assert!(live.replayed);
    live.acker.ack();
    again.stop();
    again.end().await;
    again.close().await;
}

async fn a_replay_ends_when_all_that_was_there_is_settled(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let mut again = replay(env.transport(), replay_of(&[ORDERS], ReplayFrom::Beginning)).await;
    publish(env.transport(), ORDERS, "ada", &["after it began"]).await;
    let mut out = again.take(2).await;
    assert_eq!(out.iter().map(said).collect::<Vec<_>>(), ["1", "2"]);
    out.pop().unwrap().acker.ack();
    assert!(timeout(Duration::from_millis(300), again.next_or_end()).await.is_err(), "one is still out");
    out.pop().unwrap().acker.ack();
    again.end().await;
}

async fn what_a_replay_gives_back_comes_again_within_it(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let mut again = replay(env.transport(), replay_of(&[ORDERS], ReplayFrom::Beginning)).await;
    let mut out = again.take(2).await;
    out.pop().unwrap().acker.ack();
    out.pop().unwrap().acker.release(Duration::from_millis(100));
    let back = again.expect("1").await;
    assert!(back.replayed && back.redelivered);
    drop(back);
    again.expect("1").await.acker.ack();
    again.end().await;
}

async fn a_replay_of_nothing_ends(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    for from in [ReplayFrom::Beginning, ReplayFrom::Time(env.now())] {
        read_to_the_end(replay(env.transport(), replay_of(&[ORDERS], from)).await, &[]).await;
    }
}

async fn a_replay_of_a_pattern_reads_all_its_topics(env: Env) {
    topics(env.transport(), &["suite.a.placed", "suite.b.placed", "suite.c.other"]).await;
    publish(env.transport(), "suite.a.placed", "ada", &["a1", "a2"]).await;
    publish(env.transport(), "suite.c.other", "ada", &["not this"]).await;
    publish(env.transport(), "suite.b.placed", "ada", &["b1"]).await;
    let mut again = replay(env.transport(), replay_of(&["suite.*.placed"], ReplayFrom::Beginning)).await;
    let mut seen = Vec::new();
    while let Some(delivery) = again.next_or_end().await {
        seen.push(said(&delivery).to_owned());
        delivery.acker.ack();
    }
    let of_a: Vec<_> = seen.iter().filter(|text| text.starts_with('a')).collect();
    assert_eq!(of_a, ["a1", "a2"]);
    seen.sort();
    assert_eq!(seen, ["a1", "a2", "b1"]);
}

/// What a handler was told: number, attempt, replayed.
type Runs = Seen<(u64, u32, bool)>;

async fn a_service_replays_through_its_handlers(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let (bus, runs, history) = (env.bus(), Runs::default(), History::ordered());
    history.passing("live").service(SubscriptionConfig::default()).provision(&bus).await.unwrap();
    bus.publish_all(&orders("ada", 20)).await.unwrap();
    let handler = async |order: Order, delivered: Delivered, State(runs): State<Runs>| {
        runs.push((order.number, delivered.attempt, delivered.replayed && delivered.possible_duplicate));
    };
    let service = Service::new("billing").state(runs.clone()).on(handler);
    let mut replay = within("the replay begins", service.replay(&bus, ReplayFrom::Beginning)).await.unwrap();
    within("it ends by itself", replay.finished()).await.unwrap();
    assert_eq!(runs.all(), (0..20).map(|number| (number, 1, true)).collect::<Vec<_>>());
    let live = start(history.passing("live").service(SubscriptionConfig::default()), &bus).await;
    history.settled(20).await;
    drain(live).await;
    assert_eq!(history.repeats(), 0);
}

/// What a handler was told of an invoice: number, id, whether it is marked.
type Invoices = Seen<(u64, MessageId, bool)>;

async fn note(invoice: Invoice, Metadata(message): Metadata, delivered: Delivered, State(seen): State<Invoices>) {
    seen.push((invoice.number, message.id, delivered.possible_duplicate));
}

async fn what_handlers_return_in_a_replay_has_the_same_ids(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let (bus, seen) = (env.bus(), Invoices::default());
    let bill = async |order: Order| Invoice { customer: order.customer, number: order.number };
    let billing = || Service::new("billing").on(bill);
    let crm = start(Service::new("crm").state(seen.clone()).on(note), &bus).await;
    let live = start(billing(), &bus).await;
    bus.publish_all(&orders("ada", 5)).await.unwrap();
    seen.count(5).await;
    let mut again = within("the replay begins", billing().replay(&bus, ReplayFrom::Beginning)).await.unwrap();
    within("it ends by itself", again.finished()).await.unwrap();
    bus.publish_all(&orders("ada", 6)[5..]).await.unwrap();
    eventually("the last", || async { seen.all().last().is_some_and(|last| last.0 == 5) }).await;
    let mut ids = Vec::new();
    // A broker that knows the ids again may have dropped them.
    for (number, id, marked) in seen.all() {
        match ids.get(number as usize) {
            None => ids.push(id),
            Some(first) => assert!(*first == id && marked, "invoice {number}: {first}, then {id}, marked: {marked}"),
        }
    }
    assert_eq!(ids.len(), 6);
    drain(live).await;
    drain(crm).await;
}

async fn a_replay_is_refused_with_the_way_out(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let refused = env.transport().replay(replay_of(&[ORDERS], ReplayFrom::Beginning));
    let error = within("an answer", refused).await.err().expect("refused");
    assert_eq!((error.kind(), error.transport()), (ErrorKind::Unsupported, Some(env.transport().name())), "{error}");
    let service = Service::new("billing").on(async |_: Order| ());
    let error = within("an answer", service.replay(&env.bus(), ReplayFrom::Beginning)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("retain"), "the way out: {error}");
}

/// A topic that keeps what is unread for a second only.
async fn short_lived(env: &Env) {
    provision(env.transport(), ORDERS, |topic| {
        topic.retention = Some(Duration::from_secs(1));
        topic.retained = env.can().replay;
    })
    .await;
}

/// Waits until what was published is too old.
async fn expired(env: &Env) {
    let published = env.now();
    let age = || env.now().duration_since(published).unwrap_or_default();
    eventually("it is too old", || async { age() > Duration::from_millis(1500) }).await;
    env.expire(ORDERS).await;
}

async fn a_gap_made_by_retention_is_told_and_not_jumped(env: Env) {
    short_lived(&env).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    reader.expect("1").await.acker.ack();
    reader.close().await;
    publish(env.transport(), ORDERS, "ada", &["2", "3", "4"]).await;
    expired(&env).await;
    publish(env.transport(), ORDERS, "ada", &["5"]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let next = reader.expect("5").await;
    let gap = |notice: &Notice| match notice {
        Notice::Gap { missed_at_most, from, to, .. } => Some((*missed_at_most, *from, *to)),
        _ => None,
    };
    let (missed, from, to) = reader.take_notices().iter().find_map(gap).expect("the gap is told before what follows");
    assert!(missed >= 3, "at most {missed} of 3 were missed");
    assert!(from < to && to <= next.position, "from {from} to {to}, and then {}", next.position);
    next.acker.ack();
}

async fn a_gap_made_by_retention_is_told_to_the_bus(env: Env) {
    short_lived(&env).await;
    let (bus, history) = (env.bus(), History::unordered());
    let service = || history.passing("one").service(SubscriptionConfig::default());
    service().provision(&bus).await.unwrap();
    bus.publish_all(&orders("ada", 3)).await.unwrap();
    expired(&env).await;
    let mut events = bus.events();
    let running = start(service(), &bus).await;
    bus.publish_all(&orders("bob", 1)).await.unwrap();
    let told = async {
        loop {
            if let Some(BusEvent::Gap { subscription, missed_at_most, .. }) = events.next().await {
                return (subscription.to_string(), missed_at_most);
            }
        }
    };
    let (subscription, missed) = within("the gap is told", told).await;
    assert_eq!(subscription, "billing.suite.order.placed");
    assert!(missed >= 3, "at most {missed} of 3 were missed");
    history.settled(1).await;
    drain(running).await;
    assert_eq!(history.begun("ada"), [0; 0]);
}
