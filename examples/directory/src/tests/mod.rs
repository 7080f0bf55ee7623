//! The essentials; the conformance suite asks for the rest.

mod chaos;

use crate::testing::*;
use crate::{DirectoryConfig, DirectoryTransport};
use std::time::{Duration, Instant, SystemTime};
use tidings_core::transport::{
    Destination, Fate, Health, Lease, Ordering, ReplayFrom, ReplaySpec, Role, Start, SubscriptionSpec, TopicSpec,
    Topology, Transport, submit_and_wait,
};
use tidings_core::{BusEvent, ErrorKind, Topic, header};

fn active() -> Role {
    Role::Active { slots: vec![0] }
}

#[tokio::test]
async fn every_subscription_gets_every_event_in_order() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let (mut a, mut b) = (open(&*t, spec("a", &["shop.order"])).await, open(&*t, spec("b", &["shop.>"])).await);
    let mut other = open(&*t, spec("c", &["shop.invoice"])).await;
    let batch: Vec<_> = (0..20).map(|i| (to("shop.order"), saying("shop.order", "k", i), None, false)).collect();
    assert!(submit_and_wait(&*t.publisher(), &batch).await.is_empty());
    for reader in [&mut a, &mut b] {
        let got = reader.take(20).await;
        assert!(got.iter().zip(0..).all(|(d, i)| said(d) == i.to_string()));
        assert!(got.is_sorted_by_key(|d| d.position));
        assert!(got.iter().all(|d| !d.redelivered && !d.replayed && d.hand_outs == Some(1) && d.slot == 0));
        ack(got);
        reader.nothing().await;
    }
    other.nothing().await;
}

#[tokio::test]
async fn a_restart_keeps_everything() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.*"])).await;
    for i in 0..5 {
        publish(&*t, "a.b", "k", i).await;
    }
    let mut out = reader.take(4).await;
    out.remove(1).acker.ack();
    out.remove(0).acker.release(Duration::ZERO);
    let _again = reader.expect("0").await;
    // A crash: nothing is closed.
    drop((reader, t));
    let t = folder.connect().await;
    publish(&*t, "a.new", "k", "later").await;
    let mut reader = open(&*t, spec("s", &["a.*"])).await;
    assert_eq!(reader.role().await, active());
    ack(out);
    let got = reader.take(5).await;
    assert_eq!(texts(&got), ["0", "2", "3", "4", "later"]);
    let seen: Vec<_> = got.iter().map(|d| (d.redelivered, d.hand_outs.unwrap(), d.lost.unwrap())).collect();
    assert_eq!(seen, [(true, 3, 1), (true, 2, 1), (true, 2, 1), (false, 1, 0), (false, 1, 0)]);
    ack(got);
    assert_eq!(reader.close().await.applied, 5);
    open(&*t, spec("s", &["a.*"])).await.nothing().await;
}

#[tokio::test]
async fn a_subscription_waits_for_what_it_has_not_read() {
    let folder = Folder::new();
    let t = folder.connect().await;
    publish(&*t, "a.b", "", "before").await;
    t.provision(&Topology { topics: vec![], subscriptions: vec![spec("s", &["a.b"])] }).await.unwrap();
    publish(&*t, "a.b", "", "offline").await;
    let beginning = SubscriptionSpec { start: Start::Beginning, ..spec("all", &["a.b"]) };
    assert_eq!(texts(&open(&*t, beginning).await.take(2).await), ["before", "offline"]);
    open(&*t, spec("s", &["a.b"])).await.expect("offline").await;
    open(&*t, spec("new", &["a.b"])).await.nothing().await;
}

#[tokio::test]
async fn what_is_in_flight_never_exceeds_the_limit() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, SubscriptionSpec { max_in_flight: 3, ..spec("s", &["a.b"]) }).await;
    for i in 0..5 {
        publish(&*t, "a.b", "", i).await;
    }
    let mut out = Vec::new();
    while out.len() < 3 {
        reader.poll(100).await.unwrap();
        out.extend(reader.taken());
    }
    reader.nothing().await;
    let waiting = tokio::spawn(async move { reader.expect("3").await });
    out.remove(1).acker.ack();
    waiting.await.unwrap();
}

