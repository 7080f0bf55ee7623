//! The promises together: retries, batches, order, dead letters, drains and crashes at once.

use super::cases;
use crate::env::{Env, Seen, dead_letters, drain, eventually, start, subscription, total, within};
use crate::events::{Invoice, ORDERS, Order, orders, publishing, rounds};
use crate::history::{Act, History};
use crate::instance::Instance;
use crate::reader::{provision, saying, submit};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tidings::Event;
use tidings::handler::{Delivered, Each, Metadata, State};
use tidings_core::transport::{DeadLetter, Destination};
use tidings_core::{Batch, HandlerError, MessageId, RetryPolicy, Service, SubscriptionConfig, header};
use tokio::time::Instant;

cases!("composition":
    a_batch_that_fails_in_the_middle_keeps_the_order_and_dead_letters_one [KeyOrdering],
    a_batch_in_a_dying_instance_comes_again_in_order [KeyOrdering],
    a_drain_in_the_middle_of_a_retry_keeps_the_order [KeyOrdering],
    a_retry_aside_goes_on_in_the_next_instance_where_it_was,
    a_redriven_dead_letter_disturbs_no_later_event [KeyOrdering],
    a_chain_survives_a_crash_in_the_middle_with_the_same_ids [KeyOrdering],
    what_comes_of_a_possible_duplicate_is_one,
    a_subscription_that_fails_touches_no_other [KeyOrdering],
    all_at_once_loses_and_reorders_nothing [KeyOrdering],
);

const BILLING: &str = "billing.suite.order.placed";

fn config() -> SubscriptionConfig {
    SubscriptionConfig::default()
}

fn retry(attempts: u32, delay_ms: u64) -> RetryPolicy {
    let delay = Duration::from_millis(delay_ms);
    RetryPolicy::default().attempts(attempts).backoff(delay, delay).without_jitter()
}

fn bill(order: Order) -> Result<Invoice, HandlerError> {
    match order.number {
        3 => Err("not now".into()),
        7 => Err(HandlerError::reject("never")),
        number => Ok(Invoice { customer: order.customer, number }),
    }
}

/// The orders that these dead letters carry.
fn carried(letters: Vec<DeadLetter>) -> impl Iterator<Item = (String, u64)> {
    letters.into_iter().map(|DeadLetter { message, .. }| {
        let order = Order::decode(&message.content_type, message.version, &message.payload).expect("an order");
        (order.customer, order.number)
    })
}

/// Order 3 fails each time, order 7 is rejected, of the others come invoices: what is behind a failure is handled again.
async fn a_batch_that_fails_in_the_middle_keeps_the_order_and_dead_letters_one(env: Env) {
    let (bus, invoices) = (env.bus(), Seen::<u64>::default());
    let crm = Service::new("crm").state(invoices.clone());
    let crm = crm.on(async |invoice: Invoice, State(seen): State<Seen<u64>>| seen.push(invoice.number));
    let config = config().batch(5).linger(Duration::from_millis(20)).retry(retry(3, 20).in_order());
    let handler = async |Batch(orders): Batch<Order>| Each(orders.into_iter().map(bill).collect());
    let (crm, billing) = (start(crm, &bus).await, start(Service::new("billing").on_with(config, handler), &bus).await);
    bus.publish_all(&orders("ada", 12)).await.unwrap();
    assert_eq!(invoices.count(10).await, [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]);
    let letters = dead_letters(env.transport(), BILLING, 2).await;
    assert_eq!(carried(letters).map(|(_, number)| number).collect::<Vec<_>>(), [3, 7]);
    drain(billing).await;
    drain(crm).await;
}

