//! Promises 10 and 11: drain, close, reconnect; and provisioning before the start.

use super::cases;
use crate::env::{Env, Seen, dead_letters, drain, eventually, start, subscription, within};
use crate::events::{ORDERS, Order, order, orders, rounds};
use crate::history::{Act, History};
use crate::reader::{open, provision, publish, replay_of, saying, send_to, spec, submit, topic, topics};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tidings::handler::State;
use tidings_core::transport::{
    Delivery, Destination, Health, Ordering, ReplayFrom, SubscriptionSpec, TopicSpec, Topology,
};
use tidings_core::{BusEvent, ErrorKind, EventStream, Service, SubscriptionConfig};
use tokio::time::Instant;

cases!("lifecycle":
    a_drain_finishes_what_runs_and_repeats_nothing,
    what_a_drain_cuts_off_at_its_deadline_comes_again,
    a_service_dropped_without_a_drain_loses_nothing,
    what_is_stopped_hands_nothing_out_and_what_is_out_still_settles,
    closing_gives_back_the_unsettled_at_once_in_order,
    what_was_closed_settles_nothing_any_more,
    closing_from_many_tasks_and_again_is_fine,
    what_is_closed_says_so,
    opening_and_closing_again_and_again_keeps_the_position,
    health_tells_whether_it_is_connected,
    a_subscription_survives_a_cut [Cut],
    a_subscription_survives_a_restart_of_the_broker [Durable, Restart],
    provisioning_again_is_fine,
    what_exists_with_other_settings_is_refused_and_named,
    what_is_provisioned_at_deploy_time_waits_for_the_first_start,
    a_removed_subscription_leaves_nothing_and_begins_anew,
    a_subscription_with_slots_can_be_removed [Slots],
    removing_one_subscription_touches_no_other,
    two_services_on_one_bus_stop_each_for_itself,
);

fn config() -> SubscriptionConfig {
    SubscriptionConfig::default().concurrency(4)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

async fn a_drain_finishes_what_runs_and_repeats_nothing(env: Env) {
    let history = History::ordered();
    let slow = history.desk("one", 1, |_, _| Act::After(Duration::from_millis(100)));
    let running = start(slow.service(config()), &env.bus()).await;
    env.bus().publish_all(&rounds(10, 0..4)).await.unwrap();
    history.running("one", 4).await;
    let drained = drain(running).await;
    assert_eq!((drained.abandoned, drained.flushed.stale, drained.flushed.unknown), (0, 0, 0));
    assert!((4..40).contains(&history.count()), "it finishes what runs, and no more: {}", history.count());
    let running = start(history.passing("two").service(config()), &env.bus()).await;
    history.settled(40).await;
    drain(running).await;
    assert_eq!(history.repeats(), 0);
}

async fn what_a_drain_cuts_off_at_its_deadline_comes_again(env: Env) {
    let history = History::ordered();
    let hangs = history.desk("one", 1, |_, _| Act::Hang);
    let running = start(hangs.service(config()), &env.bus()).await;
    env.bus().publish_all(&rounds(8, 0..3)).await.unwrap();
    history.running("one", 4).await;
    let drained = within("the drain ends", running.drain(Duration::from_millis(100))).await;
    assert_eq!(drained.abandoned, 4);
    let running = start(history.passing("two").service(config()), &env.bus()).await;
    history.settled(24).await;
    assert!(history.repeats() >= 4);
    drain(running).await;
    history.check();
}

async fn a_service_dropped_without_a_drain_loses_nothing(env: Env) {
    let history = History::ordered();
    let hangs = history.desk("one", 1, |order, _| if order.number == 0 { Act::Pass } else { Act::Hang });
    let running = start(hangs.service(config()), &env.bus()).await;
    env.bus().publish_all(&rounds(4, 0..5)).await.unwrap();
    history.running("one", 4).await;
    hangs.bury();
    drop(running);
    let running = start(history.passing("two").service(config()), &env.bus()).await;
    history.settled(20).await;
    drain(running).await;
    history.check();
}

async fn what_is_stopped_hands_nothing_out_and_what_is_out_still_settles(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let narrow = SubscriptionSpec { max_in_flight: 1, ..spec(&env, "crm", &[ORDERS]) };
    let mut reader = open(env.transport(), narrow.clone()).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    let out = reader.expect("1").await;
    reader.stop();
    out.acker.ack();
    reader.end().await;
    let flushed = reader.close().await;
    assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (1, 0, 0));
    let mut reader = open(env.transport(), narrow).await;
    reader.expect("2").await.acker.ack();
    reader.expect("3").await.acker.ack();
}

