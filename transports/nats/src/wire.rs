//! Messages as CloudEvents 1.0.2 in NATS messages: written in binary mode, read in binary and structured mode.
//!
//! Values of attributes are percent-encoded as the NATS binding (section 3.1.3.2) asks. Headers of the application keep their
//! order and any bytes: where NATS cannot, [`LAYOUT`] tells how to get them back.

use async_nats::header::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::str::FromStr;
use std::time::{Duration, SystemTime};
use tidings_core::transport::Destination;
use tidings_core::{
    ErrorKind, Headers, Key, Message, MessageId, Result, Text, Topic, from_rfc3339, header, to_rfc3339,
};

use crate::error::error;

/// The names of the application's headers in their order, a `=` behind those whose value is percent-encoded.
const LAYOUT: &str = "tidings-headers";
/// The topic, where the subject does not tell it.
const TOPIC: &str = "tidings-topic";
/// A key that is no text, percent-encoded; `partitionkey` holds the others.
const KEY: &str = "tidings-key";
/// Not to be handled before so many milliseconds after it was stored.
pub(crate) const DELAY: &str = "tidings-delay";
/// By which the server knows a repeat of a publish.
pub(crate) const MSG_ID: &str = "Nats-Msg-Id";
pub(crate) const TTL: &str = "Nats-TTL";

const JSON: &str = "application/json";

/// Headers of these names are read as what they are, or are the server's own.
const OWN: [&str; 6] = [LAYOUT, TOPIC, KEY, DELAY, "content-type", "ce-specversion"];

/// How `message` is sent.
pub(crate) fn encode(message: &Message, destination: &Destination, delay: Option<Duration>) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    put(&mut headers, "ce-specversion", "1.0");
    message.id.with_str(|id| put(&mut headers, "ce-id", escape(id)));
    put(&mut headers, "ce-source", escape(&message.source));
    put(&mut headers, "ce-type", escape(&message.event_type));
    put(&mut headers, "ce-datacontenttype", escape(&message.content_type));
    if message.version != 1 {
        put(&mut headers, "ce-dataversion", message.version.to_string());
    }
    let time = message.time.map(to_rfc3339);
    let recorded = message.recorded_time;
    // Mostly they are one.
    let recorded = if recorded == message.time { time.clone() } else { recorded.map(to_rfc3339) };
    for (name, time) in [("ce-time", time), ("ce-recordedtime", recorded)] {
        if let Some(time) = time {
            put(&mut headers, name, time);
        }
    }
    for (name, id) in [("ce-correlationid", &message.correlation_id), ("ce-causationid", &message.causation_id)] {
        if let Some(id) = id {
            id.with_str(|id| put(&mut headers, name, escape(id)));
        }
    }
    match message.key.as_ref().map(|key| (key, key.as_str())) {
        Some((_, Some(text))) if !text.is_empty() && !text.contains(char::is_control) => {
            put(&mut headers, "ce-partitionkey", escape(text));
        }
        Some((key, _)) => put(&mut headers, KEY, escape_bytes(key.as_bytes())),
        None => {}
    }
    for (name, value) in &message.attributes {
        set(&mut headers, &format!("ce-{name}"), &escape(value))?;
    }
    if !matches!(destination, Destination::Topic(_)) {
        put(&mut headers, TOPIC, message.topic.as_str());
    }
    if let Some(delay) = delay.filter(|delay| !delay.is_zero()) {
        let millis = u64::try_from(delay.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        put(&mut headers, DELAY, millis.to_string());
    }
    encode_headers(&message.headers, &mut headers)?;
    put(&mut headers, MSG_ID, message_id(message, destination));
    Ok(headers)
}

fn encode_headers(from: &Headers, headers: &mut HeaderMap) -> Result<()> {
    let mut layout = String::new();
    let mut needed = from.len() > 1;
    for (name, value) in from.iter() {
        let plain = std::str::from_utf8(value).ok().filter(|text| is_plain(text));
        match plain {
            Some(text) => set(headers, name, text)?,
            None => set(headers, name, &escape_bytes(value))?,
        }
        needed |= plain.is_none();
        if !layout.is_empty() {
            layout.push(',');
        }
        layout.push_str(name);
        layout.push_str(if plain.is_some() { "" } else { "=" });
    }
    if needed {
        set(headers, LAYOUT, &layout)?;
    }
    Ok(())
}

