//! Dead letters as a tool: counted, listed, shown, redriven to their subscription alone, purged only on purpose.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use tidings::memory::MemoryConfig;
use tidings::prelude::*;
use tidings::transport::{Destination, Topology};
use tidings::{BusConfig, Connect, DeadLetterBox, DeadLetterReason, Message, SubscriptionName};
use tidings_core::Clock;
use tidings_tests::faulty::Faulty;
use tidings_tests::{Order, Seen, Viewed, bus, eventually, order};
use tokio::sync::watch;

const BILLING: &str = "billing.shop.order.placed";

/// What a handler was told: number, attempt, possible duplicate.
type Runs = Seen<(u64, u32, bool)>;

/// Handles orders, and rejects all of them for as long as `broken` says.
async fn handle(
    order: Order,
    delivered: Delivered,
    State(broken): State<watch::Receiver<bool>>,
    State(runs): State<Runs>,
) -> Result<(), HandlerError> {
    runs.push((order.number, delivered.attempt, delivered.possible_duplicate));
    if *broken.borrow() { Err(HandlerError::reject("no such customer")) } else { Ok(()) }
}

fn service(name: &str, broken: &watch::Receiver<bool>, runs: &Runs) -> Service {
    Service::new(name).state(broken.clone()).state(runs.clone()).on(handle)
}

async fn open(bus: &Bus) -> DeadLetterBox {
    bus.dead_letters(BILLING).await.unwrap()
}

async fn buried(letters: &DeadLetterBox, count: u64) {
    eventually(&format!("{count} dead letters"), || async { letters.count().await.unwrap() == count }).await;
}

