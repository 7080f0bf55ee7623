//! NATS JetStream, beside async-nats.

use crate::Result;
use crate::broker::{Broker, Limits, Raw};
use crate::event::{Sample, encode, handle};
use crate::measure::Meter;
use async_nats::header::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::context::PublishAckFuture;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, Subject};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings::MessageId;
use tidings::nats::{NatsConfig, NatsTransport};
use tidings::transport::Transport;
use tidings_tests::server::Server;

const PUBLISHED: Raw = Raw {
    name: "raw",
    what: "async-nats, `send_publish`, the acks awaited in order behind the window; the SDK's headers, made once but for the ids",
    bare: false,
};
const PUBLISHED_BARE: Raw = Raw {
    name: "raw, bare",
    what: "the same with no header but `Nats-Msg-Id`: what the CloudEvents attributes cost",
    bare: true,
};
const CONSUMED: Raw = Raw {
    name: "raw",
    what: "async-nats, `consumer.stream()` of a durable pull consumer, each ack confirmed by a request, half of what may be open \
        being read and half being confirmed; the SDK's messages",
    bare: false,
};
const CONSUMED_BARE: Raw = Raw { name: "raw, bare", what: "the same with messages without attributes", bare: true };
const CONSUMED_RUNS: Raw = Raw {
    name: "raw, one ack of 64 confirmed",
    what: "the same with only the last ack of 64 confirmed, as the transport does it: no client's own way",
    bare: false,
};

/// Of how many acks one is confirmed, if not each is.
const RUN: u64 = 64;

/// A server of its own; dropped, it is stopped.
#[derive(Debug)]
pub struct Nats(Server);

impl Nats {
    /// # Errors
    /// The server cannot be installed or started.
    pub fn start() -> Result<Self> {
        Ok(Self(Server::start("nats")?))
    }

    async fn client(&self) -> Result<Client> {
        Ok(async_nats::connect(self.0.url()).await?)
    }
}

impl Broker for Nats {
    const NAME: &'static str = "nats";
    const PUBLISH: &'static [Raw] = &[PUBLISHED, PUBLISHED_BARE];
    const CONSUME: &'static [Raw] = &[CONSUMED, CONSUMED_BARE, CONSUMED_RUNS];
    const SETTLED: &'static str = "acked, each ack confirmed";

    async fn versions(&self) -> Result<String> {
        let client = self.client().await?;
        Ok(format!("nats-server {}, async-nats 0.51", client.server_info().version))
    }

    async fn connect(&self, namespace: &str) -> Result<Arc<dyn Transport>> {
        let config = NatsConfig::from_url(&format!("{}?namespace={namespace}", self.0.url()))?;
        Ok(NatsTransport::connect(config).await?)
    }

    async fn publish<E: Sample>(&self, raw: Raw, namespace: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let context = jetstream::new(self.client().await?);
        let subject = Subject::from(format!("{namespace}.{}", E::TOPIC));
        let template = if raw.bare { HeaderMap::new() } else { attributes::<E>() };
        let mut open: VecDeque<PublishAckFuture> = VecDeque::with_capacity(limits.window);
        for number in 0..meter.total() {
            meter.due(number).await;
            if open.len() == limits.window
                && let Some(oldest) = open.pop_front()
            {
                oldest.await?;
                meter.tick();
            }
            let event = E::new(number);
            let id = MessageId::new(SystemTime::now()).to_string();
            let mut headers = template.clone();
            if !raw.bare {
                headers.insert("ce-id", id.as_str());
                if let Some(key) = event.key() {
                    headers.insert("ce-partitionkey", key.as_str().unwrap_or_default());
                }
            }
            let message = PublishMessage::build().payload(encode(&event)?).headers(headers).message_id(id);
            open.push_back(context.send_publish(subject.clone(), message).await?);
        }
        for oldest in open {
            oldest.await?;
            meter.tick();
        }
        Ok(())
    }

    async fn consume<E: Sample>(&self, raw: Raw, namespace: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let client = self.client().await?;
        let (open, run) = (limits.in_flight / 2, if raw == CONSUMED_RUNS { RUN } else { 1 });
        let consumer = consumer::<E>(&jetstream::new(client.clone()), namespace, limits).await?;
        let messages = consumer.stream().max_messages_per_batch(open).heartbeat(Duration::from_secs(5));
        let mut messages = messages.expires(Duration::from_secs(30)).messages().await?;
        let mut acks = FuturesUnordered::new();
        let mut handled = 0_u64;
        while let Some(message) = messages.try_next().await? {
            let message = message.message;
            let Some(reply) = message.reply else { return Err("a message without a reply subject".into()) };
            handle::<E>(&message.payload, meter)?;
            handled += 1;
            if handled.is_multiple_of(run) {
                if acks.len() as u64 * run == open as u64 {
                    acks.next().await.transpose()?;
                }
                acks.push(client.request(reply, "+ACK".into()));
                // Sends the new one, and takes what is answered.
                while let Some(Some(answer)) = acks.next().now_or_never() {
                    answer?;
                }
            } else {
                client.publish(reply, "+ACK".into()).await?;
            }
            if !meter.tick() {
                break;
            }
        }
        while acks.next().await.transpose()?.is_some() {}
        Ok(())
    }

    async fn clean_up(&self) -> Result<()> {
        let context = jetstream::new(self.client().await?);
        let names: Vec<String> = context.stream_names().try_collect().await?;
        for name in names {
            context.delete_stream(name).await?;
        }
        Ok(())
    }
}

async fn consumer<E: Sample>(context: &Context, namespace: &str, limits: Limits) -> Result<PullConsumer> {
    let subject = format!("{namespace}.{}", E::TOPIC);
    let stream = context.stream_by_subject(subject.as_str()).await?;
    let config = pull::Config {
        durable_name: Some("raw".into()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(30),
        max_ack_pending: i64::try_from(limits.in_flight)?,
        filter_subject: subject,
        ..pull::Config::default()
    };
    Ok(context.create_consumer_on_stream(config, stream).await?)
}

/// Those that the SDK sends, but for the ids and the key.
fn attributes<E: Sample>() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-source", crate::scenario::SOURCE),
        ("ce-type", E::NAME),
        ("ce-datacontenttype", E::CONTENT),
        ("ce-time", "2026-01-01T00:00:00.123456789Z"),
        ("ce-recordedtime", "2026-01-01T00:00:00.123456789Z"),
    ] {
        headers.insert(name, value);
    }
    headers
}
