//! Instances of one subscription: sharing, owning, taking over.

use crate::testing::*;
use crate::{MemoryConfig, MemoryTransport};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Delivery, Notice, Role, SubscriptionSpec};
use tokio::time::{Instant, advance};

/// A broker that keeps what a dead instance left open away for ten seconds.
fn slow_to_redeliver() -> Arc<MemoryTransport> {
    let redelivery_delay = Duration::from_secs(10);
    MemoryTransport::connect(MemoryConfig { redelivery_delay, ..MemoryConfig::default() }).unwrap()
}

#[tokio::test(start_paused = true)]
async fn without_order_instances_share_the_work() {
    let t = connect();
    let mut readers = Vec::new();
    for _ in 0..3 {
        let mut reader = open(&t, unordered("s", &["a.b"])).await;
        reader.nothing();
        readers.push(reader);
    }
    (0..30).for_each(|i| publish(&t, "a.b", "k", i));
    let mut all = BTreeSet::new();
    for reader in &mut readers {
        assert!(reader.poll_now(100));
        let mut got = Vec::new();
        got.extend(std::iter::from_fn(|| reader.taken()));
        assert!(got.len() >= 5, "one instance got {} of 30", got.len());
        all.extend(got.iter().map(|d| said(d).to_owned()));
        ack(got);
    }
    readers.iter_mut().for_each(|reader| all.extend(reader.drain()));
    assert_eq!(all.len(), 30);
}