async fn closing_gives_back_the_unsettled_at_once_in_order(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut one = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3", "4", "5"]).await;
    let mut out = one.take(4).await;
    out.remove(0).acker.ack();
    let closed = Instant::now();
    assert_eq!(one.close().await.unknown, 0);
    let mut two = open(&env.connect().await, spec(&env, "crm", &[ORDERS])).await;
    for text in ["2", "3", "4", "5"] {
        let again = two.expect(text).await;
        assert!(again.redelivered || text == "5", "{text} is marked");
        again.acker.ack();
    }
    assert!(closed.elapsed() < Duration::from_secs(10), "it took {:?}", closed.elapsed());
}

async fn what_was_closed_settles_nothing_any_more(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut one = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let stale = one.take(2).await;
    one.close().await;
    let mut two = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    let again = two.take(2).await;
    stale.into_iter().for_each(|delivery| delivery.acker.ack());
    drop(again);
    two.close().await;
    let mut three = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    three.expect("1").await.acker.ack();
    three.expect("2").await.acker.ack();
}

async fn closing_from_many_tasks_and_again_is_fine(env: Env) {
    let transport = env.connect().await;
    topics(&transport, &[ORDERS]).await;
    let mut reader = open(&transport, spec(&env, "crm", &[ORDERS])).await;
    publish(&transport, ORDERS, "ada", &["1"]).await;
    let _out = reader.expect("1").await;
    let closing: Vec<_> = (0..8).map(|_| Arc::clone(&transport)).collect();
    let closing: Vec<_> = closing.into_iter().map(|t| tokio::spawn(async move { t.close(soon()).await })).collect();
    for closed in closing {
        within("it is closed", closed).await.unwrap().unwrap();
    }
    transport.close(soon()).await.unwrap();
    open(env.transport(), spec(&env, "crm", &[ORDERS])).await.expect("1").await.acker.ack();
}

async fn what_is_closed_says_so(env: Env) {
    let transport = env.connect().await;
    topics(&transport, &[ORDERS]).await;
    let mut reader = open(&transport, spec(&env, "crm", &[ORDERS])).await;
    transport.close(soon()).await.unwrap();
    let topology = Topology { topics: vec![TopicSpec::new(topic(ORDERS))], subscriptions: Vec::new() };
    let closed = |what: &str, error: Option<tidings_core::Error>| {
        let error = error.unwrap_or_else(|| panic!("{what} goes on"));
        assert_eq!(error.kind(), ErrorKind::Closed, "{what}: {error}");
    };
    closed("provisioning", within("an answer", transport.provision(&topology)).await.err());
    closed("subscribing", within("an answer", transport.subscribe(spec(&env, "crm", &[ORDERS]))).await.err());
    let dead = async { transport.dead_letters(&subscription("crm")).await?.count().await };
    closed("the dead letters", within("an answer", dead).await.err());
    let post = (Destination::Topic(topic(ORDERS)), saying(ORDERS, "ada", 1), None, false);
    closed("publishing", submit(&transport, &[post]).await.pop().map(|(_, failure)| failure.error));
    closed("reading", reader.failure().await);
    if env.can().replay {
        let again = transport.replay(replay_of(&[ORDERS], ReplayFrom::Beginning));
        closed("the replay", within("an answer", again).await.err());
    }
}

async fn opening_and_closing_again_and_again_keeps_the_position(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    let texts: Vec<_> = (0..20).map(|n| n.to_string()).collect();
    publish(env.transport(), ORDERS, "ada", &texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
    for text in &texts {
        let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
        reader.expect(text).await.acker.ack();
        let flushed = reader.close().await;
        assert_eq!((flushed.stale, flushed.unknown), (0, 0));
    }
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["and no other instance is left"]).await;
    reader.expect("and no other instance is left").await.acker.ack();
}

