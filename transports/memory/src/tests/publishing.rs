//! Publishing, dead letters, connecting and closing.

use crate::testing::*;
use crate::{MemoryConfig, MemoryTransport};
use futures_util::FutureExt;
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Destination, Fate, Health, Transport, submit_and_wait};
use tidings_core::{BusEvent, ErrorKind};
use tokio::time::Instant;

const KIB: usize = 1024;

fn small(capacity: usize) -> Arc<MemoryTransport> {
    MemoryTransport::connect(MemoryConfig { capacity, retain: 0, ..MemoryConfig::default() }).unwrap()
}

fn later(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn a_publish_waits_for_room_in_turn() {
    let t = small(3 * KIB);
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    let mut answers: Vec<_> =
        [2000, 2000, 900, 500].map(|size| Box::pin(to_topic(&t, message_of_size("a.b", size)))).into_iter().collect();
    assert!(answers.remove(0).now_or_never().unwrap().is_none());
    assert!(answers.iter_mut().all(|answer| answer.now_or_never().is_none()), "the small ones wait their turn");
    assert!(matches!(t.health(), Health::Degraded(e) if e.kind() == ErrorKind::Full));
    assert_eq!((stats(&t).stored, stats(&t).waiting), (2000, 3));
    reader.next().await.acker.ack();
    assert!(answers.remove(0).now_or_never().unwrap().is_none());
    assert!(answers.remove(0).now_or_never().unwrap().is_none());
    assert!((&mut answers[0]).now_or_never().is_none());
    reader.next().await.acker.ack();
    assert!(answers.remove(0).now_or_never().unwrap().is_none());
    assert!(matches!(t.health(), Health::Up));
    ack(reader.take(2).await);
    assert_eq!(stats(&t), crate::Stats { stored: 0, retained: 0, waiting: 0 });
}

#[tokio::test(start_paused = true)]
async fn what_nobody_waits_for_any_more_is_dropped() {
    let t = small(2 * KIB);
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    assert!(to_topic(&t, message_of_size("a.b", 2000)).await.is_none());
    drop(to_topic(&t, message_of_size("a.b", 2000)));
    let waits = to_topic(&t, message_of_size("a.b", 1000));
    assert_eq!(stats(&t).waiting, 1, "what was abandoned went as soon as it was seen");
    reader.next().await.acker.ack();
    assert!(waits.await.is_none());
    assert_eq!(reader.next().await.message.size(), 1000);
}

#[tokio::test(start_paused = true)]
async fn what_is_owed_never_waits() {
    let t = small(2 * KIB);
    let _reader = open(&t, spec("s", &["a.b"])).await;
    assert!(to_topic(&t, message_of_size("a.b", 2000)).await.is_none());
    let waits = to_topic(&t, message_of_size("a.b", 400));
    for to in
        [Destination::Topic(topic("a.b")), Destination::Subscription(name("s")), Destination::DeadLetter(name("s"))]
    {
        assert!(send(&t, to, message_of_size("a.b", 5000), None, true).now_or_never().unwrap().is_none());
    }
    assert_eq!(stats(&t).stored, 17_000);
    assert!(waits.now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn what_never_fits_is_refused_at_once() {
    let t = small(KIB);
    let failure = to_topic(&t, message_of_size("a.b", 1025)).now_or_never().unwrap().unwrap();
    assert_eq!((failure.fate, failure.error.kind()), (Fate::NotPersisted, ErrorKind::TooLarge));
    assert!(!failure.error.is_transient());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_sent_is_refused_by_index() {
    let t = connect();
    let event = || saying("a.b", "", 1);
    let batch = vec![
        (Destination::Topic(topic("a.b")), event(), None, false),
        (Destination::Subscription(name("none")), event(), None, false),
        (Destination::DeadLetter(name("none")), event(), Some(ms(1)), false),
        (Destination::DeadLetter(name("none")), event(), None, false),
    ];
    let failures = submit_and_wait(&*t.publisher(), batch).await;
    let seen: Vec<_> = failures.iter().map(|(i, f)| (*i, f.fate, f.error.kind())).collect();
    assert_eq!(seen, [(1, Fate::NotPersisted, ErrorKind::NotFound), (2, Fate::NotPersisted, ErrorKind::Unsupported)]);
}

#[tokio::test(start_paused = true)]
async fn retention_makes_room_for_who_waits() {
    use tidings_core::transport::{TopicSpec, Topology};
    let t = small(2 * KIB);
    let limited = TopicSpec { retention: Some(ms(100)), ..TopicSpec::new(topic("a.b")) };
    let topology = Topology { topics: vec![limited], subscriptions: vec![spec("s", &["a.b"])] };
    t.provision(&topology).await.unwrap();
    assert!(to_topic(&t, message_of_size("a.b", 2000)).await.is_none());
    tokio::time::advance(ms(101)).await;
    assert!(to_topic(&t, message_of_size("a.b", 2000)).now_or_never().unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn dead_letters_are_kept_paged_and_removed() {
    let t = connect();
    let letters = t.dead_letters(&name("s")).await.unwrap();
    assert_eq!((letters.count().await.unwrap(), letters.page(None, 10).await.unwrap()), (0, vec![]));
    for i in 0..5 {
        let to = Destination::DeadLetter(name("s"));
        assert!(send(&t, to, saying("a.b", "k", i), None, true).await.is_none());
    }
    assert_eq!(letters.count().await.unwrap(), 5);
    let first = letters.page(None, 2).await.unwrap();
    let rest = letters.page(Some(first[1].position), 10).await.unwrap();
    let text = |letter: &tidings_core::transport::DeadLetter| letter.message.payload.clone();
    assert_eq!(first.iter().chain(&rest).map(text).collect::<Vec<_>>(), ["0", "1", "2", "3", "4"]);
    assert_eq!(letters.remove(&[first[0].position, rest[2].position, 999]).await.unwrap(), 2);
    assert_eq!(letters.count().await.unwrap(), 3);
    assert_eq!(t.dead_letters(&name("other")).await.unwrap().count().await.unwrap(), 0);
    let left: Vec<_> = letters.page(None, 10).await.unwrap().iter().map(|l| l.position).collect();
    letters.remove(&left).await.unwrap();
    assert_eq!(stats(&t).stored, 0);
}

#[tokio::test(start_paused = true)]
async fn a_name_is_shared_while_anything_is_connected() {
    let config = MemoryConfig { capacity: 5000, ..MemoryConfig::named("shared-while-connected") };
    let (a, b) = (MemoryTransport::connect(config.clone()).unwrap(), MemoryTransport::connect(config.clone()).unwrap());
    let mut reader = open(&a, spec("s", &["a.b"])).await;
    publish(&b, "a.b", "", 1);
    reader.expect("1").await;
    let error = MemoryTransport::from_url("memory://shared-while-connected").err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    assert!(error.to_string().contains("capacity"), "{error}");
    drop((a, b));
    let still = MemoryTransport::connect(config.clone()).unwrap();
    assert!(stats(&still).stored > 0, "the reader is a handle too");
    drop((still, reader));
    assert_eq!(stats(&MemoryTransport::connect(config).unwrap()).stored, 0);
}

#[tokio::test(start_paused = true)]
async fn a_broker_without_a_name_is_private() {
    let (a, b) = (connect(), connect());
    publish(&a, "a.b", "", 1);
    assert_eq!(stats(&b).stored, 0);
}

#[tokio::test(start_paused = true)]
async fn namespaces_never_meet() {
    let namespace =
        |n: &str| MemoryTransport::from_url(&format!("memory://namespaces-never-meet?namespace={n}")).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let (mut of_a, mut of_b) = (open(&a, spec("s", &["a.>"])).await, open(&b, unordered("s", &["a.>"])).await);
    slots(&a, "a.b", 4).await;
    slots(&b, "a.b", 2).await;
    publish(&a, "a.b", "", "a");
    send_to(&b, "s", saying("a.b", "", "b"), None);
    assert!(send(&b, Destination::DeadLetter(name("s")), saying("a.b", "", 1), None, true).await.is_none());
    assert_eq!((of_a.drain(), of_b.drain()), (vec!["a".into()], vec!["b".into()]));
    assert_eq!(a.dead_letters(&name("s")).await.unwrap().count().await.unwrap(), 0);
    let mut again = replay(&b, replay_of(&["a.>"], tidings_core::transport::ReplayFrom::Beginning)).await;
    again.end().await;
}

#[tokio::test(start_paused = true)]
async fn closing_ends_this_transport_alone() {
    let url = "memory://closing-ends-this-transport";
    let (t, other) = (MemoryTransport::from_url(url).unwrap(), MemoryTransport::from_url(url).unwrap());
    let letters = t.dead_letters(&name("s")).await.unwrap();
    let mut mine = open(&t, spec("s", &["a.b"])).await;
    let mut theirs = open(&other, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "", 1);
    let out = mine.next().await;
    let publisher = t.publisher();
    t.close(later(1)).await.unwrap();
    t.close(later(1)).await.unwrap();
    assert_eq!(mine.poll(1).await.unwrap_err().kind(), ErrorKind::Closed);
    out.acker.ack();
    assert!(theirs.expect("1").await.redelivered);
    assert!(matches!(t.health(), Health::Down(e) if e.kind() == ErrorKind::Closed));
    assert!(matches!(other.health(), Health::Up));

    let failure =
        submit_and_wait(&*publisher, vec![(Destination::Topic(topic("a.b")), saying("a.b", "", 1), None, true)]).await;
    assert_eq!((failure[0].1.fate, failure[0].1.error.kind()), (Fate::NotPersisted, ErrorKind::Closed));
    let from = tidings_core::transport::ReplayFrom::Beginning;
    for error in [
        t.subscribe(spec("s", &["a.b"])).await.err().unwrap(),
        t.provision(&Default::default()).await.unwrap_err(),
        t.replay(replay_of(&["a.b"], from)).await.err().unwrap(),
        t.dead_letters(&name("s")).await.err().unwrap(),
        letters.count().await.unwrap_err(),
        letters.page(None, 1).await.unwrap_err(),
        letters.remove(&[]).await.unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.transport()), (ErrorKind::Closed, Some("memory")));
    }
    assert_eq!(mine.close().await, Default::default());
}

#[tokio::test(start_paused = true)]
async fn closing_flushes_what_waits_until_the_deadline() {
    let t = small(2 * KIB);
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    assert!(to_topic(&t, message_of_size("a.b", 2000)).await.is_none());
    let waits = to_topic(&t, message_of_size("a.b", 1000));
    let never = to_topic(&t, message_of_size("a.b", 1500));
    let closing = tokio::spawn({
        let t = Arc::clone(&t);
        async move { t.close(later(10)).await }
    });
    tokio::task::yield_now().await;
    reader.next().await.acker.ack();
    assert!(waits.await.is_none());
    let failure = never.await.unwrap();
    assert_eq!((failure.fate, failure.error.kind()), (Fate::NotPersisted, ErrorKind::Closed));
    assert_eq!(closing.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);

    let t = small(2 * KIB);
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    assert!(to_topic(&t, message_of_size("a.b", 2000)).await.is_none());
    let waits = to_topic(&t, message_of_size("a.b", 1000));
    let (start, closed) = (Instant::now(), async {
        reader.next().await.acker.ack();
    });
    let (closed, ()) = tokio::join!(t.close(later(10)), closed);
    assert!(closed.is_ok() && waits.await.is_none() && start.elapsed() < ms(10));
}

#[tokio::test(start_paused = true)]
async fn it_says_what_it_is() {
    let t = MemoryTransport::from_url("memory://").unwrap();
    let can = t.capabilities();
    assert!(!can.durable && can.max_hold.is_none() && can.max_payload == usize::MAX);
    assert!(can.ordered_repeats && can.publish_delay && can.key_ordering && can.slots);
    assert!(can.start_beginning && can.replay && can.counts_hand_outs);
    assert!(matches!(t.health(), Health::Up));
    let mut events = t.events().listen();
    t.events().tell(BusEvent::Connected);
    assert_eq!(events.next().await, Some(BusEvent::Connected));
    assert!(MemoryTransport::from_url("memory://a?x=1").is_err());
    assert!(MemoryTransport::from_url("memory://?capacity=0").is_err());
}

#[tokio::test(start_paused = true)]
async fn removing_dead_letters_makes_room() {
    let t = small(2 * KIB);
    let to = Destination::DeadLetter(name("s"));
    assert!(send(&t, to, message_of_size("a.b", 2000), None, false).await.is_none());
    let waits = to_topic(&t, message_of_size("a.b", 1000));
    let letters = t.dead_letters(&name("s")).await.unwrap();
    assert_eq!(letters.remove(&[letters.page(None, 1).await.unwrap()[0].position]).await.unwrap(), 1);
    assert!(waits.now_or_never().unwrap().is_none());
}
