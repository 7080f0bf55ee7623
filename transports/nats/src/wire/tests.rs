use super::*;
use proptest::prelude::*;
use std::time::SystemTime;

fn topic() -> Topic {
    Topic::new("shop.order.placed").unwrap()
}

fn origin(topic: Option<Topic>) -> Origin<'static> {
    Origin { topic, stream: "shop", position: 7 }
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    pairs.iter().for_each(|(name, value)| set(&mut headers, name, value).unwrap());
    headers
}

#[test]
fn the_binding_s_own_example() {
    // CloudEvents NATS binding, section 3.1.3.2.
    assert_eq!(escape("Euro € 😀"), "Euro%20%E2%82%AC%20%F0%9F%98%80");
    assert_eq!(unescape("Euro%20%E2%82%AC%20%F0%9F%98%80").as_deref(), Some("Euro € 😀"));
    assert_eq!(unescape("Euro%20%e2%82%ac").as_deref(), Some("Euro €"), "lower case is accepted");
    assert_eq!(unescape("%41b").as_deref(), Some("Ab"), "needless encoding is accepted");
    assert_eq!(unescape("\"a \\\"b\\\" %41\"").as_deref(), Some("a \"b\" A"), "quotes come off first");
    assert_eq!(unescape("%C0%A0"), None, "invalid UTF-8");
    assert_eq!(unescape("%2525").as_deref(), Some("%25"), "one round");
    assert_eq!(escape("a\"%\r\n"), "a%22%25%0D%0A");
}

#[test]
fn a_binary_message_of_another_client() {
    let pairs = [
        ("ce-specversion", "1.0"),
        ("CE-Type", "com.example.someevent"),
        ("ce-time", "2018-04-05T03:56:24Z"),
        ("ce-id", "1234-1234-1234"),
        ("ce-source", "/mycontext/subcontext"),
        ("ce-datacontenttype", "application/json; charset=utf-8"),
        ("ce-subject", "a%20b"),
        ("x-tenant", "acme"),
    ];
    let message = decode(Some(&headers(&pairs)), &"{}".into(), &origin(Some(topic())));
    assert_eq!(message.id.to_string(), "1234-1234-1234");
    assert_eq!(
        (message.source.as_str(), message.event_type.as_str()),
        ("/mycontext/subcontext", "com.example.someevent")
    );
    assert_eq!(message.content_type.as_str(), "application/json; charset=utf-8");
    assert_eq!(message.time, from_rfc3339("2018-04-05T03:56:24Z"));
    assert_eq!(message.attributes, [("subject".into(), "a b".into())]);
    assert_eq!(message.headers.get_str("x-tenant"), Some("acme"));
    assert_eq!((message.headers.len(), message.version), (1, 1));
}

