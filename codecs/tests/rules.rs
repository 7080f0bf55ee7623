//! What holds for every codec, each rule tried on each codec.
#![cfg(all(feature = "json", feature = "msgpack"))]

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use tidings_codecs::{Codec, Json, MAX_DEPTH, MessagePack};
use tidings_core::{Error, ErrorKind};

/// Whatever may stand in a payload, like `serde_json::Value`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Any {
    Nothing,
    Flag(bool),
    Number(f64),
    Text(String),
    List(Vec<Any>),
    Map(BTreeMap<String, Any>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct List(Vec<List>);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Chain {
    End,
    Next(Box<Chain>),
    Pair(Box<Chain>, u8),
    Named { next: Box<Chain> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Known {
    known: u8,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Empty {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Unit;

fn round_trip<C: Codec, T: Serialize + DeserializeOwned>(value: &T) -> T {
    let payload = C::encode(value).expect("encodes");
    C::decode(&payload).expect("decodes")
}

fn same<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    assert_eq!(&round_trip::<Json, T>(value), value);
    assert_eq!(&round_trip::<MessagePack, T>(value), value);
}

fn codec_error<T>(result: Result<T, Error>) -> String {
    let error = result.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    assert!(!error.is_transient());
    error.to_string()
}

/// In 2 MiB, which is what threads of tokio and of std have.
fn on_a_small_stack(check: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(2 << 20).spawn(check).expect("starts").join().expect("stands");
}

mod content_types {
    use super::*;

    #[test]
    fn each_codec_accepts_what_it_writes_and_no_other_does() {
        assert!(Json::accepts(Json::CONTENT_TYPE) && MessagePack::accepts(MessagePack::CONTENT_TYPE));
        assert!(!Json::accepts(MessagePack::CONTENT_TYPE) && !MessagePack::accepts(Json::CONTENT_TYPE));
        assert_eq!(tidings_codecs::CONTENT_TYPES, [Json::CONTENT_TYPE, MessagePack::CONTENT_TYPE]);
    }

    #[test]
    fn values_go_by_content_type() {
        for content_type in ["application/json", "text/json; charset=utf-8", "application/vnd.msgpack"] {
            let payload = tidings_codecs::encode(&Known { known: 7 }, content_type).expect("encodes");
            assert_eq!(tidings_codecs::decode::<Known>(content_type, &payload).expect("decodes").known, 7);
        }
    }
}

mod values {
    use super::*;

    #[test]
    fn numbers_keep_their_limits() {
        same(&(u64::MAX, i64::MIN, u128::MAX, i128::MIN, i8::MIN));
        same(&[0.1, -0.0, f64::MIN_POSITIVE, 5e-324, f64::MAX, f64::EPSILON, 1.0 / 3.0]);
        same(&[f32::MAX, f32::MIN_POSITIVE, 0.1]);
    }

    #[test]
    fn floats_keep_each_bit() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..100_000 {
            let float = f64::from_bits(random.u64(..));
            let payload = if float.is_finite() { Json::encode(&float) } else { continue };
            let back: f64 = Json::decode(&payload.expect("encodes")).expect("decodes");
            assert_eq!(back.to_bits(), float.to_bits());
        }
    }

    #[test]
    fn text_is_unicode() {
        same(&["", "Größe €5 😀", "\0\u{1}\"\\/\u{7f}\u{2028}\u{fffd}\u{10ffff}"].map(str::to_owned));
        same(&('é', '😀', '\0'));
    }

    #[test]
    fn empty_and_optional_things() {
        same(&(Empty {}, (), None::<u8>, Some(0_u8), Some(String::new()), Vec::<u8>::new(), [Unit]));
        same(&BTreeMap::<String, Option<Empty>>::from([("a".into(), None), ("b".into(), Some(Empty {}))]));
    }

    #[test]
    fn enums_of_all_forms() {
        let end = || Box::new(Chain::End);
        same(&vec![Chain::End, Chain::Next(end()), Chain::Pair(end(), 1), Chain::Named { next: end() }]);
    }

    #[test]
    fn tagged_and_flattened_types() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "kind", rename_all = "snake_case")]
        enum Tagged {
            Card { digits: u16 },
            Cash,
        }
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Outer {
            #[serde(flatten)]
            inner: Known,
            #[serde(skip_serializing_if = "Option::is_none", default)]
            note: Option<String>,
            payment: Vec<Tagged>,
        }
        let payment = vec![Tagged::Card { digits: 1234 }, Tagged::Cash];
        same(&Outer { inner: Known { known: 1 }, note: None, payment });
    }

    #[test]
    fn bytes_are_an_array_in_json_and_bytes_in_message_pack() {
        struct Blob(Vec<u8>);
        impl Serialize for Blob {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_bytes(&self.0)
            }
        }
        let blob = Blob(vec![0, 255, 7]);
        assert_eq!(Json::encode(&blob).expect("encodes"), "[0,255,7]");
        assert_eq!(MessagePack::encode(&blob).expect("encodes"), &[0xc4, 3, 0, 255, 7][..]);
        same(&vec![0_u8, 255, 7]);
    }

    #[test]
    fn map_keys_are_text_or_numbers_in_json() {
        same(&HashMap::from([(1_u64, 'a'), (u64::MAX, 'b')]));
        same(&BTreeMap::from([(true, 1), (false, 0)]));
        let by_pair = BTreeMap::from([((1, 2), 3)]);
        let error = codec_error(Json::encode(&by_pair));
        assert!(error.contains("key must be a string"), "{error}");
        assert_eq!(round_trip::<MessagePack, _>(&by_pair), by_pair);
    }

    #[test]
    fn json_refuses_floats_that_are_not_finite() {
        #[derive(Serialize, Deserialize)]
        struct Price {
            cents: Option<f64>,
        }
        for float in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = codec_error(Json::encode(&Price { cents: Some(float) }));
            assert!(error.contains("infinite or not a number"), "{error}");
            let back = round_trip::<MessagePack, _>(&Price { cents: Some(float) });
            assert_eq!(back.cents.map(f64::to_bits), Some(float.to_bits()));
        }
        codec_error(Json::encode(&f32::NAN));
        codec_error(Json::encode(&[BTreeMap::from([(1, f32::NAN)])]));
    }

    #[test]
    fn readers_may_know_more_or_fewer_fields_than_the_writer() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Newer {
            added: Option<String>,
            known: u8,
            #[serde(default)]
            more: Vec<u8>,
        }
        fn check<C: Codec>() {
            let old = C::encode(&Known { known: 1 }).expect("encodes");
            assert_eq!(C::decode::<Newer>(&old).expect("decodes"), Newer { added: None, known: 1, more: vec![] });
            let newer = Newer { added: Some("x".into()), known: 2, more: vec![1] };
            let new = C::encode(&newer).expect("encodes");
            assert_eq!(C::decode::<Known>(&new).expect("decodes"), Known { known: 2 });
        }
        check::<Json>();
        check::<MessagePack>();
    }

    #[test]
    fn random_values_come_back() {
        for seed in 0..2000 {
            let value = any(&mut fastrand::Rng::with_seed(seed), 6);
            assert_eq!(round_trip::<Json, Any>(&value), value, "seed {seed}");
            assert_eq!(round_trip::<MessagePack, Any>(&value), value, "seed {seed}");
        }
    }

    fn any(random: &mut fastrand::Rng, levels: usize) -> Any {
        match random.usize(..if levels == 0 { 4 } else { 6 }) {
            0 => Any::Nothing,
            1 => Any::Flag(random.bool()),
            2 => Any::Number(Some(f64::from_bits(random.u64(..))).filter(|f| f.is_finite()).unwrap_or(0.5)),
            3 => Any::Text(text(random)),
            4 => Any::List((0..random.usize(..5)).map(|_| any(random, levels - 1)).collect()),
            _ => Any::Map((0..random.usize(..5)).map(|_| (text(random), any(random, levels - 1))).collect()),
        }
    }

    fn text(random: &mut fastrand::Rng) -> String {
        (0..random.usize(..40)).map(|_| random.char(..)).collect()
    }
}

