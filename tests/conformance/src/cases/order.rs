//! Promise 5: order per key, across workers, instances and faults.

use super::cases;
use crate::env::{Env, drain, eventually, start, within};
use crate::events::{Invoice, ORDERS, Order, order, orders, publishing, rounds};
use crate::history::{Act, History};
use crate::instance::{Instance, ranked, shared};
use crate::reader::{open, provision, publish, spec, topics};
use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tidings::handler::{Delivered, State};
use tidings_core::{RetryPolicy, Service, SubscriptionConfig};
use tokio::time::Instant;

cases!("order":
    a_key_keeps_its_order_with_one_worker [KeyOrdering],
    a_key_keeps_its_order_with_sixteen_workers [KeyOrdering],
    other_keys_go_on_while_one_is_busy [KeyOrdering],
    keys_that_differ_only_slightly_are_different [KeyOrdering],
    a_key_on_two_topics_is_two_lanes [KeyOrdering],
    nothing_of_its_key_overtakes_a_retry_in_order [KeyOrdering],
    others_of_its_key_pass_a_retry_aside [KeyOrdering],
    what_is_given_back_for_later_holds_its_key_alone [KeyOrdering],
    order_is_kept_across_a_drain [KeyOrdering],
    order_is_kept_across_a_crash [KeyOrdering],
    a_stand_by_takes_over_in_order [KeyOrdering],
    each_key_has_one_owner_among_the_slots [Slots],
    order_is_kept_while_an_instance_joins [Slots],
    order_is_kept_while_an_instance_drains [Slots],
    order_is_kept_while_an_instance_dies [Slots],
    order_is_kept_through_a_cut [KeyOrdering, Cut],
    order_is_kept_through_a_restart_of_the_broker [KeyOrdering, Durable, Restart],
);

fn config() -> SubscriptionConfig {
    SubscriptionConfig::default()
}

/// Many attempts, soon one after the other: until something else has happened.
fn patient() -> RetryPolicy {
    let often = Duration::from_millis(100);
    RetryPolicy::default().attempts(200).backoff(often, often).without_jitter()
}

async fn a_key_keeps_its_order_with_one_worker(env: Env) {
    in_order(&env, 1).await;
}

async fn a_key_keeps_its_order_with_sixteen_workers(env: Env) {
    in_order(&env, 16).await;
}

async fn in_order(env: &Env, workers: usize) {
    let history = History::ordered();
    let desk = history.desk("one", 1, |order, _| Act::After(Duration::from_millis(order.number % 3)));
    let running = start(desk.service(config().concurrency(workers)), &env.bus()).await;
    env.bus().publish_all(&rounds(10, 0..30)).await.unwrap();
    history.settled(300).await;
    drain(running).await;
    history.check();
}

async fn other_keys_go_on_while_one_is_busy(env: Env) {
    let history = History::ordered();
    let desk = history.desk("one", 1, |order, _| if order.customer == "ada" { Act::Hang } else { Act::Pass });
    let running = start(desk.service(config()), &env.bus()).await;
    env.bus().publish_all(&[orders("ada", 5), orders("bob", 20)].concat()).await.unwrap();
    history.settled(20).await;
    assert_eq!((history.begun("ada"), history.passed("bob").len()), (vec![0], 20));
    desk.bury();
    running.drain(Duration::ZERO).await;
}

async fn keys_that_differ_only_slightly_are_different(env: Env) {
    let others = ["Ada", "ada ", " ada", "adA", "a.da", "a-da", "ada.", "аda", "ada%20", "ada\u{301}", "0", "00"];
    let history = History::ordered();
    let desk = history.desk("one", 1, |order, _| if order.customer == "ada" { Act::Hang } else { Act::Pass });
    let running = start(desk.service(config()), &env.bus()).await;
    let of = |other: &&str| orders(other, 3);
    env.bus().publish_all(&[orders("ada", 1), others.iter().flat_map(of).collect()].concat()).await.unwrap();
    history.settled(others.len() * 3).await;
    assert_eq!(history.begun("ada"), [0], "it is busy meanwhile");
    desk.bury();
    running.drain(Duration::ZERO).await;
}