#[tokio::test]
async fn nothing_of_its_key_overtakes_a_released_event() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.*"])).await;
    for (key, text) in [("k", "k1"), ("k", "k2"), ("l", "l1"), ("", "-"), ("k", "k3")] {
        publish(&*t, "a.b", key, text).await;
    }
    publish(&*t, "a.c", "k", "other topic").await;
    let mut out = reader.take(2).await;
    let start = Instant::now();
    out.remove(1).acker.release(Duration::ZERO);
    out.remove(0).acker.release(ms(300));
    let got = reader.take(3).await;
    assert_eq!(texts(&got), ["l1", "-", "other topic"]);
    ack(got);
    publish(&*t, "a.b", "k", "k4").await;
    // The delay outlives the instance, and holds the key in the next one.
    drop(reader);
    let mut reader = open(&*t, spec("s", &["a.*"])).await;
    let got = reader.take(4).await;
    assert!(start.elapsed() >= ms(300));
    assert_eq!(texts(&got), ["k1", "k2", "k3", "k4"]);
    assert_eq!(got.iter().map(|d| d.hand_outs.unwrap()).collect::<Vec<_>>(), [2, 2, 1, 1]);
}

#[tokio::test]
async fn without_order_a_release_holds_nothing_and_a_drop_is_a_loss() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, SubscriptionSpec { ordering: Ordering::None, ..spec("s", &["a.b"]) }).await;
    publish(&*t, "a.b", "k", 1).await;
    publish(&*t, "a.b", "k", 2).await;
    let start = Instant::now();
    drop(reader.expect("1").await);
    reader.expect("2").await.acker.ack();
    let again = reader.expect("1").await;
    assert!(start.elapsed() >= ms(100));
    assert_eq!((again.lost, again.hand_outs), (Some(1), Some(2)));
}

#[tokio::test]
async fn delays_are_durable_and_an_address_is_for_one_alone() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let (mut a, mut b) = (open(&*t, spec("a", &["a.b"])).await, open(&*t, spec("b", &["a.b"])).await);
    let start = Instant::now();
    for (to, delay, text) in [
        (to("a.b"), 400, "event"),
        (Destination::Subscription(name("a")), 300, "late"),
        (Destination::Subscription(name("a")), 200, "soon"),
        (Destination::Subscription(name("a")), 0, "now"),
    ] {
        assert!(send(&*t, to, saying("a.b", "k", text), Some(ms(delay))).await.is_none());
    }
    publish(&*t, "a.b", "k", "topic").await;
    ack([a.expect("now").await, a.expect("topic").await]);
    t.close(soon()).await.unwrap();
    drop((a, t));
    let t = folder.connect().await;
    let mut a = open(&*t, spec("a", &["a.b"])).await;
    for (text, at) in [("soon", 200), ("late", 300), ("event", 400)] {
        let delivery = a.expect(text).await;
        assert!(start.elapsed() >= ms(at) && !delivery.redelivered, "{text}");
        delivery.acker.ack();
    }
    assert_eq!(b.poll(1).await.map(|_| ()).map_or_else(|e| e.kind(), |()| ErrorKind::Internal), ErrorKind::Closed);
    assert_eq!(texts(&open(&*t, spec("b", &["a.b"])).await.take(2).await), ["topic", "event"]);
}

#[tokio::test]
async fn of_two_instances_one_is_active_and_the_other_takes_over() {
    let folder = Folder::new();
    // As two processes: neither knows of the other but by the files.
    let (t, u) = (folder.connect().await, folder.connect().await);
    let mut a = open(&*t, spec("s", &["a.b"])).await;
    assert_eq!(a.role().await, active());
    let mut b = open(&*u, spec("s", &["a.b"])).await;
    assert_eq!(b.role().await, Role::StandBy);
    for i in 0..4 {
        publish(&*[&t, &u][i % 2].clone(), "a.b", "k", i).await;
    }
    let mut out = a.take(3).await;
    out.remove(0).acker.ack();
    assert_eq!(out[0].acker.lease(), Lease::Live);
    a.stop();
    a.end().await;
    b.nothing().await;
    out.remove(0).acker.ack();
    let flushed = a.close().await;
    assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (2, 0, 0));
    assert_eq!(out[0].acker.lease(), Lease::Lost);
    assert_eq!(b.role().await, active());
    let got = b.take(2).await;
    ack(out); // Stale: it settles nothing.
    assert_eq!(texts(&got), ["2", "3"]);
    assert_eq!(got.iter().map(|d| (d.redelivered, d.lost.unwrap())).collect::<Vec<_>>(), [(true, 0), (false, 0)]);
    let mut c = open(&*t, spec("s", &["a.b"])).await;
    assert_eq!(c.role().await, Role::StandBy);
    u.close(soon()).await.unwrap();
    assert_eq!(texts(&c.take(2).await), ["2", "3"]);
}

