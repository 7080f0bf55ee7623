// What `#[derive(Event)]` writes; a test in `src/lib.rs` checks it.

#[event(name = "shop.order.placed", version = 2, key = customer.id, topic = "shop.orders", codec = "msgpack")]
#[event(upcast(from = OrderPlacedV1))]
struct OrderPlaced {
    customer: Customer,
    total_cents: u64,
}

// becomes
#[automatically_derived]
impl ::tidings::Event for OrderPlaced {
    const NAME: &'static str = "shop.order.placed";
    const VERSION: u32 = 2u32;
    const TOPIC: &'static str = "shop.orders";
    const KEYED: bool = true;
    const CONTENT_TYPE: ::core::option::Option<&'static str> = ::core::option::Option::Some(
        <::tidings::codecs::MessagePack as ::tidings::codecs::Codec>::CONTENT_TYPE,
    );
    fn key(&self) -> ::core::option::Option<::tidings::Key> {
        <_ as ::tidings::ToKey>::to_key(&self.customer.id)
    }
    fn encode(
        &self,
        content_type: &str,
    ) -> ::tidings::Result<::tidings::codecs::private::Bytes> {
        <Self as ::tidings::codecs::private::Contract>::encode(self, content_type)
    }
    fn decode(
        content_type: &str,
        version: u32,
        payload: &[u8],
    ) -> ::tidings::Result<Self> {
        if version <= <OrderPlacedV1 as ::tidings::Event>::VERSION {
            let old = <OrderPlacedV1 as ::tidings::Event>::decode(
                content_type,
                version,
                payload,
            )?;
            return ::core::result::Result::Ok(::core::convert::Into::into(old));
        }
        <Self as ::tidings::codecs::private::Contract>::decode(content_type, payload)
    }
}
const _: () = {
    ::core::assert!(
        < OrderPlacedV1 as ::tidings::Event > ::VERSION < < OrderPlaced as
        ::tidings::Event > ::VERSION,
        "`upcast(from = OrderPlacedV1)`: its version must be lower than that of `OrderPlaced`"
    );
    ::core::assert!(
        ::tidings::codecs::private::same(< OrderPlacedV1 as ::tidings::Event > ::NAME, <
        OrderPlaced as ::tidings::Event > ::NAME),
        "`upcast(from = OrderPlacedV1)`: it must have the name of `OrderPlaced`, of which it is an older version"
    );
};
::tidings::codecs::private::if_schema! {
    impl OrderPlaced { #[doc = r" The JSON Schema (draft 2020-12) of this event."]
    #[must_use] pub fn json_schema() -> ::tidings::codecs::schema::Schema where for <
    '__a > Self : ::tidings::codecs::schema::JsonSchema, {
    ::tidings::codecs::schema::of:: < Self > () } }
}
