//! CloudEvents over AMQP 0-9-1, for which no official binding exists: as in the one for AMQP 1.0, binary mode, every
//! attribute is a header `cloudEvents_<name>` and the content type a property.

use crate::error::{error, short};
use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, ByteArray, FieldTable, LongString};
use std::borrow::Cow;
use std::hash::Hasher;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};
use tidings_core::{Clock, ErrorKind, Headers, Key, Message, MessageId, Result, Text, Topic, from_rfc3339, to_rfc3339};

/// Written; RabbitMQ makes these the application properties of AMQP 1.0.
const PREFIX: &str = "cloudEvents_";
/// Read, in any case: the official binding's two, Knative's, and Kafka's.
const PREFIXES: [&str; 4] = [PREFIX, "cloudEvents:", "ce-", "ce_"];
/// The header with the key, by which slots are chosen.
pub(crate) const KEY: &str = "cloudEvents_partitionkey";
/// Where it was published, if the routing key does not say.
const TOPIC: &str = "tidings-topic";
/// All of the application's headers, if some have the same name.
const ALL: &str = "tidings-headers";
/// Where a dead letter stands among the others.
pub(crate) const DEAD_POSITION: &str = "tidings-dead-position";
/// When it was published, or is due, in microseconds since 1970; written where `recordedtime` does not say that.
pub(crate) const SENT: &str = "tidings-sent";
/// Persistent, as AMQP 0-9-1 writes it.
const PERSISTENT: u8 = 2;
/// Headers and properties travel in one frame of 128 KiB.
const MAX_HEADERS: usize = 100 * 1024;

/// Made once, because it is part of what each message begins as.
static NO_ID: LazyLock<MessageId> = LazyLock::new(|| "".into());

/// A message as the client handed it over.
pub(crate) struct Received {
    pub(crate) routing_key: String,
    pub(crate) properties: BasicProperties,
    pub(crate) data: Vec<u8>,
}

/// Writes everything but the payload. `addressed` says that the routing key will not be the topic.
pub(crate) fn encode(message: &Message, addressed: bool) -> Result<BasicProperties> {
    let mut headers = FieldTable::default();
    put_attributes(message, &mut headers)?;
    if addressed {
        headers.insert(short(TOPIC)?, text(message.topic.as_str()));
    }
    put_headers(&message.headers, &mut headers)?;
    let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    match short(&*message.content_type) {
        Ok(content_type) => properties = properties.with_content_type(content_type),
        Err(_) => drop(headers.insert(short("cloudEvents_datacontenttype")?, text(&message.content_type))),
    }
    // For other clients; the header is what is read.
    if let Ok(id) = message.id.with_str(|id| short(id)) {
        properties = properties.with_message_id(id);
    }
    Ok(properties.with_headers(headers))
}

fn put_attributes(message: &Message, headers: &mut FieldTable) -> Result<()> {
    let mut put = |name: &str, value: &str| -> Result<()> {
        headers.insert(short(name)?, text(value));
        Ok(())
    };
    put("cloudEvents_specversion", "1.0")?;
    message.id.with_str(|id| put("cloudEvents_id", id))?;
    put("cloudEvents_source", &message.source)?;
    put("cloudEvents_type", &message.event_type)?;
    if message.version != 1 {
        put("cloudEvents_dataversion", &message.version.to_string())?;
    }
    let ids =
        [("cloudEvents_correlationid", &message.correlation_id), ("cloudEvents_causationid", &message.causation_id)];
    for (name, id) in ids {
        id.as_ref().map_or(Ok(()), |id| id.with_str(|id| put(name, id)))?;
    }
    message.attributes.iter().try_for_each(|(name, value)| put(&format!("{PREFIX}{name}"), value))?;
    // Of what is published for the first time both are the same, and to write a time costs.
    let time = message.time.map(to_rfc3339);
    let recorded =
        if message.recorded_time == message.time { time.clone() } else { message.recorded_time.map(to_rfc3339) };
    for (name, time) in [("cloudEvents_time", time), ("cloudEvents_recordedtime", recorded)] {
        if let Some(time) = time {
            headers.insert(short(name)?, AMQPValue::LongString(time.into()));
        }
    }
    if let Some(key) = &message.key {
        headers.insert(short(KEY)?, AMQPValue::LongString(LongString::from(key.as_bytes())));
    }
    Ok(())
}

