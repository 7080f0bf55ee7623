//! An event on the wire.

use crate::{Error, ErrorKind, Headers, Key, MessageId, Result, Text, Topic};
use bytes::Bytes;
use std::time::SystemTime;

/// An event on the wire: CloudEvents attributes, headers and the payload's bytes.
///
/// The attributes are those of CloudEvents 1.0.2 under their usual Rust names; each transport writes
/// them by the binding of its broker. Cloning copies no payload.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Message {
    /// `id`: unique together with `source`, kept through retries and dead letters.
    pub id: MessageId,
    /// `source`: who published it, a URI reference such as `/billing`.
    pub source: Text,
    /// `type`: the event's name, such as `shop.order.placed`.
    pub event_type: Text,
    /// `dataversion`: the version of the event's contract; 1 when absent on the wire.
    pub version: u32,
    /// Where it was published. Retries and dead letters keep it.
    pub topic: Topic,
    /// What its order is kept by.
    pub key: Option<Key>,
    /// `time`: when what it tells happened.
    pub time: Option<SystemTime>,
    /// `recordedtime`: when it was first published.
    pub recorded_time: Option<SystemTime>,
    /// `datacontenttype`: which codec reads the payload, such as `application/json`.
    pub content_type: Text,
    /// `correlationid`: what all messages of one flow share.
    pub correlation_id: Option<MessageId>,
    /// `causationid`: the message whose handler published this one.
    pub causation_id: Option<MessageId>,
    /// Further CloudEvents attributes (`subject`, `dataschema`, extensions), in order, by name.
    pub attributes: Vec<(Text, Text)>,
    /// What the application sent beside the event, and the SDK's own headers.
    pub headers: Headers,
    /// The codec's bytes.
    pub payload: Bytes,
}

impl Message {
    /// A message of version 1 with an empty payload and nothing optional.
    #[must_use]
    pub fn new(id: MessageId, source: impl Into<Text>, event_type: impl Into<Text>, topic: Topic) -> Self {
        Self {
            id,
            source: source.into(),
            event_type: event_type.into(),
            version: 1,
            topic,
            key: None,
            time: None,
            recorded_time: None,
            content_type: Text::from_static("application/octet-stream"),
            correlation_id: None,
            causation_id: None,
            attributes: Vec::new(),
            headers: Headers::new(),
            payload: Bytes::new(),
        }
    }

    /// Sets the payload and the content type that names its codec.
    #[must_use]
    pub fn with_payload(mut self, content_type: impl Into<Text>, payload: impl Into<Bytes>) -> Self {
        self.content_type = content_type.into();
        self.payload = payload.into();
        self
    }

    /// Sets the key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Key>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// About how many bytes it takes on the wire and in memory, without what a broker adds.
    #[must_use]
    pub fn size(&self) -> usize {
        let key = self.key.as_ref().map_or(0, |k| k.as_bytes().len());
        let attributes: usize = self.attributes.iter().map(|(n, v)| n.len() + v.len()).sum();
        self.payload.len() + self.headers.bytes() + attributes + key + size_of::<Self>()
    }

    /// Refuses what could not be carried by every broker, or not be read again.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] for a payload over `max_payload` bytes; [`ErrorKind::InvalidName`] for an
    /// empty or malformed attribute.
    pub(crate) fn check(&self, max_payload: usize) -> Result<()> {
        if self.payload.len() > max_payload {
            let why = format!(
                "payload of {} bytes, allowed are {max_payload}; raise max_payload or send a reference",
                self.payload.len()
            );
            return Err(Error::new(ErrorKind::TooLarge, why).with_context("topic", &self.topic));
        }
        let texts =
            [("source", self.source.as_str()), ("type", &self.event_type), ("content type", &self.content_type)];
        let attributes = self.attributes.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        // CloudEvents 1.0.2, *Type System*: a String holds no control characters; what is required is not empty.
        if let Some((name, _)) = texts.into_iter().chain(attributes).find(|(_, v)| !is_plain(v)) {
            return Err(Error::new(ErrorKind::InvalidName, "an attribute is empty or holds control characters")
                .with_context("attribute", name));
        }
        if !self.id.is_plain() {
            return Err(Error::new(ErrorKind::InvalidName, "the id is empty or holds control characters"));
        }
        Ok(())
    }
}

/// Not empty, and without control characters.
pub(crate) fn is_plain(text: &str) -> bool {
    // Nearly all text is printable ASCII. Without an early end, so that the compiler makes vector code of it.
    let ascii = text.bytes().fold(true, |printable, byte| printable & (b' '..=b'~').contains(&byte));
    !text.is_empty() && (ascii || !text.contains(char::is_control))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        Message::new("1".into(), "/shop", "shop.order.placed", Topic::new("shop.order.placed").unwrap())
    }

    #[test]
    fn refuses_what_no_broker_could_carry() {
        assert!(message().with_payload("text/plain", vec![0; 10]).check(10).is_ok());
        let too_large = message().with_payload("text/plain", vec![0; 11]).check(10).unwrap_err();
        assert_eq!(too_large.kind(), ErrorKind::TooLarge);
        for break_it in [
            (|m| m.id = "".into()) as fn(&mut Message),
            |m| m.source = "".into(),
            |m| m.source = "a\nb".into(),
            |m| m.event_type = "".into(),
            |m| m.attributes.push(("subject".into(), "".into())),
        ] {
            let mut bad = message();
            break_it(&mut bad);
            assert_eq!(bad.check(10).unwrap_err().kind(), ErrorKind::InvalidName);
        }
    }

    #[test]
    fn is_small_enough_to_move() {
        assert!(size_of::<Message>() <= 336, "{}", size_of::<Message>());
    }
}
