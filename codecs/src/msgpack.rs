//! MessagePack.

use crate::{Codec, MAX_DEPTH, buffer, content_type, encodable, error};
use bytes::Bytes;
use rmp_serde::{Deserializer, Serializer, decode, encode};
use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned, IgnoredAny};
use tidings_core::{Error, Result};

/// MessagePack: `application/msgpack`; it reads `application/x-msgpack` and `application/vnd.msgpack` too.
///
/// Structs are written as maps with the names of their fields, so that a reader may know more or fewer
/// fields than the writer.
#[derive(Clone, Copy, Debug)]
pub struct MessagePack;

impl Codec for MessagePack {
    const CONTENT_TYPE: &'static str = "application/msgpack";

    fn accepts(content_type: &str) -> bool {
        content_type::is_msgpack(content_type)
    }

    fn encode<T: Serialize>(value: &T) -> Result<Bytes> {
        encodable::check::<false, T>(value).map_err(|flaw| failed("encode", flaw.to_string()))?;
        buffer::filled(|buffer| {
            let mut writer = Serializer::new(&mut *buffer).with_struct_map();
            value.serialize(&mut writer).map_err(|e| failed("encode", unwritable(&e)))
        })
    }

    fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T> {
        check(payload).map_err(|(flaw, at)| failed("decode", flaw).with_context("offset", at))?;
        let mut reader = Deserializer::from_read_ref(payload);
        // An extension counts as a level too, and the limit itself is refused. The check above is the stricter one.
        reader.set_max_depth(MAX_DEPTH + 2);
        let value = T::deserialize(&mut reader).map_err(|e| failed("decode", unreadable(&e)))?;
        if is_at_end(&mut reader) { Ok(value) } else { Err(failed("decode", TRAILING)) }
    }
}

const TRAILING: &str = "trailing bytes after the value";
const TRUNCATED: &str = "the payload ends too early";

#[cold]
fn failed(operation: &'static str, message: impl Into<String>) -> Error {
    error::codec(operation, MessagePack::CONTENT_TYPE, message)
}

/// Whether nothing is left; some types read less than the value that stands there.
fn is_at_end(reader: &mut Deserializer<decode::ReadRefReader<'_, [u8]>>) -> bool {
    matches!(IgnoredAny::deserialize(reader), Err(decode::Error::InvalidMarkerRead(_)))
}

#[cold]
fn unwritable(cause: &encode::Error) -> String {
    match cause {
        encode::Error::Syntax(message) => error::without_values(message),
        _ => "the value does not fit MessagePack".to_owned(),
    }
}

#[cold]
fn unreadable(cause: &decode::Error) -> String {
    match cause {
        decode::Error::InvalidMarkerRead(_) | decode::Error::InvalidDataRead(_) => TRUNCATED.to_owned(),
        decode::Error::TypeMismatch(_) => "invalid type".to_owned(),
        decode::Error::OutOfRange => "a number is out of range".to_owned(),
        decode::Error::LengthMismatch(_) => "an array or map has another length than expected".to_owned(),
        decode::Error::Utf8Error(_) => "text is not valid UTF-8".to_owned(),
        decode::Error::DepthLimitExceeded => error::TOO_DEEP.to_owned(),
        decode::Error::Syntax(message) => error::without_values(message),
        decode::Error::Uncategorized(_) => "malformed value".to_owned(),
    }
}

/// Checks that `payload` is exactly one value, whole, at most [`MAX_DEPTH`] deep; else why not, and at which byte.
///
/// The reader's own limit does not count the levels of nested enums (3Hren/msgpack-rust#381), and the reader takes
/// trailing bytes.
fn check(payload: &[u8]) -> Result<(), (&'static str, usize)> {
    // How many values are still to come: in the innermost array or map (at first, the payload), and in those around it.
    let (mut left, mut outer) = (1, [0; MAX_DEPTH]);
    let (mut depth, mut at) = (0, 0);
    while left > 0 {
        let item = Item::first_of(&payload[at..]).map_err(|flaw| (flaw, at))?;
        left -= 1;
        if let Some(children) = item.children {
            *outer.get_mut(depth).ok_or((error::TOO_DEEP, at))? = left;
            (left, depth) = (children, depth + 1);
        }
        at += item.size;
        while left == 0 && depth > 0 {
            depth -= 1;
            left = outer[depth];
        }
    }
    if at == payload.len() { Ok(()) } else { Err((TRAILING, at)) }
}

/// What a marker announces.
struct Item {
    /// Bytes until the next marker.
    size: usize,
    /// How many values follow that belong to it, if it is an array or a map.
    children: Option<u64>,
}

