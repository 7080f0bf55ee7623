//! Messages as CloudEvents 1.0.2 in Kafka records: written in binary mode, read in binary and structured mode.
//!
//! Attributes are headers `ce_..` with plain UTF-8 values, as the Kafka binding (section 3.2.3) asks; the record's key is the
//! event's key; headers of the application are headers as they are.

use crate::error::error;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use rdkafka::message::{Header, OwnedHeaders};
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidings_core::transport::Destination;
use tidings_core::{ErrorKind, Key, Message, MessageId, Result, Text, Topic, from_rfc3339, to_rfc3339};

/// The topic, where the record's does not tell it.
const TOPIC: &str = "tidings-topic";
/// The event's key, where the record's is another.
const KEY: &str = "tidings-key";
/// Not to be handled before this time, in milliseconds since 1970.
const DUE: &str = "tidings-due";

/// What is sent beside the payload.
pub(crate) struct Encoded {
    pub(crate) headers: OwnedHeaders,
    /// The record's key.
    pub(crate) key: Option<Bytes>,
}

struct Writer(Option<OwnedHeaders>);

impl Writer {
    fn put(&mut self, name: &str, value: &[u8]) -> Result<()> {
        if name.contains('\0') {
            return Err(error(ErrorKind::InvalidName, "a header or attribute has a name that Kafka cannot carry"));
        }
        self.0 = self.0.take().map(|headers| headers.insert(Header { key: name, value: Some(value) }));
        Ok(())
    }
}

/// How `message` is sent.
pub(crate) fn encode(message: &Message, destination: &Destination, delay: Option<Duration>) -> Result<Encoded> {
    let room = 12 + message.attributes.len() + message.headers.len();
    let mut headers = Writer(Some(OwnedHeaders::new_with_capacity(room)));
    headers.put("ce_specversion", b"1.0")?;
    message.id.with_str(|id| headers.put("ce_id", id.as_bytes()))?;
    headers.put("ce_source", message.source.as_bytes())?;
    headers.put("ce_type", message.event_type.as_bytes())?;
    headers.put("content-type", message.content_type.as_bytes())?;
    if message.version != 1 {
        headers.put("ce_dataversion", message.version.to_string().as_bytes())?;
    }
    for (name, time) in [("ce_time", message.time), ("ce_recordedtime", message.recorded_time)] {
        if let Some(time) = time {
            headers.put(name, to_rfc3339(time).as_bytes())?;
        }
    }
    for (name, id) in [("ce_correlationid", &message.correlation_id), ("ce_causationid", &message.causation_id)] {
        if let Some(id) = id {
            id.with_str(|id| headers.put(name, id.as_bytes()))?;
        }
    }
    for (name, value) in &message.attributes {
        headers.put(&format!("ce_{name}"), value.as_bytes())?;
    }
    if !matches!(destination, Destination::Topic(_)) {
        headers.put(TOPIC, message.topic.as_str().as_bytes())?;
    }
    if let Some(delay) = delay.filter(|delay| !delay.is_zero()) {
        headers.put(DUE, due_after(delay).to_string().as_bytes())?;
    }
    let key = message.key.as_ref().map(|key| Bytes::copy_from_slice(key.as_bytes()));
    let key = match destination {
        Destination::DeadLetter(_) => {
            if let Some(key) = key {
                headers.put(KEY, &key)?;
            }
            Some(letter_key())
        }
        _ => key,
    };
    for (name, value) in message.headers.iter() {
        headers.put(name, value)?;
    }
    // It is taken out only to be put back.
    Ok(Encoded { headers: headers.0.unwrap_or_default(), key })
}

/// By which a dead letter is compacted away when it is removed: no two have the same.
fn letter_key() -> Bytes {
    Bytes::copy_from_slice(format!("{:032x}", fastrand::u128(..)).as_bytes())
}

fn due_after(delay: Duration) -> u64 {
    let due = SystemTime::now().checked_add(delay).and_then(|due| due.duration_since(UNIX_EPOCH).ok());
    due.map_or(u64::MAX, |due| u64::try_from(due.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX))
}

