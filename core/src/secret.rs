//! Secrets: never printed, read where they are kept.

use crate::{Error, ErrorKind, Result};
use secrecy::SecretString;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::path::PathBuf;

/// A password, token or key of a configuration: the text itself, or where it is read each time that it is needed, so that it can
/// be changed while a service runs.
///
/// In a configuration it is a string, `{ file = "/run/secrets/nats" }` or `{ env = "NATS_PASSWORD" }`. It is never printed.
///
/// # Examples
///
/// ```
/// use tidings_core::Secret;
///
/// let secret = Secret::from("hunter2");
/// assert_eq!(format!("{secret:?}"), "Secret(..)");
/// ```
#[derive(Clone)]
pub struct Secret(Source);

#[derive(Clone)]
enum Source {
    Text(SecretString),
    File(PathBuf),
    Variable(String),
}

impl Secret {
    /// The secret that stands in this file; line ends at its end are no part of it.
    #[must_use]
    pub fn from_file(path: impl Into<PathBuf>) -> Self {
        Self(Source::File(path.into()))
    }

    /// The secret that this environment variable holds.
    #[must_use]
    pub fn from_variable(name: impl Into<String>) -> Self {
        Self(Source::Variable(name.into()))
    }

    /// Reads it. Keep what it returns for as short as you can.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] names the file or variable that cannot be read or is empty.
    pub fn read(&self) -> Result<SecretString> {
        let (text, place) = match &self.0 {
            Source::Text(text) => return Ok(text.clone()),
            Source::File(path) => {
                (std::fs::read_to_string(path).map_err(crate::BoxError::from), path.display().to_string())
            }
            Source::Variable(name) => (std::env::var(name).map_err(|error| variable(&error).into()), name.clone()),
        };
        let refuse = |why: &'static str| Error::new(ErrorKind::Config, why).with_context("from", place.clone());
        let text = text.map_err(|error| refuse("the secret cannot be read").with_source(error))?;
        match text.trim_end_matches(['\r', '\n']) {
            "" => Err(refuse("the secret is empty")),
            text => Ok(text.into()),
        }
    }
}

/// Without the value, which the error would quote.
fn variable(error: &std::env::VarError) -> &'static str {
    match error {
        std::env::VarError::NotPresent => "the variable is not set",
        std::env::VarError::NotUnicode(_) => "the variable is not UTF-8",
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(Source::Text(text.into()))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Source::Text(text.into()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SecretVisitor)
    }
}

/// Never says what it found, which may be the secret.
struct SecretVisitor;

impl<'de> Visitor<'de> for SecretVisitor {
    type Value = Secret;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, { file = \"..\" } or { env = \"..\" }")
    }

    fn visit_str<E>(self, text: &str) -> Result<Secret, E> {
        Ok(text.into())
    }

    // A variable that holds nothing but digits is read as a number.
    fn visit_i64<E>(self, number: i64) -> Result<Secret, E> {
        Ok(number.to_string().into())
    }

    fn visit_u64<E>(self, number: u64) -> Result<Secret, E> {
        Ok(number.to_string().into())
    }

    fn visit_bool<E>(self, value: bool) -> Result<Secret, E> {
        Ok(value.to_string().into())
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Secret, E> {
        Err(E::custom("a secret must be a string"))
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Secret, M::Error> {
        let wrong = || M::Error::custom("a secret must be a string, { file = \"..\" } or { env = \"..\" }");
        let secret = match map.next_entry::<String, String>()?.ok_or_else(wrong)? {
            (key, path) if key == "file" => Secret::from_file(path),
            (key, name) if key == "env" => Secret::from_variable(name),
            _ => return Err(wrong()),
        };
        if map.next_key::<String>()?.is_some() { Err(wrong()) } else { Ok(secret) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    fn read(json: &str) -> Result<String, String> {
        let secret: Secret = serde_json::from_str(json).map_err(|error| error.to_string())?;
        assert!(!format!("{secret:?} {secret:#?}").contains("hunter2"));
        secret.read().map(|text| text.expose_secret().to_owned()).map_err(|error| error.to_string())
    }

    #[test]
    fn is_text_or_where_it_stands() {
        let file = std::env::temp_dir().join(format!("tidings-secret-{}", std::process::id()));
        std::fs::write(&file, "hunter2\r\n").unwrap();
        assert_eq!(read("\"hunter2\"").unwrap(), "hunter2");
        assert_eq!(read("12345").unwrap(), "12345");
        assert_eq!(read(&format!("{{\"file\": {file:?}}}")).unwrap(), "hunter2");
        std::fs::write(&file, "\n").unwrap();
        assert!(read(&format!("{{\"file\": {file:?}}}")).unwrap_err().contains("empty"));
        std::fs::remove_file(&file).unwrap();
        assert!(read(&format!("{{\"file\": {file:?}}}")).unwrap_err().contains("tidings-secret"));
        assert!(read("{\"env\": \"TIDINGS_TEST_NO_SUCH\"}").unwrap_err().contains("TIDINGS_TEST_NO_SUCH"));
    }

    #[test]
    fn what_is_wrong_is_said_without_it() {
        for json in ["{}", "{\"hunter2\": \"x\"}", "{\"file\": \"a\", \"env\": \"hunter2\"}", "[\"hunter2\"]", "1.5"] {
            let error = read(json).unwrap_err();
            assert!(!error.contains("hunter2") && error.contains("string"), "{json}: {error}");
        }
    }
}
