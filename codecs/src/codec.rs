//! The codecs' contract, and the choice among them by content type.

use crate::content_type;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tidings_core::{Error, ErrorKind, Result};

/// Bytes to value and back, for one media type.
///
/// A codec is chosen at compile time, so that encoding and decoding are static calls; it is never a value.
pub trait Codec {
    /// The media type it writes, such as `application/json`.
    const CONTENT_TYPE: &'static str;

    /// Whether it reads `content_type`: its own media type or an alias, in upper or lower case, whatever the
    /// parameters (`; charset=utf-8`).
    #[must_use]
    fn accepts(content_type: &str) -> bool;

    /// Writes `value`.
    ///
    /// # Errors
    /// [`ErrorKind::Codec`] if the value cannot be written so that it can be read again: it nests deeper than
    /// [`MAX_DEPTH`](crate::MAX_DEPTH), or the format has no way to say it.
    fn encode<T: Serialize>(value: &T) -> Result<Bytes>;

    /// Reads a value that owns all it holds.
    ///
    /// # Errors
    /// [`ErrorKind::Codec`] if `payload` is not exactly one well-formed value of type `T`, or nests deeper than
    /// [`MAX_DEPTH`](crate::MAX_DEPTH). It neither panics nor overflows the stack, whatever the payload.
    fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T>;
}

/// The content types of the codecs that are compiled in.
pub const CONTENT_TYPES: &[&str] = &[
    #[cfg(feature = "json")]
    crate::Json::CONTENT_TYPE,
    #[cfg(feature = "msgpack")]
    crate::MessagePack::CONTENT_TYPE,
];

/// Writes `value` with the codec that `content_type` names.
///
/// # Errors
/// [`ErrorKind::Codec`] as [`Codec::encode`]; [`ErrorKind::Unsupported`] if no such codec is compiled in.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "json")] {
/// let payload = tidings_codecs::encode(&[1, 2], "application/json")?;
/// assert_eq!(payload, "[1,2]");
/// # }
/// # Ok::<(), tidings_core::Error>(())
/// ```
// Without a codec there is nothing to give the value to.
#[cfg_attr(not(any(feature = "json", feature = "msgpack")), expect(unused_variables))]
pub fn encode<T: Serialize>(value: &T, content_type: &str) -> Result<Bytes> {
    #[cfg(feature = "json")]
    if crate::Json::accepts(content_type) {
        return crate::Json::encode(value);
    }
    #[cfg(feature = "msgpack")]
    if crate::MessagePack::accepts(content_type) {
        return crate::MessagePack::encode(value);
    }
    Err(unsupported(content_type).with_operation("encode"))
}

/// Reads a value with the codec that `content_type` names.
///
/// # Errors
/// [`ErrorKind::Codec`] as [`Codec::decode`]; [`ErrorKind::Unsupported`] if no such codec is compiled in.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "json")] {
/// let numbers: Vec<u8> = tidings_codecs::decode("application/json; charset=utf-8", b"[1, 2]")?;
/// assert_eq!(numbers, [1, 2]);
/// # }
/// # Ok::<(), tidings_core::Error>(())
/// ```
#[cfg_attr(not(any(feature = "json", feature = "msgpack")), expect(unused_variables))]
pub fn decode<T: DeserializeOwned>(content_type: &str, payload: &[u8]) -> Result<T> {
    #[cfg(feature = "json")]
    if crate::Json::accepts(content_type) {
        return crate::Json::decode(payload);
    }
    #[cfg(feature = "msgpack")]
    if crate::MessagePack::accepts(content_type) {
        return crate::MessagePack::decode(payload);
    }
    Err(unsupported(content_type).with_operation("decode"))
}

/// The error for a codec that is known but left out, or not known at all.
#[cold]
fn unsupported(content_type: &str) -> Error {
    // It may come from a stranger's header, so it is quoted and cut.
    let shown: String = content_type.chars().take(80).collect();
    let message = match content_type::feature_of(content_type) {
        Some(feature) => format!("the codec of {shown:?} is not compiled in; enable the cargo feature `{feature}`"),
        None if CONTENT_TYPES.is_empty() => {
            format!("no codec for content type {shown:?}; enable the cargo feature `json` or `msgpack`")
        }
        None => format!("no codec for content type {shown:?}; there is {}", CONTENT_TYPES.join(", ")),
    };
    Error::new(ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_content_types_are_refused_by_name() {
        for unknown in ["", "text/plain", "application/jsonp", "application/jsön", "json", &"x".repeat(1000)] {
            let encoded = encode(&1, unknown).unwrap_err();
            let decoded = decode::<u8>(unknown, b"1").unwrap_err();
            for error in [encoded, decoded] {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                let text = error.to_string();
                assert!(text.contains(&unknown.chars().take(80).collect::<String>()) && text.len() < 300, "{text}");
                assert!(CONTENT_TYPES.iter().all(|there| text.contains(there)), "{text}");
            }
        }
    }

    #[test]
    fn a_known_codec_that_is_left_out_names_its_feature() {
        for (content_type, feature, there) in [
            ("application/json", "`json`", cfg!(feature = "json")),
            ("Application/X-MsgPack; a=b", "`msgpack`", cfg!(feature = "msgpack")),
        ] {
            let error = encode(&1, content_type).err();
            assert_eq!(error.is_none(), there);
            if let Some(error) = error {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(error.to_string().contains(feature), "{error}");
            }
        }
    }

    #[test]
    fn control_characters_of_a_content_type_are_escaped() {
        let error = encode(&1, "a\r\nb").unwrap_err().to_string();
        assert!(!error.contains(char::is_control), "{error}");
    }
}