/// Where a message was read, for what it does not say itself.
pub(crate) struct Origin<'a> {
    /// The topic, if the record's is one.
    pub(crate) topic: Option<&'a Topic>,
    pub(crate) name: &'a str,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
}

/// A record as it was read.
pub(crate) struct Decoded {
    pub(crate) message: Message,
    /// When it is due, in milliseconds since 1970.
    pub(crate) due: Option<u64>,
}

/// Reads records. It remembers the texts of the last, which the next one has too most of the time.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    source: Text,
    event_type: Text,
    content_type: Text,
}

/// What the headers of one record say.
#[derive(Default)]
struct Parts {
    id: Option<MessageId>,
    source: Option<Text>,
    event_type: Option<Text>,
    content_type: Option<Text>,
    time: Option<SystemTime>,
    recorded_time: Option<SystemTime>,
    attributes: Vec<(Text, String)>,
    headers: tidings_core::Headers,
    topic: Option<Topic>,
    key: Option<Key>,
    due: Option<u64>,
}

impl Parts {
    /// Every event of this SDK has times: they are not kept as texts in between.
    fn put(&mut self, attribute: &str, value: &str) {
        let time = matches!(attribute, "time" | "recordedtime").then(|| from_rfc3339(value)).flatten();
        match attribute {
            "time" if time.is_some() => self.time = time,
            "recordedtime" if time.is_some() => self.recorded_time = time,
            _ => self.attributes.push((attribute.into(), value.to_owned())),
        }
    }
}

impl Decoder {
    /// What was sent, by this SDK or by any other client; what is no CloudEvent gets the attributes it lacks.
    pub(crate) fn decode<M: rdkafka::Message>(&mut self, record: &M, origin: &Origin<'_>) -> Decoded {
        let mut parts = Parts::default();
        if let Some(headers) = record.headers() {
            // The client panics at a header name that is not UTF-8.
            if catch_unwind(AssertUnwindSafe(|| self.read(&mut parts, headers))).is_err() {
                parts = Parts::default();
            }
        }
        let payload = record.payload().map(Bytes::copy_from_slice).unwrap_or_default();
        let key = record.key().map(Key::from);
        self.assemble(parts, (key, payload), origin)
    }

    fn read<H: rdkafka::message::Headers>(&mut self, parts: &mut Parts, headers: &H) {
        for Header { key: name, value } in headers.iter() {
            self.take(parts, name, value.unwrap_or_default());
        }
    }

    fn take(&mut self, parts: &mut Parts, name: &str, value: &[u8]) {
        let text = || std::str::from_utf8(value).ok().filter(|text| !text.is_empty());
        match name {
            "ce_specversion" => {}
            "ce_id" => parts.id = text().map(MessageId::from),
            "ce_source" => parts.source = text().map(|text| same(&mut self.source, text)),
            "ce_type" => parts.event_type = text().map(|text| same(&mut self.event_type, text)),
            "content-type" => parts.content_type = text().map(|text| same(&mut self.content_type, text)),
            TOPIC => parts.topic = text().and_then(|text| Topic::new(text).ok()),
            KEY => parts.key = Some(Key::from(value)),
            DUE => parts.due = text().and_then(|text| text.parse().ok()),
            _ => match attribute(name).zip(text()) {
                Some((attribute, value)) => parts.put(attribute, value),
                None => parts.headers.append_unchecked(name, Bytes::copy_from_slice(value)),
            },
        }
    }