#[tokio::test]
async fn dead_letters_are_kept_paged_and_removed() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let letters = t.dead_letters(&name("s")).await.unwrap();
    assert_eq!((letters.count().await.unwrap(), letters.last().await.unwrap()), (0, None));
    for i in 0..5 {
        let to = Destination::DeadLetter(name("s"));
        assert!(send(&*t, to, saying("a.b", "k", i), None).await.is_none());
    }
    let other = folder.connect().await.dead_letters(&name("s")).await.unwrap();
    let first = other.page(None, 2).await.unwrap();
    let rest = other.page(Some(first[1].position), 10).await.unwrap();
    let text = |letter: &tidings_core::transport::DeadLetter| letter.message.payload.clone();
    assert_eq!(first.iter().chain(&rest).map(text).collect::<Vec<_>>(), ["0", "1", "2", "3", "4"]);
    assert_eq!(letters.last().await.unwrap(), Some(rest[2].position));
    assert_eq!(letters.remove(&[first[0].position, rest[2].position, 999]).await.unwrap(), 2);
    assert_eq!(letters.count().await.unwrap(), 3);
    assert_eq!(t.dead_letters(&name("t")).await.unwrap().count().await.unwrap(), 0);
}

#[tokio::test]
async fn a_damaged_message_is_a_dead_letter_that_names_the_file() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.b"])).await;
    let mut events = t.events().listen();
    publish(&*t, "a.b", "k", 1).await;
    let out = reader.expect("1").await;
    let torn = folder.file("log/00000000000000000002");
    std::fs::write(&torn, b"TDG1 torn").unwrap();
    publish(&*t, "a.b", "k", 3).await;
    reader.expect("3").await.acker.ack();
    assert!(matches!(events.next().await, Some(BusEvent::DeadLettered { .. })));
    let letters = t.dead_letters(&name("s")).await.unwrap();
    let letter = letters.page(None, 10).await.unwrap().remove(0).message;
    assert!(letter.headers.get_str(header::ERROR).unwrap().contains(torn.to_str().unwrap()));
    assert_eq!(letter.payload, "TDG1 torn");
    // What was given back and is gone when its turn comes.
    std::fs::remove_file(folder.file("log/00000000000000000001")).unwrap();
    out.acker.release(Duration::ZERO);
    reader.nothing().await;
    assert_eq!(letters.count().await.unwrap(), 2);
    let mut again = replay(&*t, replay_of(&["a.b"], ReplayFrom::Beginning)).await;
    let error = again.poll(10).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Codec && error.to_string().contains("00002"), "{error}");
}

#[tokio::test]
async fn damaged_state_is_an_error_that_names_the_file() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.b"])).await;
    publish(&*t, "a.b", "k", 1).await;
    reader.expect("1").await.acker.ack();
    reader.close().await;
    for broken in ["{", r#"{"read_to":7,"open":{}}"#, r#"{"read_to":0,"open":{"18446744073709551615":{}}}"#] {
        std::fs::write(folder.file("subscriptions/s/state.json"), broken).unwrap();
        let mut reader = open(&*t, spec("s", &["a.b"])).await;
        reader.nothing().await;
        assert!(matches!(t.health(), Health::Degraded(e) if e.to_string().contains("state.json")));
    }
    std::fs::write(folder.file("subscriptions/s/spec.json"), "").unwrap();
    let error = t.subscribe(spec("s", &["a.b"])).await.err().unwrap();
    assert!(error.to_string().contains("spec.json"), "{error}");
}

#[tokio::test]
async fn a_replay_reads_again_and_moves_nothing() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.b"])).await;
    publish(&*t, "a.b", "k", 0).await;
    let time = SystemTime::now();
    for i in 1..4 {
        publish(&*t, "a.b", "k", i).await;
    }
    publish(&*t, "x.y", "k", "another topic").await;
    ack(reader.take(2).await);
    let mut again = replay(&*t, ReplaySpec { max_in_flight: 2, ..replay_of(&["a.>"], ReplayFrom::Beginning) }).await;
    let mut out = again.take(2).await;
    assert!(out.iter().all(|d| d.replayed && !d.redelivered));
    let position = out[1].position;
    publish(&*t, "a.b", "k", "after it began").await;
    again.nothing().await;
    out.remove(0).acker.release(ms(10));
    out.remove(0).acker.ack();
    let got = again.take(2).await;
    assert_eq!(texts(&got), ["0", "2"]);
    assert!(got[0].redelivered);
    ack(got);
    again.expect("3").await.acker.ack();
    again.end().await;
    for from in [ReplayFrom::Time(time), ReplayFrom::Position(position)] {
        replay(&*t, replay_of(&["a.>"], from)).await.expect("1").await;
    }
    let future = ReplayFrom::Time(SystemTime::now() + Duration::from_secs(3600));
    replay(&*t, replay_of(&["a.>"], future)).await.end().await;
    let follow = ReplaySpec { follow: true, ..replay_of(&["b.>"], ReplayFrom::Beginning) };
    let mut following = replay(&*t, follow).await;
    following.nothing().await;
    publish(&*t, "b.c", "k", "new").await;
    following.expect("new").await.acker.ack();
    assert_eq!(texts(&reader.take(3).await), ["2", "3", "after it began"]);
}

