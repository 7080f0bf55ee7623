//! Members of a Kafka subscription join, leave and die, and the broker is killed, while events flow.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tidings::handler::{Delivered, State};
use tidings::prelude::*;
use tidings::transport::{TopicSpec, Topology};
use tidings_core::{BusConfig, Running, Topic};
use tidings_kafka::{KafkaConfig, KafkaTransport};
use tidings_tests::server::Server;
use tidings_tests::{Order, eventually, order};

const KEYS: u64 = 40;
const EACH: u64 = 250;

#[derive(Default)]
struct Seen {
    /// By key: the numbers in the order of their first runs.
    firsts: HashMap<String, Vec<u64>>,
    repeats: usize,
    wrong: Vec<String>,
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Seen>>);

async fn handle(order: Order, told: Delivered, State(log): State<Log>) {
    tokio::time::sleep(Duration::from_millis(1)).await;
    let mut seen = log.0.lock().expect("no panic inside");
    let firsts = seen.firsts.entry(order.customer.clone()).or_default();
    if firsts.contains(&order.number) {
        seen.repeats += 1;
        if !told.possible_duplicate && told.attempt == 1 {
            seen.wrong.push(format!("{order:?} came again unmarked"));
        }
        return;
    }
    let expected = firsts.len() as u64;
    firsts.push(order.number);
    if order.number != expected {
        seen.wrong.push(format!("{order:?} came where {expected} should have"));
    }
}

async fn member(config: &KafkaConfig, log: &Log) -> (Arc<KafkaTransport>, Running) {
    let transport = KafkaTransport::connect(config.clone()).await.expect("it connects");
    let bus = Bus::new(Arc::clone(&transport) as _, BusConfig::default()).expect("a valid configuration");
    let config = SubscriptionConfig::default().concurrency(32);
    let service = Service::new("billing").state(log.clone()).on_with(config, handle);
    (transport, service.start(&bus).await.expect("it starts"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Java, and takes a minute: cargo test -p tidings-tests --test kafka_storm -- --ignored"]
async fn nothing_is_lost_or_overtaken_in_a_storm() {
    let server = Server::start("kafka").expect("a broker");
    let mut config = KafkaConfig::from_url(server.url()).expect("a url");
    config.session_timeout = Duration::from_secs(3);
    let log = Log::default();
    let transport = KafkaTransport::connect(config.clone()).await.expect("it connects");
    let topic = TopicSpec { slots: 6, ..TopicSpec::new(Topic::new("shop.order.placed").expect("a name")) };
    let topology = Topology { topics: vec![topic], subscriptions: Vec::new() };
    tidings::transport::Transport::provision(&*transport, &topology).await.expect("provisioned");
    let mut members = vec![member(&config, &log).await];
    let bus = Bus::new(transport as _, BusConfig::default()).expect("a valid configuration");
    let publishing = tokio::spawn(async move {
        for number in 0..EACH {
            let orders: Vec<_> = (0..KEYS).map(|key| order(&format!("c{key}"), number)).collect();
            bus.publish_all(&orders).await.expect("confirmed");
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    });
    for round in 0..8 {
        members.push(member(&config, &log).await);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (_transport, running) = members.remove(0);
        match round % 4 {
            1 => drop(running),
            3 => tokio::task::block_in_place(|| server.kill().and_then(|()| server.up())).expect("it comes back"),
            _ => drop(running.drain(Duration::from_secs(20)).await),
        }
    }
    publishing.await.expect("all is published");
    let count = || log.0.lock().expect("no panic inside").firsts.values().map(Vec::len).sum::<usize>();
    eventually("all are handled", || async { count() as u64 == KEYS * EACH }).await;
    let seen = log.0.lock().expect("no panic inside");
    println!("{} repeats", seen.repeats);
    assert!(seen.wrong.is_empty(), "{:#?}", &seen.wrong[..seen.wrong.len().min(20)]);
}
