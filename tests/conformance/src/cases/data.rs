//! What is published comes as it was published, and nowhere else.

use super::cases;
use crate::env::{Env, dead_letters, within};
use crate::reader::{
    Reader, assert_same, full, open, publish, publish_messages, said, saying, send_to, spec, submit, topic, topics,
    unordered,
};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidings_core::transport::{Destination, Transport};
use tidings_core::{Key, Message};
use tokio::task::JoinSet;

cases!("data":
    every_attribute_comes_as_it_was_sent,
    what_is_absent_stays_absent,
    header_values_are_bytes,
    header_names_and_repeated_headers_are_kept,
    keys_are_bytes,
    text_is_any_unicode,
    an_empty_payload_is_a_payload,
    a_payload_may_be_as_large_as_the_limit,
    times_keep_their_microseconds,
    many_topics_stay_apart,
    similar_names_stay_apart,
    namespaces_stay_apart,
    an_id_is_the_same_each_time,
    addresses_and_dead_letters_keep_all_of_a_message,
);

const DATA: &str = "suite.data";

/// Publishes messages, and reads each as it was sent.
async fn all_come_back(env: &Env, sent: Vec<Message>) {
    topics(env.transport(), &[DATA]).await;
    let mut reader = open(env.transport(), spec(env, "crm", &[DATA])).await;
    publish_messages(env.transport(), &sent).await;
    for _ in 0..sent.len() {
        let delivery = reader.next().await;
        let original = sent.iter().find(|message| message.id == delivery.message.id);
        assert_same(&delivery.message, original.expect("an id that was sent"));
        assert!(!delivery.redelivered && !delivery.replayed, "handed out for the first time: {delivery:?}");
        delivery.acker.ack();
    }
}

/// Messages that say their number, each changed in its way.
fn changed<T>(values: impl IntoIterator<Item = T>, change: impl Fn(&mut Message, T)) -> Vec<Message> {
    let message = |(number, value)| {
        let mut message = saying(DATA, "ada", number);
        change(&mut message, value);
        message
    };
    values.into_iter().enumerate().map(message).collect()
}

async fn every_attribute_comes_as_it_was_sent(env: Env) {
    all_come_back(&env, vec![full(DATA)]).await;
}

async fn what_is_absent_stays_absent(env: Env) {
    let bare = Message::new("bare".into(), "/suite", "suite.bare", topic(DATA));
    all_come_back(&env, vec![bare]).await;
}

async fn header_values_are_bytes(env: Env) {
    let all: Vec<u8> = (0..=255).collect();
    let values =
        [all, Vec::new(), b"a: b\r\nc: d\r\n\r\n".to_vec(), b" spaces ".to_vec(), "Ω=ø%20".into(), vec![b'x'; 8_000]];
    all_come_back(&env, changed(values, |message, value| message.headers.append("x-value", value).unwrap())).await;
}

/// Names are tokens as in HTTP and kept as written; values of one name keep their order, whatever stands between them.
async fn header_names_and_repeated_headers_are_kept(env: Env) {
    let headers = [
        ("x-tenant", "1"),
        ("other", "-"),
        ("X-Tenant", "2"),
        ("x-tenant", "3"),
        ("x-tenant", "3"),
        ("x-tenant", ""),
        ("!#$%&'*+-.^_`|~", "every sign"),
        ("0.9", "a number"),
        ("id", "not the attribute"),
        ("key", "not the key"),
        ("content_type", "not the attribute"),
    ];
    let mut message = saying(DATA, "ada", "headers");
    headers.iter().for_each(|(name, value)| message.headers.append(*name, *value).unwrap());
    (0..50).for_each(|n| message.headers.append(format!("x-{n}"), n.to_string()).unwrap());
    all_come_back(&env, vec![message]).await;
}

async fn keys_are_bytes(env: Env) {
    let long = vec![b'k'; 1_000];
    let keys: [&[u8]; 10] = [b"", b"\0", b"\xff\xfe", b"a.b.c", b"a/b c", b"*", b">", b"a\r\nb: c", b"%2e=", &long];
    all_come_back(&env, changed(keys, |message, key| message.key = Some(Key::from(key)))).await;
}

async fn text_is_any_unicode(env: Env) {
    let texts = ["Grüße an Øyvind", "数据 データ", "🦀👩‍👩‍👧", "עברית", "e\u{301}\u{2028}", "100% \"quoted\" 'it' \\ ;=,"];
    let change = |message: &mut Message, text: &str| {
        message.key = Some(text.into());
        message.id = format!("{text}-1").into();
        message.correlation_id = Some(format!("{text}-2").into());
        message.attributes.push(("subject".into(), text.into()));
        message.headers.append("x-text", text.to_owned()).unwrap();
        message.payload = text.to_owned().into();
    };
    all_come_back(&env, changed(texts, change)).await;
}

/// Nothing takes it for the end of something, or for a deletion.
async fn an_empty_payload_is_a_payload(env: Env) {
    let keys = [Some("ada"), None, Some("ada")];
    let change = |message: &mut Message, key: Option<&str>| {
        message.key = key.map(Into::into);
        message.payload = bytes::Bytes::new();
    };
    all_come_back(&env, changed(keys, change)).await;
}

/// With as many headers as there may be: the limit is one of the payload.
async fn a_payload_may_be_as_large_as_the_limit(env: Env) {
    let size = env.can().max_payload.min(1024 * 1024);
    let mut message = saying(DATA, "ada", "");
    message.payload = (0..size).map(|n| (n * 31 % 251) as u8).collect::<Vec<_>>().into();
    (0..60).for_each(|n| message.headers.append(format!("x-{n}"), vec![b'v'; 260]).unwrap());
    all_come_back(&env, vec![message, saying(DATA, "ada", "a small one behind it")]).await;
}

