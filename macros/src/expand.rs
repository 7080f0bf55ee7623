//! Writes the impl of an event.

use crate::validate::{Codec, Event, Key};
use proc_macro2::TokenStream;
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Generics, Member, parse_quote};

/// The impl of `Event`, and what belongs to it.
pub(crate) fn expand(event: &Event<'_>) -> TokenStream {
    let event_impl = event_impl(event);
    let version_check = version_check(event);
    let schema = schema(event);
    quote! { #event_impl #version_check #schema }
}

fn event_impl(event: &Event<'_>) -> TokenStream {
    let Event { ident, tidings, name, topic, version, .. } = event;
    let generics = bounded(event);
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    let keyed = event.key.is_some();
    let key = key(event);
    let content_type = content_type(event);
    let upcast = upcast(event);
    // So that a missing derive of serde is shown at the type.
    let encode = quote_spanned!(ident.span()=> #tidings::codecs::encode);
    let decode = quote_spanned!(ident.span()=> #tidings::codecs::decode);
    quote! {
        #[automatically_derived]
        impl #impl_generics #tidings::Event for #ident #ty_generics #where_clause {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const TOPIC: &'static str = #topic;
            const KEYED: bool = #keyed;
            const CONTENT_TYPE: ::core::option::Option<&'static str> = #content_type;

            fn key(&self) -> ::core::option::Option<#tidings::Key> {
                #key
            }

            fn encode(&self, content_type: &str) -> #tidings::Result<#tidings::codecs::private::Bytes> {
                #encode(self, content_type)
            }

            fn decode(content_type: &str, version: u32, payload: &[u8]) -> #tidings::Result<Self> {
                #upcast
                #decode(content_type, payload)
            }
        }
    }
}

/// The generics of the type, with what an event asks of a type whose parameters are not known yet.
fn bounded(event: &Event<'_>) -> Generics {
    let mut generics = event.generics.clone();
    if !generics.params.is_empty() {
        let Event { ident, tidings, .. } = event;
        let private = quote!(#tidings::codecs::private);
        let (_, ty_generics, _) = event.generics.split_for_impl();
        generics.make_where_clause().predicates.push(parse_quote! {
            #ident #ty_generics: #private::Serialize + #private::DeserializeOwned + ::core::marker::Send + 'static
        });
    }
    generics
}

fn key(event: &Event<'_>) -> TokenStream {
    let Some(Key { path, variants }) = &event.key else { return quote!(::core::option::Option::None) };
    let tidings = &event.tidings;
    let to_key = |field: TokenStream| {
        // At the field, where a type that cannot be a key is shown.
        let span = path.last().map_or(event.ident.span(), Member::span);
        quote_spanned!(span=> #tidings::ToKey::to_key(&#field))
    };
    if variants.is_empty() {
        return to_key(quote!(self #(.#path)*));
    }
    let (first, rest) = (&path[0], &path[1..]);
    let to_key = to_key(quote!((*__key) #(.#rest)*));
    quote! { match self { #(Self::#variants { #first: __key, .. } => #to_key,)* } }
}

fn content_type(event: &Event<'_>) -> TokenStream {
    let tidings = &event.tidings;
    // By its type, so that a codec that is not compiled in is an error that names its feature.
    let codec = match event.codec {
        None => return quote!(::core::option::Option::None),
        Some(Codec::Json) => quote!(#tidings::codecs::Json),
        Some(Codec::MessagePack) => quote!(#tidings::codecs::MessagePack),
    };
    quote!(::core::option::Option::Some(<#codec as #tidings::codecs::Codec>::CONTENT_TYPE))
}

/// Reads what is as old as the version before, or older, as that; it reads its own older ones the same way.
/// Newer versions are tried as they are.
fn upcast(event: &Event<'_>) -> TokenStream {
    let Some(from) = &event.upcast_from else { return quote!(let _ = version;) };
    let tidings = &event.tidings;
    let check = (!event.generics.params.is_empty()).then(|| {
        let check = is_upcast(event, &quote!(Self));
        quote!(const { #check })
    });
    let convert = quote_spanned!(from.span()=> <Self as ::core::convert::From<#from>>::from);
    quote! {
        #check
        if version <= <#from as #tidings::Event>::VERSION {
            return <#from as #tidings::Event>::decode(content_type, version, payload).map(#convert);
        }
    }
}

/// The check of `upcast` at compile time; in a generic type it is done where the type is used.
fn version_check(event: &Event<'_>) -> Option<TokenStream> {
    let checked_here = event.upcast_from.is_some() && event.generics.params.is_empty();
    checked_here.then(|| {
        let check = is_upcast(event, event.ident);
        quote!(const _: () = { #check };)
    })
}

fn is_upcast(event: &Event<'_>, this: &dyn ToTokens) -> TokenStream {
    let Event { tidings, upcast_from: from, ident, .. } = event;
    let shown = from.to_token_stream().to_string();
    let version = format!("`upcast(from = {shown})`: its version must be lower than that of `{ident}`");
    let name = format!("`upcast(from = {shown})`: it must have the name of `{ident}`, of which it is an older version");
    quote_spanned! {from.span()=>
        ::core::assert!(<#from as #tidings::Event>::VERSION < <#this as #tidings::Event>::VERSION, #version);
        ::core::assert!(
            #tidings::codecs::private::same(<#from as #tidings::Event>::NAME, <#this as #tidings::Event>::NAME),
            #name
        );
    }
}

/// `json_schema()`, for types that have a schema; whether schemas are compiled in is known to the codecs.
fn schema(event: &Event<'_>) -> TokenStream {
    let Event { ident, tidings, generics, .. } = event;
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    quote! {
        #tidings::codecs::private::if_schema! {
            impl #impl_generics #ident #ty_generics #where_clause {
                /// The JSON Schema (draft 2020-12) of this event.
                #[must_use]
                pub fn json_schema() -> #tidings::codecs::schema::Schema
                where
                    // The lifetime makes the compiler ask for a schema only where this is called.
                    for<'__a> Self: #tidings::codecs::schema::JsonSchema,
                {
                    #tidings::codecs::schema::of::<Self>()
                }
            }
        }
    }
}
