//! Promises 4 and 15: nothing vanishes silently, and an outage is not a poison.

use super::cases;
use crate::env::{Env, dead_letters, drain, eventually, start, subscription, total, until, within};
use crate::events::{Order, Viewed, order};
use crate::reader::{assert_same, full, open, publish, publish_messages, saying, spec, submit, topics};
use crate::services::{CRM_ORDERS, Gate, Runs, settings, soon};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tidings::handler::{Delivered, State};
use tidings_core::transport::{DeadLetter, Destination, Transport};
use tidings_core::{
    Bus, BusConfig, DeadLetterReason, HandlerError, Headers, Message, OutagePolicy, RawMessage, RetryPolicy, Running,
    Service, SubscriptionConfig, Unrouted, from_rfc3339, header,
};
use tokio::time::{Instant, sleep};

cases!("dead_letter":
    after_the_last_attempt_it_is_dead_lettered_once,
    a_dead_letter_is_the_original_and_tells_why,
    what_no_run_can_help_is_dead_lettered_at_once,
    what_is_unrouted_is_dead_lettered_on_request_alone,
    what_is_dead_lettered_has_left_its_subscription,
    two_subscriptions_bury_one_event_each,
    dead_letters_are_counted_paged_and_removed,
    dead_letters_outlive_their_connection,
    dead_letters_outlive_a_cut [Cut],
    dead_letters_outlive_a_restart_of_the_broker [Durable, Restart],
    a_redriven_event_reaches_its_subscription_alone_and_says_so,
    what_fails_after_a_redrive_is_dead_lettered_again,
    all_can_be_redriven_at_once,
    a_cut_while_dead_lettering_loses_nothing [Cut],
    a_poison_holds_no_other_up,
    an_outage_leaves_no_dead_letters,
);

const ORDERS: &str = "suite.order.placed";
const VIEWS: &str = "suite.page.viewed";

/// Rejects every order until the gate is open.
async fn handle(order: Order, told: Delivered, gate: State<Gate>, runs: State<Runs>) -> Result<(), HandlerError> {
    runs.0.push((order.number, told.attempt, told.possible_duplicate));
    if gate.0.is_open() { Ok(()) } else { Err(HandlerError::reject("no such customer")) }
}

/// A service that rejects every order until its gate is open.
async fn rejecting(env: &Env, bus: &Bus, name: &str) -> (Running, Gate, Runs) {
    let (gate, runs) = (Gate::closed(), Runs::default());
    let service = Service::new(name).state(gate.clone()).state(runs.clone()).on_with(settings(env), handle);
    (start(service, bus).await, gate, runs)
}

/// Waits until there are as many dead letters of the service `crm` to orders; then there are no more than these.
async fn buried(env: &Env, count: usize) -> Vec<DeadLetter> {
    dead_letters(env.transport(), CRM_ORDERS, count).await
}

fn reason(message: &Message) -> Option<DeadLetterReason> {
    message.headers.get_str(header::REASON).and_then(DeadLetterReason::from_name)
}

/// In the lane and aside: three runs, one dead letter, and nothing left.
async fn after_the_last_attempt_it_is_dead_lettered_once(env: Env) {
    for (name, policy) in [("a", soon(3).in_order()), ("b", soon(3).aside())] {
        let (bus, runs) = (env.bus(), Runs::default());
        let handler = async |order: Order, told: Delivered, State(runs): State<Runs>| -> Result<(), HandlerError> {
            runs.push((order.number, told.attempt, told.possible_duplicate));
            if order.number == 1 { Err("the bank is closed".into()) } else { Ok(()) }
        };
        let service = Service::new(name).state(runs.clone()).on_with(settings(&env).retry(policy), handler);
        let running = start(service, &bus).await;
        bus.publish(&order("ada", 1)).await.unwrap();
        until(&running, "it is dead-lettered", |stats| stats.dead_lettered, 1).await;
        bus.publish(&order("ada", 2)).await.unwrap();
        until(&running, "the next is handled", |stats| stats.handled, 1).await;
        assert_eq!(runs.all(), [(1, 1, false), (1, 2, false), (1, 3, false), (2, 1, false)], "{name}");
        let letter = dead_letters(env.transport(), &format!("{name}.{ORDERS}"), 1).await.remove(0).message;
        assert_eq!(reason(&letter), Some(DeadLetterReason::Exhausted));
        assert_eq!(letter.headers.get_str(header::ATTEMPTS), Some("3"));
        drain(running).await;
    }
}

