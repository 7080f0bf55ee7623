//! Publishers and instances in several transports that join, release, stop, die and come back, in an order that a seed decides.

use crate::DirectoryTransport;
use crate::testing::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tidings_core::transport::{Delivery, Lease, Ordering, SubscriptionSpec};

const KEYS: usize = 5;
const EVENTS: usize = 80;

struct Run {
    seed: u64,
    rng: fastrand::Rng,
    folder: Folder,
    /// As processes: they know of each other by the files alone.
    transports: Vec<Arc<DirectoryTransport>>,
    spec: SubscriptionSpec,
    ordered: bool,
    published: [usize; KEYS],
    members: Vec<Member>,
    hand_outs: HashMap<(usize, usize), u32>,
    acked: BTreeSet<(usize, usize)>,
    /// Settled by an owner that was dead by then.
    stale: Vec<Delivery>,
}

struct Member {
    reader: Reader,
    out: Vec<Delivery>,
    stopped: bool,
}

fn key_and_number(delivery: &Delivery) -> (usize, usize) {
    let (key, number) = said(delivery).split_once('/').unwrap();
    (key.parse().unwrap(), number.parse().unwrap())
}

impl Run {
    async fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let folder = Folder::new();
        let ordered = rng.u32(0..3) > 0;
        let ordering = if ordered { Ordering::Key } else { Ordering::None };
        let spec = SubscriptionSpec { ordering, max_in_flight: rng.usize(1..12), ..spec("s", &["a.>"]) };
        let transports = vec![folder.connect().await, folder.connect().await];
        let (published, members, hand_outs) = ([0; KEYS], Vec::new(), HashMap::new());
        let (acked, stale) = (BTreeSet::new(), Vec::new());
        Self { seed, rng, folder, transports, spec, ordered, published, members, hand_outs, acked, stale }
    }

    async fn run(mut self) {
        self.join().await;
        while self.published.iter().sum::<usize>() < EVENTS {
            match self.rng.u32(0..100) {
                0..30 => self.publish().await,
                30..60 => self.poll().await,
                60..86 => self.settle(),
                86..90 if self.members.len() < 4 => self.join().await,
                90..94 => self.leave().await,
                94..96 => self.stale.clear(),
                96..97 => self.restart().await,
                _ => tokio::time::sleep(ms(self.rng.u64(1..30))).await,
            }
            self.check();
        }
        self.finish().await;
    }

    fn transport(&mut self) -> Arc<DirectoryTransport> {
        Arc::clone(&self.transports[self.rng.usize(..self.transports.len())])
    }

    async fn publish(&mut self) {
        let key = self.rng.usize(..KEYS);
        for _ in 0..self.rng.usize(1..4) {
            let number = self.published[key];
            self.published[key] += 1;
            publish(&*self.transport(), "a.b", &format!("key-{key}"), format!("{key}/{number}")).await;
        }
    }

    async fn join(&mut self) {
        let reader = open(&*self.transport(), self.spec.clone()).await;
        self.members.push(Member { reader, out: Vec::new(), stopped: false });
    }

    /// A transport goes without closing; its instances are dropped with it.
    async fn restart(&mut self) {
        self.transports.remove(0);
        self.transports.push(self.folder.connect().await);
    }

    async fn poll(&mut self) {
        let Some(at) = self.rng.usize(..8).checked_rem(self.members.len()) else { return };
        let max = self.rng.usize(1..10);
        let member = &mut self.members[at];
        // Given up in the middle now and then, as core does.
        let _ = tokio::time::timeout(ms(self.rng.u64(0..15)), member.reader.poll(max)).await;
        for delivery in member.reader.taken() {
            let (key, number) = key_and_number(&delivery);
            let seen = self.hand_outs.entry((key, number)).or_default();
            *seen += 1;
            assert!(!self.acked.contains(&(key, number)), "seed {}: {key}/{number} was acked", self.seed);
            assert!(delivery.redelivered || *seen == 1, "seed {}: {key}/{number} is not marked", self.seed);
            assert!(delivery.hand_outs >= Some(*seen), "seed {}: {key}/{number}", self.seed);
            member.out.push(delivery);
        }
    }

    /// Acks or releases as core would: of a key only the oldest.
    fn settle(&mut self) {
        let Some(at) = self.rng.usize(..8).checked_rem(self.members.len()) else { return };
        let out = &mut self.members[at].out;
        let oldest = |delivery: &Delivery| {
            let key = key_and_number(delivery).0;
            out.iter().all(|other| key_and_number(other).0 != key || other.position >= delivery.position)
        };
        let Some(index) = out.iter().position(|delivery| !self.ordered || oldest(delivery)) else { return };
        let delivery = out.remove(index);
        let (key, number) = key_and_number(&delivery);
        if delivery.acker.lease() == Lease::Lost {
            return self.stale.push(delivery);
        }
        match self.rng.u32(0..8) {
            0 => delivery.acker.release(ms(self.rng.u64(0..3) * 30)),
            1 => drop(delivery),
            _ => {
                let open = (0..number).filter(|n| !self.acked.contains(&(key, *n))).count();
                assert!(!self.ordered || open == 0, "seed {}: {key}/{number} before {open} others", self.seed);
                self.acked.insert((key, number));
                return delivery.acker.ack();
            }
        }
        // What is out of a key whose first event was given back must not be handled before it.
        let later = out.extract_if(.., |other| self.ordered && key_and_number(other).0 == key).collect::<Vec<_>>();
        later.into_iter().rev().for_each(|delivery| delivery.acker.release(Duration::ZERO));
    }

    async fn leave(&mut self) {
        let Some(at) = self.rng.usize(..8).checked_rem(self.members.len()) else { return };
        if self.rng.u32(0..3) == 0 {
            self.members[at].stopped = true;
            return self.members[at].reader.stop();
        }
        let gone = self.members.swap_remove(at);
        if self.rng.bool() {
            drop(gone.reader);
        } else {
            gone.reader.close().await;
        }
        self.stale.extend(gone.out);
    }

    fn check(&self) {
        let live = |member: &Member| member.out.iter().filter(|d| d.acker.lease() == Lease::Live).count();
        let open: Vec<_> = self.members.iter().map(live).filter(|open| *open > 0).collect();
        assert!(open.len() <= 1, "seed {}: {open:?} are out, of one active instance", self.seed);
        assert!(open.iter().all(|open| *open <= self.spec.max_in_flight), "seed {}: {open:?} in flight", self.seed);
    }

    async fn finish(mut self) {
        self.members.retain(|member| !member.stopped);
        self.join().await;
        let published = self.published.iter().sum::<usize>();
        for _ in 0..20_000 {
            if self.acked.len() == published {
                break;
            }
            if self.rng.bool() {
                self.poll().await;
            } else {
                self.settle();
            }
            self.check();
        }
        assert_eq!(self.acked.len(), published, "seed {}: lost, or stuck", self.seed);
        for member in self.members.drain(..) {
            member.reader.close().await;
        }
        open(&*self.transport(), self.spec.clone()).await.nothing().await;
    }
}

#[tokio::test]
async fn nothing_is_lost_or_out_of_order_whoever_dies() {
    // More with `TIDINGS_SEEDS=100`; a folder in memory makes it quick: `TMPDIR=/dev/shm`.
    let seeds = std::env::var("TIDINGS_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(3);
    for seed in 0..seeds {
        Run::new(seed).await.run().await;
    }
}
