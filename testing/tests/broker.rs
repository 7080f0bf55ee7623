//! The harness on a broker that is not the memory transport: it answers late, in real time, and drops what has an id
//! twice, as JetStream does.

use async_trait::async_trait;
use std::any::Any;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tidings::memory::{MemoryConfig, MemoryTransport};
use tidings::prelude::*;
use tidings::testing::{Faults, Harness};
use tidings::transport::*;
use tidings::{BusConfig, Connect, Result, SubscriptionName};
use tokio::time::Instant;

#[derive(Event, Serialize, Deserialize)]
#[event(name = "test.a.happened", key = n)]
struct A {
    n: u32,
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "test.b.happened", key = n)]
struct B {
    n: u32,
}

struct Far(Arc<MemoryTransport>, Arc<FarPublisher>);

struct FarPublisher {
    inner: Arc<dyn Publisher>,
    seen: Mutex<HashSet<(Destination, String)>>,
}

impl Publisher for FarPublisher {
    fn submit(&self, batch: &mut dyn Iterator<Item = Outgoing<'_>>) {
        for Outgoing { destination, message, delay, owed, receipt } in batch.collect::<Vec<_>>() {
            let attempts = message.headers.get_str("tidings-attempts").unwrap_or_default();
            let new = self
                .seen
                .lock()
                .expect("no panic inside")
                .insert((destination.clone(), format!("{} {attempts}", message.id)));
            let copy = [(destination, message.clone(), delay, owed)];
            let answers = new.then(|| submit_and_wait(&*self.inner, &copy));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(2)).await;
                if let Some(answers) = answers {
                    assert!(answers.await.is_empty());
                }
                receipt.confirm();
            });
        }
    }
}

#[async_trait]
impl Transport for Far {
    fn name(&self) -> &'static str {
        "far"
    }

    fn capabilities(&self) -> &Capabilities {
        self.0.capabilities()
    }

    async fn provision(&self, topology: &Topology) -> Result<()> {
        self.0.provision(topology).await
    }

    fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::clone(&self.1) as _
    }

    async fn subscribe(&self, spec: SubscriptionSpec) -> Result<Box<dyn Subscription>> {
        self.0.subscribe(spec).await
    }

    async fn replay(&self, spec: ReplaySpec) -> Result<Box<dyn Subscription>> {
        self.0.replay(spec).await
    }

    async fn dead_letters(&self, subscription: &SubscriptionName) -> Result<Arc<dyn DeadLetters>> {
        self.0.dead_letters(subscription).await
    }

    async fn remove_subscription(&self, subscription: &SubscriptionName) -> Result<bool> {
        self.0.remove_subscription(subscription).await
    }

    fn health(&self) -> Health {
        self.0.health()
    }

    fn events(&self) -> &tidings_core::Events {
        self.0.events()
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.0.close(deadline).await
    }

    fn native(&self) -> &(dyn Any + Send + Sync) {
        self.0.native()
    }
}

struct FarConfig;

impl Connect for FarConfig {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(async {
            let memory = MemoryTransport::connect(MemoryConfig::default())?;
            let publisher = Arc::new(FarPublisher { inner: memory.publisher(), seen: Mutex::default() });
            Ok((Arc::new(Far(memory, publisher)) as Arc<dyn Transport>, BusConfig::default()))
        })
    }
}

fn service(name: &str) -> Service {
    let retry = RetryPolicy::default().backoff(Duration::from_millis(50), Duration::from_millis(50)).aside();
    let config = SubscriptionConfig::default().retry(retry).without_outage();
    Service::new(name).on_with(config, async |a: A, Attempt(attempt): Attempt| -> Result<B, HandlerError> {
        if a.n == 3 && attempt < 4 { Err("not yet".into()) } else { Ok(B { n: a.n }) }
    })
}

#[tokio::test]
async fn publish_returns_when_all_has_settled() {
    let test = Harness::on(FarConfig).start([service("one"), service("two")]).await;
    let events: Vec<_> = (0..20).map(|n| A { n }).collect();
    test.publish_all(&events).await;
    test.published::<B>().times(40);
    test.handled::<A>("two.test.a.happened").times(20);
    test.retried("one.test.a.happened").times(3);
    test.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_drops_as_a_duplicate_is_not_waited_for() {
    let reader = Service::new("reader").on_with(SubscriptionConfig::default().without_outage(), async |_: B| {});
    let faults = Faults::seeded(3).duplicate(0.3).crash_after_handle(1.0).fail_first(1);
    let test = Harness::on(FarConfig).faults(faults).start([service("one"), reader]).await;
    let events: Vec<_> = (0..20).map(|n| A { n }).collect();
    test.publish_all(&events).await;
    test.published::<B>().times(20);
    assert!(test.handled::<B>("reader.test.b.happened").all().len() >= 40, "each crashed once");
    test.dead_letters().none();
}
