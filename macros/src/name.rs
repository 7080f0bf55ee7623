//! The rules of names, as in `tidings_core::Topic`; a test keeps the two the same.

use syn::{Error, LitStr, Result};

/// The longest name, in bytes; `tidings_core::MAX_NAME`.
const MAX_NAME: usize = 200;

/// Checks a name or topic that stands in an attribute.
pub(crate) fn check(what: &str, literal: &LitStr) -> Result<()> {
    let name = literal.value();
    match flaw(&name) {
        None => Ok(()),
        Some(why) => {
            let shown: String = name.chars().take(80).collect();
            Err(Error::new(literal.span(), format!("{what} `{shown}`: {why}{}", remedy(&name))))
        }
    }
}

/// Why `name` is none, if so.
fn flaw(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty; tokens are joined by dots, as in `shop.order.placed`")
    } else if name.len() > MAX_NAME {
        Some("it is longer than 200 bytes")
    } else if name.split('.').all(is_token) {
        None
    } else if name.starts_with('_') {
        Some("names that begin with `_` are reserved for what Tidings makes itself")
    } else if name.split('.').any(str::is_empty) {
        Some("it has an empty token; dots stand between tokens only")
    } else if name.contains(['*', '>']) {
        Some("wildcards are for the patterns of subscriptions")
    } else {
        Some("tokens may hold only a-z, 0-9 and `-`, joined by dots, as in `shop.order.placed`")
    }
}

fn is_token(token: &str) -> bool {
    !token.is_empty() && token.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

/// A name near to `name` that keeps the rules, if there is an obvious one.
fn remedy(name: &str) -> String {
    let near = name.to_lowercase().replace(['_', ' '], "-").replace("::", ".").replace('/', ".");
    let near = near.trim_matches(['.', '-']);
    if flaw(near).is_none() && !name.starts_with('_') { format!("; try `{near}`") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_those_of_core() {
        let mut random = fastrand::Rng::with_seed(3);
        let parts = ["a", "0", "z9", "-", ".", "..", "_", "_tidings.", "A", "ä", " ", "*", ">", "shop", "\n"];
        for _ in 0..20_000 {
            let name: String = (0..random.usize(..6)).map(|_| parts[random.usize(..parts.len())]).collect();
            assert_eq!(flaw(&name).is_none(), tidings_core::Topic::new(name.clone()).is_ok(), "{name:?}");
        }
        for len in [MAX_NAME, MAX_NAME + 1] {
            let name = "a".repeat(len);
            assert_eq!(flaw(&name).is_none(), tidings_core::Topic::new(name).is_ok());
        }
        assert_eq!(MAX_NAME, tidings_core::MAX_NAME);
    }

    #[test]
    fn a_remedy_is_a_name() {
        assert_eq!(remedy("Shop.Order_Placed"), "; try `shop.order-placed`");
        assert_eq!(remedy("shop/order"), "; try `shop.order`");
        assert_eq!(remedy("shop..order"), "");
        assert_eq!(remedy("_tidings.dead"), "");
        assert_eq!(remedy("größe"), "");
    }
}
