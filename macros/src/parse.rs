//! Reads `#[event(..)]`.

use syn::meta::ParseNestedMeta;
use syn::parse::ParseStream;
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
        let mut read = false;
        meta.parse_nested_meta(|inner| {
            read = true;
            if inner.path.is_ident("from") {
                return once(&inner, &mut self.upcast_from, |v| v.parse());
            }
            Err(inner.error("`upcast` takes `from`, as in `upcast(from = OrderPlacedV1)`"))
        })?;
        if read { Ok(()) } else { Err(meta.error("say from which type, as in `upcast(from = OrderPlacedV1)`")) }
    }
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
    if place.is_some() {
        return Err(meta.error("this is set twice; remove one"));
    }
    *place = Some(read(meta.value()?)?);
    Ok(())
}

fn text(value: ParseStream<'_>, expected: &str) -> Result<LitStr> {
    value.parse().map_err(|e| Error::new(e.span(), expected))
}

fn number(value: ParseStream<'_>) -> Result<LitInt> {
    value.parse().map_err(|e| Error::new(e.span(), "`version` is a whole number from 1 on, as in `version = 2`"))
}

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
        if !value.peek(Token![.]) {
            return Ok(path);
        }
        value.parse::<Token![.]>()?;
    }
}

fn two_indices(float: &LitFloat) -> Result<[Member; 2]> {
    let index = |digits: &str| digits.parse().map(|index| Member::Unnamed(Index { index, span: float.span() }));
    let (first, second) = float.base10_digits().split_once('.').unwrap_or_default();
    match (index(first), index(second)) {
        (Ok(first), Ok(second)) => Ok([first, second]),
        _ => Err(Error::new(float.span(), "`key` is a field, as in `key = order_id` or `key = 0`")),
    }
}

fn not_a_field(value: ParseStream<'_>, cause: &Error) -> Error {
    let message = match value.fork().parse::<LitStr>() {
        Ok(quoted) => format!("`key` is a field and not text: write `key = {}`", quoted.value()),
        Err(_) => "`key` is a field, as in `key = order_id` or `key = 0`".to_owned(),
    };
    Error::new(cause.span(), message)
}
