//! A message as a file: a magic, a checksum, then each field with its length before it.

use bytes::Bytes;
use std::time::{Duration, SystemTime};
use tidings_core::transport::Destination;
use tidings_core::{Key, Message, MessageId, SubscriptionName, Text, Topic};

const MAGIC: &[u8; 4] = b"TDG1";

/// What a file holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) to: Destination,
    /// When it arrived, a delay included.
    pub(crate) received: SystemTime,
    pub(crate) message: Message,
}

impl Stored {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut put = Put(Vec::with_capacity(self.message.size()));
        let (kind, name) = match &self.to {
            Destination::Topic(topic) => (b"T", topic.as_str()),
            Destination::Subscription(name) => (b"S", name.as_str()),
            Destination::DeadLetter(name) => (b"D", name.as_str()),
        };
        let m = &self.message;
        put.field(kind).field(name).time(self.received);
        put.field(m.id.to_string()).field(&*m.source).field(&*m.event_type).field(m.version.to_le_bytes());
        put.field(m.topic.as_str()).maybe(m.key.as_ref().map(Key::as_bytes));
        put.maybe_time(m.time).maybe_time(m.recorded_time).field(&*m.content_type);
        for id in [&m.correlation_id, &m.causation_id] {
            put.maybe(id.as_ref().map(ToString::to_string));
        }
        put.count(m.attributes.len()).pairs(m.attributes.iter().map(|(name, value)| (name, value.as_bytes())));
        put.count(m.headers.len()).pairs(m.headers.iter().map(|(name, value)| (name, value.as_ref())));
        put.field(&m.payload);
        let sum = checksum(&put.0).to_le_bytes();
        [MAGIC, &sum[..], &put.0].concat()
    }

    /// Reads a file; if it is damaged, says why.
    pub(crate) fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let rest = file.strip_prefix(MAGIC).ok_or("it is not a message of this transport")?;
        let (sum, body) = rest.split_first_chunk().ok_or("it is cut off")?;
        if u64::from_le_bytes(*sum) != checksum(body) {
            return Err("its checksum is wrong");
        }
        Take(body).stored().ok_or("a field is malformed")
    }
}

/// FNV-1a, 64 bits: finds damage by accident, not by intent.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

struct Put(Vec<u8>);

impl Put {
    fn field(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.0.extend((bytes.len() as u64).to_le_bytes());
        self.0.extend(bytes);
        self
    }

    fn maybe(&mut self, bytes: Option<impl AsRef<[u8]>>) -> &mut Self {
        match bytes {
            Some(bytes) => self.field([1]).field(bytes),
            None => self.field([]),
        }
    }

    fn time(&mut self, time: SystemTime) -> &mut Self {
        let nanos = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        let since = time.duration_since(SystemTime::UNIX_EPOCH);
        self.field(since.map_or_else(|before| -nanos(before.duration()), nanos).to_le_bytes())
    }

    fn maybe_time(&mut self, time: Option<SystemTime>) -> &mut Self {
        match time {
            Some(time) => self.field([1]).time(time),
            None => self.field([]),
        }
    }

    fn count(&mut self, count: usize) -> &mut Self {
        self.field((count as u64).to_le_bytes())
    }

    fn pairs<'a>(&mut self, pairs: impl Iterator<Item = (&'a Text, &'a [u8])>) {
        for (name, value) in pairs {
            self.field(name.as_bytes()).field(value);
        }
    }
}

/// Reads what [`Put`] wrote; `None` for whatever it cannot have written.
struct Take<'a>(&'a [u8]);

impl<'a> Take<'a> {
    fn stored(mut self) -> Option<Stored> {
        let (kind, name) = (self.field()?, self.text()?);
        let to = match kind {
            b"T" => Destination::Topic(Topic::new(name).ok()?),
            b"S" => Destination::Subscription(SubscriptionName::new(name).ok()?),
            b"D" => Destination::DeadLetter(SubscriptionName::new(name).ok()?),
            _ => return None,
        };
        let received = self.time()?;
        let (id, source, event_type) = (self.text()?, self.text()?, self.text()?);
        let version = u32::from_le_bytes(self.array()?);
        let mut message = Message::new(id.into(), source, event_type, Topic::new(self.text()?).ok()?);
        message.version = version;
        message.key = self.maybe(Self::field)?.map(Key::from);
        message.time = self.maybe(Self::time)?;
        message.recorded_time = self.maybe(Self::time)?;
        message.content_type = self.text()?.into();
        message.correlation_id = self.maybe(Self::text)?.map(MessageId::from);
        message.causation_id = self.maybe(Self::text)?.map(MessageId::from);
        for _ in 0..u64::from_le_bytes(self.array()?) {
            message.attributes.push((self.text()?.into(), self.text()?.into()));
        }
        for _ in 0..u64::from_le_bytes(self.array()?) {
            message.headers.append_unchecked(self.text()?, Bytes::copy_from_slice(self.field()?));
        }
        message.payload = Bytes::copy_from_slice(self.field()?);
        self.0.is_empty().then_some(Stored { to, received, message })
    }

    fn field(&mut self) -> Option<&'a [u8]> {
        let (len, rest) = self.0.split_first_chunk()?;
        let (field, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.0 = rest;
        Some(field)
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.field()?).ok()
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.field()?.try_into().ok()
    }

    fn time(&mut self) -> Option<SystemTime> {
        let nanos = i128::from_le_bytes(self.array()?);
        let away = duration(nanos.unsigned_abs())?;
        let epoch = SystemTime::UNIX_EPOCH;
        if nanos < 0 { epoch.checked_sub(away) } else { epoch.checked_add(away) }
    }

    fn maybe<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.field()? {
            [] => Some(None),
            [1] => read(self).map(Some),
            _ => None,
        }
    }
}

fn duration(nanos: u128) -> Option<Duration> {
    let second = 1_000_000_000;
    Some(Duration::new(u64::try_from(nanos / second).ok()?, u32::try_from(nanos % second).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> Stored {
        let topic = Topic::new("shop.order").unwrap();
        let mut message = Message::new("é-1".into(), "/shop", "shop.order", topic.clone());
        message = message.with_key(Key::from(&b"\xff\0"[..]).to_string()).with_payload("a/b", vec![0, 255, 1]);
        message.version = 3;
        message.time = SystemTime::UNIX_EPOCH.checked_sub(Duration::new(7, 1));
        message.recorded_time = SystemTime::UNIX_EPOCH.checked_add(Duration::new(7, 1));
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
            let sum = checksum(&broken[12..]).to_le_bytes();
            broken[4..12].copy_from_slice(&sum);
            let _ = Stored::decode(&broken);
        }
    }
}
