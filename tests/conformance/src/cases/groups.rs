//! Promises 6 and 7: fan-out, sharing, buffering; and where a subscription starts.

use super::cases;
use crate::env::{Env, Seen, drain, eventually, start, total, within};
use crate::events::{ORDERS, Order, order, orders, publishing, rounds};
use crate::history::{Act, History};
use crate::instance::{Instance, ranked};
use crate::reader::{open, provision, publish, said, saying, send_to, spec, topic, topics, unordered};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tidings::Event;
use tidings::handler::State;
use tidings_core::transport::{Health, Ordering, Start, SubscriptionSpec, TopicSpec, Topology};
use tidings_core::{BusEvent, ErrorKind, Service, SubscriptionConfig};

cases!("groups":
    every_subscription_gets_every_event,
    instances_share_the_work [Sharing],
    an_instance_that_joins_takes_part [Sharing],
    an_instance_that_drains_repeats_nothing [Sharing],
    what_a_dead_instance_left_comes_again_marked [Sharing],
    a_new_subscription_starts_with_what_is_new,
    a_new_subscription_can_start_at_the_beginning [Beginning],
    the_start_is_durable_before_the_first_ack,
    two_first_instances_at_once_make_one_subscription,
    the_start_of_an_existing_subscription_never_changes [Beginning],
    what_is_published_while_nobody_reads_waits,
    a_pattern_reads_topics_created_later,
    a_pattern_reads_nothing_else,
    overlapping_patterns_deliver_an_event_once,
    types_of_one_topic_reach_their_handlers_and_the_rest_is_counted,
    names_that_differ_only_in_punctuation_stay_apart,
    other_slots_for_an_existing_topic_are_refused [Slots],
    one_instance_is_active_and_the_other_says_that_it_stands_by [KeyOrdering],
);

/// Work shared message by message, in small portions.
fn config() -> SubscriptionConfig {
    SubscriptionConfig::default().ordering(Ordering::None).concurrency(4).max_in_flight(8)
}

/// A topic that instances can share on every broker.
async fn shareable(env: &Env) {
    let slots = if env.can().slots { 4 } else { 1 };
    provision(env.transport(), ORDERS, |topic| topic.slots = slots).await;
}

/// Waits until an instance takes part, as it says.
async fn takes_part(instance: &Instance) {
    eventually("it takes part", || async { instance.slots().await.is_some() }).await;
}

async fn every_subscription_gets_every_event(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let texts: Vec<_> = (0..20).map(|n| n.to_string()).collect();
    let texts: Vec<_> = texts.iter().map(String::as_str).collect();
    let mut readers = Vec::new();
    for name in ["crm", "billing", "audit"] {
        readers.push(open(&env.connect().await, spec(&env, name, &[ORDERS])).await);
    }
    publish(env.transport(), ORDERS, "ada", &texts).await;
    for mut reader in readers {
        for text in &texts {
            reader.expect(text).await.acker.ack();
        }
    }
}

async fn instances_share_the_work(env: Env) {
    shareable(&env).await;
    let history = History::unordered();
    let desk = |who| history.desk(who, 1, |_, _| Act::After(Duration::from_millis(2)));
    let one = Instance::of(&env, &desk("one"), config()).await;
    let two = Instance::of(&env, &desk("two"), config()).await;
    takes_part(&one).await;
    takes_part(&two).await;
    env.bus().publish_all(&rounds(100, 0..3)).await.unwrap();
    history.settled(300).await;
    assert!(history.keys_of("one") > 0 && history.keys_of("two") > 0, "each gets some");
    one.drain().await;
    two.drain().await;
    history.check();
}

async fn an_instance_that_joins_takes_part(env: Env) {
    shareable(&env).await;
    let history = History::unordered();
    let desk = |who| history.desk(who, 1, |_, _| Act::After(Duration::from_millis(2)));
    let one = Instance::of(&env, &desk("one"), config()).await;
    let published = publishing(&env.bus(), rounds(50, 0..5));
    history.settled(50).await;
    let two = Instance::of(&env, &desk("two"), config()).await;
    takes_part(&two).await;
    within("the publishes", published).await.unwrap();
    env.bus().publish_all(&rounds(50, 5..10)).await.unwrap();
    history.settled(500).await;
    assert!(history.keys_of("two") > 0, "it gets some");
    one.drain().await;
    two.drain().await;
    history.check();
}

async fn an_instance_that_drains_repeats_nothing(env: Env) {
    shareable(&env).await;
    let history = History::unordered();
    let desk = |who| history.desk(who, 1, |_, _| Act::After(Duration::from_millis(2)));
    let one = Instance::of(&env, &desk("one"), config()).await;
    let two = Instance::of(&env, &desk("two"), config()).await;
    takes_part(&one).await;
    takes_part(&two).await;
    let published = publishing(&env.bus(), rounds(50, 0..8));
    history.settled(100).await;
    let drained = one.drain().await;
    assert_eq!((drained.abandoned, drained.flushed.stale, drained.flushed.unknown), (0, 0, 0));
    within("the publishes", published).await.unwrap();
    history.settled(400).await;
    two.drain().await;
    assert_eq!(history.repeats(), 0);
}

