//! Faults of real brokers: killed, cut off, stalled, slow, gone; and what is refused.
//!
//! `TIDINGS_TEST_FAULTS=nats` says on which brokers; each test starts one of its own.
//! `TIDINGS_TEST_EVENTS=100000` and `TIDINGS_TEST_GONE_S=30` are for runs by hand. Numbers are printed: `--nocapture`.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tidings::handler::Delivered;
use tidings::prelude::*;
use tidings::transport::Health;
use tidings::{BusEvent, ErrorKind, EventStream, PublishErrors, Running};
use tidings_tests::proxy::{Proxy, Weather};
use tidings_tests::server::Server;
use tidings_tests::{Order, eventually, order};
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::{Instant, sleep, timeout};

/// How long nothing at all may be handled before a test has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const RECOVERY: Duration = Duration::from_secs(5);
/// How far publishers together may be ahead of the handlers, so that a fault always meets both.
const AHEAD: usize = 2_000;

/// A broker, and what only its native client can do.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    /// Deletes where events are kept, under everybody's feet.
    delete: Option<for<'a> fn(&'a Bus) -> BoxFuture<'a, ()>>,
    /// How many events may come again for each kill: what was in flight, where acks are not confirmed.
    in_flight: u64,
    /// How long a service may need to go on when its broker is back. The numbers printed are far lower on a quiet machine.
    recovery: Duration,
}

const KINDS: [Kind; 3] = [
    Kind { name: "nats", delete: Some(|bus| delete_stream(bus).boxed()), in_flight: 0, recovery: RECOVERY },
    // `suites/rabbitmq.rs` deletes its queue.
    Kind { name: "rabbitmq", delete: None, in_flight: 512, recovery: RECOVERY },
    // An outage as long as the session (10 s) takes the partitions away, with what was in flight; and who joins again waits as long
    // for its former self to be forgotten.
    Kind { name: "kafka", delete: None, in_flight: 256, recovery: Duration::from_secs(15) },
];