#[tokio::test(start_paused = true)]
async fn one_event_wakes_one_instance_in_turn() {
    let t = connect();
    let mut tasks = tokio::task::JoinSet::new();
    let mut counts = BTreeMap::new();
    for i in 0..3 {
        let mut reader = open(&t, unordered("s", &["a.b"])).await;
        tasks.spawn(async move {
            reader.next().await.acker.ack();
            (i, reader)
        });
    }
    tokio::task::yield_now().await;
    for i in 0..30 {
        publish(&t, "a.b", "", i);
        let (who, mut reader) = tasks.join_next().await.unwrap().unwrap();
        *counts.entry(who).or_insert(0) += 1;
        tasks.spawn(async move {
            reader.next().await.acker.ack();
            (who, reader)
        });
        tokio::task::yield_now().await;
    }
    assert!(counts.len() == 3 && counts.values().all(|n| *n == 10), "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn work_passes_on_when_who_was_woken_for_it_is_gone() {
    let t = connect();
    let mut a = open(&t, unordered("s", &["a.b"])).await;
    let mut b = open(&t, unordered("s", &["a.b"])).await;
    a.nothing();
    let second = tokio::spawn(async move {
        b.expect("1").await.acker.ack();
        b.expect("2").await.acker.ack();
        b.expect("3").await.acker.ack();
        b
    });
    tokio::task::yield_now().await;
    // Whoever of them is woken, `a` does not poll again.
    (1..=2).for_each(|i| publish(&t, "a.b", "", i));
    drop(a);
    publish(&t, "a.b", "", 3);
    second.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_found_again_after_all_were_full() {
    let t = connect();
    let full = || SubscriptionSpec { max_in_flight: 1, ..unordered("s", &["a.b"]) };
    let (mut a, mut b) = (open(&t, full()).await, open(&t, full()).await);
    (0..2).for_each(|i| publish(&t, "a.b", "", i));
    let (first, second) = (a.next().await, b.next().await);
    a.nothing();
    let waiting = tokio::spawn(async move { (b.next().await, b) });
    tokio::task::yield_now().await;
    // Both wait and neither can take this: one takes it when it settles, and is woken for what comes after that.
    publish(&t, "a.b", "", 2);
    second.acker.ack();
    let (third, mut b) = waiting.await.unwrap();
    assert_eq!(said(&third), "2");
    third.acker.ack();
    let waiting = tokio::spawn(async move { b.expect("3").await.acker.ack() });
    tokio::task::yield_now().await;
    publish(&t, "a.b", "", 3);
    waiting.await.unwrap();
    ack([first]);
}

#[tokio::test(start_paused = true)]
async fn with_one_slot_one_is_active_and_the_others_stand_by() {
    let t = connect();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    let mut c = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(a.role(), Some(Role::Active { slots: vec![0] }));
    assert_eq!((b.role(), c.role()), (Some(Role::StandBy), Some(Role::StandBy)));
    (0..3).for_each(|i| publish(&t, "a.b", "k", i));
    a.next().await.acker.ack();
    let _open = a.next().await;
    b.nothing();
    let taking_over = tokio::spawn(async move {
        assert_eq!(texts(&b.take(2).await), ["1", "2"]);
        b
    });
    tokio::task::yield_now().await;
    drop(a);
    let b = taking_over.await.unwrap();
    c.nothing();
    b.close().await;
    let got = c.take(2).await;
    assert_eq!(texts(&got), ["1", "2"]);
    assert_eq!(got.iter().map(|d| d.hand_outs.unwrap()).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(c.role(), Some(Role::Active { slots: vec![0] }));
}

#[tokio::test(start_paused = true)]
async fn who_has_stopped_keeps_what_it_owns_until_it_closes() {
    let t = connect();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    (0..2).for_each(|i| publish(&t, "a.b", "k", i));
    let one = a.next().await;
    a.stop();
    b.nothing();
    one.acker.ack();
    b.nothing();
    a.close().await;
    b.expect("1").await;
}

#[tokio::test(start_paused = true)]
async fn slots_are_shared_and_each_key_has_one_owner() {
    let t = connect();
    slots(&t, "a.b", 8).await;
    let mut a = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(a.slots(), (0..8).collect::<Vec<_>>());
    let mut b = open(&t, spec("s", &["a.b"])).await;
    let (of_a, of_b) = (a.slots(), b.slots());
    assert_eq!((of_a.len(), of_b.len()), (4, 4));
    for i in 0..100 {
        publish(&t, "a.b", &format!("k{}", i % 20), i);
    }
    let mut owners = BTreeMap::new();
    for (who, reader, slots) in [(0, &mut a, of_a), (1, &mut b, of_b)] {
        reader.poll_now(100);
        let mut last = BTreeMap::new();
        while let Some(delivery) = reader.taken() {
            assert!(slots.contains(&delivery.slot));
            let (key, i) = (delivery.message.key.clone(), said(&delivery).parse::<i32>().unwrap());
            assert!(last.insert(key.clone(), i) < Some(i));
            assert_eq!(*owners.entry(key).or_insert(who), who);
            delivery.acker.ack();
        }
    }
    assert_eq!(owners.len(), 20);
    assert_eq!(stats(&t).stored, stats(&t).retained);
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_given_up_only_when_nothing_of_it_is_open() {
    let t = connect();
    slots(&t, "a.b", 2).await;
    let mut a = open(&t, spec("s", &["a.b"])).await;
    (0..20).for_each(|i| publish(&t, "a.b", &format!("k{i}"), i));
    let out = a.take(20).await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    assert_eq!((b.role(), a.slots().len()), (Some(Role::StandBy), 2));
    (20..40).for_each(|i| publish(&t, "a.b", &format!("k{}", i % 20), i));
    b.nothing();
    a.poll_now(100);
    let newer: Vec<_> = std::iter::from_fn(|| a.taken()).collect();
    let keeps = newer[0].slot;
    assert!(newer.iter().all(|d| d.slot == keeps), "nothing more of what is given up");
    let (given_up, kept): (Vec<Delivery>, Vec<_>) = out.into_iter().partition(|d| d.slot != keeps);
    let mut given_up = given_up.into_iter();
    let last = given_up.next().unwrap();
    ack(given_up);
    b.nothing();
    let slot = last.slot;
    last.acker.release(Duration::ZERO);
    assert_eq!(b.slots(), [slot]);
    assert!(b.next().await.redelivered, "what was given back goes to the new owner, first");
    assert_eq!(a.slots(), [1 - slot]);
    ack(kept);
}

#[tokio::test(start_paused = true)]
async fn the_slots_of_the_dead_are_taken_over_at_once() {
    let t = connect();
    slots(&t, "a.b", 6).await;
    let mut a = open(&t, spec("s", &["a.b"])).await;
    let b = open(&t, spec("s", &["a.b"])).await;
    let mut c = open(&t, spec("s", &["a.b"])).await;
    assert_eq!((a.slots().len(), c.slots().len()), (2, 2));
    drop(b);
    assert_eq!((a.slots().len(), c.slots().len()), (3, 3));
    drop(c);
    assert_eq!(a.slots().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn events_of_several_topics_meet_in_a_slot_number() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.*"])).await;
    publish(&t, "a.one", "k", 1);
    assert_eq!(reader.drain(), ["1"]);
    slots(&t, "a.many", 4).await;
    assert_eq!(reader.slots().len(), 4);
    (0..20).for_each(|i| publish(&t, "a.many", &format!("k{i}"), i));
    publish(&t, "a.many", "", "no key");
    let got = reader.take(21).await;
    assert!(got.iter().map(|d| d.slot).collect::<BTreeSet<_>>().len() > 2);
    assert!(got.iter().all(|d| said(d) != "no key" || d.slot == 0));
    let retry = got[5].message.as_ref().clone();
    let slot = got[5].slot;
    ack(got);
    send_to(&t, "s", retry, None);
    assert_eq!(reader.next().await.slot, slot, "an address keeps the slot of the key");
}

#[tokio::test(start_paused = true)]
async fn a_release_holds_its_key_across_instances() {
    let t = connect();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    (1..=2).for_each(|i| publish(&t, "a.b", "k", i));
    publish(&t, "a.b", "l", "l");
    let start = Instant::now();
    a.next().await.acker.release(Duration::from_secs(5));
    drop(a);
    let mut b = open(&t, spec("s", &["a.b"])).await;
    b.expect("l").await.acker.ack();
    b.nothing();
    ack([b.expect("1").await, b.expect("2").await]);
    assert!(start.elapsed() >= Duration::from_secs(5));
}

fn hold_back(notices: &[Notice]) -> Option<u64> {
    notices.iter().find_map(|notice| match notice {
        Notice::HoldBack { slot: 0, after } => Some(*after),
        _ => None,
    })
}

fn is_over(notices: &[Notice]) -> bool {
    notices.iter().any(|notice| matches!(notice, Notice::HoldBackOver { slot: 0 }))
}

#[tokio::test(start_paused = true)]
async fn a_new_owner_is_told_to_hold_back_until_the_old_ones_events_have_come() {
    let t = slow_to_redeliver();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(b.role(), Some(Role::StandBy));
    (1..=3).for_each(|i| publish(&t, "a.b", "k", i));
    let mut out = a.take(3).await;
    out.remove(0).acker.ack();
    publish(&t, "a.b", "k", 4);
    let start = Instant::now();
    drop(a);
    let notices = b.notices();
    assert!(matches!(notices[0], Notice::Role(Role::Active { .. })), "{notices:?}");
    let after = hold_back(&notices).unwrap();
    let newer = b.expect("4").await;
    assert!(newer.position > after && start.elapsed().is_zero());
    let got = b.take(2).await;
    assert_eq!(texts(&got), ["2", "3"]);
    assert!(got.iter().all(|d| d.position <= after && d.redelivered && d.hand_outs == Some(2)));
    assert!(start.elapsed() >= Duration::from_secs(10));
    assert!(is_over(&b.notices()));
    b.nothing();
}

#[tokio::test(start_paused = true)]
async fn what_is_held_back_does_not_fill_the_window() {
    let t = slow_to_redeliver();
    let limited = |max_in_flight| SubscriptionSpec { max_in_flight, ..spec("s", &["a.b"]) };
    let mut a = open(&t, limited(3)).await;
    let mut b = open(&t, limited(4)).await;
    (0..20).for_each(|i| publish(&t, "a.b", "k", i));
    let _out = a.take(3).await;
    drop(a);
    assert_eq!(hold_back(&b.notices()), Some(3));
    // A core that holds back settles nothing newer until the older ones have come.
    let newer = b.expect("3").await;
    let got = b.take(3).await;
    assert_eq!(texts(&got), ["0", "1", "2"]);
    assert!(is_over(&b.notices()));
    b.nothing();
    ack(got);
    ack([newer]);
    assert_eq!(texts(&b.take(4).await), ["4", "5", "6", "7"]);
}

#[tokio::test(start_paused = true)]
async fn holding_back_starts_anew_when_the_new_owner_dies_too() {
    let t = slow_to_redeliver();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    (1..=3).for_each(|i| publish(&t, "a.b", "k", i));
    let _one = a.next().await;
    drop(a);
    advance(Duration::from_secs(5)).await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(hold_back(&b.notices()), Some(1));
    let _two = b.expect("2").await;
    drop(b);
    let mut c = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(hold_back(&c.notices()), Some(2));
    let got = c.take(3).await;
    assert_eq!(texts(&got), ["3", "1", "2"]);
    assert!(is_over(&c.notices()));
}

#[tokio::test(start_paused = true)]
async fn closing_in_order_leaves_nothing_to_hold_back() {
    let t = slow_to_redeliver();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "k", 1);
    let _one = a.next().await;
    a.close().await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(hold_back(&b.notices()), None);
    let start = Instant::now();
    b.expect("1").await;
    assert!(start.elapsed().is_zero());
}

#[tokio::test(start_paused = true)]
async fn a_stand_by_takes_over_from_who_was_cut_off() {
    let t = connect();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    let mut b = open(&t, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "k", 1);
    let cut_off = a.next().await;
    a.role();
    crate::testing::native(&t).lose_leases(&name("s")).unwrap();
    let notices = a.notices();
    assert!(notices.iter().any(|n| matches!(n, Notice::Leases)), "{notices:?}");
    assert!(notices.iter().any(|n| matches!(n, Notice::Role(Role::StandBy))), "{notices:?}");
    assert!(b.expect("1").await.redelivered);
    cut_off.acker.ack();
    a.nothing();
}

#[tokio::test(start_paused = true)]
async fn what_recovers_waits_for_an_earlier_release_of_its_key() {
    let t = slow_to_redeliver();
    let mut a = open(&t, spec("s", &["a.b"])).await;
    (1..=3).for_each(|i| publish(&t, "a.b", "k", i));
    let mut out = a.take(2).await;
    let start = Instant::now();
    out.remove(0).acker.release(Duration::from_secs(60));
    drop(a);
    let mut b = open(&t, spec("s", &["a.b"])).await;
    let newer = b.expect("3").await;
    assert_eq!(hold_back(&b.take_notices()), Some(newer.position - 1));
    let got = b.take(2).await;
    assert_eq!(texts(&got), ["1", "2"]);
    assert!(start.elapsed() >= Duration::from_secs(60));
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_a_slot_holds_nothing_back_for_it_any_more() {
    let t = slow_to_redeliver();
    slots(&t, "a.b", 2).await;
    let mut a = open(&t, spec("s", &["a.b"])).await;
    (0..10).for_each(|i| publish(&t, "a.b", &format!("k{i}"), i));
    let _out = a.take(10).await;
    drop(a);
    let mut b = open(&t, spec("s", &["a.b"])).await;
    assert_eq!(b.notices().len(), 3, "a role, and to hold back in both slots");
    let mut c = open(&t, spec("s", &["a.b"])).await;
    let told = c.notices();
    let [Notice::Role(Role::Active { slots }), Notice::HoldBack { slot, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(*slots, [*slot]);
    let told = b.notices();
    assert!(told.iter().any(|n| matches!(n, Notice::HoldBackOver { slot: over } if over == slot)), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn who_keeps_a_slot_after_all_reads_on() {
    let t = connect();
    slots(&t, "a.b", 2).await;
    let mut a = open(&t, spec("s", &["a.b"])).await;
    (0..10).for_each(|i| publish(&t, "a.b", &format!("k{i}"), i));
    let _out = a.take(10).await;
    let b = open(&t, spec("s", &["a.b"])).await;
    (0..10).for_each(|i| publish(&t, "a.b", &format!("k{i}"), i));
    a.poll_now(100);
    let reading = tokio::spawn(async move {
        a.take(10).await;
    });
    tokio::task::yield_now().await;
    assert!(!reading.is_finished());
    drop(b);
    reading.await.unwrap();
}