impl Item {
    /// The item that `bytes` begin with, which are as many as it needs.
    #[inline]
    fn first_of(bytes: &[u8]) -> Result<Self, &'static str> {
        let marker = *bytes.first().ok_or(TRUNCATED)?;
        let low = |mask: u8| usize::from(marker & mask);
        let item = match marker {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => Self::scalar(1),
            0x80..=0x8f => Self::map(1, low(0x0f)),
            0x90..=0x9f => Self::array(1, low(0x0f)),
            0xa0..=0xbf => Self::scalar(1 + low(0x1f)),
            0xc1 => return Err("malformed value"),
            // Binary and text, then extensions, with a length of 1, 2 or 4 bytes.
            0xc4..=0xc6 => Self::sized(bytes, 1 << low(0x03), 0)?,
            0xd9..=0xdb => Self::sized(bytes, 1 << (low(0x03) - 1), 0)?,
            0xc7..=0xc9 => Self::sized(bytes, 1 << (marker - 0xc7), 1)?,
            0xca => Self::scalar(5),
            0xcb => Self::scalar(9),
            // Unsigned and signed integers of 1, 2, 4 or 8 bytes.
            0xcc..=0xd3 => Self::scalar(1 + (1 << low(0x03))),
            // Extensions of 1, 2, 4, 8 or 16 bytes.
            0xd4..=0xd8 => Self::scalar(2 + (1 << (marker - 0xd4))),
            0xdc | 0xdd => Self::array(1 + (2 << low(0x01)), number(bytes, 2 << low(0x01))?),
            0xde | 0xdf => Self::map(1 + (2 << low(0x01)), number(bytes, 2 << low(0x01))?),
        };
        if item.size <= bytes.len() { Ok(item) } else { Err(TRUNCATED) }
    }

    const fn scalar(size: usize) -> Self {
        Self { size, children: None }
    }

    const fn array(size: usize, len: usize) -> Self {
        Self { size, children: Some(len as u64) }
    }

    const fn map(size: usize, len: usize) -> Self {
        Self { size, children: Some(2 * len as u64) }
    }

    /// A marker, `width` bytes of length, `extra` bytes, and as many as the length says.
    fn sized(bytes: &[u8], width: usize, extra: usize) -> Result<Self, &'static str> {
        let len = number(bytes, width)?;
        Ok(Self::scalar(len.saturating_add(1 + width + extra)))
    }
}

/// The number of `width` bytes behind a marker.
fn number(bytes: &[u8], width: usize) -> Result<usize, &'static str> {
    let digits = bytes.get(1..=width).ok_or(TRUNCATED)?;
    Ok(digits.iter().fold(0, |number, &digit| number << 8 | usize::from(digit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_whole_value_of_each_kind_passes() {
        let sized = |head: &[u8], len: usize| [head, &vec![0; len]].concat();
        let whole: Vec<Vec<u8>> = vec![
            vec![0x00],
            vec![0x7f],
            vec![0xff],
            vec![0xc0],
            vec![0xc2],
            vec![0xc3],
            vec![0x80],
            vec![0x90],
            vec![0xa0],
            sized(&[0xbf], 31),
            sized(&[0x9f], 15),
            sized(&[0x8f], 30),
            sized(&[0xc4, 3], 3),
            sized(&[0xc5, 1, 0], 256),
            sized(&[0xc6, 0, 1, 0, 0], 65536),
            sized(&[0xc7, 3, 9], 3),
            sized(&[0xc8, 1, 0, 9], 256),
            sized(&[0xc9, 0, 1, 0, 0, 9], 65536),
            sized(&[0xca], 4),
            sized(&[0xcb], 8),
            sized(&[0xcc], 1),
            sized(&[0xcd], 2),
            sized(&[0xce], 4),
            sized(&[0xcf], 8),
            sized(&[0xd0], 1),
            sized(&[0xd1], 2),
            sized(&[0xd2], 4),
            sized(&[0xd3], 8),
            sized(&[0xd4], 2),
            sized(&[0xd5], 3),
            sized(&[0xd6], 5),
            sized(&[0xd7], 9),
            sized(&[0xd8], 17),
            sized(&[0xd9, 3], 3),
            sized(&[0xda, 1, 0], 256),
            sized(&[0xdb, 0, 1, 0, 0], 65536),
            sized(&[0xdc, 0, 2], 2),
            sized(&[0xdd, 0, 0, 0, 2], 2),
            sized(&[0xde, 0, 2], 4),
            sized(&[0xdf, 0, 0, 0, 2], 4),
            vec![0x92, 0x90, 0x81, 0x01, 0x80],
        ];
        for bytes in whole {
            assert_eq!(check(&bytes), Ok(()), "{:02x?}", &bytes[..bytes.len().min(8)]);
            let longer = [&bytes[..], &[0]].concat();
            assert_eq!(check(&longer), Err((TRAILING, bytes.len())));
            for end in [0, bytes.len() / 2, bytes.len() - 1] {
                assert_eq!(check(&bytes[..end]).unwrap_err().0, TRUNCATED, "{:02x?}", &bytes[..bytes.len().min(8)]);
            }
        }
        assert_eq!(check(&[0x91, 0xc1]), Err(("malformed value", 1)));
        assert_eq!(check(&[0xdd, 0xff, 0xff, 0xff, 0xff]), Err((TRUNCATED, 5)));
    }
}
