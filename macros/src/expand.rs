//! Writes the impl of an event.

use crate::validate::{Event, Key};
use proc_macro2::{Span, TokenStream};
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
    // At the type, where a missing derive of serde is shown, and twice the same, so that it is shown once.
    let contract = quote_spanned!(ident.span()=> <Self as #tidings::codecs::private::Contract>);
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
                #contract::encode(self, content_type)
            }

            fn decode(content_type: &str, version: u32, payload: &[u8]) -> #tidings::Result<Self> {
                #upcast
                #contract::decode(content_type, payload)
            }
        }
    }
}

/// The generics of the type, with what an event asks of a type whose parameters are not known yet.
fn bounded(event: &Event<'_>) -> Generics {
    let mut generics = event.generics.clone();
    if !generics.params.is_empty() {
        let Event { ident, tidings, .. } = event;
        let (_, ty_generics, _) = event.generics.split_for_impl();
        generics.make_where_clause().predicates.push(parse_quote! {
            #ident #ty_generics: #tidings::codecs::private::Contract + ::core::marker::Send + 'static
        });
    }
    generics
}

fn key(event: &Event<'_>) -> TokenStream {
    let Some(Key { path, variants }) = &event.key else { return quote!(::core::option::Option::None) };
    let tidings = &event.tidings;
    // At the field, where a type that cannot be a key is shown.
    let span = path.last().map_or(event.ident.span(), Member::span).resolved_at(Span::call_site());
    if variants.is_empty() {
        return quote_spanned!(span=> <_ as #tidings::ToKey>::to_key(&self #(.#path)*));
    }
    let (first, rest) = (&path[0], &path[1..]);
    let to_key = quote_spanned!(span=> <_ as #tidings::ToKey>::to_key(&(*__key) #(.#rest)*));
    quote_spanned!(span=> match self { #(Self::#variants { #first: __key, .. } => #to_key,)* })
}

fn content_type(event: &Event<'_>) -> TokenStream {
    let Event { tidings, codec, .. } = event;
    let Some(codec) = codec else { return quote!(::core::option::Option::None) };
    // By its type, so that a codec that is not compiled in is an error that names its feature.
    quote!(::core::option::Option::Some(<#tidings::codecs::#codec as #tidings::codecs::Codec>::CONTENT_TYPE))
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
    let convert = quote_spanned!(from.span()=> ::core::convert::Into::into(old));
    quote! {
        #check
        if version <= <#from as #tidings::Event>::VERSION {
            let old = <#from as #tidings::Event>::decode(content_type, version, payload)?;
            return ::core::result::Result::Ok(#convert);
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