async fn a_dead_letter_is_the_original_and_tells_why(env: Env) {
    let handler = async |_: RawMessage| -> Result<(), HandlerError> { Err(HandlerError::reject("no\r\nway")) };
    let config = SubscriptionConfig::named("all").topics(["suite.raw"]);
    let running = start(Service::new("crm").on_with(config, handler), &env.bus()).await;
    let (sent, before) = (full("suite.raw"), env.now());
    publish_messages(env.transport(), std::slice::from_ref(&sent)).await;
    let mut letter = dead_letters(env.transport(), "crm.all", 1).await.remove(0).message;
    let told = std::mem::replace(&mut letter.headers, Headers::new());
    let (theirs, ours): (Vec<_>, Vec<_>) = told.iter().partition(|(name, _)| !name.starts_with("tidings-"));
    theirs.into_iter().for_each(|(name, value)| letter.headers.append_unchecked(name.clone(), value.clone()));
    assert_same(&letter, &sent);
    let ours: BTreeMap<_, _> =
        ours.iter().map(|(name, value)| (name.as_str(), str::from_utf8(value).unwrap())).collect();
    assert_eq!((ours[header::REASON], ours[header::ERROR], ours[header::ATTEMPTS]), ("rejected", "no  way", "1"));
    assert_eq!((ours[header::SUBSCRIPTION], ours[header::ORIGIN]), ("crm.all", "suite.raw"));
    let times = [header::FIRST_FAILURE, header::TIME].map(|name| from_rfc3339(ours[name]).unwrap());
    let allowed = before - Duration::from_secs(1)..=env.now() + Duration::from_secs(1);
    assert!(times[0] <= times[1] && times.iter().all(|time| allowed.contains(time)), "{times:?}");
    drain(running).await;
}

