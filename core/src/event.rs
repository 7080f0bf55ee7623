//! Events: typed facts.

use crate::{Key, Result};
use bytes::Bytes;
use std::borrow::Cow;
use std::sync::Arc;

/// A typed fact: a struct with `#[derive(Event)]`.
///
/// The derive links an event to its codecs, so that encoding and decoding are static calls; core knows no
/// codec. Write it by hand only for a type that serde cannot describe.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "not an event",
    note = "add `#[derive(Event, Serialize, Deserialize)]` and `#[event(name = \"...\")]` to it",
    note = "a handler takes an event, `Batch<E>` or `RawMessage` first, by value"
)]
pub trait Event: Sized + Send + 'static {
    /// The event's name on the wire (CloudEvents `type`), such as `shop.order.placed`.
    const NAME: &'static str;
    /// The version of its contract (`dataversion`), from 1.
    const VERSION: u32;
    /// The topic it is published to; the name, unless set otherwise.
    const TOPIC: &'static str;
    /// Whether it has a key, and so keeps an order by default.
    const KEYED: bool;
    /// The content type of its codec, where it does not take the bus's.
    const CONTENT_TYPE: Option<&'static str>;

    /// What its order is kept by; `None` for an event without order.
    fn key(&self) -> Option<Key>;

    /// Writes it with the codec named by `content_type`.
    ///
    /// # Errors
    /// [`Codec`](crate::ErrorKind::Codec) if the codec cannot express it,
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if the codec is not compiled in.
    fn encode(&self, content_type: &str) -> Result<Bytes>;

    /// Reads it, as written in `version` of its contract, with the codec named by `content_type`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode); it never panics, whatever the payload.
    fn decode(content_type: &str, version: u32, payload: &[u8]) -> Result<Self>;
}

/// What can be the key of an event: text, integers, and options of these.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the key of an event",
    note = "a key is a string, an integer, a char, a bool, or an `Option` of these; implement `ToKey` for your own id type"
)]
pub trait ToKey {
    /// The key; `None` for none.
    fn to_key(&self) -> Option<Key>;
}

macro_rules! text_keys { ($($t:ty),*) => { $(impl ToKey for $t {
    fn to_key(&self) -> Option<Key> { let text: &str = self; Some(text.into()) }
})* } }
text_keys!(str, String, Box<str>, Arc<str>, Cow<'_, str>, crate::Text);

macro_rules! displayed_keys { ($($t:ty),*) => { $(impl ToKey for $t {
    fn to_key(&self) -> Option<Key> { Some(self.to_string().into()) }
})* } }
displayed_keys!(u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, char, bool);

impl<T: ToKey> ToKey for Option<T> {
    fn to_key(&self) -> Option<Key> {
        self.as_ref().and_then(T::to_key)
    }
}

impl<T: ToKey + ?Sized> ToKey for &T {
    fn to_key(&self) -> Option<Key> {
        (**self).to_key()
    }
}