/// Whether a value comes back as it is.
fn is_plain(text: &str) -> bool {
    let printable = |b: u8| (b' '..=b'~').contains(&b);
    !text.is_empty() && text.bytes().all(printable) && !text.starts_with(' ') && !text.ends_with(' ')
}

/// A header whose name is our own and whose value is encoded.
fn put(headers: &mut HeaderMap, name: &'static str, value: impl Into<String>) {
    let value = value.into();
    // It would panic; what we encode holds no line breaks.
    if !value.bytes().any(|b| b == b'\r' || b == b'\n') {
        headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
    }
}

fn set(headers: &mut HeaderMap, name: &str, value: &str) -> Result<()> {
    let refuse = || {
        error(ErrorKind::InvalidName, "a header or attribute has a name that NATS cannot carry")
            .with_context("header", name.escape_default())
    };
    let name = HeaderName::from_str(name).map_err(|_| refuse())?;
    let value = HeaderValue::from_str(value).map_err(|_| refuse())?;
    headers.append(name, value);
    Ok(())
}

/// The same for a repeat of the same publish, and for nothing else: one event is published to several destinations, again
/// with more attempts, and again when it is redriven or buried anew.
pub(crate) fn message_id(message: &Message, destination: &Destination) -> String {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    match destination {
        Destination::Topic(topic) => {
            part(b"topic");
            part(topic.as_str().as_bytes());
        }
        Destination::Subscription(name) => {
            part(b"to");
            part(name.as_str().as_bytes());
        }
        Destination::DeadLetter(name) => {
            part(b"dead");
            part(name.as_str().as_bytes());
        }
    }
    part(message.source.as_bytes());
    message.id.with_str(|id| part(id.as_bytes()));
    for name in [header::ATTEMPTS, header::REDRIVEN, header::TIME] {
        part(message.headers.get(name).map_or(&[][..], |value| value));
    }
    // Two events with one id are a mistake of their publisher, but neither must vanish.
    part(&message.payload);
    let hex = |half: u8| char::from(b"0123456789abcdef"[usize::from(half)]);
    hash.finalize().iter().take(16).flat_map(|byte| [hex(byte >> 4), hex(byte & 15)]).collect()
}

/// Where a message was read, for what it does not say itself.
pub(crate) struct Origin<'a> {
    /// The topic, if the subject is one.
    pub(crate) topic: Option<Topic>,
    pub(crate) stream: &'a str,
    pub(crate) position: u64,
}

/// What was sent, by this SDK or by any other client; what is no CloudEvent gets the attributes it lacks.
pub(crate) fn decode(headers: Option<&HeaderMap>, payload: &Bytes, origin: &Origin<'_>) -> Message {
    let none = HeaderMap::new();
    let headers = headers.unwrap_or(&none);
    let (binary, others) = sort(headers);
    let other = |name: &str| find(others.iter().copied(), name);
    let content_type = other("content-type").unwrap_or_default();
    let structured = is_structured(content_type).then(|| structured(payload)).flatten();
    let is_binary = structured.is_none();
    let (attributes, data) = structured.unwrap_or_else(|| (binary, payload.clone()));
    let text = |name: &str| attributes.iter().find(|(n, _)| n == name).map(|(_, value)| &**value);
    let topic = other(TOPIC).and_then(|topic| Topic::new(topic).ok()).or_else(|| origin.topic.clone());
    let topic = topic.or_else(|| text("type").and_then(|name| Topic::new(name).ok()));
    // A name that every topic may have; only what other clients send to internal subjects comes here.
    let topic = topic.or_else(|| Topic::new("unknown").ok());
    let Some(topic) = topic else { unreachable!("`unknown` is a topic") };
    let id = text("id").filter(|id| !id.is_empty()).or_else(|| other(MSG_ID));
    let id = id.map_or_else(|| MessageId::from(format!("{}-{}", origin.stream, origin.position)), MessageId::from);
    let source = text("source").map_or_else(|| format!("/nats/{}", origin.stream).into(), Text::from);
    let named = text("type").filter(|name| *name != topic.as_str());
    let event_type = named.map_or_else(|| topic.text().clone(), Text::from);
    let mut message = Message::new(id, source, event_type, topic);
    message.payload = data;
    match text("datacontenttype") {
        Some(JSON) => message.content_type = Text::from_static(JSON),
        Some(given) => message.content_type = given.into(),
        None if !is_binary => message.content_type = Text::from_static(JSON),
        None if !content_type.is_empty() => message.content_type = content_type.into(),
        None => {}
    }
    for (name, value) in &attributes {
        take_attribute(&mut message, name, value);
    }
    if let Some(key) = other(KEY).and_then(unescape_bytes) {
        message.key = Some(Key::from(&key[..]));
    }
    decode_headers(headers, &others, &mut message.headers);
    message
}

