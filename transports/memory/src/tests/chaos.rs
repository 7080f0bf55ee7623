//! Many publishers and instances that join, release, stop and die, in an order that a seed decides.

use crate::testing::*;
use crate::{MemoryConfig, MemoryTransport};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Delivery, Lease, Notice, Ordering, Start, SubscriptionSpec, Transport};
use tokio::time::advance;

const KEYS: usize = 12;
const EVENTS: usize = 400;

struct Run {
    seed: u64,
    rng: fastrand::Rng,
    transport: Arc<MemoryTransport>,
    spec: SubscriptionSpec,
    ordered: bool,
    /// What the dead left open stays away for a while; newer events are then handed out, and held back, before it.
    slow: bool,
    /// How many events of each key were published.
    published: [usize; KEYS],
    pending: Vec<std::pin::Pin<Box<dyn Future<Output = Option<tidings_core::transport::PublishFailure>>>>>,
    members: Vec<Member>,
    /// The last event of each key that anyone was handed for the first time.
    first: HashMap<usize, usize>,
    hand_outs: HashMap<(usize, usize), u32>,
    acked: BTreeSet<(usize, usize)>,
    /// Settled by an owner that was dead by then.
    stale: Vec<Delivery>,
}

struct Member {
    reader: Reader,
    out: Vec<Delivery>,
    /// Slots it holds back: what is newer than this.
    held: BTreeMap<u32, u64>,
    stopped: bool,
}

