//! What a type with a mistake gets, so that the mistake is its only error: the places that need an event find one.

use crate::validate::default_tidings;
use proc_macro2::{TokenStream, TokenTree};
use quote::quote;
use syn::parse::{Parse, ParseStream, Parser};
use syn::{DeriveInput, Error, Path, parse_quote};

/// The mistake as an error, and an impl that is never run.
pub(crate) fn expand(input: &DeriveInput, mistake: &Error) -> TokenStream {
    let error = mistake.to_compile_error();
    let (ident, tidings) = (&input.ident, tidings(input));
    let mut generics = input.generics.clone();
    let (_, ty_generics, _) = input.generics.split_for_impl();
    // With lifetimes, this holds for none, but asks for nothing here.
    generics.make_where_clause().predicates.push(parse_quote!(#ident #ty_generics: ::core::marker::Send + 'static));
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    quote! {
        #error
        #[automatically_derived]
        impl #impl_generics #tidings::Event for #ident #ty_generics #where_clause {
            const NAME: &'static str = "";
            const VERSION: u32 = 1;
            const TOPIC: &'static str = "";
            const KEYED: bool = false;
            const CONTENT_TYPE: ::core::option::Option<&'static str> = ::core::option::Option::None;
            fn key(&self) -> ::core::option::Option<#tidings::Key> {
                ::core::unreachable!()
            }
            fn encode(&self, _: &str) -> #tidings::Result<#tidings::codecs::private::Bytes> {
                ::core::unreachable!()
            }
            fn decode(_: &str, _: u32, _: &[u8]) -> #tidings::Result<Self> {
                ::core::unreachable!()
            }
        }
    }
}

/// The path in `crate = ..`, wherever it stands among mistakes.
fn tidings(input: &DeriveInput) -> Path {
    let lists = input.attrs.iter().filter(|a| a.path().is_ident("event")).filter_map(|a| a.meta.require_list().ok());
    lists
        .filter_map(|list| find_crate.parse2(list.tokens.clone()).ok())
        .flatten()
        .next()
        .unwrap_or_else(default_tidings)
}

fn find_crate(tokens: ParseStream<'_>) -> syn::Result<Option<Path>> {
    let mut found = None;
    while !tokens.is_empty() {
        if tokens.peek(syn::Token![crate]) && tokens.peek2(syn::Token![=]) {
            tokens.parse::<syn::Token![crate]>()?;
            tokens.parse::<syn::Token![=]>()?;
            found = Some(Path::parse_mod_style(tokens)?);
        } else {
            TokenTree::parse(tokens)?;
        }
    }
    Ok(found)
}