async fn a_key_on_two_topics_is_two_lanes(env: Env) {
    let history = History::ordered();
    let config = SubscriptionConfig::named("both").topics([ORDERS, "suite.invoice.created"]);
    topics(env.transport(), &[ORDERS, "suite.invoice.created"]).await;
    let service = Service::new("billing").state(history.clone());
    let service = service.on_with(config.clone(), async |_: Order| pending::<()>().await);
    let handler = async |invoice: Invoice, delivered: Delivered, State(history): State<History>| {
        let desk = history.passing("one");
        desk.run(&order(invoice.customer, invoice.number), &delivered).await
    };
    let running = start(service.on_with(config, handler), &env.bus()).await;
    env.bus().publish(&order("ada", 0)).await.unwrap();
    let invoice = |number| Invoice { customer: "ada".into(), number };
    env.bus().publish_all(&(0..3).map(invoice).collect::<Vec<_>>()).await.unwrap();
    history.settled(3).await;
    running.drain(Duration::ZERO).await;
}

/// One event of `ada` fails until `bob` is through, and holds what comes after it.
async fn nothing_of_its_key_overtakes_a_retry_in_order(env: Env) {
    let (history, go) = (History::ordered(), Arc::new(AtomicBool::new(false)));
    let going = Arc::clone(&go);
    let fails = move |order: &Order| order.customer == "ada" && order.number == 1 && !going.load(SeqCst);
    let desk = history.desk("one", 200, move |order, _| if fails(order) { Act::Fail } else { Act::Pass });
    let running = start(desk.service(config().retry(patient().in_order())), &env.bus()).await;
    env.bus().publish_all(&[orders("ada", 5), orders("bob", 10)].concat()).await.unwrap();
    eventually("bob is through", || async { history.passed("bob").len() == 10 }).await;
    eventually("some retries", || async { history.repeats() > 2 }).await;
    assert_eq!(history.passed("ada"), [0]);
    go.store(true, SeqCst);
    history.settled(15).await;
    assert_eq!(history.passed("ada"), [0, 1, 2, 3, 4]);
    drain(running).await;
}

async fn others_of_its_key_pass_a_retry_aside(env: Env) {
    let (history, go) = (History::unordered(), Arc::new(AtomicBool::new(false)));
    let going = Arc::clone(&go);
    let fails = move |order: &Order| order.number == 0 && !going.load(SeqCst);
    let desk = history.desk("one", 200, move |order, _| if fails(order) { Act::Fail } else { Act::Pass });
    let running = start(desk.service(config().retry(patient().aside())), &env.bus()).await;
    env.bus().publish_all(&orders("ada", 5)).await.unwrap();
    history.settled(4).await;
    go.store(true, SeqCst);
    history.settled(5).await;
    assert_eq!(history.passed("ada"), [1, 2, 3, 4, 0]);
    drain(running).await;
}

async fn what_is_given_back_for_later_holds_its_key_alone(env: Env) {
    topics(env.transport(), &[ORDERS]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[ORDERS])).await;
    publish(env.transport(), ORDERS, "ada", &["1"]).await;
    let (released, delay) = (Instant::now(), Duration::from_millis(1500));
    reader.expect("1").await.acker.release(delay);
    publish(env.transport(), ORDERS, "ada", &["2"]).await;
    publish(env.transport(), ORDERS, "bob", &["3"]).await;
    reader.expect("3").await.acker.ack();
    let again = reader.expect("1").await;
    assert!(released.elapsed() >= delay, "it came after {:?}", released.elapsed());
    assert!(again.redelivered);
    again.acker.ack();
    reader.expect("2").await.acker.ack();
}

async fn order_is_kept_across_a_drain(env: Env) {
    let history = History::ordered();
    let one = Instance::of(&env, &history.passing("one"), config()).await;
    let published = publishing(&env.bus(), rounds(8, 0..40));
    history.settled(50).await;
    one.drain().await;
    let two = Instance::of(&env, &history.passing("two"), config()).await;
    within("the publishes", published).await.unwrap();
    history.settled(320).await;
    two.drain().await;
    history.check();
}

/// Every key is in hand when the instance dies, and more of it waits there.
async fn order_is_kept_across_a_crash(env: Env) {
    let history = History::ordered();
    let hangs = history.desk("one", 1, |order, _| if order.number < 5 { Act::Pass } else { Act::Hang });
    hangs.service(config()).provision(&env.bus()).await.unwrap();
    env.bus().publish_all(&rounds(8, 0..30)).await.unwrap();
    let one = Instance::of(&env, &hangs, config()).await;
    history.running("one", 8).await;
    one.die().await;
    let two = Instance::of(&env, &history.passing("two"), config()).await;
    history.settled(240).await;
    two.drain().await;
    history.check();
}

