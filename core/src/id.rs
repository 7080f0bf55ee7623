//! The identity of a message.

use crate::Text;
use sha2::{Digest, Sha256};
use std::fmt;
use std::time::SystemTime;
use uuid::Uuid;

/// The `id` of a message (CloudEvents 1.0.2, *Required attributes*), unique together with its source.
///
/// The SDK makes UUIDs, kept as 16 bytes: version 7 for what is published, version 8 (a hash of its
/// cause) for what a handler returns. Ids of other clients may be any text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(Repr);

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Repr {
    Uuid(Uuid),
    Text(Text),
}

impl MessageId {
    /// The id of what has none yet.
    pub(crate) const NIL: Self = Self(Repr::Text(Text::from_static("")));

    /// A new UUID of version 7, whose time part is `now` (RFC 9562, section 5.7).
    #[must_use]
    pub fn new(now: SystemTime) -> Self {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time = uuid::Timestamp::from_unix(uuid::NoContext, since.as_secs(), since.subsec_nanos());
        Self(Repr::Uuid(Uuid::new_v7(time)))
    }

    /// A UUID of version 8 (RFC 9562, section 5.8) that is the same for the same parts in the same order.
    pub(crate) fn derived<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            // The length keeps ("ab", "c") and ("a", "bc") apart.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let digest = hash.finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        Self(Repr::Uuid(uuid::Builder::from_custom_bytes(bytes).into_uuid()))
    }

    /// Not empty, and without control characters.
    pub(crate) fn is_plain(&self) -> bool {
        match &self.0 {
            Repr::Uuid(_) => true,
            Repr::Text(text) => crate::message::is_plain(text),
        }
    }

    /// Calls `f` with the id as text, without allocating.
    pub fn with_str<R>(&self, f: impl FnOnce(&str) -> R) -> R {
        match &self.0 {
            Repr::Uuid(id) => f(id.hyphenated().encode_lower(&mut Uuid::encode_buffer())),
            Repr::Text(text) => f(text),
        }
    }
}

impl From<&str> for MessageId {
    fn from(id: &str) -> Self {
        match Uuid::try_parse(id) {
            // Only the canonical form may be shortened: the text must come back as it was.
            Ok(uuid) if uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == id => Self(Repr::Uuid(uuid)),
            _ => Self(Repr::Text(id.into())),
        }
    }
}

impl From<String> for MessageId {
    fn from(id: String) -> Self {
        id.as_str().into()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_str(|id| f.write_str(id))
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_as_they_were() {
        let made = MessageId::new(SystemTime::now()).to_string();
        for id in [made.as_str(), "A-1", "", "0190A5D6-0000-7000-8000-000000000000"] {
            assert_eq!(MessageId::from(id).to_string(), id);
        }
        assert_eq!(MessageId::from(made.as_str()).to_string().as_bytes()[14], b'7');
    }

    #[test]
    fn derived_ids_depend_on_each_part_and_its_place() {
        let id = |parts: &[&str]| MessageId::derived(parts.iter().map(|p| p.as_bytes()));
        assert_eq!(id(&["a", "b"]), id(&["a", "b"]));
        assert_ne!(id(&["a", "b"]), id(&["b", "a"]));
        assert_ne!(id(&["ab", "c"]), id(&["a", "bc"]));
        assert_eq!(id(&["a"]).to_string().as_bytes()[14], b'8');
    }
}
