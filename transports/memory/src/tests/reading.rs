//! Subscriptions, one instance: order, redelivery, delays.

use crate::testing::*;
use std::time::Duration;
use tidings_core::ErrorKind;
use tidings_core::transport::{Lease, Notice, Role, Start, TopicSpec, Topology, Transport};
use tokio::time::{Instant, advance};

#[tokio::test(start_paused = true)]
async fn every_subscription_gets_every_event_in_order() {
    let t = connect();
    let mut a = open(&t, spec("a", &["shop.order"])).await;
    let mut b = open(&t, unordered("b", &["shop.order"])).await;
    let mut other = open(&t, spec("c", &["shop.invoice"])).await;
    (0..3).for_each(|i| publish(&t, "shop.order", "k", i));
    for reader in [&mut a, &mut b] {
        let got = reader.take(3).await;
        assert_eq!(texts(&got), ["0", "1", "2"]);
        assert!(got.is_sorted_by_key(|d| d.position));
        assert!(got.iter().all(|d| !d.redelivered && !d.replayed && d.hand_outs == Some(1) && d.slot == 0));
        ack(got);
        reader.nothing();
    }
    other.nothing();
    assert_eq!(stats(&t).stored, stats(&t).retained);
}

#[tokio::test(start_paused = true)]
async fn publishing_to_many_subscriptions_stores_one_copy() {
    let t = connect();
    let mut readers = Vec::new();
    for i in 0..10 {
        readers.push(open(&t, spec(&format!("s{i}"), &["a.b"])).await);
    }
    let payload = tidings_core::Message::clone(&saying("a.b", "", "x".repeat(1000)));
    assert!(to_topic(&t, payload.clone()).await.is_none());
    assert_eq!(stats(&t).stored, payload.size());
    for reader in &mut readers {
        let delivery = reader.next().await;
        assert_eq!(delivery.message.payload.as_ptr(), payload.payload.as_ptr(), "the bytes are shared");
        delivery.acker.ack();
    }
    assert_eq!(stats(&t).retained, payload.size(), "settled by the last");
}

#[tokio::test(start_paused = true)]
async fn a_subscription_waits_for_what_it_has_not_read() {
    let t = connect();
    publish(&t, "a.b", "", "before");
    let topology = Topology { topics: vec![], subscriptions: vec![spec("s", &["a.b"])] };
    t.provision(&topology).await.unwrap();
    publish(&t, "a.b", "", "offline");
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    let first = reader.expect("offline").await;
    publish(&t, "a.b", "", "later");
    assert_eq!(reader.close().await.applied, 0);
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    let again = reader.expect("offline").await;
    assert_eq!((again.position, again.redelivered, again.hand_outs), (first.position, true, Some(2)));
    reader.expect("later").await;
}

#[tokio::test(start_paused = true)]
async fn a_new_subscription_can_start_at_the_beginning() {
    let t = connect();
    publish(&t, "a.b", "", 1);
    publish(&t, "a.c", "", 2);
    publish(&t, "x.y", "", 3);
    let mut reader = open(&t, SubscriptionSpec { start: Start::Beginning, ..spec("s", &["a.>"]) }).await;
    publish(&t, "a.b", "", 4);
    let got = reader.take(3).await;
    assert_eq!(texts(&got), ["1", "2", "4"]);
    assert!(!got[0].redelivered && !got[0].replayed);
}

use tidings_core::transport::SubscriptionSpec;

