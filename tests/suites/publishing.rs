//! Publishing on a transport that fails: repeats with the same id, order per key through them, deadlines, the window.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tidings::handler::Metadata;
use tidings::prelude::*;
use tidings::transport::{Destination, Fate};
use tidings::{Error, MessageId, header};
use tidings_tests::faulty::{Fault, Faulty};
use tidings_tests::{Order, Seen, Viewed, eventually, order};

/// A bus on a transport that cannot repeat in order by itself.
async fn faulty() -> (Bus, Arc<Faulty>) {
    Faulty::bus(|capabilities| capabilities.ordered_repeats = false).await
}

fn cut() -> Error {
    Error::new(ErrorKind::Connection, "cut")
}

/// What is handled, in order: number, id, whether the publish was marked as a repeat, whether a duplicate was possible.
type Note = (u64, MessageId, bool, bool);

async fn note(
    order: Order,
    Metadata(message): Metadata,
    delivered: Delivered,
    State(seen): State<Seen<(String, Note)>>,
) {
    let repeat = message.headers.get(header::REPEAT).is_some();
    seen.push((order.customer, (order.number, message.id, repeat, delivered.possible_duplicate)));
}

#[tokio::test(start_paused = true)]
async fn what_fails_for_now_is_sent_again_with_the_same_id_and_keeps_the_order_of_its_key() {
    let (bus, faulty) = faulty().await;
    let seen: Seen<(String, Note)> = Seen::default();
    let _running = Service::new("crm").state(seen.clone()).on(note).start(&bus).await.unwrap();
    let random = Mutex::new(fastrand::Rng::with_seed(7));
    faulty.set(move |_, _| match random.lock().unwrap().u8(0..10) {
        0..2 => Some(Fault::Refuse(cut())),
        2 => Some(Fault::LoseAnswer),
        _ => None,
    });
    let orders: Vec<_> = (0..1_000).map(|n| order(&format!("k{}", n % 7), n / 7)).collect();
    let mut ids = Vec::new();
    for part in orders.chunks(100) {
        ids.extend(bus.publish_all(part).await.unwrap());
    }
    let distinct = || {
        let ids: std::collections::HashSet<_> = seen.all().into_iter().map(|(_, (_, id, ..))| id).collect();
        ids.len()
    };
    eventually("all handled", || async { distinct() == 1_000 }).await;
    let mut last: HashMap<String, u64> = HashMap::new();
    let mut repeats = 0;
    for (customer, (number, id, repeat, possible_duplicate)) in seen.all() {
        assert!(ids.contains(&id));
        let expected = last.get(&customer).map_or(0, |last| last + 1);
        assert!(number <= expected, "{customer}/{number} overtook {expected}");
        if number < expected {
            repeats += 1;
            assert!(repeat && possible_duplicate, "a duplicate is marked");
        }
        last.insert(customer, number.max(expected.saturating_sub(1)));
    }
    assert!(repeats > 20, "answers were lost: {repeats}");
}

#[tokio::test(start_paused = true)]
async fn failures_are_named_by_index_and_fate() {
    let (bus, faulty) = faulty().await;
    faulty.set(|_, message| match message.payload.last()? {
        _ if message.payload.ends_with(b"1}") => Some(Fault::Refuse(Error::new(ErrorKind::Refused, "never"))),
        _ if message.payload.ends_with(b"3}") => Some(Fault::Silence),
        _ => None,
    });
    let views: Vec<_> = (0..5).map(|page| Viewed { page }).collect();
    let start = tokio::time::Instant::now();
    let errors = bus.publish_all(&views).await.unwrap_err();
    assert!((Duration::from_secs(30)..Duration::from_secs(31)).contains(&start.elapsed()), "the deadline");
    let seen: Vec<_> = errors.failures().iter().map(|(index, f)| (*index, f.fate, f.error.kind())).collect();
    assert_eq!(seen, [(1, Fate::NotPersisted, ErrorKind::Refused), (3, Fate::PossiblyPersisted, ErrorKind::Timeout)]);
    assert_eq!(errors.confirmed(), 3);
    let error = bus.publish(&Viewed { page: 3 }).await.unwrap_err();
    assert!(error.possibly_persisted() && error.is_transient() && error.kind() == ErrorKind::Timeout);
    let error = bus.publish(&Viewed { page: 1 }).await.unwrap_err();
    assert!(!error.possibly_persisted() && !error.is_transient());
}

