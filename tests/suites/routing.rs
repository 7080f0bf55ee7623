//! Types that nobody routes, batches with a result per event, a subscription that is paused.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::time::Duration;
use tidings::handler::Each;
use tidings::prelude::*;
use tidings::transport::Health;
use tidings::{Topic, Unrouted};
use tidings_tests::{Invoice, Order, Seen, Viewed, bus, dead_letters, eventually, order};

#[tokio::test(start_paused = true)]
async fn a_type_that_nobody_routes_is_dead_lettered_on_request() {
    let bus = bus().await;
    let config = SubscriptionConfig::default().unrouted(Unrouted::DeadLetter);
    let service = Service::new("billing").on_with(config, async |_: Order| ());
    let _running = service.start(&bus).await.unwrap();
    let topic = Topic::new("shop.order.placed").unwrap();
    let stray = tidings::Message::new("1".into(), "/shop", "shop.order.cancelled", topic);
    bus.publish_raw(stray).await.unwrap();
    let letter = dead_letters(&bus, "billing.shop.order.placed", 1).await.remove(0);
    assert_eq!(letter.headers.get_str(tidings::header::REASON), Some("unrouted"));
}

#[tokio::test(start_paused = true)]
async fn each_event_of_a_batch_ends_by_its_own_result_and_a_failure_keeps_the_later_ones_of_its_key() {
    let (bus, runs): (_, Seen<Vec<(String, u64)>>) = (bus().await, Seen::default());
    let invoices: Seen<u64> = Seen::default();
    let failed_once: Seen<()> = Seen::default();
    let config = SubscriptionConfig::default().batch(10).linger(Duration::from_secs(1)).concurrency(1);
    let service = Service::new("billing").state(runs.clone()).state(failed_once).on_with(
        config,
        async |Batch(orders): Batch<Order>,
               State(runs): State<Seen<Vec<(String, u64)>>>,
               State(failed): State<Seen<()>>| {
            runs.push(orders.iter().map(|order| (order.customer.clone(), order.number)).collect());
            let bill = |order: Order| {
                if order.customer == "ada" && order.number == 1 && failed.all().is_empty() {
                    failed.push(());
                    return Err("not yet".into());
                }
                if order.customer == "bob" && order.number == 1 {
                    return Err(HandlerError::reject("never"));
                }
                Ok(Invoice { customer: order.customer, number: order.number })
            };
            Each(orders.into_iter().map(bill).collect())
        },
    );
    let crm =
        Service::new("crm").state(invoices.clone()).on(async |invoice: Invoice, State(seen): State<Seen<u64>>| {
            seen.push(invoice.number);
        });
    let (running, _crm) = (service.start(&bus).await.unwrap(), crm.start(&bus).await.unwrap());
    let orders: Vec<_> = (0..3).flat_map(|n| [order("ada", n), order("bob", n)]).collect();
    bus.publish_all(&orders).await.unwrap();
    eventually("all settled", || async { running.stats().all(|(_, s)| s.handled == 5 && s.dead_lettered == 1) }).await;
    let runs = runs.all();
    assert_eq!(runs[0].len(), 6, "a batch lingers until it is full or its time is over: {runs:?}");
    let again: Vec<_> = runs[1..].concat();
    assert_eq!(again, [("ada".to_owned(), 1), ("ada".to_owned(), 2)], "what stood behind the failure, in order");
    assert_eq!(invoices.count(5).await.len(), 5);
    assert_eq!(dead_letters(&bus, "billing.shop.order.placed", 1).await.len(), 1);
}

/// Found by the simulation, seed 10: the result was ignored where the batch had one event.
#[tokio::test(start_paused = true)]
async fn a_batch_of_one_ends_by_its_own_result_too() {
    for results in [0_usize, 1, 2] {
        let (bus, runs): (_, Seen<usize>) = (bus().await, Seen::default());
        let config = SubscriptionConfig::default().retry(RetryPolicy::default().attempts(3));
        let service = Service::new("billing").state((runs.clone(), results)).on_with(
            config,
            async |Batch(orders): Batch<Order>, State((runs, results)): State<(Seen<usize>, usize)>| {
                runs.push(orders.len());
                // One failure, or as many successes as there must not be.
                let ended = |_| if results == 1 { Err(HandlerError::from("never")) } else { Ok(()) };
                Each((0..results).map(ended).collect())
            },
        );
        let running = service.start(&bus).await.unwrap();
        bus.publish(&order("ada", 1)).await.unwrap();
        let letter = dead_letters(&bus, "billing.shop.order.placed", 1).await.remove(0);
        assert_eq!(letter.headers.get_str(tidings::header::ATTEMPTS), Some("3"), "{results} results");
        assert_eq!(runs.all(), [1, 1, 1]);
        assert!(running.stats().all(|(_, stats)| stats.handled == 0));
    }
}

/// Each of nothing was taken for a success of all.
#[tokio::test(start_paused = true)]
async fn a_batch_without_results_fails_and_is_handled_one_by_one() {
    let (bus, runs): (_, Seen<usize>) = (bus().await, Seen::default());
    let config = SubscriptionConfig::default().linger(Duration::from_secs(1)).concurrency(1);
    let service = Service::new("billing").state(runs.clone()).on_with(
        config,
        async |Batch(orders): Batch<Order>, State(runs): State<Seen<usize>>| {
            runs.push(orders.len());
            let results = if orders.len() == 1 { vec![Ok(())] } else { Vec::new() };
            Each(results)
        },
    );
    let running = service.start(&bus).await.unwrap();
    bus.publish_all(&[order("ada", 0), order("ada", 1), order("bob", 0)]).await.unwrap();
    eventually("all handled", || async { running.stats().all(|(_, stats)| stats.handled == 3) }).await;
    assert_eq!(runs.all(), [3, 1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_paused_subscription_waits_and_loses_nothing() {
    let (bus, seen): (_, Seen<u64>) = (bus().await, Seen::default());
    let service = Service::new("crm").state(seen.clone()).on(async |view: Viewed, State(seen): State<Seen<u64>>| {
        seen.push(view.page);
    });
    let running = service.start(&bus).await.unwrap();
    running.pause("crm.shop.page.viewed").unwrap();
    assert!(matches!(running.health(), Health::Degraded(_)));
    let views: Vec<_> = (0..1000).map(|page| Viewed { page }).collect();
    bus.publish_all(&views).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(seen.all().is_empty());
    running.resume("crm.shop.page.viewed").unwrap();
    assert_eq!(seen.count(1000).await.len(), 1000);
    assert!(matches!(running.health(), Health::Up));
    let error = running.pause("crm.nothing").unwrap_err();
    assert!(error.to_string().contains("crm.shop.page.viewed"), "{error}");
}