async fn a_batch_in_a_dying_instance_comes_again_in_order(env: Env) {
    let (seen, hangs) = (Seen::<u64>::default(), Arc::new(AtomicBool::new(true)));
    type States = (Seen<u64>, Arc<AtomicBool>);
    let handler = async |Batch(orders): Batch<Order>, State((seen, hangs)): State<States>| {
        if hangs.load(SeqCst) && orders.iter().any(|order| order.number >= 5) {
            pending::<()>().await;
        }
        orders.iter().for_each(|order| seen.push(order.number));
    };
    let service = || Service::new("billing").state((seen.clone(), hangs.clone())).on_with(config().batch(4), handler);
    service().provision(&env.bus()).await.unwrap();
    env.bus().publish_all(&orders("ada", 5)).await.unwrap();
    let one = Instance::start(&env, service()).await;
    seen.count(5).await;
    env.bus().publish_all(&orders("ada", 20)[5..]).await.unwrap();
    eventually("a batch hangs", || async { one.stats().await.running > 0 }).await;
    one.die().await;
    hangs.store(false, SeqCst);
    let two = Instance::start(&env, service()).await;
    seen.count(20).await;
    eventually("all of them", || async { seen.all().last() == Some(&19) }).await;
    two.drain().await;
    let mut first_runs = Vec::new();
    seen.all().into_iter().for_each(|number| {
        if !first_runs.contains(&number) {
            first_runs.push(number);
        }
    });
    assert_eq!(first_runs, (0..20).collect::<Vec<_>>(), "{:?}", seen.all());
}

/// The drain finds an event that waits for its next attempt, and others of its key behind it.
async fn a_drain_in_the_middle_of_a_retry_keeps_the_order(env: Env) {
    let history = History::ordered();
    let fails = |order: &Order, _| if order.number == 1 { Act::Fail } else { Act::Pass };
    let desk = history.desk("one", 5, fails);
    let running = start(desk.service(config().retry(retry(5, 5000).in_order())), &env.bus()).await;
    env.bus().publish_all(&rounds(4, 0..6)).await.unwrap();
    eventually("all four are held", || async { total(&running, |stats| stats.retried) == 4 }).await;
    let drained = drain(running).await;
    assert_eq!(drained.abandoned, 0);
    assert_eq!(history.count(), 4, "nothing overtook");
    let running = start(history.passing("two").service(config()), &env.bus()).await;
    history.settled(24).await;
    drain(running).await;
    history.check();
}

async fn a_retry_aside_goes_on_in_the_next_instance_where_it_was(env: Env) {
    let (history, attempts, delay) = (History::unordered(), Seen::<(u32, Instant)>::default(), 1500);
    let config = config().ordering(tidings_core::transport::Ordering::None).retry(retry(3, delay).aside());
    let failing = history.desk("one", 3, |order, _| if order.number == 0 { Act::Fail } else { Act::Pass });
    let one = Instance::of(&env, &failing, config.clone()).await;
    let published = Instant::now();
    env.bus().publish_all(&orders("ada", 3)).await.unwrap();
    history.settled(2).await;
    eventually("it stepped aside", || async { one.stats().await.retried == 1 }).await;
    one.drain().await;
    let noted = attempts.clone();
    let noting = history.desk("two", 3, move |order, attempt| {
        noted.push((attempt, Instant::now()));
        assert_eq!(order.number, 0, "the others were handled");
        if attempt == 2 { Act::Fail } else { Act::Pass }
    });
    let two = Instance::of(&env, &noting, config).await;
    history.settled(3).await;
    two.drain().await;
    let attempts = attempts.all();
    assert_eq!(attempts.iter().map(|(attempt, _)| *attempt).collect::<Vec<_>>(), [2, 3]);
    for ((_, at), delays) in attempts.iter().zip(1u32..) {
        assert!(*at - published >= Duration::from_millis(delay) * delays, "too early: {:?}", *at - published);
    }
    history.check();
}