async fn a_stand_by_takes_over_in_order(env: Env) {
    let (history, go) = (History::ordered(), Arc::new(AtomicBool::new(false)));
    let desk = |who| {
        let going = Arc::clone(&go);
        let plan = move |o: &Order, _| if o.number < 5 || going.load(SeqCst) { Act::Pass } else { Act::Hang };
        history.desk(who, 1, plan)
    };
    let one = Instance::of(&env, &desk("one"), config()).await;
    let two = Instance::of(&env, &desk("two"), config()).await;
    let (active, stand_by) = ranked(one, two).await;
    env.bus().publish_all(&rounds(8, 0..20)).await.unwrap();
    history.running(active.who(), 8).await;
    assert_eq!(history.keys_of(stand_by.who()), 0, "it stands by");
    go.store(true, SeqCst);
    active.die().await;
    history.settled(160).await;
    stand_by.drain().await;
    history.check();
}

/// Two instances that share four slots of the topic.
async fn sharing(env: &Env, history: &History, one: crate::history::Desk) -> (Instance, Instance) {
    provision(env.transport(), ORDERS, |topic| topic.slots = 4).await;
    let one = Instance::of(env, &one, config()).await;
    let two = Instance::of(env, &history.passing("two"), config()).await;
    shared(&one, &two, 4).await;
    (one, two)
}

async fn each_key_has_one_owner_among_the_slots(env: Env) {
    let history = History::ordered();
    let (one, two) = sharing(&env, &history, history.passing("one")).await;
    env.bus().publish_all(&rounds(40, 0..10)).await.unwrap();
    history.settled(400).await;
    assert!(history.owners().iter().all(|owners| owners.len() == 1), "{:?}", history.owners());
    assert!(history.keys_of("one") > 0 && history.keys_of("two") > 0, "both take part");
    one.drain().await;
    two.drain().await;
    history.check();
}

async fn order_is_kept_while_an_instance_joins(env: Env) {
    provision(env.transport(), ORDERS, |topic| topic.slots = 4).await;
    let history = History::ordered();
    let slow = history.desk("one", 1, |_, _| Act::After(Duration::from_millis(2)));
    let one = Instance::of(&env, &slow, config()).await;
    let published = publishing(&env.bus(), rounds(40, 0..15));
    history.settled(100).await;
    let two = Instance::of(&env, &history.passing("two"), config()).await;
    within("the publishes", published).await.unwrap();
    shared(&one, &two, 4).await;
    env.bus().publish_all(&rounds(40, 15..20)).await.unwrap();
    history.settled(800).await;
    assert!(history.keys_of("two") > 0, "it takes part");
    one.drain().await;
    two.drain().await;
    history.check();
}

async fn order_is_kept_while_an_instance_drains(env: Env) {
    let history = History::ordered();
    let slow = history.desk("one", 1, |_, _| Act::After(Duration::from_millis(2)));
    let (one, two) = sharing(&env, &history, slow).await;
    let published = publishing(&env.bus(), rounds(40, 0..20));
    history.settled(200).await;
    one.drain().await;
    within("the publishes", published).await.unwrap();
    history.settled(800).await;
    two.drain().await;
    history.check();
}

async fn order_is_kept_while_an_instance_dies(env: Env) {
    let history = History::ordered();
    let hangs = history.desk("one", 1, |order, _| if order.number < 5 { Act::Pass } else { Act::Hang });
    let (one, two) = sharing(&env, &history, hangs).await;
    let published = publishing(&env.bus(), rounds(40, 0..20));
    history.running("one", 8).await;
    one.die().await;
    within("the publishes", published).await.unwrap();
    history.settled(800).await;
    two.drain().await;
    history.check();
}

async fn order_is_kept_through_a_cut(env: Env) {
    through(&env, async { env.cut().await }).await;
}

async fn order_is_kept_through_a_restart_of_the_broker(env: Env) {
    through(&env, async { env.restart().await }).await;
}

/// Publishes and handles while the fault happens.
async fn through(env: &Env, fault: impl Future<Output = ()>) {
    let history = History::ordered();
    let desk = history.desk("one", 1, |_, _| Act::After(Duration::from_millis(2)));
    let running = start(desk.service(config()), &env.bus()).await;
    let published = publishing(&env.bus(), rounds(8, 0..50));
    history.settled(50).await;
    fault.await;
    within("the publishes", published).await.unwrap();
    history.settled(400).await;
    drain(running).await;
    history.check();
}
