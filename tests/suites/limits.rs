//! What the limits of a subscription mean where several handlers, batches, hot keys and long runs meet.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tidings::prelude::*;
use tidings::transport::Fate;
use tidings::{Error, header};
use tidings_tests::faulty::{Fault, Faulty};
use tidings_tests::{Invoice, Order, Seen, Viewed, bus, dead_letters, eventually, order};
use tokio::sync::{Barrier, Notify};
use tokio::time::{Instant, sleep, timeout};

/// Another type on the topic of orders.
#[derive(Clone, Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(name = "shop.order.cancelled", topic = "shop.order.placed", key = customer)]
struct Cancelled {
    customer: String,
}

/// How many run now, and how many did at the most.
#[derive(Clone, Default)]
struct Gauge(Arc<(AtomicUsize, AtomicUsize)>);

impl Gauge {
    async fn run(&self) {
        let (now, most) = &*self.0;
        most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
        sleep(Duration::from_millis(10)).await;
        now.fetch_sub(1, SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn concurrency_is_of_the_subscription_however_many_handlers_it_has() {
    let (bus, gauge) = (bus().await, Gauge::default());
    let config = SubscriptionConfig::default().concurrency(2);
    let service = Service::new("crm")
        .state(gauge.clone())
        .on_with(config.clone(), async |_: Order, State(gauge): State<Gauge>| gauge.run().await)
        .on_with(config, async |_: Cancelled, State(gauge): State<Gauge>| gauge.run().await);
    let running = service.start(&bus).await.unwrap();
    for n in 0..50 {
        bus.publish(&order(&format!("a{n}"), 0)).await.unwrap();
        bus.publish(&Cancelled { customer: format!("b{n}") }).await.unwrap();
    }
    eventually("all handled", || async { running.stats().all(|(_, stats)| stats.handled == 100) }).await;
    assert_eq!(gauge.0.1.load(SeqCst), 2);
}

/// Handlers return invoices, which nobody confirms for a while.
async fn unconfirmed(in_flight: usize) -> (Bus, Arc<Faulty>, Seen<u64>, tidings::Running) {
    let ((bus, faulty), sent) = (Faulty::bus(|_| ()).await, Seen::default());
    faulty.set({
        let sent: Seen<u64> = sent.clone();
        move |_, message| {
            let invoice = Invoice::decode("application/json", 1, &message.payload).ok();
            invoice.filter(|_| message.event_type == Invoice::NAME).map(|invoice| {
                sent.push(invoice.number);
                Fault::Silence
            })
        }
    });
    let config = SubscriptionConfig::default().concurrency(1).max_in_flight(in_flight);
    let bill = async |order: Order, State(gauge): State<Gauge>| {
        gauge.run().await;
        assert_eq!(gauge.0.1.load(SeqCst), 1, "one run at a time");
        Invoice { customer: order.customer, number: order.number }
    };
    let service = Service::new("billing").state(Gauge::default()).on_with(config, bill);
    let running = service.start(&bus).await.unwrap();
    (bus, faulty, sent, running)
}

#[tokio::test(start_paused = true)]
async fn a_run_waits_for_no_confirmation_unless_its_key_does() {
    let (bus, faulty, sent, running) = unconfirmed(8).await;
    for number in 0..10 {
        bus.publish(&order(&format!("c{number}"), number)).await.unwrap();
        bus.publish(&order("ada", 100 + number)).await.unwrap();
    }
    let handled = || running.stats().map(|(_, stats)| (stats.handled, stats.in_flight)).next().unwrap();
    // Of ada the first alone is run; her others, and what the window has no room for, wait.
    assert_eq!(sent.count(5).await, [0, 100, 1, 2, 3], "in the order of their runs");
    sleep(Duration::from_secs(5)).await;
    assert_eq!((sent.all().len(), handled()), (5, (0, 8)), "what is not confirmed is not done with");
    let mut rounds = 0;
    while handled().0 < 20 {
        faulty.confirm();
        sleep(Duration::from_millis(100)).await;
        rounds += 1;
    }
    assert!((10..15).contains(&rounds), "one of ada in each round: {rounds}");
    let ada: Vec<_> = sent.all().into_iter().filter(|number| *number >= 100).collect();
    assert_eq!(ada, (100..110).collect::<Vec<_>>());
    assert_eq!(running.drain(Duration::from_secs(5)).await.abandoned, 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_confirmations_until_its_deadline_and_what_has_none_comes_again() {
    let (bus, faulty, sent, running) = unconfirmed(8).await;
    for number in 0..3 {
        bus.publish(&order(&format!("c{number}"), number)).await.unwrap();
    }
    sent.count(3).await;
    let confirm = async {
        sleep(Duration::from_secs(1)).await;
        faulty.confirm();
    };
    let (drained, ()) = tokio::join!(running.drain(Duration::from_secs(5)), confirm);
    assert_eq!((drained.abandoned, drained.given_back, drained.flushed.applied), (0, 0, 3));
    let (again, config) = (Seen::<(u64, bool)>::default(), SubscriptionConfig::default().concurrency(1));
    let bill = async |order: Order, told: Delivered, State(again): State<Seen<(u64, bool)>>| {
        again.push((order.number, told.possible_duplicate));
        Invoice { customer: order.customer, number: order.number }
    };
    let service = || Service::new("billing").state(again.clone()).on_with(config.clone(), bill);
    let running = service().start(&bus).await.unwrap();
    bus.publish(&order("bob", 3)).await.unwrap();
    again.count(1).await;
    assert_eq!(running.drain(Duration::from_secs(1)).await.abandoned, 1);
    let _running = service().start(&bus).await.unwrap();
    assert_eq!(again.count(2).await, [(3, false), (3, true)]);
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_one_run() {
    let (bus, all_four) = (bus().await, Arc::new(Barrier::new(4)));
    let config = SubscriptionConfig::default().concurrency(4).batch(4);
    let service = Service::new("crm").state(Arc::clone(&all_four)).on_with(
        config,
        async |_: Batch<Viewed>, State(all_four): State<Arc<Barrier>>| {
            all_four.wait().await;
        },
    );
    service.provision(&bus).await.unwrap();
    bus.publish_all(&(0..16).map(|page| Viewed { page }).collect::<Vec<_>>()).await.unwrap();
    let running = service.start(&bus).await.unwrap();
    let all = eventually("all handled", || async { running.stats().all(|(_, stats)| stats.handled == 16) });
    assert!(timeout(Duration::from_secs(10), all).await.is_ok(), "four batches run at a time");
}

#[tokio::test(start_paused = true)]
async fn a_key_whose_lane_fills_while_it_holds_takes_no_more_than_its_share() {
    let (bus, seen): (_, Seen<(u64, u32)>) = (bus().await, Seen::default());
    let policy = RetryPolicy::default().backoff(Duration::from_secs(5), Duration::from_secs(5)).without_jitter();
    let config = SubscriptionConfig::default().retry(policy).max_in_flight(40);
    let service = Service::new("crm").state(seen.clone()).on_with(
        config,
        async |order: Order,
               Attempt(attempt): Attempt,
               State(seen): State<Seen<(u64, u32)>>|
               -> Result<(), HandlerError> {
            seen.push((order.number, attempt));
            if order.number == 0 { Err("not now".into()) } else { Ok(()) }
        },
    );
    let running = service.start(&bus).await.unwrap();
    let start = Instant::now();
    bus.publish(&order("hot", 0)).await.unwrap();
    seen.count(1).await;
    let mut orders: Vec<_> = (1..100).map(|number| order("hot", number)).collect();
    orders.push(order("other", 1_000));
    bus.publish_all(&orders).await.unwrap();
    eventually("the other is handled", || async { seen.all().contains(&(1_000, 1)) }).await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    eventually("all end", || async { running.stats().all(|(_, s)| s.handled == 100 && s.dead_lettered == 1) }).await;
    let attempts: Vec<_> = seen.all().into_iter().filter(|run| run.0 == 0).map(|run| run.1).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5], "none is lost");
}

#[tokio::test(start_paused = true)]
async fn workers_with_nothing_to_do_get_something_although_few_places_are_free() {
    let (bus, seen, long): (_, Seen<String>, _) = (bus().await, Seen::default(), Arc::new(Notify::new()));
    let config = SubscriptionConfig::default().concurrency(4).max_in_flight(8).without_timeout();
    let service = Service::new("crm").state(seen.clone()).state(Arc::clone(&long)).on_with(
        config,
        async |order: Order, State(seen): State<Seen<String>>, State(long): State<Arc<Notify>>| {
            seen.push(format!("{}{}", order.customer, order.number));
            match (order.customer.as_str(), order.number) {
                ("a", 1) | ("b", 2) => long.notified().await,
                _ => sleep(Duration::from_millis(1)).await,
            }
        },
    );
    service.provision(&bus).await.unwrap();
    // Two keys fill all eight places; the second run of `b` begins when a first place is free.
    for number in 1..5 {
        bus.publish(&order("a", number)).await.unwrap();
        bus.publish(&order("b", number)).await.unwrap();
    }
    bus.publish(&order("c", 1)).await.unwrap();
    let _running = service.start(&bus).await.unwrap();
    let other = eventually("c is handled", || async { seen.all().contains(&"c1".to_owned()) });
    assert!(
        timeout(Duration::from_secs(10), other).await.is_ok(),
        "one place is free, two workers wait: {:?}",
        seen.all()
    );
    long.notify_waiters();
}

#[tokio::test(start_paused = true)]
async fn failures_ascend_by_index_whoever_failed_first() {
    let (bus, faulty) = Faulty::bus(|_| ()).await;
    faulty.set(|_, message| match &message.payload[..] {
        br#"{"page":0}"# => Some(Fault::Silence),
        br#"{"page":2}"# => Some(Fault::Refuse(Error::new(ErrorKind::Refused, "never"))),
        _ => None,
    });
    let views: Vec<_> = (0..4).map(|page| Viewed { page }).collect();
    let errors = bus.publish_all(&views).await.unwrap_err();
    let seen: Vec<_> = errors.failures().iter().map(|(index, failure)| (*index, failure.fate)).collect();
    assert_eq!(seen, [(0, Fate::PossiblyPersisted), (2, Fate::NotPersisted)]);
}

/// Panics when it is dropped before its end.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("dropped in the middle");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_panics_while_it_is_cut_off_has_failed_like_any_other() {
    let bus = bus().await;
    let config = SubscriptionConfig::default().timeout(Duration::from_secs(1)).retry(RetryPolicy::none());
    let service = Service::new("crm").on_with(config, async |order: Order| {
        if order.number == 1 {
            let _bomb = Bomb;
            std::future::pending::<()>().await;
        }
    });
    let running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    bus.publish(&order("ada", 2)).await.unwrap();
    let letter = dead_letters(&bus, "crm.shop.order.placed", 1).await.remove(0);
    let error = letter.headers.get_str(header::ERROR).unwrap();
    assert!(error.contains("dropped in the middle") || error.contains("longer than"), "{error}");
    eventually("the next is handled", || async { running.stats().all(|(_, stats)| stats.handled == 1) }).await;
}