#[tokio::test(start_paused = true)]
async fn a_pattern_reads_topics_that_appear_later_from_their_first_event() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["shop.*.placed", "crm.>"])).await;
    publish(&t, "shop.order.placed", "", 1);
    publish(&t, "shop.order.paid", "", 2);
    publish(&t, "crm.a.b.c", "", 3);
    publish(&t, "shop.return.placed", "", 4);
    assert_eq!(reader.drain(), ["1", "3", "4"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_in_flight_never_exceeds_the_limit() {
    let t = connect();
    let mut reader = open(&t, SubscriptionSpec { max_in_flight: 3, ..spec("s", &["a.b"]) }).await;
    (0..5).for_each(|i| publish(&t, "a.b", "", i));
    let mut out = reader.take(3).await;
    reader.nothing();
    // Settling wakes the poller that the limit held up.
    let waiting = tokio::spawn(async move { reader.next().await });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    out.remove(1).acker.ack();
    assert_eq!(said(&waiting.await.unwrap()), "3");
}

#[tokio::test(start_paused = true)]
async fn no_more_than_max_are_added() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    (0..5).for_each(|i| publish(&t, "a.b", "", i));
    reader.notices();
    assert!(reader.poll_now(2));
    assert_eq!(reader.take(2).await.len(), 2);
    assert_eq!(reader.drain(), ["2", "3", "4"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_released_comes_back_to_its_place() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    (0..6).for_each(|i| publish(&t, "a.b", "", i));
    let mut out = reader.take(4).await;
    let position = out[2].position;
    out.remove(2).acker.release(Duration::ZERO);
    out.remove(0).acker.release(Duration::ZERO);
    ack(out);
    let got = reader.take(4).await;
    assert_eq!(texts(&got), ["0", "2", "4", "5"], "before newer ones, in order");
    assert_eq!((got[1].position, got[1].redelivered, got[1].hand_outs), (position, true, Some(2)));
    assert!(!got[2].redelivered);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_delivery_comes_back_after_a_while() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "", 1);
    drop(reader.next().await);
    reader.nothing();
    let start = Instant::now();
    assert_eq!(reader.next().await.hand_outs, Some(2));
    assert!(start.elapsed() >= ms(100));
}

#[tokio::test(start_paused = true)]
async fn nothing_of_its_key_overtakes_a_released_event() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.*"])).await;
    for (key, text) in [("k", "k1"), ("k", "k2"), ("l", "l1"), ("", "-"), ("k", "k3")] {
        publish(&t, "a.b", key, text);
    }
    publish(&t, "a.c", "k", "other topic");
    let mut out = reader.take(2).await;
    out.remove(1).acker.release(Duration::ZERO);
    out.remove(0).acker.release(ms(50));
    let got = reader.take(3).await;
    assert_eq!(texts(&got), ["l1", "-", "other topic"]);
    ack(got);
    publish(&t, "a.b", "k", "k4");
    reader.nothing();
    advance(ms(49)).await;
    reader.nothing();
    let got = reader.take(4).await;
    assert_eq!(texts(&got), ["k1", "k2", "k3", "k4"]);
    assert_eq!(got.iter().map(|d| d.hand_outs.unwrap()).collect::<Vec<_>>(), [2, 2, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn each_release_of_a_key_holds_those_behind_it() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    (1..=4).for_each(|i| publish(&t, "a.b", "k", i));
    let mut out = reader.take(3).await.into_iter();
    let (one, two, three) = (out.next().unwrap(), out.next().unwrap(), out.next().unwrap());
    three.acker.release(ms(10));
    two.acker.release(ms(100));
    advance(ms(20)).await;
    reader.nothing();
    one.acker.release(ms(10));
    let start = Instant::now();
    ack([reader.expect("1").await]);
    assert!(start.elapsed() < ms(12));
    reader.nothing();
    ack([reader.expect("2").await, reader.expect("3").await, reader.expect("4").await]);
    assert_eq!(stats(&t).stored, stats(&t).retained);
}

#[tokio::test(start_paused = true)]
async fn without_order_a_release_holds_nothing() {
    let t = connect();
    let mut reader = open(&t, unordered("s", &["a.b"])).await;
    publish(&t, "a.b", "k", 1);
    publish(&t, "a.b", "k", 2);
    reader.next().await.acker.release(Duration::from_secs(600));
    let start = Instant::now();
    reader.expect("2").await.acker.ack();
    assert!(start.elapsed().is_zero());
    reader.expect("1").await.acker.ack();
    assert!(start.elapsed() >= Duration::from_secs(600));
}

#[tokio::test(start_paused = true)]
async fn an_address_reaches_one_subscription_alone_when_due() {
    let t = connect();
    let mut a = open(&t, spec("a", &["a.b"])).await;
    let mut b = open(&t, spec("b", &["a.b"])).await;
    let start = Instant::now();
    send_to(&t, "a", saying("a.b", "k", "late"), Some(Duration::from_secs(600)));
    send_to(&t, "a", saying("a.b", "k", "soon"), Some(Duration::from_secs(60)));
    send_to(&t, "a", saying("a.b", "k", "now"), None);
    publish(&t, "a.b", "k", "topic");
    ack([a.expect("now").await, a.expect("topic").await]);
    assert!(start.elapsed().is_zero(), "nothing waits for what is due later");
    a.expect("soon").await.acker.ack();
    assert!((60..61).contains(&start.elapsed().as_secs()));
    let late = a.expect("late").await;
    assert!((600..601).contains(&start.elapsed().as_secs()));
    assert!(!late.redelivered && late.hand_outs == Some(1));
    late.acker.ack();
    assert_eq!(b.drain(), ["topic"]);
}

#[tokio::test(start_paused = true)]
async fn an_earlier_delay_wakes_who_sleeps_for_a_later_one() {
    let t = connect();
    for spec in [spec("ordered", &["a.b"]), unordered("unordered", &["a.b"])] {
        let address = spec.name.to_string();
        let mut reader = open(&t, spec).await;
        send_to(&t, &address, saying("a.b", "", "late"), Some(Duration::from_secs(600)));
        let reading = tokio::spawn(async move { reader.next().await });
        tokio::task::yield_now().await;
        let start = Instant::now();
        send_to(&t, &address, saying("a.b", "", "soon"), Some(Duration::from_secs(1)));
        assert_eq!(said(&reading.await.unwrap()), "soon");
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}

#[tokio::test(start_paused = true)]
async fn delayed_messages_outlive_the_instances() {
    let t = connect();
    drop(open(&t, spec("s", &["a.b"])).await);
    send_to(&t, "s", saying("a.b", "", "retry"), Some(Duration::from_secs(60)));
    publish_in(&t, Duration::from_secs(30), "a.b", "event");
    assert!(stats(&t).stored > 0, "they count");
    advance(Duration::from_secs(90)).await;
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(reader.drain(), ["event", "retry"]);
}

#[tokio::test(start_paused = true)]
async fn a_delayed_publish_reaches_who_subscribed_before_it_was_due() {
    let t = connect();
    let mut early = open(&t, spec("early", &["a.b"])).await;
    let start = Instant::now();
    publish_in(&t, Duration::from_secs(60), "a.b", "delayed");
    publish(&t, "a.b", "", "now");
    let mut middle = open(&t, spec("middle", &["a.b"])).await;
    early.expect("now").await.acker.ack();
    early.expect("delayed").await.acker.ack();
    assert!((60..61).contains(&start.elapsed().as_secs()));
    middle.expect("delayed").await;
    open(&t, spec("late", &["a.b"])).await.nothing();
    publish_in(&t, Duration::from_secs(60), "a.b", "nobody polls");
    advance(Duration::from_secs(61)).await;
    open(&t, spec("later", &["a.b"])).await.nothing();
}

#[tokio::test(start_paused = true)]
async fn a_dead_instance_leaves_everything_to_the_next_at_once() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    (0..4).for_each(|i| publish(&t, "a.b", "k", i));
    let mut out = reader.take(3).await;
    out.remove(0).acker.ack();
    assert_eq!(out[0].acker.lease(), Lease::Live);
    drop(reader);
    assert_eq!(out[0].acker.lease(), Lease::Lost);
    let mut heir = open(&t, spec("s", &["a.b"])).await;
    ack(out); // Stale: it settles nothing.
    let got = heir.take(3).await;
    assert_eq!(texts(&got), ["1", "2", "3"]);
    assert_eq!(got.iter().map(|d| d.redelivered).collect::<Vec<_>>(), [true, true, false]);
}

#[tokio::test(start_paused = true)]
async fn closing_says_what_became_of_the_settlements() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    (0..5).for_each(|i| publish(&t, "a.b", "", i));
    let mut out = reader.take(5).await;
    out.remove(0).acker.ack();
    out.remove(0).acker.release(Duration::ZERO);
    native(&t).lose_leases(&name("s")).unwrap();
    out.remove(0).acker.ack();
    let flushed = reader.close().await;
    assert_eq!((flushed.applied, flushed.stale, flushed.unknown), (2, 1, 0));
    ack(out);
    assert_eq!(open(&t, spec("s", &["a.b"])).await.drain(), ["1", "2", "3", "4"]);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_subscription_ends_but_still_settles() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "", 1);
    publish(&t, "a.b", "", 2);
    let one = reader.next().await;
    reader.stop();
    reader.end().await;
    assert_eq!(one.acker.lease(), Lease::Live);
    one.acker.ack();
    assert_eq!(reader.close().await.applied, 1);
    assert_eq!(open(&t, spec("s", &["a.b"])).await.drain(), ["2"]);
}

#[tokio::test(start_paused = true)]
async fn stopping_wakes_the_poller() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    reader.nothing();
    reader.stop();
    reader.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_exists_with_other_settings_is_refused_and_the_difference_named() {
    let t = connect();
    let _reader = open(&t, spec("s", &["a.b", "a.c"])).await;
    let _same = open(&t, SubscriptionSpec { max_in_flight: 7, ..spec("s", &["a.c", "a.b"]) }).await;
    slots(&t, "a.b", 4).await;
    slots(&t, "a.b", 4).await;
    for (spec, named) in [
        (spec("s", &["a.b"]), "a.c"),
        (unordered("s", &["a.b", "a.c"]), "ordering"),
        (SubscriptionSpec { start: Start::Beginning, ..spec("s", &["a.b", "a.c"]) }, "remove_subscription"),
    ] {
        let error = t.subscribe(spec.clone()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.to_string().contains(named), "{error}");
        let topology = Topology { topics: vec![], subscriptions: vec![spec] };
        assert_eq!(t.provision(&topology).await.unwrap_err().kind(), ErrorKind::Mismatch);
    }
    publish(&t, "x.y", "", 1);
    for (name, slots, has) in [("a.b", 8, '4'), ("x.y", 2, '1')] {
        let topics = vec![TopicSpec::new(topic("new")), TopicSpec { slots, ..TopicSpec::new(topic(name)) }];
        let error = t.provision(&Topology { topics, subscriptions: vec![] }).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.to_string().contains(has) && error.to_string().contains(&slots.to_string()), "{error}");
    }
    let retained = TopicSpec { retention: Some(ms(1)), slots: 4, ..TopicSpec::new(topic("a.b")) };
    let error = t.provision(&Topology { topics: vec![retained], subscriptions: vec![] }).await.unwrap_err();
    assert!(error.to_string().contains("retention"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn settings_that_make_no_sense_are_refused() {
    let t = connect();
    for bad in [SubscriptionSpec { max_in_flight: 0, ..spec("s", &["a.b"]) }, spec("s", &[])] {
        assert_eq!(t.subscribe(bad).await.err().unwrap().kind(), ErrorKind::Config);
    }
    let topics = vec![TopicSpec { slots: 0, ..TopicSpec::new(topic("a.b")) }];
    let error = t.provision(&Topology { topics, subscriptions: vec![] }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
}

#[tokio::test(start_paused = true)]
async fn what_retention_takes_unread_is_reported() {
    let t = connect();
    let limited = TopicSpec { retention: Some(Duration::from_secs(60)), ..TopicSpec::new(topic("a.b")) };
    let topology = Topology { topics: vec![limited], subscriptions: vec![spec("s", &["a.b", "a.c"])] };
    t.provision(&topology).await.unwrap();
    (0..3).for_each(|i| publish(&t, "a.b", "", i));
    publish(&t, "a.c", "", "kept");
    advance(Duration::from_secs(61)).await;
    publish(&t, "a.b", "", "new");
    let mut reader = open(&t, spec("s", &["a.b", "a.c"])).await;
    let notices = reader.notices();
    let Some(Notice::Gap { topic: Some(gone), missed_at_most: 3, from, to }) = notices.get(1) else {
        panic!("{notices:?}")
    };
    assert_eq!((gone.as_str(), to - from), ("a.b", 3));
    assert_eq!(reader.drain(), ["kept", "new"]);
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_out_once_is_not_taken_by_retention() {
    let t = connect();
    let limited = TopicSpec { retention: Some(Duration::from_secs(60)), ..TopicSpec::new(topic("a.b")) };
    let topology = Topology { topics: vec![limited], subscriptions: vec![spec("s", &["a.b"])] };
    t.provision(&topology).await.unwrap();
    publish(&t, "a.b", "k", "released");
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    reader.next().await.acker.release(Duration::from_secs(600));
    advance(Duration::from_secs(700)).await;
    assert_eq!(reader.drain(), ["released"]);
}

#[tokio::test(start_paused = true)]
async fn a_role_is_told_first_and_alone() {
    let t = connect();
    let mut ordered = open(&t, spec("s", &["a.b"])).await;
    let mut shared = open(&t, unordered("u", &["a.b"])).await;
    publish(&t, "a.b", "", 1);
    for (reader, slots) in [(&mut ordered, vec![0]), (&mut shared, vec![])] {
        assert!(reader.poll_now(10));
        assert_eq!(reader.role(), Some(Role::Active { slots }));
        assert_eq!(reader.drain(), ["1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn lost_leases_are_told_and_the_events_come_again() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "k", 1);
    publish(&t, "a.b", "k", 2);
    let old = reader.next().await;
    native(&t).lose_leases(&name("s")).unwrap();
    assert_eq!(old.acker.lease(), Lease::Lost);
    assert!(reader.notices().iter().any(|notice| matches!(notice, Notice::Leases)));
    let again = reader.expect("1").await;
    old.acker.ack();
    assert_eq!(again.acker.lease(), Lease::Live);
    again.acker.ack();
    reader.expect("2").await;
    assert_eq!(native(&t).lose_leases(&name("x")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn whatever_becomes_ready_wakes_who_waits_for_it() {
    let t = connect();
    for spec in [spec("ordered", &["a.b"]), unordered("unordered", &["a.b"])] {
        let mut reader = open(&t, spec).await;
        publish(&t, "a.b", "", "released");
        let out = reader.next().await;
        let waiting = tokio::spawn(async move {
            reader.expect("released").await.acker.ack();
            reader
        });
        tokio::task::yield_now().await;
        out.acker.release(Duration::ZERO);
        let mut reader = waiting.await.unwrap();
        let waiting = tokio::spawn(async move { reader.expect("delayed").await.acker.ack() });
        tokio::task::yield_now().await;
        publish_in(&t, Duration::from_secs(1), "a.b", "delayed");
        waiting.await.unwrap();
    }
}
