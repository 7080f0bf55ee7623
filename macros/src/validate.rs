//! Checks what was read and makes a model of it in which all is decided.

use crate::name;
use crate::parse::Attributes;
use proc_macro2::Span;
use syn::{Data, DeriveInput, Error, Fields, GenericParam, Generics, Ident, LitStr, Member, Path, Result, Type};

/// An event without mistakes, as far as a macro can see.
pub(crate) struct Event<'a> {
    pub(crate) ident: &'a Ident,
    pub(crate) generics: &'a Generics,
    /// The path of the crate `tidings`.
    pub(crate) tidings: Path,
    pub(crate) name: LitStr,
    pub(crate) topic: LitStr,
    pub(crate) version: u32,
    pub(crate) key: Option<Key<'a>>,
    /// The type of its codec, at the place of its name.
    pub(crate) codec: Option<Ident>,
    pub(crate) upcast_from: Option<Type>,
}

/// Where the key is.
pub(crate) struct Key<'a> {
    /// The field, and the fields in it on the way to the key.
    pub(crate) path: Vec<Member>,
    /// The variants of an enum; none in a struct.
    pub(crate) variants: Vec<&'a Ident>,
}

impl<'a> Event<'a> {
    /// Checks `attributes` against the type they stand at.
    pub(crate) fn new(input: &'a DeriveInput, attributes: Attributes) -> Result<Self> {
        check_shape(input)?;
        let name = required_name(input, &attributes)?;
        name::check("event name", &name)?;
        if let Some(topic) = &attributes.topic {
            name::check("topic", topic)?;
        }
        let version = version(&attributes)?;
        Ok(Self {
            ident: &input.ident,
            generics: &input.generics,
            version,
            key: attributes.key.map(|path| Key::new(input, path)).transpose()?,
            codec: attributes.codec.as_ref().map(codec).transpose()?,
            upcast_from: attributes.upcast_from.map(|from| upcast(from, version)).transpose()?,
            topic: attributes.topic.unwrap_or_else(|| name.clone()),
            tidings: attributes.tidings.unwrap_or_else(default_tidings),
            name,
        })
    }
}

/// `::tidings`.
pub(crate) fn default_tidings() -> Path {
    let mut path = Path::from(Ident::new("tidings", Span::call_site()));
    path.leading_colon = Some(Default::default());
    path
}

fn check_shape(input: &DeriveInput) -> Result<()> {
    if let Data::Union(data) = &input.data {
        return Err(Error::new(data.union_token.span, "an event is a struct or an enum; serde cannot write a union"));
    }
    let lifetime = input.generics.params.iter().find(|p| matches!(p, GenericParam::Lifetime(_)));
    lifetime.map_or(Ok(()), |lifetime| {
        let why = "an event owns what it holds, for it outlives what it was read from: `String` instead of `&str`";
        Err(Error::new_spanned(lifetime, why))
    })
}

fn required_name(input: &DeriveInput, attributes: &Attributes) -> Result<LitStr> {
    if let Some(name) = &attributes.name {
        return Ok(name.clone());
    }
    Err(match &attributes.attribute {
        Some(attribute) => {
            Error::new_spanned(&attribute.meta, "an event has a name: add `name = \"shop.order.placed\"`")
        }
        None => Error::new(input.ident.span(), "an event has a name: add `#[event(name = \"shop.order.placed\")]`"),
    })
}

fn version(attributes: &Attributes) -> Result<u32> {
    let Some(literal) = &attributes.version else { return Ok(1) };
    match literal.base10_parse() {
        Ok(0) => Err(Error::new(literal.span(), "versions count from 1: write `version = 1`")),
        Ok(version) => Ok(version),
        Err(_) => Err(Error::new(literal.span(), "`version` is a whole number from 1 to 4294967295")),
    }
}

fn upcast(from: Type, version: u32) -> Result<Type> {
    if version == 1 {
        return Err(Error::new_spanned(from, "there is nothing before version 1: set `version = 2` or higher"));
    }
    Ok(from)
}

fn codec(name: &LitStr) -> Result<Ident> {
    let codec = match name.value().as_str() {
        "json" => "Json",
        "msgpack" => "MessagePack",
        _ => return Err(Error::new(name.span(), "the codecs are \"json\" and \"msgpack\"")),
    };
    Ok(Ident::new(codec, name.span()))
}

impl<'a> Key<'a> {
    fn new(input: &'a DeriveInput, path: Vec<Member>) -> Result<Self> {
        let variants = match &input.data {
            Data::Struct(data) => {
                check_field(&path, &data.fields, &input.ident)?;
                Vec::new()
            }
            Data::Enum(data) => {
                for variant in &data.variants {
                    check_field(&path, &variant.fields, &variant.ident)?;
                }
                data.variants.iter().map(|variant| &variant.ident).collect()
            }
            Data::Union(_) => Vec::new(),
        };
        Ok(Self { path, variants })
    }
}

/// Checks that the first field of the key's path is among `fields`; the others are known to the compiler alone.
fn check_field(path: &[Member], fields: &Fields, of: &Ident) -> Result<()> {
    if path.first().is_none_or(|first| fields.members().any(|member| member == *first)) {
        return Ok(());
    }
    let there: Vec<_> = fields.members().map(|member| format!("`{}`", display(&member))).collect();
    let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
    Err(Error::new_spanned(
        &path[0],
        format!("`{of}` has no field `{}`, which is to be the key; it has {there}", display(&path[0])),
    ))
}

fn display(member: &Member) -> String {
    match member {
        Member::Named(ident) => ident.to_string(),
        Member::Unnamed(index) => index.index.to_string(),
    }
}
