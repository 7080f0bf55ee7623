//! `#[derive(Event)]` of Tidings; use it by the facade crate `tidings`.
//!
//! It works in four steps, a file each: `parse` reads `#[event(..)]`, `validate` makes a model of it that has no
//! mistakes, `expand` writes the impl, and `fallback` writes one for a type that has a mistake, so that the
//! mistake is the only error.

mod expand;
mod fallback;
mod name;
mod parse;
mod validate;

use proc_macro2::TokenStream;
use syn::DeriveInput;

/// Makes a struct or an enum an event.
///
/// The type also derives serde's `Serialize` and `Deserialize`, and owns all it holds.
///
/// | in `#[event(..)]` | is |
/// |---|---|
/// | `name = "shop.order.placed"` | the event's name on the wire; required. Tokens of `[a-z0-9-]`, joined by dots, at most 200 bytes |
/// | `version = 2` | the version of its contract, from 1; 1 by default |
/// | `key = order_id` | the field that its order is kept by: also `key = customer.id` or, in a tuple struct, `key = 0`. It implements `ToKey`. In an enum, every variant has it |
/// | `topic = "shop.orders"` | the topic it is published to, if that is not its name |
/// | `codec = "msgpack"` | `"json"` or `"msgpack"`, if it does not take the bus's codec |
/// | `upcast(from = OrderPlacedV1)` | the version before: events up to that version are read as it, and converted by `From` |
/// | `crate = my::tidings` | where the crate `tidings` is, if not at `::tidings` |
///
/// # Examples
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use tidings::Event;
///
/// #[derive(Event, Serialize, Deserialize)]
/// #[event(name = "shop.order.placed", version = 1, key = order_id)]
/// struct OrderPlacedV1 {
///     order_id: String,
///     total: u64,
/// }
///
/// #[derive(Event, Serialize, Deserialize, Debug, PartialEq)]
/// #[event(name = "shop.order.placed", version = 2, key = order_id, upcast(from = OrderPlacedV1))]
/// struct OrderPlaced {
///     order_id: String,
///     total_cents: u64,
/// }
///
/// impl From<OrderPlacedV1> for OrderPlaced {
///     fn from(old: OrderPlacedV1) -> Self {
///         Self { order_id: old.order_id, total_cents: old.total * 100 }
///     }
/// }
///
/// // A reader of version 2 reads version 1 too.
/// let old = br#"{ "order_id": "A-1", "total": 12 }"#;
/// let order = OrderPlaced::decode("application/json", 1, old)?;
/// assert_eq!(order, OrderPlaced { order_id: "A-1".into(), total_cents: 1200 });
/// assert_eq!(order.key().unwrap().as_str(), Some("A-1"));
/// # Ok::<(), tidings::Error>(())
/// ```
///
/// With the feature `schema` of `tidings`, an event that also derives `JsonSchema` has an associated function
/// `json_schema()`.
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as DeriveInput);
    event(&input).unwrap_or_else(|mistake| fallback::expand(&input, &mistake)).into()
}

fn event(input: &DeriveInput) -> syn::Result<TokenStream> {
    let attributes = parse::Attributes::of(input)?;
    let event = validate::Event::new(input, attributes)?;
    Ok(expand::expand(&event))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `macros/expansion.rs` shows what the derive writes; where that is meant to change, it must be changed too.
    #[test]
    fn expands_as_documented() {
        let documented = include_str!("../expansion.rs");
        let (input, _) = documented.split_once("// becomes\n").expect("has an input");
        let input: DeriveInput = syn::parse_str(input).expect("parses");
        let expanded = event(&input).expect("has no mistake");
        let expanded = prettyplease::unparse(&syn::parse2(expanded).expect("parses"));
        assert!(documented.ends_with(&format!("// becomes\n{expanded}")), "the derive writes:\n{expanded}");
    }
}
