//! The key of an event: what its order is kept by.

use std::fmt;
use std::hash::{Hash, Hasher};

/// Events of one topic with the same key keep their order.
///
/// A key is bytes, because other clients' keys may be; keys of events in this SDK are text. Up to
/// 38 bytes (a UUID in text has 36) are kept inline, so that a key costs no allocation.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(Repr);

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Repr {
    // Unused bytes are zero, so that derived equality is right.
    Inline(u8, [u8; INLINE]),
    Heap(Box<[u8]>),
}

const INLINE: usize = 38;

impl Key {
    /// The key as bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Repr::Inline(len, bytes) => &bytes[..usize::from(*len)],
            Repr::Heap(bytes) => bytes,
        }
    }

    /// The key as text, if it is.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(self.as_bytes()).ok()
    }
}

impl Hash for Key {
    /// Of the bytes alone: most keys are far shorter than the room for them.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

impl From<&[u8]> for Key {
    fn from(key: &[u8]) -> Self {
        let mut inline = [0; INLINE];
        match inline.get_mut(..key.len()) {
            Some(room) => {
                room.copy_from_slice(key);
                // At most INLINE, which fits.
                Self(Repr::Inline(key.len() as u8, inline))
            }
            None => Self(Repr::Heap(key.into())),
        }
    }
}

impl From<&str> for Key {
    fn from(key: &str) -> Self {
        key.as_bytes().into()
    }
}

impl From<String> for Key {
    fn from(key: String) -> Self {
        key.as_str().into()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().escape_ascii().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_keys_are_equal_by_their_bytes() {
        for len in [0, 1, 36, 37, 38, 39, 1000] {
            let text = "k".repeat(len);
            let key = Key::from(text.as_str());
            assert_eq!(key.as_str(), Some(text.as_str()));
            assert_eq!(key, Key::from(text.as_bytes()));
        }
        assert_ne!(Key::from("a"), Key::from("a\0"));
        assert_eq!(Key::from(&b"\xff"[..]).as_str(), None);
        assert!(std::mem::size_of::<Key>() <= 40);
    }
}