mod depth {
    use super::*;

    fn lists(depth: usize) -> List {
        (1..depth).fold(List(vec![]), |inner, _| List(vec![inner]))
    }

    fn nested(depth: usize, open: &[u8], inner: &[u8], close: &[u8]) -> Vec<u8> {
        [open.repeat(depth), inner.to_vec(), close.repeat(depth)].concat()
    }

    #[test]
    fn the_limit_is_exact() {
        fn check<C: Codec>() {
            let deepest = lists(MAX_DEPTH);
            assert_eq!(round_trip::<C, List>(&deepest), deepest);
            let error = codec_error(C::encode(&lists(MAX_DEPTH + 1)));
            assert!(error.contains("nest deeper than 64"), "{error}");
        }
        check::<Json>();
        check::<MessagePack>();
        for (depth, fits) in [(MAX_DEPTH, true), (MAX_DEPTH + 1, false)] {
            assert_eq!(Json::decode::<Any>(&nested(depth, b"[", b"", b"]")).is_ok(), fits);
            assert_eq!(Json::decode::<Any>(&nested(depth, b"{\"[\":", b"1", b"}")).is_ok(), fits);
            assert_eq!(MessagePack::decode::<Any>(&nested(depth, b"\x91", b"\x01", b"")).is_ok(), fits);
            assert_eq!(MessagePack::decode::<Any>(&nested(depth - 1, b"\x81\xa1a", b"\x80", b"")).is_ok(), fits);
        }
    }