async fn a_redriven_dead_letter_disturbs_no_later_event(env: Env) {
    let (history, bus, well) = (History::ordered(), env.bus(), Arc::new(AtomicBool::new(false)));
    let is_well = Arc::clone(&well);
    let plan = move |order: &Order, _| if order.number == 1 && !is_well.load(SeqCst) { Act::Reject } else { Act::Pass };
    let running = start(history.desk("one", 1, plan).service(config()), &bus).await;
    bus.publish_all(&orders("ada", 4)).await.unwrap();
    dead_letters(env.transport(), BILLING, 1).await;
    well.store(true, SeqCst);
    let published = publishing(&bus, orders("ada", 40)[4..].to_vec());
    let letters = bus.dead_letters(BILLING).await.unwrap();
    assert_eq!(within("it is redriven", letters.redrive_all()).await.unwrap(), 1);
    within("the publishes", published).await.unwrap();
    eventually("all have passed", || async { history.passed("ada").len() == 40 }).await;
    let mut passed = history.passed("ada");
    passed.retain(|number| *number != 1);
    assert_eq!(passed, (0..40).filter(|number| *number != 1).collect::<Vec<_>>(), "the others in order, each once");
    assert_eq!(letters.count().await.unwrap(), 0);
    drain(running).await;
    history.check();
}

/// What is sent for an [`Invoice`].
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "suite.parcel.sent", key = customer)]
struct Sent {
    customer: String,
    number: u64,
}

/// The last of the chain: customer, number, id, whether it is marked.
type Parcels = Seen<(String, u64, MessageId, bool)>;

async fn send(invoice: Invoice, State(hangs): State<Arc<AtomicBool>>) -> Sent {
    if invoice.number >= 5 && hangs.load(SeqCst) {
        pending::<()>().await;
    }
    Sent { customer: invoice.customer, number: invoice.number }
}

async fn receive(sent: Sent, Metadata(message): Metadata, delivered: Delivered, State(parcels): State<Parcels>) {
    parcels.push((sent.customer, sent.number, message.id, delivered.possible_duplicate));
}

async fn a_chain_survives_a_crash_in_the_middle_with_the_same_ids(env: Env) {
    let (parcels, hangs) = (Parcels::default(), Arc::new(AtomicBool::new(true)));
    let billing = async |order: Order| Invoice { customer: order.customer, number: order.number };
    let shipping = || Service::new("shipping").state(Arc::clone(&hangs)).on(send);
    let homes = start(Service::new("homes").state(parcels.clone()).on(receive), &env.bus()).await;
    let middle = Instance::start(&env, shipping()).await;
    let billing = start(Service::new("billing").on(billing), &env.bus()).await;
    let published = publishing(&env.bus(), rounds(8, 0..20));
    eventually("all hang", || async { middle.stats().await.running == 8 }).await;
    middle.die().await;
    hangs.store(false, SeqCst);
    let middle = Instance::start(&env, shipping()).await;
    within("the publishes", published).await.unwrap();
    let distinct = || parcels.all().into_iter().map(|parcel| parcel.2).collect::<BTreeSet<_>>().len();
    eventually("all parcels", || async { distinct() >= 160 }).await;
    for running in [billing, homes] {
        drain(running).await;
    }
    middle.drain().await;
    arrived(&parcels.all());
}

/// Each in order, and only with a mark again, under the same id.
fn arrived(parcels: &[(String, u64, MessageId, bool)]) {
    let mut lanes = BTreeMap::<&str, Vec<&MessageId>>::new();
    for (customer, number, id, marked) in parcels {
        let lane = lanes.entry(customer).or_default();
        match lane.get(*number as usize) {
            None => assert_eq!(lane.len() as u64, *number, "{customer} {number} overtook"),
            Some(first) => assert!(*first == id && *marked, "{customer} {number} came again, marked: {marked}"),
        }
        if lane.len() as u64 == *number {
            lane.push(id);
        }
    }
    assert!(lanes.values().all(|lane| lane.len() == 20) && lanes.len() == 8, "{:?}", lanes.len());
}

