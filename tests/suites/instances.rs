//! Order per key across instances that join, drain and die.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tidings::memory::{MemoryConfig, MemoryTransport};
use tidings::prelude::*;
use tidings::transport::{TopicSpec, Topology, Transport};
use tidings::{BusConfig, Topic};
use tidings_tests::{Order, eventually, order};
use tokio::sync::oneshot;

const KEYS: u64 = 1_000;
const EVENTS: u64 = 100_000;

/// What all instances together have begun to handle, by key.
#[derive(Clone, Default)]
struct History(Arc<Mutex<Begun>>);

#[derive(Default)]
struct Begun {
    last: HashMap<String, u64>,
    first_runs: u64,
    repeats: u64,
    wrong: Vec<String>,
}

impl History {
    fn begin(&self, order: &Order, delivered: &Delivered) {
        let mut begun = self.0.lock().unwrap();
        let expected = begun.last.get(&order.customer).map_or(0, |last| last + 1);
        if order.number == expected {
            begun.last.insert(order.customer.clone(), order.number);
            begun.first_runs += 1;
        } else if order.number > expected {
            begun.wrong.push(format!("{order:?} overtook {expected}"));
        } else {
            begun.repeats += 1;
            if !delivered.possible_duplicate {
                begun.wrong.push(format!("{order:?} came again unmarked"));
            }
        }
    }
}

async fn handle(order: Order, delivered: Delivered, State(history): State<History>) {
    history.begin(&order, &delivered);
    tokio::task::yield_now().await;
}

#[derive(Clone, Copy)]
enum Parting {
    /// As a process does that is killed: nothing of it runs any more when the broker notices.
    Dies,
    Drains,
}

/// One instance of the service, on a thread and runtime of its own.
struct Instance {
    part: oneshot::Sender<Parting>,
    thread: JoinHandle<()>,
}

impl Instance {
    async fn start(bus: &Bus, history: &History) -> Self {
        let (part, parting) = oneshot::channel();
        let (ready, started) = oneshot::channel();
        let (bus, history) = (bus.clone(), history.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let running = Service::new("billing").state(history).on(handle).start(&bus).await.unwrap();
                ready.send(()).unwrap();
                if let Ok(Parting::Drains) = parting.await {
                    let drained = running.drain(Duration::from_secs(10)).await;
                    assert_eq!((drained.abandoned, drained.flushed.stale), (0, 0));
                }
            });
        });
        started.await.unwrap();
        Self { part, thread }
    }

    async fn part(self, parting: Parting) {
        let _ = self.part.send(parting);
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
    }
}

/// Publishes to two instances, the older of which goes away now and then; checks that nothing is lost or reordered.
async fn survives(config: MemoryConfig, slots: u32, parting: Parting) {
    let transport = MemoryTransport::connect(config).unwrap();
    let topics = vec![TopicSpec { slots, ..TopicSpec::new(Topic::new("shop.order.placed").unwrap()) }];
    transport.provision(&Topology { topics, subscriptions: Vec::new() }).await.unwrap();
    let bus = Bus::new(transport, BusConfig::default()).unwrap();
    let history = History::default();
    let mut instances = vec![Instance::start(&bus, &history).await, Instance::start(&bus, &history).await];
    let publisher = bus.clone();
    let publishing = tokio::spawn(async move {
        for first in (0..EVENTS).step_by(KEYS as usize) {
            let orders: Vec<_> = (0..KEYS).map(|key| order(&format!("k{key}"), first / KEYS)).collect();
            publisher.publish_all(&orders).await.unwrap();
        }
    });
    while history.0.lock().unwrap().first_runs < EVENTS && history.0.lock().unwrap().wrong.is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        instances.remove(0).part(parting).await;
        instances.push(Instance::start(&bus, &history).await);
        let before = history.0.lock().unwrap().first_runs;
        eventually("progress", || async {
            let begun = history.0.lock().unwrap();
            begun.first_runs > before || begun.first_runs == EVENTS || !begun.wrong.is_empty()
        })
        .await;
    }
    publishing.await.unwrap();
    let begun = history.0.lock().unwrap();
    assert_eq!(begun.wrong, Vec::<String>::new());
    assert_eq!(begun.first_runs, EVENTS);
    println!("{EVENTS} events, {} repeats, all marked", begun.repeats);
    assert!(matches!(parting, Parting::Dies) || begun.repeats == 0, "a drain repeats nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_dies_breaks_no_order_and_loses_nothing() {
    survives(MemoryConfig::default(), 1, Parting::Dies).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_where_instances_share_slots() {
    survives(MemoryConfig::default(), 8, Parting::Dies).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_where_open_events_come_back_late_and_newer_ones_would_overtake() {
    let config = MemoryConfig { redelivery_delay: Duration::from_millis(30), ..MemoryConfig::default() };
    survives(config, 4, Parting::Dies).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_drains_hands_over_without_repeats() {
    survives(MemoryConfig::default(), 4, Parting::Drains).await;
}