/// Puts an attribute where it belongs; those that [`decode`] has read already go nowhere.
fn take_attribute(message: &mut Message, name: &str, value: &str) {
    let known = match name {
        "id" | "source" | "type" | "datacontenttype" | "specversion" => true,
        "dataversion" => value.parse().map(|version| message.version = version).is_ok(),
        "time" => set_time(&mut message.time, value),
        "recordedtime" => set_time(&mut message.recorded_time, value),
        "partitionkey" => {
            message.key = Some(value.into());
            true
        }
        "correlationid" => {
            message.correlation_id = Some(value.into());
            true
        }
        "causationid" => {
            message.causation_id = Some(value.into());
            true
        }
        _ => false,
    };
    if !known {
        message.attributes.push((name.into(), value.into()));
    }
}

/// Whether `value` is a time.
fn set_time(time: &mut Option<SystemTime>, value: &str) -> bool {
    let read = from_rfc3339(value);
    *time = read.or(*time);
    read.is_some()
}

/// Headers as the server stores them: `NATS/1.0`, then a line for each.
pub(crate) fn parse_headers(stored: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let text = String::from_utf8_lossy(stored);
    for (name, value) in text.split("\r\n").skip(1).filter_map(|line| line.split_once(':')) {
        // What the server has taken and the client cannot hold is nothing that we wrote.
        let _ = set(&mut headers, name, value.trim());
    }
    headers
}

/// What keeps its order, as it stands in a message: its topic and its key.
pub(crate) fn lane(raw: &async_nats::Message) -> Option<(String, String)> {
    let headers = raw.headers.as_ref()?;
    let header = |name| find(each(headers), name);
    let key = header("ce-partitionkey").or_else(|| header(KEY))?;
    Some((header(TOPIC).unwrap_or(&raw.subject).to_owned(), key.to_owned()))
}

/// A header and its values.
type Header<'a> = (&'a str, &'a [HeaderValue]);
/// An attribute: its name, in lower case, and its value, decoded.
type Attribute<'a> = (Cow<'a, str>, Cow<'a, str>);

fn each(headers: &HeaderMap) -> impl Iterator<Item = Header<'_>> {
    headers.iter().map(|(name, values)| (name.as_ref(), &values[..]))
}

fn find<'a>(mut headers: impl Iterator<Item = Header<'a>>, name: &str) -> Option<&'a str> {
    let found = headers.find(|(n, _)| n.eq_ignore_ascii_case(name));
    found.and_then(|(_, values)| values.first()).map(HeaderValue::as_str)
}

/// Attributes of binary mode, by name, and the other headers. An attribute that cannot be decoded is among those.
fn sort(headers: &HeaderMap) -> (Vec<Attribute<'_>>, Vec<Header<'_>>) {
    let (mut attributes, mut others) = (Vec::with_capacity(headers.len()), Vec::new());
    for (name, values) in each(headers) {
        match attribute(name, values) {
            Some(attribute) => attributes.push(attribute),
            None => others.push((name, values)),
        }
    }
    attributes.sort_unstable();
    (attributes, others)
}

