//! Which media type belongs to which codec, compiled in or not.

/// The cargo feature whose codec reads `content_type`, if there is one.
pub(crate) fn feature_of(content_type: &str) -> Option<&'static str> {
    if is_json(content_type) {
        return Some("json");
    }
    is_msgpack(content_type).then_some("msgpack")
}

/// `application/json`, `text/json`, and whatever says by its suffix that it is JSON (RFC 6839).
pub(crate) fn is_json(content_type: &str) -> bool {
    if content_type == "application/json" {
        return true;
    }
    let media_type = media_type(content_type);
    is_one_of(media_type, &["application/json", "text/json"]) || has_json_suffix(media_type)
}

/// `application/msgpack` and what it was called before there was an agreement.
pub(crate) fn is_msgpack(content_type: &str) -> bool {
    is_one_of(media_type(content_type), &["application/msgpack", "application/x-msgpack", "application/vnd.msgpack"])
}

/// The content type without its parameters (RFC 2045 5.1).
fn media_type(content_type: &str) -> &str {
    content_type.split_once(';').map_or(content_type, |(media_type, _)| media_type).trim()
}

fn is_one_of(media_type: &str, known: &[&str]) -> bool {
    known.iter().any(|k| k.eq_ignore_ascii_case(media_type))
}

fn has_json_suffix(media_type: &str) -> bool {
    let Some((kind, subtype)) = media_type.split_once('/') else { return false };
    let suffix = subtype.rsplit_once('+').map_or("", |(name, suffix)| if name.is_empty() { "" } else { suffix });
    !kind.is_empty() && suffix.eq_ignore_ascii_case("json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_are_compared_without_case_and_parameters() {
        for json in [
            "application/json",
            "Application/JSON",
            "application/json; charset=utf-8",
            "application/json;charset=UTF-8",
            " application/json ;x",
            "text/json",
            "application/vnd.shop.order+json",
            "application/problem+JSON; a=\"b;c\"",
        ] {
            assert_eq!(feature_of(json), Some("json"), "{json}");
        }
        for msgpack in ["application/msgpack", "application/X-MsgPack; v=1", "APPLICATION/VND.MSGPACK"] {
            assert_eq!(feature_of(msgpack), Some("msgpack"), "{msgpack}");
        }
    }

    #[test]
    fn others_are_of_no_codec() {
        for other in
            ["", ";", "json", "+json", "a+json", "/a+json", "a/+json", "application/json5", "application/jsonl"]
        {
            assert_eq!(feature_of(other), None, "{other}");
        }
        assert_eq!(feature_of("application/msgpack+zstd"), None);
    }
}