/// The brokers that `TIDINGS_TEST_FAULTS` names.
fn chosen() -> Vec<Kind> {
    let named = std::env::var("TIDINGS_TEST_FAULTS").unwrap_or_default();
    let names: Vec<_> = named.split(',').map(str::trim).collect();
    let chosen: Vec<_> = KINDS.into_iter().filter(|kind| names.contains(&kind.name)).collect();
    if chosen.is_empty() {
        let known: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
        println!("skipped: TIDINGS_TEST_FAULTS is `{named}` and names none of {}", known.join(", "));
    }
    chosen
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn events() -> u64 {
    number("TIDINGS_TEST_EVENTS", 20_000)
}

async fn delete_stream(bus: &Bus) {
    let client = bus.transport().native().downcast_ref::<async_nats::Client>().unwrap();
    let answer = client.request("$JS.API.STREAM.DELETE.shop", "".into()).await.unwrap();
    assert!(String::from_utf8_lossy(&answer.payload).contains("true"), "{answer:?}");
}

// ---- What was published and handled ----

/// One run of the handler.
struct Run {
    order: Order,
    marked: bool,
    /// When it was published, by this machine's clock.
    published: Option<Instant>,
}

#[derive(Default)]
struct Runs {
    /// How many are confirmed.
    confirmed: usize,
    all: Vec<Run>,
    distinct: HashSet<(String, u64)>,
    last: Option<Instant>,
}

/// The runs of all instances, in the order they began.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Runs>>);

async fn handle(order: Order, delivered: Delivered, State(log): State<Log>) {
    log.begin(order, &delivered);
    tokio::task::yield_now().await;
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, Runs> {
        self.0.lock().unwrap()
    }

    fn begin(&self, order: Order, delivered: &Delivered) {
        let mut runs = self.lock();
        runs.distinct.insert((order.customer.clone(), order.number));
        let published = delivered.delay.and_then(|delay| Instant::now().checked_sub(delay));
        runs.all.push(Run { order, marked: delivered.possible_duplicate || delivered.attempt > 1, published });
        runs.last = Some(Instant::now());
    }

    fn count(&self) -> usize {
        self.lock().distinct.len()
    }

    /// Waits until `done`, as long as something is handled.
    async fn until(&self, what: &str, done: impl Fn(&Runs) -> bool) {
        let begun = Instant::now();
        while !done(&self.lock()) {
            let idle = self.lock().last.unwrap_or(begun).max(begun).elapsed();
            assert!(idle < PATIENCE, "{what}: nothing since {idle:?}, {} handled", self.count());
            sleep(Duration::from_millis(2)).await;
        }
    }

    async fn reaches(&self, count: usize) {
        self.until(&format!("{count} handled"), |runs| runs.distinct.len() >= count).await;
    }

    /// How long from now until the next run begins, if not all `total` have begun.
    async fn next(&self, total: u64) -> Duration {
        let (begun, before) = (Instant::now(), self.lock().all.len());
        self.until("one more handled", |runs| runs.all.len() > before || runs.have(total)).await;
        begun.elapsed()
    }

    /// The same, and until the next run of what is published from now on.
    async fn recovers(&self, total: u64) -> Recovery {
        let (begun, before) = (Instant::now(), self.lock().all.len());
        let handled = self.next(total).await;
        let new = |run: &Run| run.published.is_some_and(|published| published > begun);
        self.until("a new one handled", |runs| runs.all[before..].iter().any(new) || runs.have(total)).await;
        Recovery { handled, new: begun.elapsed() }
    }

    /// Waits for all that was confirmed, and checks that nothing of it was overtaken, or came twice without a mark.
    async fn settle(&self, published: &Published) -> Repeats {
        let missing = |runs: &Runs| published.confirmed.iter().filter(|id| !runs.distinct.contains(*id)).count();
        self.until("all confirmed are handled", |runs| {
            runs.distinct.len() >= published.confirmed.len() && missing(runs) == 0
        })
        .await;
        // Repeats come later than firsts.
        sleep(Duration::from_secs(1)).await;
        let runs = self.lock();
        assert_eq!(runs.overtaken(&published.confirmed), Vec::<String>::new());
        let (repeats, unmarked) = runs.repeats();
        assert_eq!(unmarked, Vec::<String>::new(), "{repeats} repeats");
        Repeats { repeats, of: published.confirmed.len() }
    }
}

impl Runs {
    fn have(&self, total: u64) -> bool {
        self.distinct.len() as u64 >= total
    }

    fn is_behind(&self) -> bool {
        self.confirmed > self.distinct.len() + AHEAD
    }

    /// Confirmed orders whose first run began after that of a later order of their key.
    fn overtaken(&self, confirmed: &HashSet<(String, u64)>) -> Vec<String> {
        let (mut seen, mut last, mut wrong) = (HashSet::new(), HashMap::new(), Vec::new());
        for Run { order, .. } in &self.all {
            let id = (order.customer.clone(), order.number);
            if !confirmed.contains(&id) || !seen.insert(id) {
                continue;
            }
            let before = last.insert(order.customer.clone(), order.number);
            if before.is_some_and(|before| before > order.number) {
                wrong.push(format!("{order:?} after {before:?}"));
            }
        }
        wrong
    }

    /// How many runs were not the first of their order, and those of them that did not say so.
    fn repeats(&self) -> (usize, Vec<String>) {
        let (mut seen, mut repeats, mut unmarked) = (HashSet::new(), 0, Vec::new());
        for (at, Run { order, marked, .. }) in self.all.iter().enumerate() {
            if !seen.insert((&order.customer, order.number)) {
                repeats += 1;
                if !marked {
                    unmarked.push(format!("{order:?}, run {at} of {}", self.all.len()));
                }
            }
        }
        (repeats, unmarked)
    }
}

/// How long after a fault an event was handled, and one that was published after it.
#[derive(Debug)]
struct Recovery {
    handled: Duration,
    new: Duration,
}

struct Repeats {
    repeats: usize,
    of: usize,
}

impl Repeats {
    fn percent(&self) -> f64 {
        100.0 * self.repeats as f64 / self.of as f64
    }
}

/// What publishers have done.
#[derive(Default)]
struct Published {
    confirmed: HashSet<(String, u64)>,
    failed: usize,
}

impl Published {
    fn add(&mut self, orders: &[Order], result: &Result<Vec<tidings::MessageId>, PublishErrors>) {
        let failed: BTreeMap<_, _> = match result {
            Ok(_) => BTreeMap::new(),
            Err(errors) => errors.failures().iter().map(|(index, failure)| (*index, failure)).collect(),
        };
        self.failed += failed.len();
        let confirmed = orders.iter().enumerate().filter(|(index, _)| !failed.contains_key(index));
        self.confirmed.extend(confirmed.map(|(_, order)| (order.customer.clone(), order.number)));
    }

    fn merge(&mut self, other: Self) {
        self.confirmed.extend(other.confirmed);
        self.failed += other.failed;
    }
}

/// Publishes `rounds` orders of each key, the keys side by side.
fn publish(bus: &Bus, log: &Log, keys: std::ops::Range<u64>, rounds: u64) -> JoinHandle<Published> {
    let (bus, log) = (bus.clone(), log.clone());
    tokio::spawn(async move {
        let mut published = Published::default();
        for round in 0..rounds {
            published.merge(publish_round(&bus, &log, keys.clone(), round).await);
        }
        published
    })
}

/// One of each key; and waits until the handlers are not far behind.
async fn publish_round(bus: &Bus, log: &Log, keys: std::ops::Range<u64>, round: u64) -> Published {
    let mut published = Published::default();
    let orders: Vec<_> = keys.map(|key| order(&format!("k{key}"), round)).collect();
    published.add(&orders, &bus.publish_all(&orders).await);
    log.lock().confirmed += published.confirmed.len();
    while log.lock().is_behind() {
        sleep(Duration::from_millis(5)).await;
    }
    published
}

#[test]
fn what_is_wrong_is_found() {
    let mut runs = Runs::default();
    for (number, marked) in [(0, false), (2, false), (1, false), (1, true), (2, false)] {
        runs.all.push(Run { order: order("ada", number), marked, published: None });
    }
    let confirmed = (0..3).map(|number| ("ada".to_owned(), number)).collect();
    assert_eq!(runs.overtaken(&confirmed).len(), 1);
    let unconfirmed = [("ada".to_owned(), 0), ("ada".to_owned(), 2)].into();
    assert_eq!(runs.overtaken(&unconfirmed).len(), 0, "the order is that of confirmed publishes");
    let (repeats, unmarked) = runs.repeats();
    assert_eq!((repeats, unmarked.len()), (2, 1));
}

// ---- A broker and who uses it ----

/// A server of the test's own, and what lies before it.
struct Place {
    kind: Kind,
    server: Server,
    proxy: Proxy,
}

impl Place {
    async fn open(kind: Kind) -> Self {
        if kind.name == "kafka" {
            // It tells its clients where to connect to, so it has to know the proxy.
            let (server, ports) = block_in_place(|| Server::start_proxied_kafka(1)).unwrap();
            let proxy = Proxy::start_at(ports[0].1, SocketAddr::from(([127, 0, 0, 1], ports[0].0))).await.unwrap();
            return Self { kind, server, proxy };
        }
        let server = block_in_place(|| Server::start(kind.name)).unwrap();
        let proxy = Proxy::start(host(server.url()).parse().unwrap()).await.unwrap();
        Self { kind, server, proxy }
    }

    async fn direct(&self) -> Bus {
        connect(Config::from_url(self.server.url()).unwrap()).await
    }

    fn proxied(&self) -> Config {
        let url = self.server.url();
        Config::from_url(&url.replace(host(url), &self.proxy.address().to_string())).unwrap()
    }

    fn set(&self, change: impl FnOnce(&mut Weather)) {
        self.proxy.set(change);
    }
}

/// The host and port in a URL.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").unwrap().1;
    let place = rest.split(['/', '?']).next().unwrap();
    place.rsplit('@').next().unwrap()
}

