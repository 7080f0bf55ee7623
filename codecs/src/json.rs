//! JSON (RFC 8259).

use crate::{Codec, MAX_DEPTH, buffer, content_type, encodable, error};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use tidings_core::{Error, Result};

/// JSON: `application/json`; it reads `text/json` and every `+json` type too.
///
/// Floats keep their exact value; one that is infinite or not a number is refused, as are map keys that are
/// neither text nor numbers. An error names line and column.
#[derive(Clone, Copy, Debug)]
pub struct Json;

impl Codec for Json {
    const CONTENT_TYPE: &'static str = "application/json";

    fn accepts(content_type: &str) -> bool {
        content_type::is_json(content_type)
    }

    fn encode<T: Serialize>(value: &T) -> Result<Bytes> {
        let has_raw = encodable::check::<true, T>(value).map_err(|flaw| flawed("encode", flaw.to_string()))?;
        buffer::filled(|buffer| {
            serde_json::to_writer(&mut *buffer, value).map_err(|e| failed("encode", &e))?;
            if has_raw { check_depth("encode", buffer) } else { Ok(()) }
        })
    }

    fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T> {
        check_depth("decode", payload)?;
        // Checked at once, text is UTF-8 faster than string by string; what is not gets the reader's own error.
        let decoded =
            std::str::from_utf8(payload).map_or_else(|_| serde_json::from_slice(payload), serde_json::from_str);
        decoded.map_err(|e| failed("decode", &e))
    }
}

fn check_depth(operation: &'static str, json: &[u8]) -> Result<()> {
    if is_too_deep(json) { Err(flawed(operation, error::TOO_DEEP)) } else { Ok(()) }
}

#[cold]
fn flawed(operation: &'static str, message: impl Into<String>) -> Error {
    error::codec(operation, Json::CONTENT_TYPE, message)
}

/// What `serde_json` found, without what it found there.
#[cold]
fn failed(operation: &'static str, cause: &serde_json::Error) -> Error {
    let (line, column) = (cause.line(), cause.column());
    let text = cause.to_string();
    let text = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
    let message = match cause.classify() {
        // The text of these is fixed.
        Category::Syntax | Category::Eof => text.to_owned(),
        Category::Data => error::without_values(text),
        Category::Io => "cannot write".to_owned(),
    };
    let error = flawed(operation, message);
    if line == 0 { error } else { error.with_context("line", line).with_context("column", column) }
}

/// Whether arrays and objects nest deeper than [`MAX_DEPTH`].
///
/// `serde_json` has a limit of its own, 128, which it forgets in what a type ignores. Malformed JSON may be
/// measured wrongly, but only behind the place where the reader stops.
fn is_too_deep(json: &[u8]) -> bool {
    // Most payloads have too few brackets to be deep.
    json.len() > MAX_DEPTH && opening_brackets(json) > MAX_DEPTH && depth(json) > MAX_DEPTH
}

/// How many opening brackets there are, in strings or not; summed in bytes, which compilers make vector code of.
fn opening_brackets(json: &[u8]) -> usize {
    json.chunks(255).map(|chunk| usize::from(chunk.iter().map(|&b| u8::from(is_opening(b))).sum::<u8>())).sum()
}

/// `[` or `{`: they differ in one bit.
const fn is_opening(byte: u8) -> bool {
    byte | 0x20 == b'{'
}

/// How deep the brackets nest that stand outside of strings.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut at) = (0_usize, 0, 0);
    while let Some(&byte) = json.get(at) {
        at += 1;
        match byte {
            b'"' => at = end_of_string(json, at),
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Where the string ends in which `at` is.
fn end_of_string(json: &[u8], mut at: usize) -> usize {
    while let Some(&byte) = json.get(at) {
        at += 1;
        match byte {
            b'"' => break,
            b'\\' => at += 1,
            _ => {}
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_of_strings() {
        for (json, expected) in [
            ("", 0),
            ("1", 0),
            ("\"[[[\"", 0),
            (r#""\"[[\\\"[""#, 0),
            (r#"["\\",[]]"#, 2),
            ("[[],[[]],{}]", 3),
            (r#"{"a[":{"b":[1]}}"#, 3),
            ("]]]}[", 1),
            ("\"[", 0),
            ("\"\\", 0),
        ] {
            assert_eq!(depth(json.as_bytes()), expected, "{json}");
        }
    }
}