async fn health_tells_whether_it_is_connected(env: Env) {
    let transport = env.connect().await;
    topics(&transport, &[ORDERS]).await;
    publish(&transport, ORDERS, "ada", &["1"]).await;
    assert!(matches!(transport.health(), Health::Up), "{:?}", transport.health());
    transport.close(soon()).await.unwrap();
    assert!(matches!(transport.health(), Health::Down(_)), "{:?}", transport.health());
}

async fn a_subscription_survives_a_cut(env: Env) {
    survives(&env, async { env.cut_off().await }, |_| {}).await;
}

async fn a_subscription_survives_a_restart_of_the_broker(env: Env) {
    // Leases may outlive it; then what is abandoned comes again.
    survives(&env, async { env.restart().await }, Vec::clear).await;
}

/// It is not opened again, says what happened, and what was out comes again.
async fn survives(env: &Env, fault: impl Future<Output = ()>, abandon: impl FnOnce(&mut Vec<Delivery>)) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let mut out = reader.take(2).await;
    let mut events = env.transport().events().listen();
    fault.await;
    tells(&mut events, |event| matches!(event, BusEvent::Disconnected { .. })).await;
    abandon(&mut out);
    // It may find out, and come back, only when it is used.
    let again = reader.expect("1").await;
    assert!(again.redelivered);
    tells(&mut events, |event| matches!(event, BusEvent::Connected)).await;
    let behind = reader.expect("2").await;
    out.into_iter().for_each(|stale| stale.acker.ack());
    // Which would not come again if what was lost with the connection had settled anything.
    again.acker.release(Duration::ZERO);
    behind.acker.release(Duration::ZERO);
    reader.expect("1").await.acker.ack();
    reader.expect("2").await.acker.ack();
    publish(&env.connect().await, ORDERS, "ada", &["3"]).await;
    reader.expect("3").await.acker.ack();
    eventually("it is up again", || async { matches!(env.transport().health(), Health::Up) }).await;
}

async fn tells(events: &mut EventStream, wanted: impl Fn(&BusEvent) -> bool) {
    let told = async { while !events.next().await.as_ref().is_some_and(&wanted) {} };
    within("it is told", told).await;
}

async fn provisioning_again_is_fine(env: Env) {
    let spec = spec(&env, "crm", &[ORDERS]);
    let topology = Topology { topics: vec![TopicSpec::new(topic(ORDERS))], subscriptions: vec![spec.clone()] };
    for transport in [env.transport(), &env.connect().await] {
        within("provisioning", transport.provision(&topology)).await.unwrap();
        within("again", transport.provision(&topology)).await.unwrap();
    }
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    within("and again", env.transport().provision(&topology)).await.unwrap();
    open(env.transport(), spec).await.expect("1").await.acker.ack();
}

async fn what_exists_with_other_settings_is_refused_and_named(env: Env) {
    topics(env.transport(), &[ORDERS, "suite.other"]).await;
    let existing = spec(&env, "crm", &[ORDERS]);
    drop(open(env.transport(), existing.clone()).await);
    let mut others = vec![spec(&env, "crm", &[ORDERS, "suite.other"]), spec(&env, "crm", &["suite.other"])];
    if env.can().key_ordering {
        others.push(SubscriptionSpec { ordering: Ordering::None, ..existing.clone() });
    }
    for other in others {
        let topology = Topology { topics: Vec::new(), subscriptions: vec![other.clone()] };
        let errors = [
            within("an answer", env.transport().subscribe(other)).await.err().expect("refused"),
            within("an answer", env.transport().provision(&topology)).await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
            assert!(error.to_string().contains("crm"), "it names the subscription: {error}");
        }
    }
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    open(env.transport(), existing).await.expect("1").await.acker.ack();
}