async fn connect(config: Config) -> Bus {
    timeout(PATIENCE, Bus::connect(config)).await.expect("an answer").unwrap()
}

/// One instance of the service, with 16 workers.
async fn instance(bus: &Bus, log: &Log) -> Running {
    Service::new("billing").state(log.clone()).on(handle).start(bus).await.unwrap()
}

async fn end(running: Running) {
    let drained = running.drain(Duration::from_secs(20)).await;
    assert_eq!(drained.abandoned, 0, "{drained:?}");
}

/// Waits until the health of a bus is as wanted; how long that took.
async fn health(bus: &Bus, up: bool) -> Duration {
    let begun = Instant::now();
    while matches!(bus.health(), Health::Up) != up {
        assert!(begun.elapsed() < PATIENCE, "up should be {up}: {:?}", bus.health());
        sleep(Duration::from_millis(2)).await;
    }
    begun.elapsed()
}

/// How often it was told that the connection was lost and made, up to now.
async fn told(events: &mut EventStream) -> (usize, usize) {
    let (mut lost, mut made) = (0, 0);
    while let Some(Some(event)) = events.next().now_or_never() {
        match event {
            BusEvent::Disconnected { .. } => lost += 1,
            BusEvent::Connected => made += 1,
            _ => {}
        }
    }
    (lost, made)
}