#[test]
fn structured_messages() {
    let event = r#"{"specversion":"1.0","type":"t","source":"/s","id":"A1","comexampleextension2":{"x":1},"ext":5,
        "partitionkey":"k","datacontenttype":"text/xml","data":"<much wow=\"xml\"/>"}"#;
    for content_type in ["application/cloudevents+json", "Application/CloudEvents+JSON; charset=UTF-8"] {
        let headers = headers(&[("Content-Type", content_type)]);
        let message = decode(Some(&headers), &event.into(), &origin(Some(topic())));
        assert_eq!((message.id.to_string().as_str(), message.event_type.as_str()), ("A1", "t"));
        assert_eq!((&message.payload[..], message.content_type.as_str()), (&b"<much wow=\"xml\"/>"[..], "text/xml"));
        assert_eq!((message.key, message.attributes), (Some("k".into()), vec![("ext".into(), "5".into())]));
    }
    let json = |event: &str| {
        let headers = headers(&[("content-type", "application/cloudevents+json")]);
        decode(Some(&headers), &Bytes::copy_from_slice(event.as_bytes()), &origin(Some(topic())))
    };
    let data = json(r#"{"specversion":"1.0","type":"t","source":"/s","id":"1","data":{"a":[1]}}"#);
    assert_eq!((&data.payload[..], data.content_type.as_str()), (&br#"{"a":[1]}"#[..], "application/json"));
    let data = json(r#"{"specversion":"1.0","type":"t","source":"/s","id":"1","data_base64":"AP8="}"#);
    assert_eq!(&data.payload[..], b"\0\xff");
    for broken in ["{", "[]", r#"{"specversion":"1.0","type":"t","source":"/s"}"#, r#"{"id":1}"#] {
        let message = json(broken);
        assert_eq!((&message.payload[..], message.event_type.as_str()), (broken.as_bytes(), "shop.order.placed"));
    }
}

#[test]
fn what_is_no_event_gets_what_it_lacks() {
    let message = decode(None, &"hello".into(), &origin(Some(topic())));
    assert_eq!((message.id.to_string().as_str(), message.source.as_str()), ("shop-7", "/nats/shop"));
    assert_eq!((message.event_type.as_str(), &message.topic), ("shop.order.placed", &topic()));
    let message = decode(None, &Bytes::new(), &origin(None));
    assert_eq!(message.topic.as_str(), "unknown");
}

#[test]
fn a_repeat_has_the_same_id_and_nothing_else_has() {
    let message = Message::new("1".into(), "/s", "t", topic()).with_payload("text/plain", "x");
    let to = |name: &str| tidings_core::SubscriptionName::new(name).unwrap();
    let mut ids = std::collections::HashSet::new();
    assert!(ids.insert(message_id(&message, &Destination::Topic(topic()))));
    assert!(ids.insert(message_id(&message, &Destination::Subscription(to("a")))));
    assert!(ids.insert(message_id(&message, &Destination::DeadLetter(to("a")))));
    assert!(ids.insert(message_id(&message, &Destination::DeadLetter(to("b")))));
    for name in [header::ATTEMPTS, header::REDRIVEN, header::TIME] {
        let mut other = message.clone();
        other.headers.append_unchecked(name, "2");
        assert!(ids.insert(message_id(&other, &Destination::Topic(topic()))), "{name}");
    }
    let other = message.clone().with_payload("text/plain", "y");
    assert!(ids.insert(message_id(&other, &Destination::Topic(topic()))));
    let mut repeat = message;
    repeat.headers.append_unchecked(header::REPEAT, "1");
    assert!(!ids.insert(message_id(&repeat, &Destination::Topic(topic()))));
}

fn text() -> impl Strategy<Value = String> {
    "[^\\p{C}]{1,20}"
}

prop_compose! {
    fn messages()(
        id in text(), source in text(), event_type in text(), version in 1_u32..,
        key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..60)),
        attributes in proptest::collection::btree_map("x[a-z0-9]{1,10}", text(), 0..3),
        headers in proptest::collection::vec(("[a-zA-Z!#$&'*+.^`|~-]{1,8}", proptest::collection::vec(any::<u8>(), 0..20)), 0..6),
        times in proptest::option::of(0_u64..4_000_000_000_000_000), link in proptest::option::of(text()),
        payload in proptest::collection::vec(any::<u8>(), 0..50),
    ) -> Message {
        let mut message = Message::new(id.into(), source, event_type, topic()).with_payload("text/plain; a=\"b c\"", payload);
        message.version = version;
        message.key = key.map(|key| Key::from(&key[..]));
        message.time = times.map(|micros| SystemTime::UNIX_EPOCH + Duration::from_micros(micros));
        message.recorded_time = message.time;
        message.correlation_id = link.map(Into::into);
        message.causation_id = message.correlation_id.clone();
        message.attributes = attributes.into_iter().map(|(n, v)| (n.into(), v.into())).collect();
        for (name, value) in headers {
            if !Headers::is_reserved(&name) {
                message.headers.append(name, value).unwrap();
            }
        }
        message
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(message in messages(), addressed in any::<bool>()) {
        let name = tidings_core::SubscriptionName::new("a").unwrap();
        let destination = if addressed { Destination::Subscription(name) } else { Destination::Topic(topic()) };
        let headers = encode(&message, &destination, None).unwrap();
        let read = decode(Some(&headers), &message.payload, &origin((!addressed).then(topic)));
        prop_assert_eq!(read, message);
    }

    #[test]
    fn nothing_that_is_read_panics(name in "[!-9;-~]{1,20}", value in "[^\r\n]{0,40}", payload in proptest::collection::vec(any::<u8>(), 0..50)) {
        for extra in ["x", "application/cloudevents+json"] {
            let headers = headers(&[(&name, &value), ("content-type", extra), (LAYOUT, &value)]);
            decode(Some(&headers), &payload.clone().into(), &origin(None));
        }
    }
}