async fn what_is_provisioned_at_deploy_time_waits_for_the_first_start(env: Env) {
    let history = History::ordered();
    let service = || history.passing("one").service(config());
    service().provision(&env.another_bus().await).await.unwrap();
    env.bus().publish_all(&orders("ada", 20)).await.unwrap();
    let running = start(service(), &env.bus()).await;
    history.settled(20).await;
    drain(running).await;
    assert_eq!(history.passed("ada"), (0..20).collect::<Vec<_>>());
}

async fn remove(env: &Env, name: &str) -> bool {
    within("an answer", env.transport().remove_subscription(&subscription(name))).await.unwrap()
}

/// What waited for it is gone, what it was created with too; what is published from then on waits for its successor.
async fn a_removed_subscription_leaves_nothing_and_begins_anew(env: Env) {
    topics(env.transport(), &[ORDERS, "suite.other"]).await;
    assert!(!remove(&env, "crm").await, "there is none yet");
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2", "3"]).await;
    send_to(env.transport(), "crm", saying(ORDERS, "ada", "to its address"), None).await;
    reader.next().await.acker.ack();
    reader.close().await;
    assert!(remove(&env, "crm").await);
    assert!(!remove(&env, "crm").await, "it is gone");
    publish(env.transport(), ORDERS, "ada", &["nobody waits for this"]).await;
    let mut anew = open(env.transport(), spec(&env, "crm", &[ORDERS, "suite.other"])).await;
    publish(env.transport(), ORDERS, "ada", &["4"]).await;
    publish(env.transport(), "suite.other", "ada", &["5"]).await;
    assert_eq!(anew.texts(2).await, ["4", "5"]);
}

async fn a_subscription_with_slots_can_be_removed(env: Env) {
    provision(env.transport(), ORDERS, |spec| spec.slots = 3).await;
    let texts = |from: u64| (from..from + 30).map(|n| n.to_string()).collect::<Vec<_>>();
    let all = async |from| {
        for (key, text) in texts(from).iter().enumerate() {
            publish(env.transport(), ORDERS, &format!("key {key}"), &[text]).await;
        }
    };
    open(env.transport(), spec(&env, "crm", &[ORDERS])).await.close().await;
    all(100).await;
    assert!(remove(&env, "crm").await);
    let mut anew = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    all(200).await;
    assert_eq!(anew.texts(30).await, texts(200));
}

/// Another subscription of the topic, and the dead letters of the one that is removed.
async fn removing_one_subscription_touches_no_other(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    open(env.transport(), spec(&env, "crm", &[ORDERS])).await.close().await;
    let mut other = open(env.transport(), spec(&env, "crm.eu", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let dead = (Destination::DeadLetter(subscription("crm")), saying(ORDERS, "ada", "dead"), None, true);
    assert!(submit(env.transport(), &[dead]).await.is_empty());
    other.expect("1").await.acker.ack();
    assert!(remove(&env, "crm").await);
    send_to(env.transport(), "crm.eu", saying(ORDERS, "bob", "to its address"), None).await;
    assert_eq!(other.texts(2).await, ["2", "to its address"]);
    let letters = dead_letters(env.transport(), "crm", 1).await;
    assert_eq!(letters[0].message.payload, "dead");
}

async fn two_services_on_one_bus_stop_each_for_itself(env: Env) {
    let (bus, crm, audit) = (env.bus(), Seen::<u64>::default(), Seen::<u64>::default());
    let service = |name, seen: &Seen<u64>| {
        let handler = async |order: Order, State(seen): State<Seen<u64>>| seen.push(order.number);
        Service::new(name).state(seen.clone()).on(handler)
    };
    let (one, two) = (start(service("crm", &crm), &bus).await, start(service("audit", &audit), &bus).await);
    bus.publish(&order("ada", 1)).await.unwrap();
    assert_eq!((crm.count(1).await, audit.count(1).await), (vec![1], vec![1]));
    drain(one).await;
    bus.publish(&order("ada", 2)).await.unwrap();
    assert_eq!(audit.count(2).await, [1, 2], "the other goes on");
    assert_eq!(crm.all(), [1]);
    let one = start(service("crm", &crm), &bus).await;
    assert_eq!(crm.count(2).await, [1, 2]);
    drain(one).await;
    drain(two).await;
}