/// A service whose first `count` orders are dead letters, and which is then repaired.
async fn with_letters(bus: &Bus, count: u64) -> (tidings::Running, Runs, watch::Sender<bool>, DeadLetterBox) {
    let ((broken, is_broken), runs) = (watch::channel(true), Runs::default());
    let running = service("billing", &is_broken, &runs).start(bus).await.unwrap();
    let orders: Vec<_> = (1..=count).map(|number| order("ada", number)).collect();
    bus.publish_all(&orders).await.unwrap();
    let letters = open(bus).await;
    buried(&letters, count).await;
    broken.send_replace(false);
    (running, runs, broken, letters)
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_tells_what_it_is_why_and_since_when_by_the_clock_of_the_bus() {
    let (transport, config) = MemoryConfig::default().connect().await.unwrap();
    let clock = Clock::of_tokio();
    let bus = Bus::with_clock(transport, config, clock).unwrap();
    let (_running, _, _, letters) = with_letters(&bus, 1).await;
    let buried_at = clock.now();
    tokio::time::advance(Duration::from_secs(600)).await;
    let letter = letters.list(None, 10).await.unwrap().remove(0);
    assert_eq!((letter.event_type.as_str(), letter.topic.as_str()), ("shop.order.placed", "shop.order.placed"));
    assert_eq!((letter.key.as_ref().unwrap().as_str(), letter.version), (Some("ada"), 1));
    assert_eq!((letter.reason, letter.error.as_str()), (Some(DeadLetterReason::Rejected), "no such customer"));
    assert_eq!((letter.attempts, letter.size), (1, 29));
    assert!(letter.first_failure.is_some() && letter.redriven.is_none() && !letter.replayed);
    let age = letter.age.unwrap();
    assert!((600..602).contains(&age.as_secs()), "{age:?}");
    assert!(buried_at.duration_since(letter.time.unwrap()).unwrap_or_default() < Duration::from_secs(2));
    let whole = letters.show(letter.position).await.unwrap();
    assert_eq!(&whole.payload[..], br#"{"customer":"ada","number":1}"#);
    assert_eq!((whole.id, whole.headers), (letter.id, letter.headers));
}

#[tokio::test(start_paused = true)]
async fn an_unknown_reason_is_kept_as_text() {
    let bus = bus().await;
    let topic = tidings::Topic::new("shop.order.placed").unwrap();
    let mut message = Message::new("1".into(), "/elsewhere", "shop.order.placed", topic);
    message.headers.append_unchecked(tidings::header::REASON, "cosmic_rays");
    let to = Destination::DeadLetter(SubscriptionName::new(BILLING).unwrap());
    let failures =
        tidings::transport::submit_and_wait(&*bus.transport().publisher(), &[(to, message, None, true)]).await;
    assert!(failures.is_empty());
    let letter = open(&bus).await.list(None, 1).await.unwrap().remove(0);
    assert_eq!((letter.reason, letter.reason_text.as_str(), letter.error.as_str()), (None, "cosmic_rays", ""));
    assert_eq!((letter.attempts, letter.time, letter.age), (0, None, None));
}

#[tokio::test(start_paused = true)]
async fn two_subscriptions_dead_letter_the_same_event_and_redrive_it_apart() {
    let (bus, runs, others) = (bus().await, Runs::default(), Runs::default());
    let (broken, is_broken) = watch::channel(true);
    let running = service("billing", &is_broken, &runs).start(&bus).await.unwrap();
    let _crm = service("crm", &is_broken, &others).start(&bus).await.unwrap();
    let id = bus.publish(&order("ada", 1)).await.unwrap();
    let (billing, crm) = (open(&bus).await, bus.dead_letters("crm.shop.order.placed").await.unwrap());
    buried(&billing, 1).await;
    buried(&crm, 1).await;
    broken.send_replace(false);
    let letter = billing.list(None, 10).await.unwrap().remove(0);
    assert_eq!(letter.id, id);
    // An instance that never saw the event knows all the same that it may be a duplicate.
    running.drain(Duration::from_secs(1)).await;
    let _running = service("billing", &is_broken, &runs).start(&bus).await.unwrap();
    billing.redrive(letter.position).await.unwrap();
    assert_eq!(runs.count(2).await, [(1, 1, false), (1, 1, true)], "attempts anew, and marked");
    assert_eq!((billing.count().await.unwrap(), crm.count().await.unwrap()), (0, 1));
    // What was published later, with the same key, shows that nothing else came before it.
    bus.publish(&order("ada", 2)).await.unwrap();
    assert_eq!(others.count(2).await, [(1, 1, false), (2, 1, false)], "the other subscription saw nothing of it");
    assert_eq!(crm.redrive_all().await.unwrap(), 1);
    assert_eq!(others.count(3).await[2], (1, 1, true));
    let gone = billing.redrive(letter.position).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    assert_eq!(billing.show(letter.position).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_redriven_event_is_as_it_came_but_for_its_mark() {
    let bus = bus().await;
    let seen: Seen<Message> = Seen::default();
    let (repaired, is_repaired) = watch::channel(false);
    let billing = Service::new("billing").state(seen.clone()).state(is_repaired).on(
        async |order: Order,
               Metadata(message): Metadata,
               State(repaired): State<watch::Receiver<bool>>,
               State(seen): State<Seen<Message>>|
               -> Result<(), HandlerError> {
            seen.push(message.with_payload("text/plain", order.customer));
            if *repaired.borrow() { Ok(()) } else { Err("the bank is closed".into()) }
        },
    );
    let _billing = billing.start(&bus).await.unwrap();
    let options = PublishOptions::default().with_header("x-tenant", "acme").with_correlation_id("flow-1");
    bus.publish_with(&order("ada", 1), options).await.unwrap();
    let letters = open(&bus).await;
    buried(&letters, 1).await;
    repaired.send_replace(true);
    letters
        .redrive_edited(letters.list(None, 1).await.unwrap()[0].position, r#"{"customer":"bob","number":1}"#)
        .await
        .unwrap();
    let seen = seen.count(6).await;
    let (first, mut last) = (seen[0].clone(), seen[5].clone());
    assert!(last.headers.remove(tidings::header::REDRIVEN));
    assert_eq!((&first.payload[..], &last.payload[..]), (&b"ada"[..], &b"bob"[..]));
    last.payload = first.payload.clone();
    assert_eq!(last, first, "id, source, key, times, headers");
}

#[tokio::test(start_paused = true)]
async fn a_payload_that_is_too_large_is_not_redriven() {
    let (transport, config) = MemoryConfig::default().connect().await.unwrap();
    let bus = Bus::new(transport, BusConfig { max_payload: 100, ..config }).unwrap();
    let (_running, _, _, letters) = with_letters(&bus, 1).await;
    let position = letters.list(None, 1).await.unwrap()[0].position;
    let error = letters.redrive_edited(position, vec![b' '; 101]).await.unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::TooLarge, Some("redrive")));
    assert_eq!(letters.count().await.unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn pages_and_filters_reach_all_of_many() {
    let bus = bus().await;
    let (_running, runs, _broken, letters) = with_letters(&bus, 1_000).await;
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = letters.list(after, 150).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.position);
        seen.extend(page.into_iter().map(|letter| letter.position));
    }
    assert!(seen.len() == 1_000 && seen.is_sorted());
    assert_eq!(letters.list(None, 0).await.unwrap(), []);
    let chosen: Vec<_> = seen.iter().copied().filter(|position| position % 3 == 0).collect();
    let redriven = letters.redrive_if(|letter| letter.position % 3 == 0).await.unwrap();
    assert_eq!((redriven, letters.count().await.unwrap()), (chosen.len() as u64, 1_000 - redriven));
    runs.count(1_000 + chosen.len()).await;
    assert_eq!(letters.redrive_all().await.unwrap(), 1_000 - redriven);
    let numbers: std::collections::BTreeSet<_> = runs.count(2_000).await[1_000..].iter().map(|run| run.0).collect();
    assert_eq!(numbers, (1..=1_000).collect());
    assert_eq!((letters.count().await.unwrap(), letters.redrive_all().await.unwrap()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn redriving_ends_although_what_it_sends_dead_letters_again() {
    let (bus, _faulty) = Faulty::bus(|_| {}).await;
    let (_running, runs, broken, letters) = with_letters(&bus, 200).await;
    broken.send_replace(true);
    let mut looked_at = 0;
    let redriven = letters.redrive_if(|_| {
        looked_at += 1;
        true
    });
    assert_eq!(redriven.await.unwrap(), 200);
    assert_eq!(looked_at, 200);
    runs.count(400).await;
    buried(&letters, 200).await;
    let again = letters.list(None, 1_000).await.unwrap();
    assert!(again.iter().all(|letter| letter.redriven.is_some() && letter.attempts == 1));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_confirmed_stays_a_dead_letter() {
    let (bus, faulty) = Faulty::bus(|_| {}).await;
    let (_running, runs, _broken, letters) = with_letters(&bus, 3).await;
    faulty.refuses.store(true, SeqCst);
    let error = letters.redrive_all().await.unwrap_err();
    assert_eq!((error.kind(), error.possibly_persisted()), (ErrorKind::Refused, false));
    assert!(error.context().any(|pair| pair == ("redriven", "0")), "{error}");
    assert_eq!((letters.count().await.unwrap(), runs.all().len()), (3, 3));
    faulty.refuses.store(false, SeqCst);

    // The crash between: the event arrives, its dead letter stays, and redriving it again is told to the handler.
    faulty.keeps.store(true, SeqCst);
    let position = letters.list(None, 1).await.unwrap()[0].position;
    let error = letters.redrive(position).await.unwrap_err();
    assert!(error.possibly_persisted(), "{error}");
    assert_eq!((runs.count(4).await[3], letters.count().await.unwrap()), ((1, 1, true), 3));
    faulty.keeps.store(false, SeqCst);
    assert_eq!(letters.redrive_all().await.unwrap(), 3);
    assert!(runs.count(7).await[3..].iter().all(|run| run.2), "all marked");
}

#[tokio::test(start_paused = true)]
async fn a_full_broker_does_not_keep_dead_letters_from_being_redriven() {
    let bus = Bus::connect(MemoryConfig { capacity: 1_000, ..MemoryConfig::default() }).await.unwrap();
    let (_running, runs, _broken, letters) = with_letters(&bus, 1).await;
    // With its reason, the dead letter leaves less room than the event needs.
    assert_eq!(letters.redrive_all().await.unwrap(), 1);
    runs.count(2).await;
}

#[tokio::test(start_paused = true)]
async fn dead_letters_are_purged_only_by_position_or_with_their_number() {
    let bus = bus().await;
    let (_running, _, _, letters) = with_letters(&bus, 150).await;
    let positions: Vec<_> = letters.list(None, 2).await.unwrap().iter().map(|letter| letter.position).collect();
    assert_eq!(letters.purge(&positions).await.unwrap(), 2);
    assert_eq!(letters.purge(&positions).await.unwrap(), 0);
    for wrong in [0, 147, 149] {
        let error = letters.purge_all(wrong).await.unwrap_err();
        assert_eq!((error.kind(), letters.count().await.unwrap()), (ErrorKind::Mismatch, 148));
    }
    assert_eq!(letters.purge_all(148).await.unwrap(), 148);
    assert_eq!(letters.purge_all(0).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn dead_letters_are_found_by_a_name_that_is_one() {
    let bus = bus().await;
    assert_eq!(bus.dead_letters("no name").await.unwrap_err().kind(), ErrorKind::InvalidName);
    let name = SubscriptionName::new(BILLING).unwrap();
    let letters = bus.dead_letters(&name).await.unwrap();
    assert_eq!((letters.subscription(), letters.count().await.unwrap()), (&name, 0));
    assert_eq!(letters.show(0).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn what_expires_unread_is_told_as_a_gap() {
    let bus = bus().await;
    let seen: Seen<u64> = Seen::default();
    let crm = || {
        Service::new("crm").state(seen.clone()).on(async |view: Viewed, State(seen): State<Seen<u64>>| {
            seen.push(view.page);
        })
    };
    let topic = tidings::Topic::new("shop.page.viewed").unwrap();
    let topics = vec![tidings::transport::TopicSpec {
        retention: Some(Duration::from_secs(3_600)),
        ..tidings::transport::TopicSpec::new(topic.clone())
    }];
    bus.transport().provision(&Topology { topics, subscriptions: Vec::new() }).await.unwrap();
    crm().provision(&bus).await.unwrap();
    for page in 1..=3 {
        bus.publish(&Viewed { page }).await.unwrap();
    }
    tokio::time::advance(Duration::from_secs(3_601)).await;
    bus.publish(&Viewed { page: 4 }).await.unwrap();
    let mut events = bus.events();
    let _crm = crm().start(&bus).await.unwrap();
    assert_eq!(seen.count(1).await, [4]);
    let gap = loop {
        if let tidings::BusEvent::Gap { subscription, topic, missed_at_most, from, to } = events.next().await.unwrap() {
            break (subscription.to_string(), topic, missed_at_most, to - from);
        }
    };
    assert_eq!(gap, ("crm.shop.page.viewed".into(), Some(topic), 3, 3));
}
