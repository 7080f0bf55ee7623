//! Reads `#[event(..)]`.

use proc_macro2::TokenTree;
use quote::ToTokens;
use syn::meta::ParseNestedMeta;
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, DeriveInput, Error, Index, Lit, LitFloat, LitInt, LitStr, Member, Path, Result, Token, Type};

/// What stands in `#[event(..)]`, as it stands there.
#[derive(Default)]
pub(crate) struct Attributes {
    /// The attribute itself, for what is missing in it.
    pub(crate) attribute: Option<Attribute>,
    pub(crate) name: Option<LitStr>,
    pub(crate) version: Option<LitInt>,
    pub(crate) key: Option<Vec<Member>>,
    pub(crate) topic: Option<LitStr>,
    pub(crate) codec: Option<LitStr>,
    pub(crate) upcast_from: Option<Type>,
    pub(crate) tidings: Option<Path>,
}

impl Attributes {
    /// The attributes of `input`.
    pub(crate) fn of(input: &DeriveInput) -> Result<Self> {
        let mut attributes = Self::default();
        for attribute in input.attrs.iter().filter(|a| a.path().is_ident("event")) {
            attribute.parse_nested_meta(|meta| attributes.read(&meta))?;
            attributes.attribute = Some(attribute.clone());
        }
        Ok(attributes)
    }

    fn read(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let Some(what) = meta.path.get_ident() else { return Err(unknown(meta)) };
        match what.to_string().as_str() {
            "name" => once(meta, &mut self.name, |v| text(v, "`name` is text, as in `name = \"shop.order.placed\"`")),
            "topic" => once(meta, &mut self.topic, |v| text(v, "`topic` is text, as in `topic = \"shop.orders\"`")),
            "codec" => once(meta, &mut self.codec, |v| text(v, "`codec` is text: \"json\" or \"msgpack\"")),
            "version" => once(meta, &mut self.version, number),
            "key" => once(meta, &mut self.key, field_path),
            "crate" => once(meta, &mut self.tidings, |v| v.call(Path::parse_mod_style)),
            "upcast" => self.upcast(meta),
            _ => Err(unknown(meta)),
        }
    }

    fn upcast(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let expected = "`upcast` takes `from`, as in `upcast(from = OrderPlacedV1)`";
        if !is_list_with_something(meta.input) {
            return Err(meta.error(expected));
        }
        meta.parse_nested_meta(|inner| {
            if inner.path.is_ident("from") {
                once(&inner, &mut self.upcast_from, |v| v.call(Type::parse))
            } else {
                Err(inner.error(expected))
            }
        })
    }
}

fn is_list_with_something(input: ParseStream<'_>) -> bool {
    matches!(input.cursor().token_tree(), Some((TokenTree::Group(group), _)) if !group.stream().is_empty())
}

fn unknown(meta: &ParseNestedMeta<'_>) -> Error {
    meta.error("`event` takes `name`, `version`, `key`, `topic`, `codec`, `upcast` and `crate`")
}

/// Reads the value of `meta` into `place`, which must be free.
fn once<T>(
    meta: &ParseNestedMeta<'_>,
    place: &mut Option<T>,
    read: impl FnOnce(ParseStream<'_>) -> Result<T>,
) -> Result<()> {
    let what = meta.path.to_token_stream();
    if place.is_some() {
        return Err(meta.error(format!("`{what}` is set twice; remove one")));
    }
    let value = meta.value().map_err(|_| meta.error(format!("`{what}` needs a value: `{what} = ..`")))?;
    *place = Some(read(value)?);
    Ok(())
}

fn text(value: ParseStream<'_>, expected: &str) -> Result<LitStr> {
    value.parse().map_err(|e| Error::new(e.span(), expected))
}

fn number(value: ParseStream<'_>) -> Result<LitInt> {
    value.parse().map_err(|e| Error::new(e.span(), "`version` is a whole number from 1 on, as in `version = 2`"))
}

const NOT_A_FIELD: &str = "`key` is a field, as in `key = order_id`, `key = customer.id` or `key = 0`; \
                           for another key, implement `ToKey` for the type of a field";

/// `order_id`, `customer.id`, `0` or `0.1`.
fn field_path(value: ParseStream<'_>) -> Result<Vec<Member>> {
    let mut path = Vec::new();
    loop {
        match value.fork().parse() {
            // The lexer takes `0.1` for a float.
            Ok(Lit::Float(float)) => {
                value.parse::<Lit>()?;
                path.extend(two_indices(&float)?);
            }
            _ => path.push(value.parse().map_err(|e| not_a_field(value, &e))?),
        }
        if value.is_empty() || value.peek(Token![,]) {
            return Ok(path);
        }
        value.parse::<Token![.]>().map_err(|e| Error::new(e.span(), NOT_A_FIELD))?;
    }
}

fn two_indices(float: &LitFloat) -> Result<[Member; 2]> {
    let index = |digits: &str| digits.parse().map(|index| Member::Unnamed(Index { index, span: float.span() }));
    let (first, second) = float.base10_digits().split_once('.').unwrap_or_default();
    match (index(first), index(second)) {
        (Ok(first), Ok(second)) => Ok([first, second]),
        _ => Err(Error::new(float.span(), NOT_A_FIELD)),
    }
}

fn not_a_field(value: ParseStream<'_>, cause: &Error) -> Error {
    let message = match value.fork().parse::<LitStr>() {
        Ok(quoted) => format!("`key` is a field and not text: write `key = {}`", quoted.value()),
        Err(_) => NOT_A_FIELD.to_owned(),
    };
    Error::new(cause.span(), message)
}