#[tokio::test]
async fn what_cannot_be_honoured_or_does_not_fit_is_refused() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let _reader = open(&*t, spec("s", &["a.b", "a.c"])).await;
    let _same = open(&*t, SubscriptionSpec { max_in_flight: 7, ..spec("s", &["a.c", "a.b"]) }).await;
    for (spec, kind) in [
        (spec("s", &["a.b"]), ErrorKind::Mismatch),
        (SubscriptionSpec { ordering: Ordering::None, ..spec("s", &["a.b", "a.c"]) }, ErrorKind::Mismatch),
        (SubscriptionSpec { start: Start::Beginning, ..spec("s", &["a.b", "a.c"]) }, ErrorKind::Mismatch),
        (SubscriptionSpec { max_in_flight: 0, ..spec("t", &["a.b"]) }, ErrorKind::Config),
        (spec("t", &[]), ErrorKind::Config),
    ] {
        assert_eq!(t.subscribe(spec).await.err().unwrap().kind(), kind);
    }
    for (slots, retention, kind) in
        [(2, None, ErrorKind::Unsupported), (0, None, ErrorKind::Config), (1, Some(ms(1)), ErrorKind::Unsupported)]
    {
        let topics = vec![TopicSpec { slots, retention, ..TopicSpec::new(topic("a.b")) }];
        let error = t.provision(&Topology { topics, subscriptions: vec![spec("u", &["a.b"])] }).await.unwrap_err();
        assert_eq!((error.kind(), error.transport()), (kind, Some("directory")));
    }
    assert!(!folder.file("subscriptions/u").exists());
    let batch = vec![
        (to("a.b"), saying("a.b", "", 1), None, false),
        (Destination::Subscription(name("none")), saying("a.b", "", 1), None, false),
        (Destination::DeadLetter(name("none")), saying("a.b", "", 1), Some(ms(1)), true),
    ];
    let failures = submit_and_wait(&*t.publisher(), &batch).await;
    let seen: Vec<_> = failures.iter().map(|(i, f)| (*i, f.fate, f.error.kind())).collect();
    assert_eq!(seen, [(1, Fate::NotPersisted, ErrorKind::NotFound), (2, Fate::NotPersisted, ErrorKind::Unsupported)]);
}

#[tokio::test]
async fn closing_flushes_and_ends_this_transport_alone() {
    let folder = Folder::new();
    let (t, other) = (folder.connect().await, folder.connect().await);
    let letters = t.dead_letters(&name("s")).await.unwrap();
    let mut mine = open(&*t, spec("s", &["a.b"])).await;
    publish(&*t, "a.b", "", 1).await;
    let out = mine.expect("1").await;
    let answers: Vec<_> = (2..50).map(|i| send(&*t, to("a.b"), saying("a.b", "", i), None)).collect();
    drop(send(&*t, to("a.b"), saying("a.b", "", 50), None));
    let publisher = t.publisher();
    t.close(soon()).await.unwrap();
    t.close(tokio::time::Instant::now()).await.unwrap();
    for answer in answers {
        assert!(answer.await.is_none());
    }
    assert_eq!(mine.poll(1).await.unwrap_err().kind(), ErrorKind::Closed);
    out.acker.ack();
    let mut theirs = open(&*other, spec("s", &["a.b"])).await;
    let got = theirs.take(50).await;
    assert!(got[0].redelivered && said(&got[49]) == "50");
    assert!(matches!(t.health(), Health::Down(e) if e.kind() == ErrorKind::Closed));
    assert!(matches!(other.health(), Health::Up));
    let failure = submit_and_wait(&*publisher, &[(to("a.b"), saying("a.b", "", 1), None, true)]).await.remove(0).1;
    assert_eq!((failure.fate, failure.error.kind()), (Fate::NotPersisted, ErrorKind::Closed));
    for error in [
        t.subscribe(spec("s", &["a.b"])).await.err().unwrap(),
        t.provision(&Topology::default()).await.unwrap_err(),
        t.replay(replay_of(&["a.b"], ReplayFrom::Beginning)).await.err().unwrap(),
        t.dead_letters(&name("s")).await.err().unwrap(),
        letters.count().await.unwrap_err(),
        letters.remove(&[]).await.unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.transport()), (ErrorKind::Closed, Some("directory")));
    }
    mine.close().await;
}

