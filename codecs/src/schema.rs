//! JSON Schema of events, by schemars.
//!
//! An event that also derives [`JsonSchema`] has `json_schema()`. The derive of schemars finds its crate by
//! name; without a dependency of your own, tell it where: `#[schemars(crate = "tidings::codecs::schema::schemars")]`.

pub use schemars::{self, JsonSchema, Schema};

/// The JSON Schema (draft 2020-12) of `T`.
///
/// # Examples
///
/// ```
/// let schema = tidings_codecs::schema::of::<Vec<String>>();
/// assert_eq!(schema.get("type").unwrap(), "array");
/// ```
#[must_use]
pub fn of<T: JsonSchema>() -> Schema {
    schemars::SchemaGenerator::default().into_root_schema_for::<T>()
}