#[tokio::test(start_paused = true)]
async fn a_key_waits_for_its_unconfirmed_publish_and_others_do_not() {
    let (bus, faulty) = faulty().await;
    faulty.set(|_, message| message.payload.ends_with(b"0}").then_some(Fault::Silence));
    let first = tokio::spawn({
        let bus = bus.clone();
        async move { bus.publish(&order("ada", 0)).await }
    });
    tokio::task::yield_now().await;
    let mut second = Box::pin(bus.publish(order_ref("ada", 1)));
    tokio::select! {
        biased;
        _ = &mut second => panic!("it overtook the first, which is not confirmed"),
        other = bus.publish(order_ref("bob", 1)) => drop(other.unwrap()),
    }
    first.abort();
    assert!(first.await.is_err(), "cancelled");
    faulty.break_silence();
    second.await.unwrap();
}

/// An order that lives long enough for a pinned future.
fn order_ref(customer: &str, number: u64) -> &'static Order {
    Box::leak(Box::new(order(customer, number)))
}

#[tokio::test(start_paused = true)]
async fn never_more_are_unconfirmed_than_the_window_allows() {
    let (bus, faulty) = faulty().await;
    let config = tidings::BusConfig { max_unconfirmed: 8, publish_timeout_ms: 1_000, ..tidings::BusConfig::default() };
    let bus = Bus::new(Arc::clone(bus.transport()), config).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    faulty.set({
        let sent = Arc::clone(&sent);
        move |_, _| {
            sent.fetch_add(1, SeqCst);
            Some(Fault::Silence)
        }
    });
    let views: Vec<_> = (0..100).map(|page| Viewed { page }).collect();
    let errors = bus.publish_all(&views).await.unwrap_err();
    assert_eq!(sent.load(SeqCst), 8);
    let unsent = errors.failures().iter().filter(|(_, failure)| failure.fate == Fate::NotPersisted).count();
    assert_eq!((errors.failures().len(), unsent), (100, 92));
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_that_cannot_be_confirmed_leaves_the_original_where_it_is() {
    let (bus, faulty) = Faulty::bus(|_| {}).await;
    let mut events = bus.events();
    let tries = Arc::new(AtomicUsize::new(0));
    faulty.set({
        let tries = Arc::clone(&tries);
        move |destination, _| match destination {
            Destination::DeadLetter(_) if tries.fetch_add(1, SeqCst) < 5 => Some(Fault::Refuse(cut())),
            _ => None,
        }
    });
    let service =
        Service::new("crm").on(async |_: Order| -> Result<(), HandlerError> { Err(HandlerError::reject("no")) });
    let running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    while !matches!(events.next().await, Some(tidings::BusEvent::PublishStalled { .. })) {}
    assert!(running.stats().all(|(_, stats)| stats.in_flight == 1 && stats.dead_lettered == 0));
    assert_eq!(tidings_tests::dead_letters(&bus, "crm.shop.order.placed", 1).await.len(), 1);
    assert_eq!(tries.load(SeqCst), 6);
}

#[tokio::test(start_paused = true)]
async fn what_a_handler_returns_is_sent_until_it_is_confirmed_without_another_run() {
    let (bus, faulty) = Faulty::bus(|_| {}).await;
    let tries = Arc::new(AtomicUsize::new(0));
    faulty.set({
        let tries = Arc::clone(&tries);
        move |_, message| {
            (&*message.event_type == "shop.page.viewed" && tries.fetch_add(1, SeqCst) < 5).then(|| Fault::Refuse(cut()))
        }
    });
    let runs: Seen<u32> = Seen::default();
    let service = Service::new("crm").state(runs.clone()).on(
        async |order: Order, Attempt(attempt): Attempt, State(runs): State<Seen<u32>>| {
            runs.push(attempt);
            Viewed { page: order.number }
        },
    );
    let running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    eventually("confirmed", || async { running.stats().all(|(_, s)| s.published == 1 && s.handled == 1) }).await;
    assert_eq!((runs.all(), tries.load(SeqCst)), (vec![1], 6));
}

#[tokio::test(start_paused = true)]
async fn what_a_handler_returns_and_the_broker_refuses_for_good_dead_letters_its_cause() {
    let (bus, faulty) = Faulty::bus(|_| {}).await;
    faulty.set(|_, message| {
        let refuse = || Fault::Refuse(Error::new(ErrorKind::Refused, "not here"));
        (&*message.event_type == "shop.page.viewed").then(refuse)
    });
    let service = Service::new("crm").on(async |order: Order| Viewed { page: order.number });
    let _running = service.start(&bus).await.unwrap();
    bus.publish(&order("ada", 1)).await.unwrap();
    let letter = tidings_tests::dead_letters(&bus, "crm.shop.order.placed", 1).await.remove(0);
    assert_eq!(letter.headers.get_str(header::REASON), Some("rejected"));
    assert!(letter.headers.get_str(header::ERROR).unwrap().contains("not here"));
}