/// Who receives it may never have seen the first.
async fn what_comes_of_a_possible_duplicate_is_one(env: Env) {
    let (bus, invoices) = (env.bus(), Seen::<(u64, bool)>::default());
    let note = async |invoice: Invoice, delivered: Delivered, State(seen): State<Seen<(u64, bool)>>| {
        seen.push((invoice.number, delivered.possible_duplicate));
    };
    let crm = start(Service::new("crm").state(invoices.clone()).on(note), &bus).await;
    let bill = async |order: Order| Invoice { customer: order.customer, number: order.number };
    let billing = start(Service::new("billing").on(bill), &bus).await;
    bus.publish(&orders("ada", 1)[0]).await.unwrap();
    let mut repeat = saying(ORDERS, "ada", r#"{"customer":"ada","number":1}"#);
    repeat.headers.append_unchecked(header::REPEAT, "1");
    repeat.event_type = ORDERS.into();
    repeat.content_type = "application/json".into();
    let failures = submit(env.transport(), &[(Destination::Topic(repeat.topic.clone()), repeat, None, false)]).await;
    assert!(failures.is_empty(), "{failures:?}");
    invoices.count(2).await;
    let mut seen = invoices.all();
    seen.sort_unstable();
    assert_eq!(seen, [(0, false), (1, true)]);
    drain(billing).await;
    drain(crm).await;
}

async fn a_subscription_that_fails_touches_no_other(env: Env) {
    let (well, ill, bus) = (History::ordered(), History::ordered(), env.bus());
    let failing = ill.desk("ill", 2, |_, _| Act::Fail);
    let config = || SubscriptionConfig::named("audit").retry(retry(2, 20)).without_outage();
    let audit = start(failing.service(config()), &bus).await;
    let running = start(well.passing("well").service(SubscriptionConfig::default()), &bus).await;
    bus.publish_all(&rounds(4, 0..10)).await.unwrap();
    well.settled(40).await;
    ill.settled(40).await;
    let letters = dead_letters(env.transport(), "billing.audit", 40).await;
    assert_eq!(carried(letters).collect::<BTreeSet<_>>(), ill.gave_up());
    dead_letters(env.transport(), BILLING, 0).await;
    assert_eq!(well.repeats(), 0);
    drain(running).await;
    drain(audit).await;
    ill.check();
}

/// What happens to an order of [`all_at_once_loses_and_reorders_nothing`].
fn mixed(order: &Order, attempt: u32) -> Act {
    match order.number {
        3 | 13 | 23 | 33 if attempt == 1 => Act::Fail,
        7 | 27 => Act::Reject,
        19 => Act::Fail,
        number => Act::After(Duration::from_millis(number % 3)),
    }
}

/// How many may be unsettled in an instance of [`all_at_once_loses_and_reorders_nothing`].
const IN_FLIGHT: usize = 128;

/// 2,000 orders of 50 customers: one instance is killed and one drained in the middle, some fail, some for ever.
async fn all_at_once_loses_and_reorders_nothing(env: Env) {
    let slots = if env.can().slots { 4 } else { 1 };
    provision(env.transport(), ORDERS, |topic| topic.slots = slots).await;
    let history = History::ordered();
    let config = || config().concurrency(16).max_in_flight(IN_FLIGHT).retry(retry(3, 10).in_order()).without_outage();
    let instance = async |who| Instance::of(&env, &history.desk(who, 3, mixed), config()).await;
    let (one, two) = (instance("one").await, instance("two").await);
    let bus = env.bus();
    let published = tokio::spawn(async move {
        for orders in rounds(50, 0..40).chunks(100) {
            bus.publish_all(orders).await.expect("all are confirmed");
        }
    });
    history.settled(400).await;
    one.die().await;
    let three = instance("three").await;
    history.settled(1000).await;
    two.drain().await;
    within("the publishes", published).await.unwrap();
    history.settled(2000).await;
    three.drain().await;
    history.check();
    let given_up = history.gave_up();
    assert_eq!(given_up.len(), 50 * 3);
    let letters = env.transport().dead_letters(&subscription(BILLING)).await.unwrap();
    let letters: Vec<_> = carried(letters.page(None, 1000).await.unwrap()).collect();
    assert_eq!(letters.iter().cloned().collect::<BTreeSet<_>>(), given_up);
    // What the killed instance had dead-lettered comes again if the broker has not taken its ack, be it that it was on its
    // way: no more than were in flight, and none a third time.
    assert!(letters.len() <= 150 + IN_FLIGHT, "{} dead letters", letters.len());
    let times = |order| letters.iter().filter(|letter| *letter == order).count();
    assert!(given_up.iter().all(|order| times(order) <= 2), "{letters:?}");
}
