//! RabbitMQ, quorum queues, beside lapin.

use crate::Result;
use crate::broker::{Broker, Limits, Raw};
use crate::event::{Sample, encode, handle};
use crate::measure::Meter;
use futures_util::stream::FuturesOrdered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use tidings::MessageId;
use tidings::rabbitmq::{RabbitMqClient, RabbitMqConfig, RabbitMqTransport};
use tidings::transport::Transport;
use tidings_tests::server::Server;

const PUBLISHED: Raw = Raw {
    name: "raw",
    what: "lapin, one channel, `mandatory`, persistent, each publish polled once and the confirms awaited in order behind the \
        window; the SDK's headers, made once but for the ids",
    bare: false,
};
const PUBLISHED_SPREAD: Raw = Raw {
    name: "raw, four channels",
    what: "the same over four channels in turn, as the transport does by key",
    bare: false,
};
const PUBLISHED_BARE: Raw = Raw {
    name: "raw, bare",
    what: "the same with no header and no property but the message's id: what the CloudEvents attributes cost",
    bare: true,
};
const CONSUMED: Raw = Raw {
    name: "raw",
    what: "lapin, one consumer, prefetch of what may be open, one multiple ack for 64; the SDK's messages",
    bare: false,
};
const CONSUMED_BARE: Raw = Raw { name: "raw, bare", what: "the same with messages without attributes", bare: true };

/// How many deliveries one ack settles.
const RUN: u64 = 64;
/// More unconfirmed on one channel cost the client more than they gain: each multiple confirm goes through all of them.
const WINDOW: usize = 512;

/// A server of its own; dropped, it is stopped.
#[derive(Debug)]
pub struct Rabbit {
    server: Server,
    /// What there is to clean up.
    namespaces: Mutex<Vec<String>>,
}

impl Rabbit {
    /// # Errors
    /// The server cannot be installed or started.
    pub fn start() -> Result<Self> {
        Ok(Self { server: Server::start("rabbitmq")?, namespaces: Mutex::default() })
    }

    async fn channel(&self) -> Result<(Connection, Channel)> {
        let connection = Connection::connect(self.server.url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    async fn transport(&self, namespace: &str) -> Result<Arc<RabbitMqTransport>> {
        let config = RabbitMqConfig::from_url(&format!("{}?namespace={namespace}", self.server.url()))?;
        Ok(RabbitMqTransport::connect(config).await?)
    }

    fn namespaces(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Broker for Rabbit {
    const NAME: &'static str = "rabbitmq";
    const PUBLISH: &'static [Raw] = &[PUBLISHED, PUBLISHED_SPREAD, PUBLISHED_BARE];
    const CONSUME: &'static [Raw] = &[CONSUMED, CONSUMED_BARE];
    const COUNT: u64 = 12_000;
    const SETTLED: &'static str = "acked: RabbitMQ confirms no ack";

    async fn versions(&self) -> Result<String> {
        let version = self.server.tool(&["rabbitmqctl", "--quiet", "version"])?;
        Ok(format!("RabbitMQ {}, lapin 4.12", version.trim()))
    }

    async fn connect(&self, namespace: &str) -> Result<Arc<dyn Transport>> {
        self.namespaces().push(namespace.to_owned());
        Ok(self.transport(namespace).await?)
    }

    async fn publish<E: Sample>(&self, raw: Raw, namespace: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let (connection, first) = self.channel().await?;
        let mut channels = vec![first];
        if raw == PUBLISHED_SPREAD {
            channels.extend([connection.create_channel().await?, connection.create_channel().await?]);
            channels.push(connection.create_channel().await?);
        }
        for channel in &channels {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
        }
        let exchange = ShortString::try_new(format!("{namespace}:tidings"))?;
        let topic = ShortString::try_new(E::TOPIC)?;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let mut open = FuturesOrdered::new();
        for (number, channel) in (0..meter.total()).zip(channels.iter().cycle()) {
            meter.due(number).await;
            if open.len() == limits.window.min(WINDOW * channels.len()) {
                check(open.next().await)?;
                meter.tick();
            }
            let event = E::new(number);
            let (payload, properties) = (encode(&event)?, properties(&event, raw)?);
            let (exchange, topic) = (exchange.clone(), topic.clone());
            let mut publish =
                Box::pin(
                    async move { channel.basic_publish(exchange, topic, options, &payload, properties).await?.await },
                );
            // The first poll queues it.
            match publish.as_mut().now_or_never() {
                Some(confirmed) => open.push_back(futures_util::future::ready(confirmed).left_future()),
                None => open.push_back(publish.right_future()),
            }
        }
        while let Some(confirmed) = open.next().await {
            check(Some(confirmed))?;
            meter.tick();
        }
        Ok(())
    }

    async fn consume<E: Sample>(&self, _: Raw, namespace: &str, limits: Limits, meter: &Meter) -> Result<()> {
        let (_connection, channel) = self.channel().await?;
        channel.basic_qos(u16::try_from(limits.in_flight)?, BasicQosOptions::default()).await?;
        let queue = ShortString::try_new(format!("{namespace}:{}", crate::consume::POLLED))?;
        let options = BasicConsumeOptions::default();
        let mut messages = channel.basic_consume(queue, "raw".into(), options, FieldTable::default()).await?;
        let mut handled = 0_u64;
        while let Some(message) = messages.next().await.transpose()? {
            handle::<E>(&message.data, meter)?;
            handled += 1;
            let more = meter.tick();
            if handled.is_multiple_of(RUN) || !more {
                channel.basic_ack(message.delivery_tag, BasicAckOptions { multiple: true }).await?;
            }
            if !more {
                break;
            }
        }
        Ok(channel.close(200, "done".into()).await?)
    }

    async fn clean_up(&self) -> Result<()> {
        let namespaces = std::mem::take(&mut *self.namespaces());
        for namespace in namespaces {
            let transport = self.transport(&namespace).await?;
            let client = transport.native().downcast_ref::<RabbitMqClient>().ok_or("no such client")?;
            client.remove_namespace(&namespace).await?;
        }
        Ok(())
    }
}

/// That it was taken by a queue.
fn check(confirmed: Option<lapin::Result<Confirmation>>) -> Result<()> {
    match confirmed.transpose()? {
        Some(Confirmation::Ack(None)) => Ok(()),
        other => Err(format!("not confirmed: {other:?}").into()),
    }
}

/// Those that the SDK sends.
fn properties<E: Sample>(event: &E, raw: Raw) -> Result<BasicProperties> {
    let id = MessageId::new(SystemTime::now()).to_string();
    let mut properties = BasicProperties::default().with_delivery_mode(2).with_message_id(ShortString::try_new(&*id)?);
    if !raw.bare {
        let mut headers = FieldTable::default();
        let mut put = |name: &str, value: &str| -> Result<()> {
            headers.insert(ShortString::try_new(name)?, AMQPValue::LongString(value.into()));
            Ok(())
        };
        for (name, value) in [
            ("cloudEvents_specversion", "1.0"),
            ("cloudEvents_id", &id),
            ("cloudEvents_source", crate::scenario::SOURCE),
            ("cloudEvents_type", E::NAME),
            ("cloudEvents_time", "2026-01-01T00:00:00.123456789Z"),
            ("cloudEvents_recordedtime", "2026-01-01T00:00:00.123456789Z"),
        ] {
            put(name, value)?;
        }
        if let Some(key) = event.key() {
            put("cloudEvents_partitionkey", key.as_str().unwrap_or_default())?;
        }
        properties = properties.with_content_type(E::CONTENT.into()).with_headers(headers);
    }
    Ok(properties)
}