    fn assemble(&mut self, mut parts: Parts, (key, payload): (Option<Key>, Bytes), origin: &Origin<'_>) -> Decoded {
        let is_structured = parts.content_type.as_ref().is_some_and(|given| is_structured(given));
        let mut payload = payload;
        if let Some((attributes, data)) = is_structured.then(|| structured(&payload)).flatten() {
            payload = data;
            parts.content_type = Some(Text::from_static("application/json"));
            for (name, value) in attributes {
                match name.as_str() {
                    "datacontenttype" => parts.content_type = Some(value.into()),
                    name => self.take(&mut parts, &format!("ce_{name}"), value.as_bytes()),
                }
            }
        }
        let topic = parts.topic.or_else(|| origin.topic.cloned());
        let topic = topic.or_else(|| parts.event_type.as_ref().and_then(|name| Topic::new(name.clone()).ok()));
        // A name that every topic may have; only what other clients send to internal topics comes here.
        let Some(topic) = topic.or_else(|| Topic::new("unknown").ok()) else { unreachable!("`unknown` is a topic") };
        let Origin { name, partition, offset, .. } = origin;
        let id = parts.id.unwrap_or_else(|| MessageId::from(format!("{name}-{partition}-{offset}")));
        let source = parts.source.unwrap_or_else(|| same(&mut self.source, &format!("/kafka/{name}")));
        let event_type = parts.event_type.unwrap_or_else(|| topic.text().clone());
        let mut message = Message::new(id, source, event_type, topic);
        message.payload = payload;
        message.headers = parts.headers;
        (message.time, message.recorded_time) = (parts.time, parts.recorded_time);
        message.key = if origin.topic.is_none() && parts.key.is_some() { parts.key } else { key };
        if let Some(content_type) = parts.content_type {
            message.content_type = content_type;
        }
        parts.attributes.into_iter().for_each(|(name, value)| take_attribute(&mut message, name, value));
        Decoded { message, due: parts.due }
    }
}

/// Dead letters have keys of their own.
pub(crate) fn without_letter_key(mut message: Message, record_key: Option<&[u8]>) -> Message {
    if message.key.as_ref().map(Key::as_bytes) == record_key {
        message.key = None;
    }
    message
}

fn same(last: &mut Text, text: &str) -> Text {
    if last.as_str() != text {
        *last = text.into();
    }
    last.clone()
}

fn attribute(name: &str) -> Option<&str> {
    let name = name.strip_prefix("ce_")?;
    let named = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    named.then_some(name)
}

/// Puts an attribute where it belongs.
fn take_attribute(message: &mut Message, name: Text, value: String) {
    match name.as_str() {
        "dataversion" if value.parse::<u32>().is_ok() => message.version = value.parse().unwrap_or(1),
        "correlationid" => message.correlation_id = Some(value.into()),
        "causationid" => message.causation_id = Some(value.into()),
        // Of a producer that has no other place for it.
        "partitionkey" if message.key.is_none() => message.key = Some(value.into()),
        _ => message.attributes.push((name, value.into())),
    }
}

fn is_structured(content_type: &str) -> bool {
    let media = content_type.split(';').next().unwrap_or_default().trim();
    ["application/cloudevents", "application/cloudevents+json"].iter().any(|known| media.eq_ignore_ascii_case(known))
}

/// Attributes and data of structured mode in the JSON format; `None` if it is none.
fn structured(payload: &[u8]) -> Option<(Vec<(String, String)>, Bytes)> {
    let Value::Object(event) = serde_json::from_slice(payload).ok()? else { return None };
    for required in ["id", "source", "type", "specversion"] {
        event.get(required)?.as_str().filter(|value| !value.is_empty())?;
    }
    let data = match (event.get("data"), event.get("data_base64")) {
        (None, None) => Bytes::new(),
        (None, Some(encoded)) => STANDARD.decode(encoded.as_str()?).ok()?.into(),
        (Some(data), None) => json_data(data, event.get("datacontenttype").and_then(Value::as_str))?,
        (Some(_), Some(_)) => return None,
    };
    let attribute = |(name, value): (&String, &Value)| {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            _ => return None,
        };
        (!name.starts_with("data_") && name != "data").then(|| (name.clone(), text))
    };
    Some((event.iter().filter_map(attribute).collect(), data))
}

/// JSON formats section 3.1.1: JSON is written as it is; a string of another content type is its text.
fn json_data(data: &Value, content_type: Option<&str>) -> Option<Bytes> {
    let media = content_type.unwrap_or("application/json").split(';').next().unwrap_or_default().trim();
    let media = media.to_ascii_lowercase();
    let is_json = media.ends_with("/json") || media.ends_with("+json");
    match data {
        Value::String(text) if !is_json => Some(text.clone().into()),
        data => serde_json::to_vec(data).ok().map(Bytes::from),
    }
}