    #[test]
    fn what_is_written_can_be_read_at_every_depth_and_form() {
        let forms: [fn(Box<Chain>) -> Chain; 3] =
            [Chain::Next, |next| Chain::Pair(next, 1), |next| Chain::Named { next }];
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut chain = Chain::End;
            for _ in 0..random.usize(20..50) {
                chain = forms[random.usize(..3)](Box::new(chain));
            }
            for result in [
                Json::encode(&chain).map(|p| Json::decode::<Chain>(&p)),
                MessagePack::encode(&chain).map(|p| MessagePack::decode::<Chain>(&p)),
            ] {
                match result {
                    Ok(back) => assert_eq!(back.expect("what was written is read"), chain, "seed {seed}"),
                    Err(error) => assert!(error.to_string().contains("deeper"), "{error}"),
                }
            }
        }
    }

    #[test]
    fn writer_and_reader_agree_on_the_limit() {
        // One step before it is refused, a value is as deep as the reader takes.
        for form in [Chain::Next, |next| Chain::Named { next }] as [fn(Box<Chain>) -> Chain; 2] {
            let mut chain = Chain::End;
            while let Ok(payload) = MessagePack::encode(&chain) {
                assert!(MessagePack::decode::<Chain>(&payload).is_ok());
                assert!(Json::decode::<Chain>(&Json::encode(&chain).expect("as deep")).is_ok());
                chain = form(Box::new(chain));
            }
            codec_error(Json::encode(&chain));
        }
    }

    #[test]
    fn a_hundred_thousand_arrays_are_an_error_and_no_more() {
        const N: usize = 100_000;
        on_a_small_stack(|| {
            for json in [nested(N, b"[", b"", b"]"), nested(N, b"[", b"", b""), nested(N, b"{\"a\":", b"1", b"}")] {
                everything_refuses::<Json>(&json);
                everything_refuses::<Json>(&[b"{\"known\":1,\"ignored\":", &json[..], b"}"].concat());
            }
            for open in [&b"\x91"[..], b"\xdc\0\x01", b"\xdd\0\0\0\x01", b"\x81\xa4Next", b"\x81\xa1a", b"\x81"] {
                let packed = nested(N, open, b"\x90", b"");
                everything_refuses::<MessagePack>(&packed);
                let ignored = [b"\x82\xa5known\x01\xa7ignored", &packed[..]].concat();
                everything_refuses::<MessagePack>(&ignored);
            }
        });
    }

    #[test]
    fn raw_json_is_looked_into() {
        let raw = |depth| {
            let json = String::from_utf8(nested(depth, b"[", b"", b"]")).expect("text");
            [serde_json::value::RawValue::from_string(json).expect("JSON")]
        };
        assert!(Json::encode(&raw(MAX_DEPTH - 1)).is_ok());
        assert!(codec_error(Json::encode(&raw(MAX_DEPTH))).contains("nest deeper than 64"));
    }

    fn everything_refuses<C: Codec>(payload: &[u8]) {
        for error in [
            codec_error(C::decode::<Any>(payload)),
            codec_error(C::decode::<List>(payload)),
            codec_error(C::decode::<Chain>(payload)),
            codec_error(C::decode::<Known>(payload)),
            codec_error(C::decode::<serde::de::IgnoredAny>(payload)),
        ] {
            assert!(error.contains("nest deeper than 64"), "{error}");
        }
    }

    #[test]
    fn the_deepest_payloads_fit_a_small_stack() {
        on_a_small_stack(|| {
            Json::decode::<Any>(&nested(MAX_DEPTH, b"[", b"", b"]")).expect("fits");
            MessagePack::decode::<Any>(&nested(MAX_DEPTH, b"\x91", b"\x01", b"")).expect("fits");
            let json = nested(MAX_DEPTH, b"{\"Next\":", b"\"End\"", b"}");
            assert!(matches!(Json::decode(&json), Ok(Chain::Next(_))));
            let packed = nested(MAX_DEPTH, b"\x81\xa4Next", b"\xa3End", b"");
            assert!(matches!(MessagePack::decode(&packed), Ok(Chain::Next(_))));
        });
    }

    #[test]
    fn a_value_of_any_depth_is_refused_before_it_is_written() {
        struct Deep(usize);
        impl Serialize for Deep {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                [Deep(self.0 + 1)].serialize(serializer)
            }
        }
        on_a_small_stack(|| {
            codec_error(Json::encode(&Deep(0)));
            codec_error(MessagePack::encode(&Deep(0)));
        });
    }
}