#[tokio::test]
async fn a_disk_that_fails_is_tried_again_in_order() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.b"])).await;
    let (log, away) = (folder.file("log"), folder.file("log-away"));
    std::fs::rename(&log, &away).unwrap();
    let answers: Vec<_> = (0..5).map(|i| send(&*t, to("a.b"), saying("a.b", "k", i), None)).collect();
    let start = Instant::now();
    while !matches!(t.health(), Health::Down(_)) {
        assert!(start.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(ms(5)).await;
    }
    std::fs::rename(&away, &log).unwrap();
    for answer in answers {
        assert!(answer.await.is_none());
    }
    assert_eq!(texts(&reader.take(5).await), ["0", "1", "2", "3", "4"]);
    assert!(matches!(t.health(), Health::Up));
}

#[tokio::test]
async fn many_processes_write_one_log_and_nothing_is_lost() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.>"])).await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let t = folder.connect().await;
        writers.spawn(async move {
            for i in 0..25 {
                publish(&*t, &format!("a.w{writer}"), "k", i).await;
            }
        });
    }
    let got = reader.take(100).await;
    writers.join_all().await;
    for writer in 0..4 {
        let topic = Topic::new(format!("a.w{writer}")).unwrap();
        let of_it: Vec<_> = got.iter().filter(|d| d.message.topic == topic).map(said).collect();
        assert_eq!(of_it, (0..25).map(|i| i.to_string()).collect::<Vec<_>>());
    }
}

/// What the killed process of the next test does.
#[tokio::test]
async fn the_process_that_is_killed() {
    let Ok(path) = std::env::var("TIDINGS_DIRECTORY_TO_BE_KILLED") else { return };
    let t = DirectoryTransport::connect(DirectoryConfig::at(path)).await.unwrap();
    let mut reader = open(&*t, spec("s", &["a.b"])).await;
    for i in 0.. {
        publish(&*t, "a.b", "k", i).await;
        // Fails, and so ends the process, when nobody reads it any more.
        println!("published {i}");
        let delivery = reader.next().await;
        if i % 3 == 0 {
            delivery.acker.ack();
        } else {
            std::mem::forget(delivery);
        }
    }
}

#[tokio::test]
async fn what_was_confirmed_outlives_a_killed_process() {
    use std::io::{BufRead, BufReader};
    let folder = Folder::new();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "tests::the_process_that_is_killed"])
        .env("TIDINGS_DIRECTORY_TO_BE_KILLED", folder.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().contains("published 20") {}
    let t = folder.connect().await;
    let mut heir = open(&*t, spec("s", &["a.b"])).await;
    assert_eq!(heir.role().await, Role::StandBy);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(heir.role().await, active());
    let got = heir.take(13).await;
    let expected: Vec<_> = (0..20).filter(|i| i % 3 != 0).map(|i| i.to_string()).collect();
    assert_eq!(texts(&got), expected);
    assert!(got.iter().all(|d| d.redelivered && d.lost == Some(1)));
}

#[tokio::test]
async fn what_is_on_its_way_waits_for_an_older_one_that_is_given_back() {
    let folder = Folder::new();
    let t = folder.connect().await;
    let mut reader = open(&*t, spec("s", &["a.b"])).await;
    assert_eq!(reader.role().await, active());
    // Four are asked for, and ready before the first is taken.
    assert!(tokio::time::timeout(ms(1), reader.poll(4)).await.is_err());
    let batch: Vec<_> = (0..4).map(|i| (to("a.b"), saying("a.b", "k", i), None, false)).collect();
    assert!(submit_and_wait(&*t.publisher(), &batch).await.is_empty());
    tokio::time::sleep(ms(100)).await;
    let start = Instant::now();
    reader.expect("0").await.acker.release(ms(200));
    let got = reader.take(4).await;
    assert!(start.elapsed() >= ms(200));
    assert_eq!(texts(&got), ["0", "1", "2", "3"]);
    assert_eq!(got.iter().map(|d| d.hand_outs.unwrap()).collect::<Vec<_>>(), [2, 1, 1, 1]);
}