fn put_headers(all: &Headers, headers: &mut FieldTable) -> Result<()> {
    if all.bytes() > MAX_HEADERS {
        let why = "the headers do not fit into a frame; put the data into the event";
        return Err(error(ErrorKind::TooLarge, why).with_context("bytes", all.bytes()));
    }
    let own = || all.iter().filter(|(name, _)| !is_brokers(name));
    for (name, value) in own() {
        let name = short(name.as_str())?;
        if !headers.contains_key(name.as_str()) {
            headers.insert(name, bytes(value));
        }
    }
    // A table has each name once and keeps no order.
    if own().any(|(name, _)| all.get_all(name).nth(1).is_some()) {
        headers.insert(short(ALL)?, AMQPValue::ByteArray(ByteArray::from(pack(own()))));
    }
    Ok(())
}

/// Names and values, each behind its length.
fn pack<'a>(all: impl Iterator<Item = (&'a Text, &'a Bytes)>) -> Vec<u8> {
    let mut packed = Vec::new();
    for part in all.flat_map(|(name, value)| [name.as_bytes(), value]) {
        // Below MAX_HEADERS, which fits.
        packed.extend((part.len() as u32).to_be_bytes());
        packed.extend(part);
    }
    packed
}

fn unpack(packed: &[u8]) -> Option<Headers> {
    let (mut headers, mut rest) = (Headers::new(), packed);
    let mut part = || -> Option<Option<&[u8]>> {
        let Some((length, behind)) = rest.split_first_chunk::<4>() else { return rest.is_empty().then_some(None) };
        let (part, behind) = behind.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        rest = behind;
        Some(Some(part))
    };
    while let Some(name) = part()? {
        let value = part()??;
        headers.append_unchecked(std::str::from_utf8(name).ok()?, Bytes::copy_from_slice(value));
    }
    Some(headers)
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value))
}

fn bytes(value: &[u8]) -> AMQPValue {
    match std::str::from_utf8(value) {
        Ok(value) => text(value),
        Err(_) => AMQPValue::ByteArray(ByteArray::from(value)),
    }
}

/// What the broker adds, or would take for instructions: never shown, never sent.
fn is_brokers(name: &str) -> bool {
    const PREFIXES: [&str; 3] = ["x-death", "x-first-death-", "x-last-death-"];
    const NAMES: [&str; 7] =
        ["CC", "BCC", "x-delivery-count", "x-acquired-count", "x-stream-offset", DEAD_POSITION, SENT];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || NAMES.contains(&name) || matches!(name, TOPIC | ALL)
}

/// Reads any message: what is no CloudEvent gets an envelope of what there is.
pub(crate) fn decode(received: Received) -> Message {
    let Received { routing_key, properties, data } = received;
    let empty = FieldTable::default();
    let table = properties.headers().as_ref().unwrap_or(&empty);
    let none = Text::from_static("");
    let topic = topic_of(table, &routing_key);
    let mut message = Message::new(NO_ID.clone(), none.clone(), none, topic);
    if let Some(content_type) =
        properties.content_type().as_ref().map(|text| clean(text.as_str())).filter(|text| !text.is_empty())
    {
        message.content_type = content_type_of(&content_type);
    }
    for (name, value) in table {
        let name = name.as_str();
        match attribute(name) {
            Some(attribute) => read_attribute(&mut message, &attribute, value),
            None if !is_brokers(name) => read_header(&mut message.headers, name, value),
            None => {}
        }
    }
    if let Some(AMQPValue::ByteArray(packed)) = table.inner().get(ALL)
        && let Some(headers) = unpack(packed.as_slice())
    {
        message.headers = headers;
    }
    fill_in(&mut message, &properties, &data);
    message.payload = Bytes::from(data);
    message
}

/// What every message has, from what other clients write.
fn fill_in(message: &mut Message, properties: &BasicProperties, data: &[u8]) {
    if message.id.with_str(str::is_empty) {
        let id = property(properties.message_id()).unwrap_or_else(|| id_of(properties, data).into());
        message.id = MessageId::from(&*id);
    }
    if message.source.is_empty() {
        message.source = property(properties.app_id()).unwrap_or(Text::from_static("/rabbitmq"));
    }
    if message.event_type.is_empty() {
        message.event_type = property(properties.kind()).unwrap_or_else(|| Text::from(message.topic.as_str()));
    }
}

fn property(value: &Option<lapin::types::ShortString>) -> Option<Text> {
    value.as_ref().map(|value| clean(value.as_str())).filter(|value| !value.is_empty()).map(|value| (&*value).into())
}