async fn what_a_dead_instance_left_comes_again_marked(env: Env) {
    shareable(&env).await;
    let history = History::unordered();
    let one = Instance::of(&env, &history.desk("one", 1, |_, _| Act::Hang), config()).await;
    takes_part(&one).await;
    let published = publishing(&env.bus(), rounds(40, 0..5));
    history.running("one", 2).await;
    // Not before: on a loaded machine it would take all of them.
    let two = Instance::of(&env, &history.passing("two"), config()).await;
    takes_part(&two).await;
    one.die().await;
    within("the publishes", published).await.unwrap();
    history.settled(200).await;
    assert!(history.repeats() >= 2, "what it had begun came again");
    two.drain().await;
    history.check();
}

async fn a_new_subscription_starts_with_what_is_new(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["3"]).await;
    let delivery = reader.expect("3").await;
    assert!(!delivery.redelivered && !delivery.replayed);
    delivery.acker.ack();
}

async fn a_new_subscription_can_start_at_the_beginning(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let from_the_beginning = SubscriptionSpec { start: Start::Beginning, ..spec(&env, "crm", &[ORDERS]) };
    let mut reader = open(env.transport(), from_the_beginning).await;
    publish(env.transport(), ORDERS, "ada", &["3"]).await;
    for text in ["1", "2", "3"] {
        reader.expect(text).await.acker.ack();
    }
}

