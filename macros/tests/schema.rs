//! `json_schema()`, with the feature `schema` of `tidings`.

use serde::{Deserialize, Serialize};
use tidings::Event;
use tidings::codecs::schema::JsonSchema;

/// An order was placed.
#[derive(Event, Serialize, Deserialize, JsonSchema)]
#[event(name = "shop.order.placed")]
#[schemars(crate = "tidings::codecs::schema::schemars")]
struct OrderPlaced {
    order_id: String,
    note: Option<String>,
}

#[derive(Event, Serialize, Deserialize, JsonSchema)]
#[event(name = "generic")]
#[schemars(crate = "tidings::codecs::schema::schemars")]
struct Generic<T> {
    value: T,
}

/// Without a schema, which is no mistake.
#[derive(Event, Serialize, Deserialize)]
#[event(name = "plain")]
struct Plain;

#[test]
fn events_that_have_a_schema_tell_it() {
    let schema = OrderPlaced::json_schema().to_value();
    assert_eq!(schema["title"], "OrderPlaced");
    assert_eq!(schema["description"], "An order was placed.");
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["required"].as_array().unwrap(), &["order_id"]);
    assert_eq!(Generic::<u8>::json_schema().to_value()["properties"]["value"]["maximum"], 255);
    assert_eq!(Plain::NAME, "plain");
}