mod payloads {
    use super::*;

    #[test]
    fn one_value_and_nothing_after_it() {
        assert!(Json::decode::<u8>(b" 1 \n").is_ok());
        for (json, why) in [("1 2", "trailing characters"), ("{\"known\":1}}", "trailing"), ("", "EOF"), (" ", "EOF")] {
            assert!(codec_error(Json::decode::<Any>(json.as_bytes())).contains(why), "{json}");
        }
        for (packed, why) in [(&b"\x01\x02"[..], "trailing bytes"), (b"\xc0\xc0", "trailing bytes"), (b"", "too early")]
        {
            let error = codec_error(MessagePack::decode::<Any>(packed));
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_type_that_leaves_a_part_unread_is_refused() {
        #[derive(Debug)]
        struct ReadsNothing;
        impl<'de> Deserialize<'de> for ReadsNothing {
            fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
                Ok(Self)
            }
        }
        assert!(codec_error(Json::decode::<ReadsNothing>(b"1")).contains("trailing"));
        assert!(codec_error(MessagePack::decode::<ReadsNothing>(b"\x01")).contains("trailing"));
    }

    #[test]
    fn a_cut_payload_is_refused_wherever_it_is_cut() {
        let value = BTreeMap::from([("a".to_owned(), vec![Some(1.5), None]), ("ü".to_owned(), vec![])]);
        fn check<C: Codec>(value: &BTreeMap<String, Vec<Option<f64>>>) {
            let payload = C::encode(value).expect("encodes");
            for end in 0..payload.len() {
                codec_error(C::decode::<BTreeMap<String, Vec<Option<f64>>>>(&payload[..end]));
                codec_error(C::decode::<serde::de::IgnoredAny>(&payload[..end]));
            }
        }
        check::<Json>(&value);
        check::<MessagePack>(&value);
    }

    #[test]
    fn lengths_that_are_not_there_reserve_no_memory() {
        for head in [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
        {
            let error = codec_error(MessagePack::decode::<Vec<[u64; 32]>>(head));
            assert!(error.contains("too early"), "{error}");
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        let seeds: Vec<Vec<u8>> = [Chain::End, Chain::Pair(Box::new(Chain::Named { next: Box::new(Chain::End) }), 9)]
            .iter()
            .flat_map(|v| {
                [Json::encode(v).expect("encodes").to_vec(), MessagePack::encode(v).expect("encodes").to_vec()]
            })
            .collect();
        for round in 0..100_000 {
            let mut bytes = if round % 2 == 0 {
                vec![0; random.usize(..64)]
            } else {
                random.choice(&seeds).cloned().unwrap_or_default()
            };
            if round % 2 == 0 {
                random.fill(&mut bytes);
            } else {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            decode_all::<Json>(&bytes);
            decode_all::<MessagePack>(&bytes);
        }
    }

    fn decode_all<C: Codec>(bytes: &[u8]) {
        let results = [
            C::decode::<Any>(bytes).map(drop),
            C::decode::<Chain>(bytes).map(drop),
            C::decode::<(u8, i128, Option<String>, char)>(bytes).map(drop),
            C::decode::<HashMap<u16, Known>>(bytes).map(drop),
        ];
        for error in results.into_iter().filter_map(Result::err) {
            assert_eq!(error.kind(), ErrorKind::Codec);
        }
    }
}

mod errors {
    use super::*;
    use serde::de::Error as _;

    const SECRET: &str = "hunter2";

    #[derive(Debug, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Strict {
        count: u8,
        choice: Option<Choice>,
        checked: Option<Checked>,
    }

    #[derive(Debug, Serialize, Deserialize)]
    enum Choice {
        One,
    }

    #[derive(Debug, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct NoFields {}

    #[derive(Debug, Serialize)]
    struct Checked(String);

    impl<'de> Deserialize<'de> for Checked {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            Err(D::Error::custom(format!("{} is not allowed", String::deserialize(deserializer)?)))
        }
    }

    #[test]
    fn tell_what_and_where_but_never_the_value() {
        let text = || Any::Text(SECRET.into());
        let map = |key: &str, value| Any::Map(BTreeMap::from([(key.to_owned(), value)]));
        for (value, told) in [
            (map("count", text()), "invalid type, expected u8"),
            (map("count", Any::Text("x, expected hunter2".into())), "invalid type, expected u8"),
            (map(SECRET, Any::Nothing), "unknown field, expected one of `count`, `choice`, `checked`"),
            (map("choice", text()), "unknown variant, expected `One`"),
            (map("checked", text()), "a value was refused by its type"),
            (map("choice", Any::Nothing), "missing field `count`"),
            (text(), "invalid type, expected struct Strict"),
        ] {
            refused::<Json, Strict>(&value, told);
            // Its reader keeps less of what a number was expected to be.
            refused::<MessagePack, Strict>(&value, told.strip_suffix(", expected u8").unwrap_or(told));
        }
        refused::<Json, NoFields>(&map("x, expected hunter2", Any::Nothing), "unknown field");
        refused::<MessagePack, NoFields>(&map("x, expected hunter2", Any::Nothing), "unknown field");
    }

    fn refused<C: Codec, T: DeserializeOwned + Debug>(value: &Any, told: &str) {
        let payload = C::encode(value).expect("encodes");
        let error = C::decode::<T>(&payload).expect_err("refused");
        let (text, whole) = (codec_error::<()>(Err(error)), C::decode::<T>(&payload));
        assert!(text.contains(told), "{text} should tell {told}");
        assert!(text.contains(C::CONTENT_TYPE), "{text}");
        assert!(!format!("{whole:?}{text}").contains(SECRET), "{text}");
    }

    #[test]
    fn json_tells_line_and_column() {
        let error = codec_error(Json::decode::<Known>(b"{\n  \"known\": \"hunter2\"\n}"));
        assert!(error.contains("line=2, column=20"), "{error}");
        assert!(!error.contains(SECRET) && !error.contains("at line"), "{error}");
    }

    #[test]
    fn message_pack_tells_the_offset_of_a_malformed_value() {
        let error = codec_error(MessagePack::decode::<Any>(b"\x92\x01\xc1"));
        assert!(error.contains("offset=2"), "{error}");
        // Small integers and lengths stand in the marker, which rmp-serde prints.
        let error = codec_error(MessagePack::decode::<Option<Vec<i128>>>(b"\x91\xa142"));
        assert!(!error.contains("42") && !error.contains("Fix"), "{error}");
    }

    #[test]
    fn a_type_that_refuses_to_be_written_is_not_quoted() {
        struct Refuses;
        impl Serialize for Refuses {
            fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
                Err(serde::ser::Error::custom(SECRET))
            }
        }
        for error in [codec_error(Json::encode(&[Refuses])), codec_error(MessagePack::encode(&[Refuses]))] {
            assert!(error.contains("refused by its type") && !error.contains(SECRET), "{error}");
        }
    }
}
