//! A message as a file: a line with a checksum, a line of JSON with everything but the payload, the payload.

use crate::store::nanos;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};
use tidings_core::transport::Destination;
use tidings_core::{Message, MessageId, SubscriptionName, Topic, from_rfc3339, to_rfc3339};

/// What a file holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) to: Destination,
    /// When it arrived, a delay included.
    pub(crate) received: SystemTime,
    pub(crate) message: Message,
}

/// The line of JSON. Bytes are written as text, each as the character of its number, because they nearly always are text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    to: To,
    received: u64,
    id: String,
    source: String,
    event_type: String,
    version: u32,
    topic: String,
    key: Option<String>,
    time: Option<String>,
    recorded_time: Option<String>,
    content_type: String,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    attributes: Vec<(String, String)>,
    headers: Vec<(String, String)>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum To {
    Topic(String),
    Subscription(String),
    DeadLetter(String),
}

impl Stored {
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Numbers and text: there is nothing in it that JSON cannot say.
        let envelope = serde_json::to_string(&Envelope::of(self)).unwrap_or_default();
        let rest = [envelope.as_bytes(), b"\n", &self.message.payload].concat();
        [format!("{:016x}\n", checksum(&rest)).as_bytes(), &rest].concat()
    }

    /// Reads a file; if it is damaged, says why.
    pub(crate) fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let (sum, rest) = line(file).ok_or("it is cut off")?;
        if sum != format!("{:016x}", checksum(rest)).as_bytes() {
            return Err("its checksum is wrong");
        }
        let (envelope, payload) = line(rest).ok_or("it is cut off")?;
        let envelope: Envelope = serde_json::from_slice(envelope).map_err(|_| "its envelope is malformed")?;
        envelope.open(payload).ok_or("a field of its envelope is malformed")
    }
}

impl Envelope {
    fn of(Stored { to, received, message: m }: &Stored) -> Self {
        Self {
            to: match to {
                Destination::Topic(topic) => To::Topic(topic.to_string()),
                Destination::Subscription(name) => To::Subscription(name.to_string()),
                Destination::DeadLetter(name) => To::DeadLetter(name.to_string()),
            },
            received: nanos(*received),
            id: m.id.to_string(),
            source: m.source.to_string(),
            event_type: m.event_type.to_string(),
            version: m.version,
            topic: m.topic.to_string(),
            key: m.key.as_ref().map(|key| text(key.as_bytes())),
            time: m.time.map(to_rfc3339),
            recorded_time: m.recorded_time.map(to_rfc3339),
            content_type: m.content_type.to_string(),
            correlation_id: m.correlation_id.as_ref().map(ToString::to_string),
            causation_id: m.causation_id.as_ref().map(ToString::to_string),
            attributes: m.attributes.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            headers: m.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
        }
    }

    fn open(self, payload: &[u8]) -> Option<Stored> {
        let to = match self.to {
            To::Topic(name) => Destination::Topic(Topic::new(name).ok()?),
            To::Subscription(name) => Destination::Subscription(SubscriptionName::new(name).ok()?),
            To::DeadLetter(name) => Destination::DeadLetter(SubscriptionName::new(name).ok()?),
        };
        let time = |text: Option<String>| text.map_or(Some(None), |text| from_rfc3339(&text).map(Some));
        let mut message = Message::new(self.id.into(), self.source, self.event_type, Topic::new(self.topic).ok()?);
        message = message.with_payload(self.content_type, Bytes::copy_from_slice(payload));
        message.version = self.version;
        message.key = self.key.map_or(Some(None), |key| bytes(&key).map(|key| Some(key.as_slice().into())))?;
        (message.time, message.recorded_time) = (time(self.time)?, time(self.recorded_time)?);
        message.correlation_id = self.correlation_id.map(MessageId::from);
        message.causation_id = self.causation_id.map(MessageId::from);
        message.attributes = self.attributes.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        for (name, value) in self.headers {
            message.headers.append_unchecked(name, bytes(&value)?);
        }
        let received = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(self.received))?;
        Some(Stored { to, received, message })
    }
}

/// FNV-1a, 64 bits: finds damage by accident, not by intent.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn line(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = file.iter().position(|byte| *byte == b'\n')?;
    Some((&file[..end], &file[end + 1..]))
}

fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|c| u8::try_from(c).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidings_core::Key;

    fn stored() -> Stored {
        let topic = Topic::new("shop.order").unwrap();
        let mut message = Message::new("é-1".into(), "/shop", "shop.order", topic.clone());
        message = message.with_key(Key::from(&b"\xff\0k"[..])).with_payload("a/b", vec![0, 10, 255]);
        message.version = 3;
        message.time = SystemTime::UNIX_EPOCH.checked_sub(Duration::from_micros(7_000_001));
        message.recorded_time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(7_000_001));
        message.causation_id = Some(MessageId::new(SystemTime::now()));
        message.attributes.push(("subject".into(), "x".into()));
        message.headers.append_unchecked("X-Any name", &b"\xff"[..]);
        Stored { to: Destination::Topic(topic), received: SystemTime::now(), message }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let stored = stored();
        assert_eq!(Stored::decode(&stored.encode()), Ok(stored));
    }

    #[test]
    fn damage_is_found_and_never_a_panic() {
        let file = stored().encode();
        for len in 0..file.len() {
            assert!(Stored::decode(&file[..len]).is_err());
        }
        for _ in 0..5_000 {
            let mut broken = file.clone();
            let at = fastrand::usize(..broken.len());
            broken[at] ^= fastrand::u8(1..);
            assert!(Stored::decode(&broken).is_err());
            // Behind a checksum that is right, too.
            let sum = format!("{:016x}", checksum(&broken[17..]));
            broken[..16].copy_from_slice(sum.as_bytes());
            let _ = Stored::decode(&broken);
        }
    }
}