// ---- a. Killed ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_five_times_loses_nothing() {
    for kind in chosen() {
        killed(kind).await;
    }
}

async fn killed(kind: Kind) {
    let (place, log, begun) = (Place::open(kind).await, Log::default(), Instant::now());
    let instances = [instance(&place.direct().await, &log).await, instance(&place.direct().await, &log).await];
    let rounds = (events() / 1_000).max(1);
    let publishers = [place.direct().await, place.direct().await];
    let publishing = [publish(&publishers[0], &log, 0..500, rounds), publish(&publishers[1], &log, 500..1_000, rounds)];
    let mut recovered = Vec::new();
    for kill in 1..=5 {
        log.reaches(rounds as usize * 1_000 * kill / 7).await;
        block_in_place(|| place.server.kill().and_then(|()| place.server.up())).unwrap();
        recovered.push(log.recovers(rounds * 1_000).await);
    }
    let mut published = Published::default();
    for task in publishing {
        published.merge(task.await.unwrap());
    }
    let repeats = log.settle(&published).await;
    println!(
        "{}: {} confirmed, {} not, in {:.1?}; killed five times: {} repeats ({:.3} %), all marked; recovered in {recovered:.2?}",
        kind.name,
        published.confirmed.len(),
        published.failed,
        begun.elapsed(),
        repeats.repeats,
        repeats.percent(),
    );
    for running in instances {
        end(running).await;
    }
    assert_eq!(published.failed, 0, "an outage of a second is shorter than publishing may take");
    let allowed = repeats.of / 200 + 5 * kind.in_flight as usize;
    assert!(repeats.repeats <= allowed, "{} of {} came again, allowed are {allowed}", repeats.repeats, repeats.of);
    assert!(
        recovered.iter().all(|took| took.handled <= kind.recovery && took.new <= 2 * kind.recovery),
        "{recovered:?}"
    );
}