/// CloudEvents 1.0.2, *Type System*: a String holds no control characters.
fn clean(text: &str) -> Cow<'_, str> {
    // All of them: without a way out in between several are looked at at once.
    if text.bytes().fold(true, |plain, byte| plain & (b' '..=b'~').contains(&byte)) {
        return text.into();
    }
    text.chars().filter(|c| !c.is_control()).collect()
}

/// The usual one is not copied each time.
fn content_type_of(text: &str) -> Text {
    const USUAL: &str = "application/json";
    if text == USUAL { Text::from_static(USUAL) } else { text.into() }
}

fn attribute(header: &str) -> Option<Cow<'_, str>> {
    let starts = |prefix: &str| header.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    let other = || PREFIXES.into_iter().find(|prefix| starts(prefix)).map(|prefix| &header[prefix.len()..]);
    let name = header.strip_prefix(PREFIX).or_else(other)?;
    let is_lower = !name.bytes().any(|byte| byte.is_ascii_uppercase());
    let name = if is_lower { name.into() } else { name.to_ascii_lowercase().into() };
    Some(name).filter(|name: &Cow<'_, str>| !name.is_empty())
}

fn read_attribute(message: &mut Message, name: &str, value: &AMQPValue) {
    if name == "partitionkey" {
        message.key = scalar(value).map(|key| Key::from(&key[..]));
        return;
    }
    let Some(value) = scalar(value) else { return };
    let Ok(text) = std::str::from_utf8(&value) else { return };
    let text = &*clean(text);
    if text.is_empty() {
        return;
    }
    match name {
        "specversion" => {}
        "id" => message.id = text.into(),
        "source" => message.source = text.into(),
        "type" => message.event_type = text.into(),
        "datacontenttype" => message.content_type = content_type_of(text),
        "dataversion" => message.version = text.parse().unwrap_or(u32::MAX),
        "time" => message.time = from_rfc3339(text),
        "recordedtime" => message.recorded_time = from_rfc3339(text),
        "correlationid" => message.correlation_id = Some(text.into()),
        "causationid" => message.causation_id = Some(text.into()),
        _ => message.attributes.push((name.into(), text.into())),
    }
}

fn read_header(headers: &mut Headers, name: &str, value: &AMQPValue) {
    match value {
        AMQPValue::FieldArray(values) => {
            let values = values.as_slice().iter().filter_map(scalar);
            values.for_each(|value| headers.append_unchecked(name, value.into_owned()));
        }
        value => scalar(value).into_iter().for_each(|value| headers.append_unchecked(name, value.into_owned())),
    }
}

/// A value as bytes; `None` for what has parts.
fn scalar(value: &AMQPValue) -> Option<Cow<'_, [u8]>> {
    let number = match value {
        AMQPValue::LongString(text) => return Some(text.as_bytes().into()),
        AMQPValue::ShortString(text) => return Some(text.as_str().as_bytes().into()),
        AMQPValue::ByteArray(bytes) => return Some(bytes.as_slice().into()),
        AMQPValue::Timestamp(time) => to_rfc3339(at(*time)),
        AMQPValue::Boolean(flag) => flag.to_string(),
        AMQPValue::Float(number) => number.to_string(),
        AMQPValue::Double(number) => number.to_string(),
        AMQPValue::DecimalValue(number) => format!("{}e-{}", number.value, number.scale),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) | AMQPValue::Void => return None,
        integer => self::integer(integer)?.to_string(),
    };
    Some(number.into_bytes().into())
}

/// An integer of any width.
pub(crate) fn integer(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(n) => Some((*n).into()),
        AMQPValue::ShortShortUInt(n) => Some((*n).into()),
        AMQPValue::ShortInt(n) => Some((*n).into()),
        AMQPValue::ShortUInt(n) => Some((*n).into()),
        AMQPValue::LongInt(n) => Some((*n).into()),
        AMQPValue::LongUInt(n) => Some((*n).into()),
        AMQPValue::LongLongInt(n) => Some(*n),
        AMQPValue::Timestamp(n) => i64::try_from(*n).ok(),
        _ => None,
    }
}

/// A header of the broker that holds a count.
pub(crate) fn count(properties: &BasicProperties, name: &str) -> Option<u64> {
    let table = properties.headers().as_ref()?.inner();
    // Mostly it is not there and sorts behind all that is, which one comparison tells.
    let (last, _) = table.last_key_value()?;
    let value = (last.as_str() >= name).then(|| table.get(name))??;
    integer(value).and_then(|count| u64::try_from(count).ok())
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or_else(|| Clock::SYSTEM.now())
}