fn key_and_number(delivery: &Delivery) -> (usize, usize) {
    let (key, number) = said(delivery).split_once('/').unwrap();
    (key.parse().unwrap(), number.parse().unwrap())
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let ordered = rng.bool();
        let config = MemoryConfig {
            // Room for about fifty, so that publishing waits now and then.
            capacity: 20_000,
            retain: if rng.bool() { 0 } else { 4000 },
            redelivery_delay: if rng.bool() { Duration::ZERO } else { ms(300) },
            ..MemoryConfig::default()
        };
        let slow = !config.redelivery_delay.is_zero();
        let spec = SubscriptionSpec {
            ordering: if ordered { Ordering::Key } else { Ordering::None },
            start: if rng.bool() { Start::New } else { Start::Beginning },
            max_in_flight: rng.usize(1..20),
            ..spec("s", &["a.*"])
        };
        Self {
            seed,
            rng,
            transport: MemoryTransport::connect(config).unwrap(),
            spec,
            ordered,
            slow,
            published: [0; KEYS],
            pending: Vec::new(),
            members: Vec::new(),
            first: HashMap::new(),
            hand_outs: HashMap::new(),
            acked: BTreeSet::new(),
            stale: Vec::new(),
        }
    }

    async fn run(mut self) {
        let many = self.rng.u32(1..5);
        slots(&self.transport, "a.b", many).await;
        self.join().await;
        while self.published.iter().sum::<usize>() < EVENTS {
            self.step().await;
            self.check();
        }
        self.finish().await;
    }

    async fn step(&mut self) {
        match self.rng.u32(0..100) {
            0..35 => self.publish(),
            35..60 => self.poll(),
            60..85 => self.settle(),
            85..88 if self.members.len() < 4 => self.join().await,
            88..91 => self.leave().await,
            91..92 => self.lose_leases(),
            92..95 => self.stale.clear(),
            _ => advance(ms(self.rng.u64(1..200))).await,
        }
    }

    fn publish(&mut self) {
        let key = self.rng.usize(..KEYS);
        let number = self.published[key];
        self.published[key] += 1;
        let event = saying("a.b", &format!("key-{key}"), format!("{key}/{number}"));
        self.pending.push(Box::pin(to_topic(&self.transport, event)));
    }

    async fn join(&mut self) {
        let reader = open(&self.transport, self.spec.clone()).await;
        self.members.push(Member { reader, out: Vec::new(), held: BTreeMap::new(), stopped: false });
    }

    fn poll(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let at = self.rng.usize(..self.members.len());
        let max = self.rng.usize(1..10);
        self.members[at].reader.poll_now(max);
        for notice in self.members[at].reader.take_notices() {
            match notice {
                Notice::HoldBack { slot, after } => {
                    self.members[at].held.insert(slot, after);
                }
                Notice::HoldBackOver { slot } => {
                    self.members[at].held.remove(&slot);
                }
                _ => {}
            }
        }
        while let Some(delivery) = self.members[at].reader.taken() {
            self.take(at, delivery);
        }
    }

    fn take(&mut self, at: usize, delivery: Delivery) {
        let (key, number) = key_and_number(&delivery);
        let hand_outs = self.hand_outs.entry((key, number)).or_default();
        *hand_outs += 1;
        assert_eq!(delivery.hand_outs, Some(*hand_outs), "seed {}: hand-outs of {key}/{number}", self.seed);
        assert_eq!(delivery.redelivered, *hand_outs > 1, "seed {}", self.seed);
        if self.ordered && !self.slow && *hand_outs == 1 {
            let last = self.first.insert(key, number);
            assert!(last.is_none_or(|last| last + 1 == number), "seed {}: {key}: {number} after {last:?}", self.seed);
        }
        self.members[at].out.push(delivery);
    }

    /// Acks or releases as core would: of a key only the oldest, and nothing that is held back.
    fn settle(&mut self) {
        let Some(at) = self.rng.usize(..8).checked_rem(self.members.len()) else { return };
        let member = &mut self.members[at];
        for index in 0..member.out.len() {
            let delivery = &member.out[index];
            let (key, number) = key_and_number(delivery);
            let held = member.held.get(&delivery.slot).is_some_and(|after| delivery.position > *after);
            let first =
                member.out.iter().all(|other| key_and_number(other).0 != key || other.position >= delivery.position);
            let dead = delivery.acker.lease() == Lease::Lost;
            if !dead && self.ordered && (held || !first) {
                continue;
            }
            let delivery = member.out.remove(index);
            if dead {
                delivery.acker.ack();
            } else if self.rng.u32(0..4) > 0 {
                if self.ordered {
                    let before = (0..number).filter(|n| !self.acked.contains(&(key, *n))).count();
                    assert_eq!(before, 0, "seed {}: {key}/{number} is handled before {before} others", self.seed);
                }
                self.acked.insert((key, number));
                delivery.acker.ack();
            } else {
                delivery.acker.release(ms(self.rng.u64(0..3) * 100));
                self.give_back_later_ones(at, key);
            }
            return;
        }
    }

    /// What is out of a key whose first event was released must not be handled before it.
    fn give_back_later_ones(&mut self, at: usize, key: usize) {
        let out = &mut self.members[at].out;
        let mut later: Vec<_> = out.extract_if(.., |other| self.ordered && key_and_number(other).0 == key).collect();
        self.rng.shuffle(&mut later);
        later.into_iter().for_each(|delivery| delivery.acker.release(Duration::ZERO));
    }

    async fn leave(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let at = self.rng.usize(..self.members.len());
        match self.rng.u32(0..3) {
            0 => {
                let gone = self.members.swap_remove(at);
                drop(gone.reader);
                self.stale.extend(gone.out);
            }
            1 => {
                let gone = self.members.swap_remove(at);
                gone.reader.close().await;
                self.stale.extend(gone.out);
            }
            _ => {
                self.members[at].stopped = true;
                self.members[at].reader.stop();
            }
        }
    }

    fn lose_leases(&mut self) {
        native(&self.transport).lose_leases(&self.spec.name).unwrap();
    }

    fn check(&self) {
        let mut owners = HashMap::new();
        for (at, member) in self.members.iter().enumerate() {
            let live = || member.out.iter().filter(|delivery| delivery.acker.lease() == Lease::Live);
            assert!(live().count() <= self.spec.max_in_flight, "seed {}: in flight", self.seed);
            for delivery in live().filter(|_| self.ordered) {
                let owner = *owners.entry(key_and_number(delivery).0).or_insert(at);
                assert_eq!(owner, at, "seed {}: a key has one owner", self.seed);
            }
        }
        assert!(stats(&self.transport).stored <= 20_000, "seed {}", self.seed);
    }

    async fn finish(mut self) {
        self.members.retain(|member| !member.stopped);
        self.join().await;
        let published: usize = self.published.iter().sum();
        for _ in 0..200_000 {
            if self.acked.len() == published {
                break;
            }
            match self.rng.u32(0..40) {
                0 => advance(ms(50)).await,
                1..20 => self.poll(),
                _ => self.settle(),
            }
            self.check();
        }
        assert_eq!(self.acked.len(), published, "seed {}: lost, or stuck: {:?}", self.seed, stats(&self.transport));
        for answer in self.pending {
            assert!(answer.await.is_none());
        }
        let stats = stats(&self.transport);
        assert_eq!((stats.stored, stats.waiting), (stats.retained, 0), "seed {}", self.seed);
        self.transport.close(tokio::time::Instant::now()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_lost_or_out_of_order_whoever_dies() {
    for seed in 0..150 {
        Run::new(seed).run().await;
    }
}

/// The same on real threads, for what only those can show.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_between_threads() {
    for ordering in [Ordering::Key, Ordering::None] {
        let t = MemoryTransport::connect(MemoryConfig { capacity: 100_000, ..MemoryConfig::default() }).unwrap();
        slots(&t, "a.b", 4).await;
        let spec = SubscriptionSpec { ordering, max_in_flight: 16, ..spec("s", &["a.b"]) };
        let (told, mut hears) = tokio::sync::mpsc::unbounded_channel();
        let mut readers = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let (mut reader, told) = (open(&t, spec.clone()).await, told.clone());
            readers.spawn(async move {
                while let Some(delivery) = reader.next_or_end().await {
                    let said = said(&delivery).to_owned();
                    // Before it is told: when all are heard, all are settled.
                    delivery.acker.ack();
                    told.send(said).unwrap();
                }
            });
        }
        let publishers = (0..3).map(|p| {
            let t = Arc::clone(&t);
            tokio::spawn(async move {
                for i in 0..2000 {
                    assert!(to_topic(&t, saying("a.b", &format!("k{}", i % 50), format!("{p}/{i}"))).await.is_none());
                }
            })
        });
        futures_util::future::join_all(publishers).await.into_iter().for_each(|done| done.unwrap());
        let mut last = HashMap::new();
        for _ in 0..6000 {
            let heard = tokio::time::timeout(Duration::from_secs(60), hears.recv()).await.unwrap().unwrap();
            let (publisher, i) = heard.split_once('/').unwrap();
            let i: usize = i.parse().unwrap();
            let before = last.insert((publisher.to_owned(), i % 50), i);
            assert!(ordering == Ordering::None || before < Some(i), "{heard} after {before:?}");
        }
        t.close(tokio::time::Instant::now() + Duration::from_secs(60)).await.unwrap();
        while readers.join_next().await.is_some() {}
        assert_eq!(stats(&t).stored, stats(&t).retained);
    }
}