/// What cannot be read, and what is too large: without a run; and what the handler rejects: after one.
async fn what_no_run_can_help_is_dead_lettered_at_once(env: Env) {
    let bus = env.bus_with(env.connect().await, BusConfig { max_payload: 1_000, ..BusConfig::default() });
    let (running, _, runs) = rejecting(&env, &bus, "crm").await;
    let json = |payload: &str, version| {
        let mut message = saying(ORDERS, "ada", payload);
        (message.event_type, message.content_type) = (ORDERS.into(), "application/json".into());
        message.version = version;
        message
    };
    let mut unknown = json("{}", 1);
    unknown.content_type = "application/x-nobody-reads-this".into();
    let large = format!(r#"{{"customer":"{}","number":1}}"#, "x".repeat(2_000));
    let sent = [
        (json("{", 1), DeadLetterReason::Undecodable),
        (unknown, DeadLetterReason::Undecodable),
        (json("", 1), DeadLetterReason::Undecodable),
        (json(r#"{"who":"ada"}"#, 2), DeadLetterReason::NewerVersion),
        (json(&large, 1), DeadLetterReason::TooLarge),
        (json(r#"{"customer":"ada","number":7}"#, 2), DeadLetterReason::Rejected),
    ];
    publish_messages(env.transport(), &sent.iter().map(|(message, _)| message.clone()).collect::<Vec<_>>()).await;
    for letter in buried(&env, sent.len()).await {
        let (original, expected) = sent.iter().find(|(message, _)| message.id == letter.message.id).unwrap();
        assert_eq!((reason(&letter.message), &letter.message.payload), (Some(*expected), &original.payload));
    }
    assert_eq!(runs.all(), [(7, 1, false)], "a newer version is tried, and nothing is tried twice");
    drain(running).await;
}

async fn what_is_unrouted_is_dead_lettered_on_request_alone(env: Env) {
    for (name, unrouted, letters) in [("a", Unrouted::Ack, 0), ("b", Unrouted::DeadLetter, 1)] {
        let (bus, runs) = (env.bus(), Runs::default());
        let handler = async |order: Order, State(runs): State<Runs>| runs.push((order.number, 0, false));
        let service = Service::new(name).state(runs.clone()).on_with(settings(&env).unrouted(unrouted), handler);
        let running = start(service, &bus).await;
        publish(env.transport(), ORDERS, "ada", &["of another type"]).await;
        bus.publish(&order("ada", 1)).await.unwrap();
        runs.count(1).await;
        let found = dead_letters(env.transport(), &format!("{name}.{ORDERS}"), letters).await;
        assert!(found.iter().all(|letter| reason(&letter.message) == Some(DeadLetterReason::Unrouted)), "{found:?}");
        drain(running).await;
        let other = env.connect().await;
        publish(&other, ORDERS, "ada", &["later"]).await;
        let mut reader = open(&other, spec(&env, &format!("{name}.{ORDERS}"), &[ORDERS])).await;
        reader.expect("later").await.acker.ack();
        reader.close().await;
    }
}

async fn what_is_dead_lettered_has_left_its_subscription(env: Env) {
    let bus = env.another_bus().await;
    let (running, _, runs) = rejecting(&env, &bus, "crm").await;
    bus.publish_all(&[order("ada", 1), order("ada", 2)]).await.unwrap();
    buried(&env, 2).await;
    let flushed = drain(running).await.flushed;
    assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (2, 0, 0));
    bus.close(Duration::from_secs(10)).await.unwrap();
    let (running, gate, again) = rejecting(&env, &env.bus(), "crm").await;
    gate.open();
    env.bus().publish(&order("ada", 3)).await.unwrap();
    assert_eq!((runs.all().len(), again.count(1).await), (2, vec![(3, 1, false)]));
    buried(&env, 2).await;
    drain(running).await;
}

/// A broker that takes them for one, by their id, loses one.
async fn two_subscriptions_bury_one_event_each(env: Env) {
    let bus = env.bus();
    let (one, ..) = rejecting(&env, &bus, "crm").await;
    let (two, ..) = rejecting(&env, &bus, "billing").await;
    let id = bus.publish(&order("ada", 1)).await.unwrap();
    for name in ["crm", "billing"] {
        let name = format!("{name}.{ORDERS}");
        let letter = dead_letters(env.transport(), &name, 1).await.remove(0).message;
        assert_eq!((&letter.id, letter.headers.get_str(header::SUBSCRIPTION)), (&id, Some(name.as_str())));
    }
    drain(one).await;
    drain(two).await;
}

/// Sends texts to the dead letters of a subscription that need not exist.
async fn bury(transport: &Arc<dyn Transport>, name: &str, count: u64) {
    topics(transport, &[ORDERS]).await;
    let to = || Destination::DeadLetter(subscription(name));
    let post = |n| (to(), saying(ORDERS, if n % 2 == 0 { "ada" } else { "" }, n), None, true);
    for part in (0..count).map(post).collect::<Vec<_>>().chunks(50) {
        let failures = submit(transport, part).await;
        assert!(failures.is_empty(), "{failures:?}");
    }
}

/// Looking at them changes nothing.
async fn dead_letters_are_counted_paged_and_removed(env: Env) {
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    let letters = env.transport().dead_letters(&subscription("crm")).await.unwrap();
    assert_eq!((letters.count().await.unwrap(), letters.last().await.unwrap()), (0, None));
    assert_eq!((letters.page(None, 10).await.unwrap(), letters.remove(&[1, 2]).await.unwrap()), (vec![], 0));
    bury(env.transport(), "crm", 70).await;
    let all = dead_letters(env.transport(), "crm", 70).await;
    assert!(all.is_sorted_by(|a, b| a.position < b.position), "the oldest first");
    assert!(all.iter().zip(0..).all(|(letter, n)| letter.message.payload == n.to_string()), "as they were sent");
    assert_eq!(letters.last().await.unwrap(), Some(all[69].position));
    let mut paged = Vec::new();
    while let page @ [_, ..] = &letters.page(paged.last().map(|l: &DeadLetter| l.position), 30).await.unwrap()[..] {
        assert!(page.len() <= 30 && paged.len() < 70, "a page begins after the one before");
        paged.extend_from_slice(page);
    }
    assert_eq!(paged, all);
    let some = [all[0].position, all[35].position, all[69].position];
    assert_eq!((letters.remove(&some).await.unwrap(), letters.remove(&some).await.unwrap()), (3, 0));
    let rest: Vec<_> = all.iter().filter(|letter| !some.contains(&letter.position)).cloned().collect();
    assert_eq!(letters.page(None, 100).await.unwrap(), rest);
    let (count, last) = (letters.count().await.unwrap(), letters.last().await.unwrap());
    assert_eq!((count, last), (67, Some(all[68].position)));
    assert_eq!(letters.page(Some(all[34].position), 1).await.unwrap(), [all[36].clone()]);
}

async fn dead_letters_outlive_their_connection(env: Env) {
    let one = env.connect().await;
    drop(open(&one, spec(&env, "crm", &[ORDERS])).await);
    bury(&one, "crm", 3).await;
    let before = dead_letters(&one, "crm", 3).await;
    one.close(Instant::now() + Duration::from_secs(10)).await.unwrap();
    assert_eq!(dead_letters(&env.connect().await, "crm", 3).await, before);
}

async fn dead_letters_outlive_a_cut(env: Env) {
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    bury(env.transport(), "crm", 3).await;
    let letters = env.transport().dead_letters(&subscription("crm")).await.unwrap();
    let before = letters.page(None, 10).await.unwrap();
    env.cut().await;
    let mut after = within("an answer", letters.page(None, 10)).await;
    // Until the connection is repaired, it may say so.
    while after.as_ref().is_err_and(tidings_core::Error::is_transient) {
        after = within("an answer", letters.page(None, 10)).await;
    }
    assert_eq!((after.unwrap(), before.len()), (before, 3));
    assert_eq!(env.bus().dead_letters("crm").await.unwrap().redrive_all().await.unwrap(), 3);
}

async fn dead_letters_outlive_a_restart_of_the_broker(env: Env) {
    drop(open(env.transport(), spec(&env, "crm", &[ORDERS])).await);
    bury(env.transport(), "crm", 3).await;
    let before = dead_letters(env.transport(), "crm", 3).await;
    env.restart().await;
    assert_eq!(dead_letters(&env.connect().await, "crm", 3).await, before);
}

/// With its attempts anew; an instance that has never seen it knows that it may be a duplicate.
async fn a_redriven_event_reaches_its_subscription_alone_and_says_so(env: Env) {
    let bus = env.bus();
    let (one, ..) = rejecting(&env, &bus, "crm").await;
    let (two, open, others) = rejecting(&env, &bus, "billing").await;
    open.open();
    bus.publish(&order("ada", 1)).await.unwrap();
    let position = buried(&env, 1).await[0].position;
    drain(one).await;
    let (one, gate, runs) = rejecting(&env, &bus, "crm").await;
    gate.open();
    let letters = bus.dead_letters(CRM_ORDERS).await.unwrap();
    assert_eq!(&letters.show(position).await.unwrap().payload[..], br#"{"customer":"ada","number":1}"#);
    letters.redrive(position).await.unwrap();
    assert_eq!(runs.count(1).await, [(1, 1, true)]);
    assert_eq!(letters.count().await.unwrap(), 0);
    // What comes later, with the same key, shows that the other was sent nothing.
    bus.publish(&order("ada", 2)).await.unwrap();
    assert_eq!(others.count(2).await, [(1, 1, false), (2, 1, false)]);
    assert_eq!(runs.count(2).await[1], (2, 1, false));
    drain(one).await;
    drain(two).await;
}

/// Again and again: a broker that takes the second for the first, by its id, loses it.
async fn what_fails_after_a_redrive_is_dead_lettered_again(env: Env) {
    let bus = env.bus();
    let (running, gate, runs) = rejecting(&env, &bus, "crm").await;
    let id = bus.publish(&order("ada", 1)).await.unwrap();
    for round in 1..4 {
        let letters = bus.dead_letters(CRM_ORDERS).await.unwrap();
        eventually("it is dead-lettered", || async {
            runs.all().len() == round && letters.count().await.unwrap() == 1
        })
        .await;
        let letter = letters.list(None, 10).await.unwrap().remove(0);
        assert_eq!((&letter.id, letter.attempts, letter.redriven.is_some()), (&id, 1, round > 1));
        letters.redrive(letter.position).await.unwrap();
    }
    eventually("it is dead-lettered", || async { runs.all().len() == 4 }).await;
    buried(&env, 1).await;
    gate.open();
    assert_eq!(bus.dead_letters(CRM_ORDERS).await.unwrap().redrive_all().await.unwrap(), 1);
    let expected = [(1, 1, false), (1, 1, true), (1, 1, true), (1, 1, true), (1, 1, true)];
    assert_eq!(runs.count(5).await, expected);
    drain(running).await;
}

async fn all_can_be_redriven_at_once(env: Env) {
    let bus = env.bus();
    let (running, gate, runs) = rejecting(&env, &bus, "crm").await;
    bus.publish_all(&(0..100).map(|number| order(format!("c{number}"), number)).collect::<Vec<_>>()).await.unwrap();
    buried(&env, 100).await;
    gate.open();
    let letters = bus.dead_letters(CRM_ORDERS).await.unwrap();
    assert_eq!((letters.redrive_all().await.unwrap(), letters.count().await.unwrap()), (100, 0));
    let mut redriven = runs.count(200).await.split_off(100);
    redriven.sort_unstable();
    assert_eq!(redriven, (0..100).map(|number| (number, 1, true)).collect::<Vec<_>>());
    drain(running).await;
}

/// Nor makes more of it than marked: a dead letter beyond the first stems from a marked run or is a marked repeat.
async fn a_cut_while_dead_lettering_loses_nothing(env: Env) {
    let runs = Runs::default();
    let handler = async |order: Order, told: Delivered, State(runs): State<Runs>| -> Result<(), HandlerError> {
        runs.push((order.number, told.attempt, told.possible_duplicate));
        sleep(Duration::from_millis(10)).await;
        Err(HandlerError::reject("no such customer"))
    };
    let service = Service::new("crm").state(runs.clone()).on_with(settings(&env).concurrency(2), handler);
    let running = start(service, &env.another_bus().await).await;
    env.bus().publish_all(&(0..60).map(|n| order(format!("c{}", n % 7), n)).collect::<Vec<_>>()).await.unwrap();
    for so_far in [5, 20, 40] {
        runs.count(so_far).await;
        env.cut().await;
    }
    let letters = env.connect().await.dead_letters(&subscription(CRM_ORDERS)).await.unwrap();
    let found = async || {
        let mut found: BTreeMap<Bytes, Vec<bool>> = BTreeMap::new();
        for DeadLetter { message, .. } in letters.page(None, 1_000).await.unwrap_or_default() {
            found.entry(message.payload).or_default().push(message.headers.get(header::REPEAT).is_some());
        }
        found
    };
    eventually("each is a dead letter", || async { found().await.len() == 60 }).await;
    let found = found().await;
    for (payload, repeats) in found {
        let marked = runs.all().iter().filter(|run| run.2 && payload == json(run.0)).count();
        let allowed = 1 + marked + repeats.iter().filter(|repeat| **repeat).count();
        assert!(repeats.len() <= allowed, "{} dead letters, {marked} marked runs", repeats.len());
    }
    drain(running).await;
}

fn json(number: u64) -> Vec<u8> {
    format!(r#"{{"customer":"c{}","number":{number}}}"#, number % 7).into_bytes()
}

/// It waits for its next run, or is dead-lettered, and the others go on.
async fn a_poison_holds_no_other_up(env: Env) {
    let (bus, runs) = (env.bus(), Runs::default());
    let handler = async |order: Order, told: Delivered, State(runs): State<Runs>| {
        runs.push((order.number, told.attempt, told.possible_duplicate));
        match order.customer.as_str() {
            "poison" => Err(HandlerError::retry_after(Duration::from_secs(10), "never")),
            _ => Ok(()),
        }
    };
    let config = settings(&env).retry(RetryPolicy::default().attempts(2));
    let running = start(Service::new("crm").state(runs.clone()).on_with(config, handler), &bus).await;
    bus.publish(&order("poison", 1_000)).await.unwrap();
    runs.count(1).await;
    let others: Vec<_> = (0..50).map(|number| order(format!("c{}", number % 5), number)).collect();
    bus.publish_all(&others).await.unwrap();
    let seen = runs.count(52).await;
    assert_eq!((seen[0], seen[51]), ((1_000, 1, false), (1_000, 2, false)), "all others between its two runs");
    assert_eq!(reason(&buried(&env, 1).await[0].message), Some(DeadLetterReason::Exhausted));
    drain(running).await;
}

/// In the lane and aside; and it is over soon.
async fn an_outage_leaves_no_dead_letters(env: Env) {
    for (name, policy) in [("a", soon(3).in_order()), ("b", soon(3).aside())] {
        let (bus, gate, runs) = (env.bus(), Gate::closed(), Runs::default());
        let handler =
            async |view: Viewed, told: Delivered, gate: State<Gate>, runs: State<Runs>| -> Result<(), HandlerError> {
                runs.0.push((view.page, told.attempt, told.possible_duplicate));
                if gate.0.is_open() { Ok(()) } else { Err("the database is down".into()) }
            };
        let config = settings(&env).retry(policy).outage(OutagePolicy::default());
        let service = Service::new(name).state(gate.clone()).state(runs.clone()).on_with(config, handler);
        let running = start(service, &bus).await;
        bus.publish_all(&(0..30).map(|page| Viewed { page }).collect::<Vec<_>>()).await.unwrap();
        until(&running, "an outage", |stats| stats.outage.into(), 1).await;
        let (before, probes) = (runs.all().len(), 3);
        runs.count(before + probes).await;
        assert_eq!(total(&running, |stats| stats.handled), 0);
        gate.open();
        until(&running, "all are handled", |stats| stats.handled, 30).await;
        dead_letters(env.transport(), &format!("{name}.{VIEWS}"), 0).await;
        drain(running).await;
    }
}