async fn times_keep_their_microseconds(env: Env) {
    let after = |micros| SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
    let before = SystemTime::UNIX_EPOCH - Duration::from_micros(1_000_000_000_000_001);
    let times =
        [after(0), after(1), after(1_764_000_000_999_999), after(1_764_000_001_000_000), after(1 << 52), before];
    let change = |message: &mut Message, time| (message.time, message.recorded_time) = (Some(time), None);
    all_come_back(&env, changed(times, change)).await;
}

/// 30 topics, three to each of ten subscriptions, all at once.
async fn many_topics_stay_apart(env: Env) {
    let names: Vec<_> = (0..30).map(|n| format!("suite.many-{}.t{n}", n % 2)).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    topics(env.transport(), &names).await;
    let mut opening = JoinSet::new();
    for (n, topics) in names.chunks(3).enumerate() {
        let (transport, spec) = (Arc::clone(env.transport()), spec(&env, &format!("crm.s{n}"), topics));
        opening.spawn(async move { (n, open(&transport, spec).await) });
    }
    let readers = within("all are open", opening.join_all()).await;
    let messages: Vec<_> = (0..300).map(|n| saying(names[n % 30], "ada", n)).collect();
    publish_messages(env.transport(), &messages).await;
    for (n, mut reader) in readers {
        for delivery in reader.take(30).await {
            let number: usize = said(&delivery).parse().unwrap();
            assert_eq!((number % 30 / 3, delivery.message.topic.as_str()), (n, names[number % 30]));
            delivery.acker.ack();
        }
    }
}

/// Names that are alike on the broker if a separator is lost.
async fn similar_names_stay_apart(env: Env) {
    let names = ["suite.a.b", "suite.a-b", "suite-a.b", "suite-a-b", "suite.a", "suite.a.b.c"];
    topics(env.transport(), &names).await;
    let mut readers = Vec::new();
    for (subscription, read) in ["crm.a.b", "crm.a-b", "crm-a.b", "crm-a-b", "crm.a", "crm.a.b.c"].iter().zip(names) {
        readers.push(open(env.transport(), spec(&env, subscription, &[read])).await);
    }
    for name in names {
        publish(env.transport(), name, "ada", &[name, "the end"]).await;
    }
    for (reader, name) in readers.iter_mut().zip(names) {
        for expected in [name, "the end"] {
            let delivery = reader.expect(expected).await;
            assert_eq!(delivery.message.topic.as_str(), name);
            delivery.acker.ack();
        }
    }
}

/// The same topic, subscription, address and dead letters in two namespaces.
async fn namespaces_stay_apart(env: Env) {
    let other = env.elsewhere().await;
    let mut readers: Vec<Reader> = Vec::new();
    for env in [&env, &other] {
        topics(env.transport(), &[DATA]).await;
        readers.push(open(env.transport(), spec(env, "crm", &[DATA])).await);
    }
    for (env, texts) in [(&env, ["a1", "a2", "a3"]), (&other, ["b1", "b2", "b3"])] {
        publish(env.transport(), DATA, "ada", &texts[..1]).await;
        send_to(env.transport(), "crm", saying(DATA, "ada", texts[1]), None).await;
        bury(env.transport(), saying(DATA, "ada", texts[2])).await;
    }
    assert_eq!(readers[0].texts(2).await, ["a1", "a2"]);
    assert_eq!(readers[1].texts(2).await, ["b1", "b2"]);
    assert_eq!(&dead_letters(env.transport(), "crm", 1).await[0].message.payload[..], b"a3");
    assert_eq!(&dead_letters(other.transport(), "crm", 1).await[0].message.payload[..], b"b3");
    drop(readers);
    other.clean_up().await.unwrap();
}

/// Sends to the dead letters of the subscription `crm`.
async fn bury(transport: &Arc<dyn Transport>, message: Message) {
    let to = Destination::DeadLetter(crate::env::subscription("crm"));
    let failures = submit(transport, &[(to, message, None, true)]).await;
    assert!(failures.is_empty(), "{failures:?}");
}

/// Also when an id is no UUID, whoever reads it, however often.
async fn an_id_is_the_same_each_time(env: Env) {
    topics(env.transport(), &[DATA]).await;
    let one = env.connect().await;
    let mut reader = open(&one, unordered(&env, "crm", &[DATA])).await;
    let sent = full(DATA);
    publish_messages(env.transport(), std::slice::from_ref(&sent)).await;
    for _ in 0..2 {
        let delivery = reader.next().await;
        assert_same(&delivery.message, &sent);
        delivery.acker.release(Duration::ZERO);
    }
    let held = reader.take(1).await;
    reader.crash(held);
    drop(one);
    let again = open(env.transport(), unordered(&env, "crm", &[DATA])).await.next().await;
    assert_same(&again.message, &sent);
    again.acker.ack();
}

async fn addresses_and_dead_letters_keep_all_of_a_message(env: Env) {
    topics(env.transport(), &[DATA]).await;
    let mut reader = open(env.transport(), spec(&env, "crm", &[DATA])).await;
    for delay in [None, Some(Duration::from_millis(50))] {
        let mut sent = full(DATA);
        sent.id = format!("{delay:?}").into();
        send_to(env.transport(), "crm", sent.clone(), delay).await;
        let delivery = reader.next().await;
        assert_same(&delivery.message, &sent);
        delivery.acker.ack();
    }
    bury(env.transport(), full(DATA)).await;
    assert_same(&dead_letters(env.transport(), "crm", 1).await[0].message, &full(DATA));
}