/// The first instance is gone before anything was published, without an ack or a goodbye.
async fn the_start_is_durable_before_the_first_ack(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let first = env.connect().await;
    drop(open(&first, spec(&env, "crm", &[ORDERS])).await);
    drop(first);
    publish(env.transport(), ORDERS, "ada", &["1", "2"]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    reader.expect("1").await.acker.ack();
    reader.expect("2").await.acker.ack();
}

async fn two_first_instances_at_once_make_one_subscription(env: Env) {
    let history = History::ordered();
    let (one, two) = (history.passing("one"), history.passing("two"));
    let config = || if env.can().key_ordering { SubscriptionConfig::default() } else { config() };
    let (one, two) = tokio::join!(Instance::of(&env, &one, config()), Instance::of(&env, &two, config()));
    env.bus().publish_all(&orders("ada", 50)).await.unwrap();
    history.settled(50).await;
    env.bus().publish_all(&rounds(5, 0..10)).await.unwrap();
    history.settled(100).await;
    one.drain().await;
    two.drain().await;
    history.check();
}

async fn the_start_of_an_existing_subscription_never_changes(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    let (new, start) = (spec(&env, "crm", &[ORDERS]), Start::Beginning);
    drop(open(env.transport(), new.clone()).await);
    let other = SubscriptionSpec { start, ..new.clone() };
    let error = within("an answer", env.transport().subscribe(other)).await.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
    assert!(error.to_string().contains("remove_subscription"), "the way out: {error}");
    publish(env.transport(), ORDERS, "ada", &["2"]).await;
    open(env.transport(), new).await.expect("2").await.acker.ack();
}

async fn what_is_published_while_nobody_reads_waits(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let transport = env.connect().await;
    let mut reader = open(&transport, spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    reader.expect("1").await.acker.ack();
    reader.close().await;
    transport.close(tokio::time::Instant::now() + Duration::from_secs(10)).await.unwrap();
    publish(env.transport(), ORDERS, "ada", &["2", "3", "4"]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    for text in ["2", "3", "4"] {
        let delivery = reader.expect(text).await;
        assert!(!delivery.redelivered, "nobody has had it");
        delivery.acker.ack();
    }
}

async fn a_pattern_reads_topics_created_later(env: Env) {
    topics(env.transport(), &["suite.one.placed"]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &["suite.>"])).await;
    publish(env.transport(), "suite.one.placed", "ada", &["1"]).await;
    reader.expect("1").await.acker.ack();
    topics(env.transport(), &["suite.later"]).await;
    publish(env.transport(), "suite.later", "ada", &["2", "3"]).await;
    reader.expect("2").await.acker.ack();
    reader.expect("3").await.acker.ack();
}

async fn a_pattern_reads_nothing_else(env: Env) {
    let others = ["suite.placed", "suite.a.b.placed", "suite.a.placed.again", "suite-a.a.placed", "suite.a.placed-b"];
    topics(env.transport(), &others).await;
    topics(env.transport(), &["suite.a.placed"]).await;
    let mut reader = open(env.transport(), unordered(&env, "crm", &["suite.*.placed"])).await;
    for other in others {
        publish(env.transport(), other, "ada", &[other]).await;
    }
    publish(env.transport(), "suite.a.placed", "ada", &["this one"]).await;
    reader.expect("this one").await.acker.ack();
    let more = reader.next_within(Duration::from_millis(200)).await;
    assert!(more.is_none(), "{:?}", more.as_ref().map(said));
}

async fn overlapping_patterns_deliver_an_event_once(env: Env) {
    topics(env.transport(), &["suite.a.placed"]).await;
    let patterns = ["suite.a.placed", "suite.*.placed", "suite.>"];
    let mut reader = open(env.transport(), spec(&env, "crm", &patterns)).await;
    publish(env.transport(), "suite.a.placed", "ada", &["1", "2", "3"]).await;
    for text in ["1", "2", "3"] {
        reader.expect(text).await.acker.ack();
    }
    let more = reader.next_within(Duration::from_millis(200)).await;
    assert!(more.is_none(), "{:?}", more.as_ref().map(said));
}

/// A second type on the topic of the orders.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "suite.order.cancelled", topic = "suite.order.placed", key = customer)]
struct Cancelled {
    customer: String,
}

async fn types_of_one_topic_reach_their_handlers_and_the_rest_is_counted(env: Env) {
    let (bus, seen) = (env.bus(), Seen::<&'static str>::default());
    let mut events = bus.events();
    let service = Service::new("crm").state(seen.clone());
    let service = service.on(async |_: Order, State(seen): State<Seen<&'static str>>| seen.push("placed"));
    let service = service.on(async |_: Cancelled, State(seen): State<Seen<&'static str>>| seen.push("cancelled"));
    let running = start(service, &bus).await;
    publish(env.transport(), ORDERS, "ada", &["of a type that nobody takes"]).await;
    bus.publish(&order("ada", 1)).await.unwrap();
    bus.publish(&Cancelled { customer: "ada".into() }).await.unwrap();
    assert_eq!(seen.count(2).await, ["placed", "cancelled"]);
    let told = async { while !matches!(events.next().await, Some(BusEvent::Unrouted { .. })) {} };
    within("it is told", told).await;
    drain(running).await;
    let running = start(Service::new("crm").state(seen.clone()).on(async |_: Cancelled| ()), &bus).await;
    bus.publish(&Cancelled { customer: "ada".into() }).await.unwrap();
    eventually("handled", || async { total(&running, |stats| stats.handled) == 1 }).await;
    assert_eq!(total(&running, |stats| stats.unrouted), 0, "what was unrouted is acked");
    drain(running).await;
}

async fn names_that_differ_only_in_punctuation_stay_apart(env: Env) {
    let names = ["a.b", "a-b", "a.b-c", "a-b.c", "a.b.c", "a--b", "a.b-", "ab"];
    let topic_of = |name: &str| format!("suite.{name}");
    let mut readers = Vec::new();
    topics(env.transport(), &["suite.shared"]).await;
    for name in names {
        topics(env.transport(), &[&topic_of(name)]).await;
        readers.push(open(env.transport(), unordered(&env, name, &[&topic_of(name), "suite.shared"])).await);
    }
    publish(env.transport(), "suite.shared", "", &["shared"]).await;
    for name in names {
        publish(env.transport(), &topic_of(name), "", &[name]).await;
        send_to(env.transport(), name, saying("suite.shared", "", format!("to {name}")), None).await;
    }
    for (mut reader, name) in readers.into_iter().zip(names) {
        let mut got: Vec<_> = reader.take(3).await.iter().map(|delivery| said(delivery).to_owned()).collect();
        got.sort();
        let mut expected = [name.to_owned(), "shared".into(), format!("to {name}")];
        expected.sort();
        assert_eq!(got, expected);
    }
}

async fn other_slots_for_an_existing_topic_are_refused(env: Env) {
    provision(env.transport(), ORDERS, |topic| topic.slots = 4).await;
    let spec = TopicSpec { slots: 8, ..TopicSpec::new(topic(ORDERS)) };
    let topology = Topology { topics: vec![spec], subscriptions: Vec::new() };
    let other = env.connect().await;
    let error = within("an answer", other.provision(&topology)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
    let text = error.to_string();
    assert!(text.contains(ORDERS) && text.contains("slots"), "it names what differs: {text}");
    provision(env.transport(), ORDERS, |topic| topic.slots = 4).await;
}

async fn one_instance_is_active_and_the_other_says_that_it_stands_by(env: Env) {
    let (history, bus) = (History::ordered(), env.bus());
    let mut events = bus.events();
    let one = Instance::of(&env, &history.passing("one"), SubscriptionConfig::default()).await;
    let running = start(history.passing("two").service(SubscriptionConfig::default()), &bus).await;
    let told = async { while !matches!(events.next().await, Some(BusEvent::Role { .. })) {} };
    within("its role is told", told).await;
    assert!(matches!(running.health(), Health::Up), "standing by is no failure");
    running.drain(Duration::from_secs(10)).await;
    let two = Instance::of(&env, &history.passing("two"), SubscriptionConfig::default()).await;
    let (active, stand_by) = ranked(one, two).await;
    bus.publish_all(&orders("ada", 10)).await.unwrap();
    history.settled(10).await;
    assert_eq!((history.keys_of(active.who()), history.keys_of(stand_by.who())), (1, 0));
    active.drain().await;
    stand_by.drain().await;
}
