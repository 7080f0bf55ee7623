//! What codecs say about failures, without the payload.

use tidings_core::{Error, ErrorKind};

/// A failure of one codec in `operation`.
#[cold]
pub(crate) fn codec(operation: &'static str, content_type: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Codec, message.into()).with_operation(operation).with_context("content_type", content_type)
}

/// The message for arrays and maps that nest too deep.
pub(crate) const TOO_DEEP: &str = "arrays and maps nest deeper than 64";

/// What may be told of a message that serde or a type made: its kind and what the type expected, never what
/// was there (`invalid type: string "secret", expected u64` becomes `invalid type, expected u64`).
///
/// What a type expects is its own text (`Visitor::expecting`, names of fields and variants), so it is kept.
/// Free text (`serde::de::Error::custom`) may quote a value, so it is not.
pub(crate) fn without_values(message: &str) -> String {
    const KINDS: [&str; 5] =
        ["invalid type:", "invalid value:", "invalid length ", "unknown variant ", "unknown field "];
    const STATIC: [&str; 2] = ["missing field ", "duplicate field "];
    if STATIC.iter().any(|kind| message.strip_prefix(kind).is_some_and(is_quoted_name)) {
        return message.to_owned();
    }
    match KINDS.iter().find(|kind| message.starts_with(*kind)) {
        Some(kind) => kind.trim_end_matches([':', ' ']).to_owned() + &expectation(message),
        None => "a value was refused by its type".to_owned(),
    }
}

fn is_quoted_name(text: &str) -> bool {
    let name = text.strip_prefix('`').and_then(|t| t.strip_suffix('`'));
    name.is_some_and(|name| !name.contains(['`', '\n', '"']))
}

/// The last `, expected ...`: what stands before it may quote the payload, what stands in it does not.
fn expectation(message: &str) -> String {
    // Then nothing of the message is the type's: all that looks like an expectation is payload.
    let nothing_expected = message.ends_with(", there are no fields") || message.ends_with(", there are no variants");
    let expected = message.rsplit_once(", expected ").filter(|_| !nothing_expected);
    expected.map_or_else(String::new, |(_, expected)| format!(", expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::without_values;

    #[test]
    fn values_are_left_out_and_expectations_kept() {
        for (from_serde, told) in [
            ("invalid type: string \"hunter2\", expected u64", "invalid type, expected u64"),
            ("invalid value: integer `42`, expected i8", "invalid value, expected i8"),
            (
                "invalid length 2, expected struct A with 3 elements",
                "invalid length, expected struct A with 3 elements",
            ),
            ("unknown variant `hunter2`, expected `a` or `b`", "unknown variant, expected `a` or `b`"),
            ("unknown field `hunter2`, expected one of `a`, `b`", "unknown field, expected one of `a`, `b`"),
            ("unknown field `x, expected hunter2`, there are no fields", "unknown field"),
            ("unknown variant `x, expected hunter2`, there are no variants", "unknown variant"),
            ("invalid type: string \"a, expected hunter2\", expected u64", "invalid type, expected u64"),
            ("missing field `order_id`", "missing field `order_id`"),
            ("duplicate field `order_id`", "duplicate field `order_id`"),
            ("missing field `a` in `hunter2`", "a value was refused by its type"),
            ("missing field hunter2", "a value was refused by its type"),
            ("hunter2 is not a date", "a value was refused by its type"),
            ("", "a value was refused by its type"),
        ] {
            assert_eq!(without_values(from_serde), told);
        }
    }
}
