//! What `#[derive(Event)]` makes of types without mistakes.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidings::{ErrorKind, Event};

const JSON: &str = "application/json";

fn key<E: Event>(event: &E) -> Option<String> {
    event.key().map(|key| key.to_string())
}

#[derive(Event, Serialize, Deserialize, Debug, PartialEq)]
#[event(name = "shop.started")]
struct Started;

#[test]
fn what_is_not_said_has_a_default() {
    assert_eq!((Started::NAME, Started::TOPIC, Started::VERSION), ("shop.started", "shop.started", 1));
    assert_eq!((Started::KEYED, Started.key()), (false, None));
    assert_eq!(Started::CONTENT_TYPE, None);
}

#[derive(Event, Serialize, Deserialize, Debug, PartialEq)]
#[event(name = "shop.order.placed", version = 7)]
#[event(key = customer.id, topic = "shop.orders", codec = "msgpack")]
struct OrderPlaced {
    customer: Customer,
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
struct Customer {
    id: Option<u32>,
}

#[test]
fn all_that_can_be_said_is_kept() {
    assert_eq!(OrderPlaced::NAME, "shop.order.placed");
    assert_eq!((OrderPlaced::TOPIC, OrderPlaced::VERSION, OrderPlaced::KEYED), ("shop.orders", 7, true));
    assert_eq!(OrderPlaced::CONTENT_TYPE, Some("application/msgpack"));
    assert_eq!(key(&OrderPlaced { customer: Customer { id: Some(42) } }).as_deref(), Some("42"));
    assert_eq!(key(&OrderPlaced { customer: Customer { id: None } }), None);
}

#[test]
fn events_come_back_by_every_codec() {
    let event = OrderPlaced { customer: Customer { id: Some(1) } };
    for content_type in tidings::codecs::CONTENT_TYPES {
        let payload = event.encode(content_type).unwrap();
        assert_eq!(OrderPlaced::decode(content_type, 7, &payload).unwrap(), event);
        assert_eq!(OrderPlaced::decode(content_type, 8, &payload).unwrap(), event, "newer versions are tried");
        assert_eq!(OrderPlaced::decode(content_type, 7, b"\xc1").unwrap_err().kind(), ErrorKind::Codec);
    }
    assert_eq!(event.encode("text/csv").unwrap_err().kind(), ErrorKind::Unsupported);
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "tuple", key = 1.0)]
struct Tuple(u8, (String, u8));

#[derive(Event, Serialize, Deserialize)]
#[event(name = "newtype", key = 0)]
struct Newtype(String);

#[derive(Event, Serialize, Deserialize)]
#[event(name = "deep", key = 0.inner.1.0)]
struct Deep(Inner);