/// Where it was published: as the SDK has written it, or by the routing key of its first journey.
fn topic_of(headers: &FieldTable, routing_key: &str) -> Topic {
    let written = headers.inner().get(TOPIC).and_then(scalar).and_then(|topic| String::from_utf8(topic.into()).ok());
    let first = || dead_routing_key(headers).unwrap_or_else(|| routing_key.to_owned());
    let name = written.unwrap_or_else(first);
    Topic::new(name.as_str()).unwrap_or_else(|_| similar(&name))
}

/// What the routing key was before the broker dead-lettered the message.
fn dead_routing_key(headers: &FieldTable) -> Option<String> {
    let deaths = headers.inner().get("x-death")?.as_array()?.as_slice();
    let first = deaths.last()?.as_field_table()?;
    let keys = first.inner().get("routing-keys")?.as_array()?.as_slice();
    keys.first().and_then(scalar).and_then(|key| String::from_utf8(key.into()).ok())
}

/// The topic that is most like another client's routing key.
fn similar(name: &str) -> Topic {
    let allowed = |c: char| match c.to_ascii_lowercase() {
        c @ ('a'..='z' | '0'..='9' | '.' | '-') => c,
        _ => '-',
    };
    let name: String = name.chars().take(200).map(allowed).collect();
    let tokens: Vec<_> = name.split('.').map(|token| if token.is_empty() { "-" } else { token }).collect();
    let joined = tokens.join(".");
    Topic::new(joined).unwrap_or_else(|_| Topic::new("unnamed").expect("a valid topic"))
}

/// An id for what has none: the same each time it is handed out.
fn id_of(properties: &BasicProperties, data: &[u8]) -> String {
    let mut hash = Fnv::default();
    hash.write(properties.kind().as_ref().map_or("", |kind| kind.as_str()).as_bytes());
    hash.write(&properties.timestamp().unwrap_or_default().to_be_bytes());
    hash.write(properties.correlation_id().as_ref().map_or("", |id| id.as_str()).as_bytes());
    hash.write(data);
    format!("rabbitmq-{:016x}-{:x}", hash.finish(), data.len())
}