/// About how much a message takes of a request.
pub(crate) fn size(message: &Message) -> usize {
    let key = message.key.as_ref().map_or(0, |key| key.as_bytes().len());
    let attributes: usize = message.attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
    let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.len() + 10).sum();
    message.payload.len() + headers + attributes + key + 256
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::message::{Message as _, OwnedMessage, Timestamp};
    use tidings_core::{SubscriptionName, header};

    fn record(message: &Message, to: &Destination) -> OwnedMessage {
        let Encoded { headers, key } = encode(message, to, None).unwrap();
        let (key, payload) = (key.map(|key| key.to_vec()), Some(message.payload.to_vec()));
        OwnedMessage::new(payload, key, "prod.shop".into(), Timestamp::NotAvailable, 0, 7, Some(headers))
    }

    fn read(record: &OwnedMessage, topic: Option<&Topic>) -> Message {
        let origin = Origin { topic, name: "prod.shop", partition: 0, offset: 7 };
        Decoder::default().decode(record, &origin).message
    }

    fn full() -> Message {
        let mut message = Message::new("1".into(), "/a b%20", "shop.é", Topic::new("shop").unwrap());
        message = message.with_payload("text/plain", "hi").with_key(&b"\xff\0"[..]);
        message.version = 3;
        message.time = Some(UNIX_EPOCH + Duration::from_micros(1_234_567));
        message.attributes = vec![("subject".into(), "x y".into())];
        message.headers.append("X-A", &b"\0\xff"[..]).unwrap();
        message.headers.append("x-a", "").unwrap();
        message.headers.append_unchecked(header::ATTEMPTS, "2");
        message
    }

    #[test]
    fn what_is_written_is_read() {
        let (message, topic) = (full(), Topic::new("shop").unwrap());
        assert_eq!(read(&record(&message, &Destination::Topic(topic.clone())), Some(&topic)), message);
        let name = SubscriptionName::new("crm").unwrap();
        assert_eq!(read(&record(&message, &Destination::Subscription(name.clone())), None), message);
        let letter = record(&message, &Destination::DeadLetter(name.clone()));
        assert_eq!(read(&letter, None), message);
        let mut keyless = message;
        keyless.key = None;
        let letter = record(&keyless, &Destination::DeadLetter(name));
        assert_eq!(without_letter_key(read(&letter, None), letter.key()), keyless);
    }

    #[test]
    fn what_others_send_is_read_too() {
        let topic = Topic::new("shop").unwrap();
        let bare = OwnedMessage::new(None, None, "prod.shop".into(), Timestamp::NotAvailable, 0, 7, None);
        let read_bare = read(&bare, Some(&topic));
        assert_eq!((read_bare.id.to_string().as_str(), &read_bare.payload[..]), ("prod.shop-0-7", &b""[..]));
        assert_eq!((read_bare.source.as_str(), read_bare.event_type.as_str()), ("/kafka/prod.shop", "shop"));
        let json = br#"{"specversion":"1.0","id":"9","source":"/x","type":"y","subject":"s","data":{"a":1}}"#;
        let headers = OwnedHeaders::new()
            .insert(Header { key: "content-type", value: Some("Application/CloudEvents+JSON; charset=utf-8") });
        let headers = headers.insert(Header { key: "x-null", value: None::<&str> });
        let record = OwnedMessage::new(
            Some(json.to_vec()),
            Some(b"k".to_vec()),
            "prod.shop".into(),
            Timestamp::NotAvailable,
            0,
            7,
            Some(headers),
        );
        let message = read(&record, Some(&topic));
        assert_eq!((message.id.to_string().as_str(), message.event_type.as_str()), ("9", "y"));
        assert_eq!((&message.payload[..], message.content_type.as_str()), (&br#"{"a":1}"#[..], "application/json"));
        assert_eq!(message.attributes, [("subject".into(), "s".into())]);
        assert_eq!(message.key, Some("k".into()));
    }
}