#[derive(Serialize, Deserialize)]
struct Inner {
    inner: (u8, (char,)),
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "raw", key = r#type)]
struct Raw {
    r#type: String,
}

#[test]
fn a_key_is_any_path_of_fields() {
    assert_eq!(key(&Tuple(1, ("k".into(), 2))).as_deref(), Some("k"));
    assert_eq!(key(&Newtype("k".into())).as_deref(), Some("k"));
    assert_eq!(key(&Raw { r#type: "k".into() }).as_deref(), Some("k"));
    assert_eq!(key(&Deep(Inner { inner: (1, ('k',)) })).as_deref(), Some("k"));
}

#[derive(Event, Serialize, Deserialize, Debug, PartialEq)]
#[event(name = "shop.parcel", key = parcel.0)]
enum Parcel {
    Sent { parcel: (String, u8), carrier: String },
    Lost { parcel: (String, u8) },
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.light", key = 0)]
enum Light {
    On(u8),
    Off(u16, String),
}

#[derive(Event, Serialize, Deserialize)]
#[event(name = "shop.plain")]
enum Plain {
    A,
    B(u8),
}

#[test]
fn enums_are_events_whose_variants_share_the_key() {
    let sent = Parcel::Sent { parcel: ("p-1".into(), 1), carrier: String::new() };
    let lost = Parcel::Lost { parcel: ("p-2".into(), 1) };
    assert_eq!((key(&sent).as_deref(), key(&lost).as_deref()), (Some("p-1"), Some("p-2")));
    assert_eq!(Parcel::decode(JSON, 1, &sent.encode(JSON).unwrap()).unwrap(), sent);
    assert_eq!((key(&Light::On(1)).as_deref(), key(&Light::Off(2, "x".into())).as_deref()), (Some("1"), Some("2")));
    assert_eq!((key(&Plain::A), key(&Plain::B(1))), (None, None));
}

#[derive(Event, Serialize, Deserialize, Debug, PartialEq)]
#[event(name = "generic", key = id)]
struct Generic<T, const N: usize = 3>
where
    T: Clone,
{
    id: String,
    value: Vec<T>,
}

fn goes_and_comes<T: Clone + Serialize + DeserializeOwned + Send + 'static>(value: T) -> T {
    let event = Generic::<T> { id: "k".into(), value: vec![value] };
    let payload = event.encode(JSON).expect("encodes");
    let mut back = Generic::<T>::decode(JSON, 1, &payload).expect("decodes");
    assert_eq!(key(&back).as_deref(), Some("k"));
    back.value.remove(0)
}

#[test]
fn generic_types_are_events_where_their_parameters_allow() {
    assert_eq!(goes_and_comes(5), 5);
    assert_eq!(goes_and_comes("text".to_owned()), "text");
}

mod elsewhere {
    pub(crate) mod bus {
        pub(crate) use tidings::*;
    }
}

mod without_the_crate {
    #[allow(dead_code)]
    mod tidings {}

    #[derive(super::elsewhere::bus::Event, serde::Serialize, serde::Deserialize)]
    #[event(name = "moved", crate = super::elsewhere::bus)]
    pub(super) struct Moved;
}

#[test]
fn the_crate_may_be_elsewhere() {
    assert_eq!(<without_the_crate::Moved as Event>::NAME, "moved");
}

mod versions {
    use super::*;

    #[derive(Event, Serialize, Deserialize)]
    #[event(name = "shop.paid", version = 1)]
    struct PaidV1 {
        euros: u64,
    }

    // There was no version 2 of it; what says it is 2 was written as 1.
    #[derive(Event, Serialize, Deserialize)]
    #[event(name = "shop.paid", version = 3, upcast(from = PaidV1))]
    struct PaidV3 {
        cents: u64,
    }

    #[derive(Event, Serialize, Deserialize, Debug, PartialEq)]
    #[event(name = "shop.paid", version = 4, upcast(from = self::PaidV3))]
    struct Paid {
        cents: u64,
        currency: String,
    }

    impl From<PaidV1> for PaidV3 {
        fn from(old: PaidV1) -> Self {
            Self { cents: old.euros * 100 }
        }
    }

    impl From<PaidV3> for Paid {
        fn from(old: PaidV3) -> Self {
            Self { cents: old.cents, currency: "EUR".into() }
        }
    }

    #[derive(Event, Serialize, Deserialize)]
    #[event(name = "shop.paid", version = 5, upcast(from = Paid))]
    struct GenericPaid<T> {
        by: Option<T>,
        cents: u64,
    }

    impl<T> From<Paid> for GenericPaid<T> {
        fn from(old: Paid) -> Self {
            Self { by: None, cents: old.cents }
        }
    }

    #[test]
    fn older_ones_are_read_by_their_own_type_and_converted() {
        let paid = Paid { cents: 1200, currency: "EUR".into() };
        let new = br#"{"cents":1200,"currency":"EUR"}"#;
        for (version, payload) in [
            (0, &br#"{"euros":12}"#[..]),
            (1, br#"{"euros":12}"#),
            (2, br#"{"cents":1200}"#),
            (3, br#"{"cents":1200}"#),
            (4, new),
            (5, new),
        ] {
            assert_eq!(Paid::decode(JSON, version, payload).unwrap(), paid, "version {version}");
        }
        assert_eq!(GenericPaid::<u8>::decode(JSON, 1, br#"{"euros":12}"#).unwrap().cents, 1200);
        assert_eq!(GenericPaid::<u8>::decode(JSON, 5, br#"{"by":1,"cents":2}"#).unwrap().by, Some(1));
        let error = Paid::decode(JSON, 1, new).unwrap_err();
        assert!(error.to_string().contains("missing field `euros`"), "{error}");
    }
}
