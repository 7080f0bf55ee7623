//! Headers: what an application sends beside the event.

use crate::{Error, ErrorKind, Result, Text};
use bytes::Bytes;

/// An ordered multimap of names to bytes that every broker can carry.
///
/// Names are tokens as in HTTP (RFC 9110, section 5.6.2) of at most 128 bytes, compared without
/// regard to case and kept as written; values are any bytes. An application may set at most 64
/// headers of 16 KiB in all, and no [reserved](Self::is_reserved) name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Text, Bytes)>);

/// Names that start so (in any case) belong to this SDK, to CloudEvents or to a broker.
const RESERVED_PREFIXES: [&str; 10] = [
    "tidings-",
    "ce-",
    "ce_",
    "cloudevents",
    "nats-",
    "x-death",
    "x-delay",
    "x-first-death",
    "x-last-death",
    "x-match",
];
const RESERVED_NAMES: [&str; 7] =
    ["cc", "bcc", "content-type", "content-encoding", "traceparent", "tracestate", "baggage"];

impl Headers {
    /// The most headers an application may set on one message.
    pub const MAX_COUNT: usize = 64;
    /// The most bytes that names and values of an application's headers may have together.
    pub const MAX_BYTES: usize = 16 * 1024;
    /// The longest name, in bytes.
    pub const MAX_NAME: usize = 128;

    /// No headers; allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a header after those that are there, of the same name too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] for a malformed or reserved name, [`ErrorKind::TooLarge`] beyond a
    /// limit; the headers are then as they were.
    pub fn append(&mut self, name: impl Into<Text>, value: impl Into<Bytes>) -> Result<()> {
        let (name, value) = (name.into(), value.into());
        check_name(&name)?;
        if Self::is_reserved(&name) {
            return Err(invalid(
                &name,
                "the name is reserved; use a name of your own, such as one that starts with `x-`",
            ));
        }
        let own = || self.0.iter().filter(|(n, _)| !Self::is_reserved(n));
        let bytes: usize = own().map(|(n, v)| n.len() + v.len()).sum();
        if own().count() >= Self::MAX_COUNT {
            return Err(Error::new(ErrorKind::TooLarge, "more than 64 headers; put the data into the event"));
        }
        if bytes + name.len() + value.len() > Self::MAX_BYTES {
            return Err(Error::new(ErrorKind::TooLarge, "headers of more than 16 KiB; put the data into the event")
                .with_context("header", name));
        }
        self.0.push((name, value));
        Ok(())
    }

    /// Adds a header without the rules for applications: as read from a broker, or reserved.
    ///
    /// # For implementors
    /// Transports use it for what they read; a header that some other client sent must not be lost,
    /// however it is named. They must be able to write whatever they could read.
    pub fn append_unchecked(&mut self, name: impl Into<Text>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    /// Sets a reserved header, replacing what was there.
    pub(crate) fn set(&mut self, name: &'static str, value: impl Into<Bytes>) {
        self.remove(name);
        self.0.push((Text::from_static(name), value.into()));
    }

    /// Removes all headers of this name and says whether there were any.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self.0.len() < before
    }

    /// The first value of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.get_all(name).next()
    }

    /// The first value of this name, if it is text.
    #[must_use]
    pub fn get_str(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get(name)?).ok()
    }

    /// All values of this name, in order.
    pub fn get_all(&self, name: &str) -> impl Iterator<Item = &Bytes> {
        self.0.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v)
    }

    /// All headers, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Text, &Bytes)> {
        self.0.iter().map(|(n, v)| (n, v))
    }

    /// How many headers there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many bytes names and values take together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(n, v)| n.len() + v.len()).sum()
    }

    /// Whether applications may not set this name: it belongs to this SDK, to CloudEvents, to W3C
    /// trace context or steers a broker (`CC` adds routes in RabbitMQ, `Nats-Rollup` deletes).
    #[must_use]
    pub fn is_reserved(name: &str) -> bool {
        let starts = |prefix: &&str| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
        RESERVED_PREFIXES.iter().any(|p| starts(p)) || RESERVED_NAMES.iter().any(|n| name.eq_ignore_ascii_case(n))
    }
}

fn check_name(name: &str) -> Result<()> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || name.len() > Headers::MAX_NAME || !name.bytes().all(token) {
        return Err(invalid(name, "names are 1 to 128 ASCII letters, digits and any of !#$%&'*+-.^_`|~"));
    }
    Ok(())
}

fn invalid(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::InvalidName, format!("header `{}`: {why}", crate::error::clean_line(name, 80)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_duplicates_and_binary_values() {
        let mut headers = Headers::new();
        headers.append("X-Tenant", "a").unwrap();
        headers.append("trace", &b"\0\xff"[..]).unwrap();
        headers.append("x-tenant", "b").unwrap();
        assert_eq!(headers.get_all("x-TENANT").collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(headers.get_str("trace"), None);
        assert_eq!(headers.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), ["X-Tenant", "trace", "x-tenant"]);
        assert!(headers.remove("X-TENANT") && headers.len() == 1);
    }

    #[test]
    fn refuses_reserved_and_malformed_names() {
        let long = "n".repeat(129);
        let names = ["CC", "bcc", "ce-id", "CE_id", "cloudEvents:id", "Nats-Rollup", "x-death", "tidings-attempts"];
        for bad in names.iter().chain(&["", "a b", "a:b", "ä", "a\r\nb", "content-type", "traceparent", &long]) {
            assert_eq!(Headers::new().append(*bad, "v").unwrap_err().kind(), ErrorKind::InvalidName, "{bad}");
        }
    }

    #[test]
    fn refuses_too_many_and_too_much() {
        let mut headers = Headers::new();
        headers.set("tidings-attempts", "1");
        for i in 0..64 {
            headers.append(format!("h{i}"), "v").unwrap();
        }
        assert_eq!(headers.append("one-more", "v").unwrap_err().kind(), ErrorKind::TooLarge);
        let error = Headers::new().append("big", vec![0; 16 * 1024]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
    }
}
