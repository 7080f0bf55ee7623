//! Reading again.

use crate::testing::*;
use crate::{MemoryConfig, MemoryTransport};
use std::time::{Duration, SystemTime};
use tidings_core::transport::{ReplayFrom, ReplaySpec, Transport};
use tokio::time::advance;

#[tokio::test(start_paused = true)]
async fn a_replay_reads_all_that_is_kept_and_moves_nothing() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    (0..4).for_each(|i| publish(&t, "a.b", "k", i));
    publish(&t, "x.y", "k", "another topic");
    ack(reader.take(2).await);
    let mut again = replay(&t, replay_of(&["a.>"], ReplayFrom::Beginning)).await;
    let got = again.take(4).await;
    assert_eq!(texts(&got), ["0", "1", "2", "3"]);
    assert!(got.iter().all(|d| d.replayed && !d.redelivered));
    ack(got);
    publish(&t, "a.b", "k", "after it began");
    again.end().await;
    drop(again);
    assert_eq!(reader.drain(), ["2", "3", "after it began"]);
    assert_eq!(stats(&t).stored, stats(&t).retained);
}

#[tokio::test(start_paused = true)]
async fn a_replay_has_a_window_of_its_own_and_ends_when_all_is_settled() {
    let t = connect();
    (0..3).for_each(|i| publish(&t, "a.b", "k", i));
    let spec = ReplaySpec { max_in_flight: 2, ..replay_of(&["a.b"], ReplayFrom::Beginning) };
    let mut again = replay(&t, spec).await;
    let mut out = again.take(2).await;
    again.nothing();
    out.remove(0).acker.release(ms(10));
    out.remove(0).acker.ack();
    let got = again.take(2).await;
    assert_eq!(texts(&got), ["0", "2"]);
    assert!(got[0].redelivered && got[0].replayed);
    again.nothing();
    ack(got);
    again.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_replay_starts_at_a_position_or_a_time() {
    let t = connect();
    let mut reader = open(&t, spec("s", &["a.b"])).await;
    publish(&t, "a.b", "", 1);
    advance(Duration::from_secs(60)).await;
    let time = SystemTime::now() + Duration::from_secs(30);
    publish(&t, "a.b", "", 2);
    publish(&t, "a.b", "", 3);
    let position = reader.take(3).await[2].position;
    advance(ms(1)).await;
    let mut by_time = replay(&t, replay_of(&["a.b"], ReplayFrom::Time(time))).await;
    assert_eq!(by_time.drain(), ["2", "3"]);
    let mut by_position = replay(&t, replay_of(&["a.b"], ReplayFrom::Position(position))).await;
    assert_eq!(by_position.drain(), ["3"]);
    let long_ago = ReplayFrom::Time(SystemTime::UNIX_EPOCH);
    assert_eq!(replay(&t, replay_of(&["a.b"], long_ago)).await.drain(), ["1", "2", "3"]);
    let future = ReplayFrom::Time(SystemTime::now() + Duration::from_secs(7 * 24 * 3600));
    replay(&t, replay_of(&["a.b"], future)).await.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_replay_can_follow() {
    let t = connect();
    slots(&t, "a.b", 3).await;
    publish(&t, "a.b", "k", 1);
    let spec = ReplaySpec { follow: true, ..replay_of(&["a.>"], ReplayFrom::Beginning) };
    let mut again = replay(&t, spec).await;
    assert_eq!(again.drain(), ["1"]);
    again.nothing();
    publish(&t, "a.b", "k", 2);
    publish(&t, "a.new", "k", 3);
    let mut got = again.drain();
    got.sort();
    assert_eq!(got, ["2", "3"]);
    again.nothing();
    again.stop();
    again.end().await;
    drop(again);
    publish(&t, "a.b", "k", 4);
    assert_eq!(stats(&t).stored, stats(&t).retained, "nobody has it to settle");
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_is_the_newest() {
    let size = saying("a.b", "", "0").size();
    let config = MemoryConfig { retain: 3 * size, ..MemoryConfig::default() };
    let t = MemoryTransport::connect(config).unwrap();
    (0..5).for_each(|i| publish(&t, "a.b", "", i));
    assert_eq!(replay(&t, replay_of(&["a.b"], ReplayFrom::Beginning)).await.drain(), ["2", "3", "4"]);
    assert_eq!(stats(&t).stored, 3 * size);
}

#[tokio::test(start_paused = true)]
async fn a_replay_that_is_dropped_gives_everything_up() {
    let t = connect();
    (0..5).for_each(|i| publish(&t, "a.b", "k", i));
    let spec = ReplaySpec { follow: true, ..replay_of(&["a.b"], ReplayFrom::Beginning) };
    let mut again = replay(&t, spec).await;
    let mut out = again.take(3).await;
    out.remove(1).acker.release(Duration::from_secs(60));
    assert_eq!(stats(&t).retained, 0, "while it reads they are kept for it");
    drop(again);
    assert_eq!(stats(&t).stored, stats(&t).retained);
    drop(out);
    t.close(tokio::time::Instant::now()).await.unwrap();
}