fn attribute<'a>(name: &'a str, values: &'a [HeaderValue]) -> Option<Attribute<'a>> {
    let name = name.get(..3).filter(|prefix| prefix.eq_ignore_ascii_case("ce-")).and(name.get(3..))?;
    if name.is_empty() || !all(name.as_bytes(), |b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let lower = !name.bytes().any(|b| b.is_ascii_uppercase());
    let name = if lower { Cow::Borrowed(name) } else { Cow::Owned(name.to_ascii_lowercase()) };
    let value = values.first()?.as_str().trim();
    if all(value.as_bytes(), |b| is_literal(b) || b == b' ') {
        return Some((name, Cow::Borrowed(value)));
    }
    let value = unescape(value).filter(|value| !value.contains(char::is_control))?;
    Some((name, Cow::Owned(value)))
}

fn is_structured(content_type: &str) -> bool {
    let media = content_type.split(';').next().unwrap_or_default().trim();
    ["application/cloudevents", "application/cloudevents+json"].iter().any(|known| media.eq_ignore_ascii_case(known))
}

/// Attributes and data of structured mode in the JSON format; `None` if it is none.
fn structured(payload: &[u8]) -> Option<(Vec<Attribute<'static>>, Bytes)> {
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
        (!name.starts_with("data_") && name != "data").then(|| (name.clone().into(), text.into()))
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

fn decode_headers(from: &HeaderMap, others: &[Header<'_>], headers: &mut Headers) {
    let mut taken: Vec<(&str, usize)> = Vec::new();
    for listed in
        find(others.iter().copied(), LAYOUT).unwrap_or_default().split(',').filter(|listed| !listed.is_empty())
    {
        let (name, encoded) = listed.strip_suffix('=').map_or((listed, false), |name| (name, true));
        let nth = taken.iter().filter(|(n, _)| *n == name).count();
        let exact = each(from).find(|(n, _)| *n == name);
        let Some(value) = exact.and_then(|(_, values)| values.get(nth)) else { continue };
        let value = value.as_str();
        let bytes = if encoded { unescape_bytes(value) } else { None };
        headers.append_unchecked(name, bytes.map_or_else(|| Bytes::copy_from_slice(value.as_bytes()), Bytes::from));
        taken.push((name, nth));
    }
    let mut rest: Vec<_> = others.iter().filter(|(name, _)| is_foreign(name)).collect();
    rest.sort_unstable_by_key(|(name, _)| *name);
    for (name, values) in rest {
        let skip = taken.iter().filter(|(n, _)| n == name).count();
        for value in values.iter().skip(skip) {
            headers.append_unchecked(*name, Bytes::copy_from_slice(value.as_str().as_bytes()));
        }
    }
}

/// Whether a header that is no attribute is neither the server's nor our own.
fn is_foreign(name: &str) -> bool {
    let own = OWN.iter().any(|own| name.eq_ignore_ascii_case(own));
    let server = name.get(..5).is_some_and(|prefix| prefix.eq_ignore_ascii_case("nats-"));
    !own && !server
}

/// What is written as it is: U+0021 to U+007E but for `"` and `%`.
fn is_literal(byte: u8) -> bool {
    (b'!'..=b'~').contains(&byte) && byte != b'"' && byte != b'%'
}

/// Without a branch for each byte, because it is asked of each attribute of each message.
fn all(bytes: &[u8], is: impl Fn(u8) -> bool) -> bool {
    bytes.iter().fold(true, |all, byte| all & is(*byte))
}

fn escape(text: &str) -> Cow<'_, str> {
    if all(text.as_bytes(), is_literal) { Cow::Borrowed(text) } else { Cow::Owned(escape_bytes(text.as_bytes())) }
}

fn escape_bytes(bytes: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut escaped = String::with_capacity(bytes.len());
    for byte in bytes {
        if is_literal(*byte) {
            escaped.push(char::from(*byte));
        } else {
            escaped.push('%');
            escaped.push(char::from(HEX[usize::from(byte >> 4)]));
            escaped.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    escaped
}

/// One round of decoding, after un-quoting, of what is trimmed; `None` for what is no UTF-8.
fn unescape(value: &str) -> Option<String> {
    let inner = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).filter(|_| value.len() > 1);
    let bytes = match inner {
        None => unescape_bytes(value)?,
        Some(quoted) => unescape_bytes(&unquote(quoted))?,
    };
    String::from_utf8(bytes).ok()
}

fn unquote(quoted: &str) -> String {
    let mut chars = quoted.chars();
    let mut text = String::with_capacity(quoted.len());
    while let Some(c) = chars.next() {
        text.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    text
}

/// `%` that begins no escape stands for itself.
fn unescape_bytes(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|hex| *first == b'%' && hex.iter().all(u8::is_ascii_hexdigit));
        match hex.and_then(|hex| std::str::from_utf8(hex).ok()) {
            Some(hex) => {
                bytes.push(u8::from_str_radix(hex, 16).ok()?);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