/// FNV-1a, 64 bits: the same in every process, unlike the standard library's.
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::{FieldArray, ShortString};

    fn full() -> Message {
        let mut message = Message::new("order-4711".into(), "/shops/1", "shop.order", Topic::new("shop.a").unwrap());
        message = message.with_key(&b"\0\xff"[..]).with_payload("text/plain; charset=utf-8", "all of it");
        message.version = 7;
        message.time = from_rfc3339("2026-11-24T08:27:18.000001Z");
        message.recorded_time = from_rfc3339("1938-04-24T22:13:19.999999Z");
        message.correlation_id = Some("flow-1".into());
        message.causation_id = Some("01890a5d-ac96-774b-bcce-b302099a8057".into());
        message.attributes = vec![("dataschema".into(), "https://x/v7".into()), ("subject".into(), "Ω/ø".into())];
        message.headers.append("x-bytes", &b"\0\xff\r\n"[..]).unwrap();
        message.headers.append("x-text", "Ω").unwrap();
        message
    }

    fn read(properties: BasicProperties, routing_key: &str, data: &[u8]) -> Message {
        decode(Received { routing_key: routing_key.into(), properties, data: data.to_vec() })
    }

    fn table(entries: Vec<(&str, AMQPValue)>) -> BasicProperties {
        let mut headers = FieldTable::default();
        for (name, value) in entries {
            headers.insert(name.into(), value);
        }
        BasicProperties::default().with_headers(headers)
    }

    #[test]
    fn what_was_written_is_read_as_it_was() {
        let message = full();
        let properties = encode(&message, false).unwrap();
        assert_eq!(read(properties, "shop.a", b"all of it"), message);
        let addressed = encode(&message, true).unwrap();
        assert_eq!(read(addressed, "elsewhere", b"all of it"), message);
        let bare = Message::new("1".into(), "/s", "t", Topic::new("a").unwrap());
        assert_eq!(read(encode(&bare, false).unwrap(), "a", b""), bare);
    }

    #[test]
    fn headers_of_one_name_keep_their_order() {
        let mut message = full();
        for (name, value) in [("X-Tenant", "1"), ("other", "-"), ("x-tenant", "2"), ("x-tenant", "")] {
            message.headers.append(name, value).unwrap();
        }
        let read = read(encode(&message, false).unwrap(), "shop.a", b"all of it");
        assert_eq!(read.headers, message.headers);
    }

    #[test]
    fn reads_the_names_and_types_of_other_clients() {
        for prefix in ["cloudEvents:", "CloudEvents_", "ce-", "CE_"] {
            let name = |attribute: &str| format!("{prefix}{attribute}");
            let properties = table(vec![
                (&name("id"), AMQPValue::LongInt(4711)),
                (&name("source"), text("/php")),
                (&name("type"), AMQPValue::ShortString("shop.order".into())),
                (&name("time"), AMQPValue::Timestamp(1)),
                (&name("dataversion"), AMQPValue::ShortShortUInt(3)),
                (&name("partitionkey"), text("ada")),
                ("retries", AMQPValue::LongLongInt(-2)),
                ("flag", AMQPValue::Boolean(true)),
                ("several", AMQPValue::FieldArray(FieldArray::from(vec![text("a"), text("b")]))),
                ("nothing", AMQPValue::Void),
                ("parts", AMQPValue::FieldTable(FieldTable::default())),
            ]);
            let message = read(properties, "shop.order", b"{}");
            assert_eq!((message.id.to_string().as_str(), &*message.source, message.version), ("4711", "/php", 3));
            assert_eq!((message.time, message.key), (Some(at(1)), Some("ada".into())));
            let header = |name| message.headers.get_str(name);
            assert_eq!((header("retries"), header("flag"), header("nothing")), (Some("-2"), Some("true"), None));
            assert_eq!(message.headers.get_all("several").collect::<Vec<_>>(), ["a", "b"]);
        }
    }

    #[test]
    fn what_is_no_cloud_event_gets_an_envelope() {
        let properties = BasicProperties::default();
        let message = read(properties.clone(), "Shop..Order_Placed\n", b"raw");
        assert_eq!((message.topic.as_str(), &*message.event_type), ("shop.-.order-placed-", "shop.-.order-placed-"));
        assert_eq!(message.id, read(properties.clone(), "other", b"raw").id, "the same each time");
        assert_ne!(message.id, read(properties, "other", b"else").id);
        let with = BasicProperties::default().with_message_id("m\u{1}1".into()).with_type(ShortString::from("t"));
        let message = read(with, "", b"");
        assert_eq!((message.id.to_string().as_str(), &*message.event_type, message.topic.as_str()), ("m1", "t", "-"));
    }

    #[test]
    fn what_the_broker_adds_is_neither_shown_nor_sent() {
        let mut death = FieldTable::default();
        death.insert("routing-keys".into(), AMQPValue::FieldArray(FieldArray::from(vec![text("shop.first")])));
        let properties = table(vec![
            ("x-death", AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)]))),
            ("x-delivery-count", AMQPValue::LongLongInt(3)),
            ("x-first-death-queue", text("q")),
            ("CC", AMQPValue::FieldArray(FieldArray::from(vec![text("elsewhere")]))),
        ]);
        assert_eq!(count(&properties, "x-delivery-count"), Some(3));
        let mut message = read(properties, "q", b"");
        assert!(message.headers.is_empty(), "{:?}", message.headers);
        assert_eq!(message.topic.as_str(), "shop.first");
        message.headers.append_unchecked("CC", "elsewhere");
        let sent = encode(&message, false).unwrap();
        assert!(!sent.headers().as_ref().unwrap().contains_key("CC"));
    }

    #[test]
    fn nothing_that_comes_makes_it_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2_000 {
            let mut noise = || std::iter::repeat_with(|| random.u8(..)).take(12).collect::<Vec<_>>();
            let value = AMQPValue::LongString(LongString::from(noise()));
            let packed = AMQPValue::ByteArray(ByteArray::from(noise()));
            let properties = table(vec![("cloudEvents_id", value.clone()), ("cloudEvents_time", value), (ALL, packed)]);
            let key = String::from_utf8_lossy(&noise()).into_owned();
            let message = read(properties, &key, &noise());
            assert!(message.id.with_str(|id| !id.is_empty()));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut message = full();
        message.attributes.push(("n".repeat(300).into(), "v".into()));
        assert_eq!(encode(&message, false).unwrap_err().kind(), ErrorKind::InvalidName);
        let mut message = full();
        message.headers.append_unchecked("big", vec![b'x'; 200_000]);
        assert_eq!(encode(&message, false).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}
