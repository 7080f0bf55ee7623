//! A look at a value before it is written: is it too deep, and can the format say all of it?

use crate::MAX_DEPTH;
use serde::ser::{self, Serialize, Serializer};
use std::cell::Cell;
use std::fmt;

/// Checks `value` for a codec; `TEXT` is whether its format is JSON-like: human-readable, without a word for
/// floats that are not finite, bytes written as an array.
///
/// It writes nothing, so that for most types the compiler leaves nothing of it but the walk through
/// their containers. It cannot look into raw JSON (`serde_json::value::RawValue`); `Ok(true)` says that there is some.
pub(crate) fn check<const TEXT: bool, T: Serialize>(value: &T) -> Result<bool, Flaw> {
    let has_raw = Cell::new(false);
    value.serialize(Check::<TEXT> { depth: 0, has_raw: &has_raw })?;
    Ok(has_raw.get())
}

/// How `RawValue` tells serializers that it is one.
const RAW_JSON: &str = "$serde_json::private::RawValue";

/// Why a value cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Arrays and maps nest deeper than [`MAX_DEPTH`].
    TooDeep,
    /// A float is infinite or not a number.
    NotFinite,
    /// The type's own `Serialize` failed.
    Refused,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooDeep => crate::error::TOO_DEEP,
            Self::NotFinite => "a float is infinite or not a number, which JSON cannot say",
            Self::Refused => "a value was refused by its type",
        })
    }
}

impl std::error::Error for Flaw {}

impl ser::Error for Flaw {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self::Refused
    }
}

#[derive(Clone, Copy)]
struct Check<'a, const TEXT: bool> {
    depth: usize,
    has_raw: &'a Cell<bool>,
}

impl<const TEXT: bool> Check<'_, TEXT> {
    /// Enters `levels` arrays or maps.
    fn enter(self, levels: usize) -> Result<Self, Flaw> {
        let depth = self.depth + levels;
        if depth > MAX_DEPTH { Err(Flaw::TooDeep) } else { Ok(Self { depth, ..self }) }
    }

    fn finite(finite: bool) -> Result<(), Flaw> {
        if TEXT && !finite { Err(Flaw::NotFinite) } else { Ok(()) }
    }
}

macro_rules! always_fine { ($($method:ident: $t:ty),*) => { $(
    fn $method(self, _: $t) -> Result<(), Flaw> { Ok(()) }
)* } }

impl<const TEXT: bool> Serializer for Check<'_, TEXT> {
    type Ok = ();
    type Error = Flaw;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    always_fine! {
        serialize_bool: bool, serialize_char: char, serialize_str: &str,
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64, serialize_i128: i128,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_u128: u128,
        serialize_unit_struct: &'static str
    }

    fn is_human_readable(&self) -> bool {
        TEXT
    }

    fn serialize_f32(self, v: f32) -> Result<(), Flaw> {
        Self::finite(v.is_finite())
    }

    fn serialize_f64(self, v: f64) -> Result<(), Flaw> {
        Self::finite(v.is_finite())
    }

    fn serialize_bytes(self, _: &[u8]) -> Result<(), Flaw> {
        self.enter(usize::from(TEXT)).map(drop)
    }

    fn collect_str<T: fmt::Display + ?Sized>(self, _: &T) -> Result<(), Flaw> {
        Ok(())
    }

    fn serialize_none(self) -> Result<(), Flaw> {
        Ok(())
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Flaw> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Flaw> {
        Ok(())
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<(), Flaw> {
        Ok(())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), Flaw> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<(), Flaw> {
        value.serialize(self.enter(1)?)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self, Flaw> {
        self.enter(1)
    }

    fn serialize_tuple(self, _: usize) -> Result<Self, Flaw> {
        self.enter(1)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self, Flaw> {
        self.enter(1)
    }

    // `{"Variant": [..]}`: two levels, as in the struct variant.
    fn serialize_tuple_variant(self, _: &'static str, _: u32, _: &'static str, _: usize) -> Result<Self, Flaw> {
        self.enter(2)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self, Flaw> {
        self.enter(1)
    }

    fn serialize_struct(self, name: &'static str, _: usize) -> Result<Self, Flaw> {
        self.has_raw.set(self.has_raw.get() || name == RAW_JSON);
        self.enter(1)
    }

    fn serialize_struct_variant(self, _: &'static str, _: u32, _: &'static str, _: usize) -> Result<Self, Flaw> {
        self.enter(2)
    }
}

macro_rules! compounds { ($($trait:ident { $($method:ident($($key:ty)?)),* })*) => { $(
    impl<const TEXT: bool> ser::$trait for Check<'_, TEXT> {
        type Ok = ();
        type Error = Flaw;
        $(fn $method<T: Serialize + ?Sized>(&mut self, $(_: $key,)? value: &T) -> Result<(), Flaw> {
            value.serialize(*self)
        })*
        fn end(self) -> Result<(), Flaw> {
            Ok(())
        }
    }
)* } }

compounds! {
    SerializeSeq { serialize_element() }
    SerializeTuple { serialize_element() }
    SerializeTupleStruct { serialize_field() }
    SerializeTupleVariant { serialize_field() }
    SerializeMap { serialize_key(), serialize_value() }
    SerializeStruct { serialize_field(&'static str) }
    SerializeStructVariant { serialize_field(&'static str) }
}