/// A subscription shared by slots, each of whose members may be killed: Kafka's partitions are that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_while_the_server_is_killed_three_times() {
    for kind in chosen().into_iter().filter(|kind| kind.name == "kafka") {
        storm(kind, "classic").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_where_the_cluster_says_who_reads_what() {
    for kind in chosen().into_iter().filter(|kind| kind.name == "kafka") {
        storm(kind, "consumer").await;
    }
}

/// 32 workers, on a bus of its own.
async fn member(config: &Config, log: &Log) -> Running {
    let bus = connect(config.clone()).await;
    let settings = SubscriptionConfig::default().concurrency(32).max_in_flight(WINDOW);
    Service::new("billing").state(log.clone()).on_with(settings, handle).start(&bus).await.unwrap()
}

const WINDOW: usize = 256;

async fn storm(kind: Kind, protocol: &str) {
    let (place, log, begun) = (Place::open(kind).await, Log::default(), Instant::now());
    let text = format!(
        "url = '{}'\n[kafka]\ngroup_protocol = '{protocol}'\nsession_timeout_ms = 3000\n[topics.\"shop.order.placed\"]\nslots = 6",
        place.server.url()
    );
    let config = Config::from_toml(&text).unwrap();
    let (mut members, rounds) = (vec![member(&config, &log).await], events() / 1_000);
    let publishing = tokio::spawn({
        let (bus, log) = (connect(config.clone()).await, log.clone());
        async move {
            let mut published = Published::default();
            for round in 0..rounds {
                // For half a minute at least, so that many come and go.
                sleep(Duration::from_secs(30) / u32::try_from(rounds).unwrap()).await;
                published.merge(publish_round(&bus, &log, 0..1_000, round).await);
            }
            published
        }
    });
    let (mut kills, mut crashes) = (0, 0);
    for turn in 0.. {
        members.push(member(&config, &log).await);
        sleep(Duration::from_secs(2)).await;
        if kills < 3 && log.count() as u64 >= rounds * 1_000 * (kills + 1) / 4 {
            block_in_place(|| place.server.kill().and_then(|()| place.server.up())).unwrap();
            kills += 1;
        }
        let oldest = members.remove(0);
        if turn % 2 == 1 {
            crashes += 1;
            drop(oldest);
        } else {
            oldest.drain(Duration::from_secs(20)).await;
        }
        if publishing.is_finished() && kills == 3 {
            break;
        }
    }
    let published = publishing.await.unwrap();
    let repeats = log.settle(&published).await;
    println!(
        "{}, {protocol}: {} confirmed, {} not, in {:.1?}; killed {kills} times, {crashes} members crashed: {} repeats \
         ({:.3} %), all marked",
        kind.name,
        published.confirmed.len(),
        published.failed,
        begun.elapsed(),
        repeats.repeats,
        repeats.percent(),
    );
    // Of a crash or a kill each member that there was may repeat what it had under way.
    let allowed = WINDOW * (crashes + 2 * kills as usize);
    assert!(repeats.repeats <= allowed, "{} came again, allowed are {allowed}", repeats.repeats);
    assert_eq!(published.failed, 0);
}

// ---- b. Through a proxy ----

/// Publishes `rounds` of orders of `keys` and handles them, through the proxy, while `meanwhile` goes on.
async fn weathered<F: Future<Output = ()>>(
    what: &str,
    place: &Place,
    (keys, rounds): (u64, u64),
    meanwhile: impl FnOnce(Bus, Log) -> F,
) {
    let (log, begun) = (Log::default(), Instant::now());
    let bus = connect(place.proxied()).await;
    let running = instance(&bus, &log).await;
    let publishing = publish(&connect(place.proxied()).await, &log, 0..keys, rounds);
    meanwhile(bus.clone(), log.clone()).await;
    let published = publishing.await.unwrap();
    let repeats = log.settle(&published).await;
    println!(
        "{}, {what}: {} confirmed, {} not, in {:.1?}; {} repeats ({:.3} %), all marked",
        place.kind.name,
        published.confirmed.len(),
        published.failed,
        begun.elapsed(),
        repeats.repeats,
        repeats.percent(),
    );
    health(&bus, true).await;
    end(running).await;
    assert_eq!(published.failed, 0, "nothing of this lasts as long as publishing may take");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_cut_twenty_times_heals() {
    for kind in chosen() {
        let place = Place::open(kind).await;
        weathered("cut 20 times", &place, (100, 60), async |bus: Bus, log: Log| {
            let (mut events, mut recovered) = (bus.events(), Vec::new());
            for cut in 1..=20 {
                let asked = Instant::now();
                log.reaches(6_000 * cut / 21).await;
                // What was here already is no recovery: more than that is handled between two cuts.
                recovered.push(asked.elapsed());
                // Every fifth lasts until it is seen.
                let lasts = cut % 5 == 0;
                place.set(|weather| weather.refusing = lasts);
                place.proxy.cut();
                if lasts {
                    health(&bus, false).await;
                    place.set(|weather| weather.refusing = false);
                }
            }
            println!("{}: 285 events after each cut took {recovered:.2?}", kind.name);
            let slowest = recovered.iter().max().unwrap();
            assert!(
                *slowest < Duration::from_secs(8),
                "what was on its way came only when its lease was over: {slowest:?}"
            );
            log.reaches(6_000).await;
            health(&bus, true).await;
            let (lost, made) = told(&mut events).await;
            assert!(lost >= 4 && lost == made, "lost {lost} times, made {made} times");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_stalled_for_eight_seconds_goes_on() {
    for kind in chosen() {
        let place = Place::open(kind).await;
        weathered("stalled for 8 s", &place, (100, 60), async |bus: Bus, log: Log| {
            log.reaches(2_000).await;
            place.set(|weather| weather.stalled = true);
            let seen = timeout(Duration::from_secs(8), health(&bus, false)).await;
            if let Ok(after) = seen {
                sleep(Duration::from_secs(8).saturating_sub(after)).await;
            }
            place.set(|weather| weather.stalled = false);
            let recovered = log.recovers(6_000).await;
            println!("{}: not up after {seen:.2?}; recovered in {recovered:.2?}", kind.name);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_silent_is_given_up() {
    for kind in chosen() {
        let place = Place::open(kind).await;
        weathered("stalled until noticed", &place, (100, 60), async |bus: Bus, log: Log| {
            let mut events = bus.events();
            log.reaches(2_000).await;
            place.set(|weather| weather.stalled = true);
            let noticed = health(&bus, false).await;
            place.set(|weather| weather.stalled = false);
            let recovered = log.recovers(6_000).await;
            println!("{}: not up after {noticed:.1?}; {recovered:.2?}", kind.name);
            health(&bus, true).await;
            let (lost, made) = told(&mut events).await;
            assert!(lost >= 1 && lost == made, "lost {lost} times, made {made} times");
            assert!(noticed < Duration::from_secs(30), "{noticed:?}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_connection_only_takes_longer() {
    for kind in chosen() {
        let place = Place::open(kind).await;
        place.set(|weather| weather.bytes_per_second = 64 * 1024);
        weathered("64 KiB a second", &place, (100, 20), async |_: Bus, _: Log| {}).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_50_ms_away_is_as_good() {
    for kind in chosen() {
        let place = Place::open(kind).await;
        place.set(|weather| weather.delay = Duration::from_millis(50));
        weathered("50 ms away", &place, (100, 30), async |_: Bus, _: Log| {}).await;
    }
}

// ---- c. Gone ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_gone_is_told_and_waited_for() {
    for kind in chosen() {
        gone(kind, Duration::from_secs(number("TIDINGS_TEST_GONE_S", 10))).await;
    }
}

async fn gone(kind: Kind, time: Duration) {
    let (place, log) = (Place::open(kind).await, Log::default());
    let running = instance(&place.direct().await, &log).await;
    let mut config = Config::from_url(place.server.url()).unwrap();
    config.bus.publish_timeout_ms = 2_000;
    let bus = connect(config).await;
    let mut events = bus.events();
    let mut published = publish(&bus, &log, 0..100, 5).await.unwrap();
    block_in_place(|| place.server.kill()).unwrap();
    let (begun, mut number, mut kinds, mut longest) = (Instant::now(), 5, BTreeMap::new(), Duration::ZERO);
    // One of several connections may be found broken first.
    while !matches!(bus.health(), Health::Down(_)) {
        assert!(begun.elapsed() < PATIENCE, "{:?}", bus.health());
        sleep(Duration::from_millis(2)).await;
    }
    let noticed = begun.elapsed();
    // It has a connection of its own.
    eventually("the service tells", || async { !matches!(running.health(), Health::Up) }).await;
    while begun.elapsed() < time {
        let asked = Instant::now();
        let error = timeout(PATIENCE, bus.publish(&order("k0", number))).await.expect("an answer").unwrap_err();
        longest = longest.max(asked.elapsed());
        assert!(error.is_transient(), "{error:?}");
        *kinds.entry(format!("{:?}", error.kind())).or_insert(0) += 1;
        number += 1;
    }
    block_in_place(|| place.server.up()).unwrap();
    let back = Instant::now();
    while let Err(error) = bus.publish(&order("k1", number)).await {
        assert!(error.is_transient() && back.elapsed() < PATIENCE, "{error:?}");
        number += 1;
    }
    let confirmed = back.elapsed();
    published.confirmed.insert(("k1".into(), number));
    log.settle(&published).await;
    health(&bus, true).await;
    println!(
        "{}: gone for {time:?}: noticed after {noticed:.2?}; publishing failed after at most {longest:.2?}, as {kinds:?}; \
         confirmed again after {confirmed:.2?}",
        kind.name
    );
    assert_eq!(told(&mut events).await, (1, 1), "once each");
    assert!(longest < Duration::from_secs(4), "{longest:?}");
    assert!(kinds.keys().all(|kind| ["Timeout", "Connection"].contains(&kind.as_str())), "{kinds:?}");
    assert!(confirmed <= RECOVERY, "{confirmed:?}");
    // Its connections are others than the bus's, and each is tried again in its own time.
    while !matches!(running.health(), Health::Up) {
        assert!(back.elapsed() < PATIENCE, "{:?}", running.health());
        sleep(Duration::from_millis(2)).await;
    }
    end(running).await;
}

// ---- d. Refused ----

#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(name = "shop.picture.taken")]
struct Picture {
    bytes: String,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_over_the_servers_limit_is_refused_with_the_limit() {
    for kind in chosen() {
        let place = Place::open(kind).await;
        let mut config = Config::from_url(place.server.url()).unwrap();
        config.bus.max_payload = usize::MAX;
        let bus = connect(config).await;
        let limit = bus.transport().capabilities().max_payload;
        let bytes = "x".repeat(limit + 1);
        let error = bus.publish(&Picture { bytes }).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error:?}");
        assert!(error.to_string().contains(&limit.to_string()) && !error.is_transient(), "{error}");
        let bytes = "x".repeat(limit - 100);
        bus.publish(&Picture { bytes }).await.expect("what is under the limit is taken");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_deleted_under_a_service_is_built_again() {
    for (kind, delete) in chosen().into_iter().filter_map(|kind| Some((kind, kind.delete?))) {
        let (place, log) = (Place::open(kind).await, Log::default());
        let bus = place.direct().await;
        let running = instance(&bus, &log).await;
        let mut published = publish(&bus, &log, 0..10, 10).await.unwrap();
        log.settle(&published).await;
        delete(&bus).await;
        let orders: Vec<_> = (0..10).map(|key| order(&format!("k{key}"), 10)).collect();
        let begun = Instant::now();
        published.add(&orders, &bus.publish_all(&orders).await);
        log.settle(&published).await;
        println!(
            "{}: went on {:.2?} after its stream was deleted",
            kind.name,
            begun.elapsed() - Duration::from_secs(1)
        );
        assert_eq!(published.confirmed.len(), 110);
        end(running).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_absent_is_an_error_in_time() {
    for kind in chosen() {
        let url = Place::open(kind).await.server.url().to_owned();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap().to_string();
        absent(kind, &url.replace(host(&url), &address), ErrorKind::Timeout).await;
        drop(silent);
        absent(kind, &url.replace(host(&url), &address), ErrorKind::Connection).await;
    }
}

async fn absent(kind: Kind, url: &str, expected: ErrorKind) {
    let begun = Instant::now();
    let connecting = Bus::connect(Config::from_url(url).unwrap());
    let error = timeout(PATIENCE, connecting).await.expect("an answer").unwrap_err();
    println!("{}: {error} after {:.2?}", kind.name, begun.elapsed());
    assert_eq!(error.kind(), expected, "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(15));
}
