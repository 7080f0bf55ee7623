//! The service that `scripts/interop` lets a client of another language talk to: it answers each greeting.
//!
//! `TIDINGS_URL` says where; it ends when it was greeted twice.

use std::time::Duration;
use tidings::prelude::*;
use tokio::sync::mpsc;

/// What the other client publishes.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "interop.greeted", key = name)]
struct Greeted {
    name: String,
}

/// What is published for it: who was greeted, and what was read of the event around it.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "interop.answered", key = name)]
struct Answered {
    name: String,
    id: String,
    source: String,
    subject: Option<String>,
    key: Option<String>,
}

async fn answer(greeted: Greeted, Metadata(message): Metadata, State(seen): State<mpsc::Sender<()>>) -> Answered {
    let _ = seen.send(()).await;
    let subject = message.attributes.iter().find(|(name, _)| name.as_str() == "subject");
    Answered {
        name: greeted.name,
        id: message.id.to_string(),
        source: message.source.to_string(),
        subject: subject.map(|(_, value)| value.to_string()),
        key: message.key.as_ref().and_then(|key| key.as_str()).map(str::to_owned),
    }
}

#[tokio::main]
async fn main() -> tidings::Result<()> {
    // Not `Config::load`: variables of `scripts/brokers` begin with TIDINGS_ too.
    let url = std::env::var("TIDINGS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".into());
    let bus = Bus::connect(Config::from_url(&url)?.with_source("/interop")).await?;
    let (seen, mut greeted) = mpsc::channel::<()>(2);
    let running = Service::new("interop").state(seen).on(answer).start(&bus).await?;
    println!("ready");
    for _ in 0..2 {
        greeted.recv().await;
    }
    let drained = running.drain(Duration::from_secs(10)).await;
    println!("answered; {} given up", drained.abandoned);
    bus.close(Duration::from_secs(10)).await
}
