//! How the transport is configured.

use crate::DirectoryTransport;
use crate::error::error;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use tidings_core::transport::{BoxFuture, Transport};
use tidings_core::{BusConfig, Connect, ErrorKind, Result};

/// The configuration of the directory transport.
///
/// # Examples
///
/// ```
/// use tidings_directory::DirectoryConfig;
///
/// let config = DirectoryConfig::from_url("dir:///var/lib/shop?namespace=test")?;
/// assert_eq!((config.path.to_str(), config.namespace.as_str()), (Some("/var/lib/shop"), "test"));
/// # Ok::<(), tidings_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DirectoryConfig {
    /// Where the files are, created if it is not there. On a local disk: it needs `rename`, `fsync` and file
    /// locks that work. No default.
    pub path: PathBuf,
    /// Topics and subscriptions of different namespaces never meet. Default: empty.
    pub namespace: String,
    /// How often the directory is looked at for what other processes wrote, in milliseconds. Default: 20.
    pub poll_ms: u64,
}

impl Default for DirectoryConfig {
    fn default() -> Self {
        Self { path: PathBuf::new(), namespace: String::new(), poll_ms: 20 }
    }
}

impl DirectoryConfig {
    /// The defaults, in this directory.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    /// Reads `dir:///absolute/path?namespace=..&poll_ms=..`, or `dir://relative/path`. The path is taken as it is written.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for another scheme, an unknown key or a malformed value, each by name.
    pub fn from_url(url: &str) -> Result<Self> {
        let Some(rest) = url.strip_prefix("dir://") else {
            return Err(invalid("the url must start with `dir://`"));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut config = Self::at(path);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            config.set(key, value)?;
        }
        config.check()?;
        Ok(config)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "namespace" => value.clone_into(&mut self.namespace),
            "poll_ms" => {
                let why = || format!("`poll_ms` in the url must be a whole number, not `{value}`");
                self.poll_ms = value.parse().map_err(|_| invalid(why()))?;
            }
            _ => return Err(invalid(format!("unknown key `{key}` in the url; known are namespace, poll_ms"))),
        }
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.path.as_os_str().is_empty() {
            return Err(invalid("`path` is empty; name a directory, as in `dir:///var/lib/shop`"));
        }
        if self.poll_ms == 0 {
            return Err(invalid("`poll_ms` must be at least 1"));
        }
        if self.folder().as_os_str().len() > 200 {
            return Err(invalid("`namespace` is too long for the name of a folder"));
        }
        Ok(())
    }

    /// The folder of the namespace: injective, because `%` and `_` stand for nothing else, and the same on file
    /// systems that ignore case.
    pub(crate) fn folder(&self) -> PathBuf {
        if self.namespace.is_empty() {
            return PathBuf::from("_");
        }
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let encode = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") };
        self.namespace.bytes().map(encode).collect::<String>().into()
    }
}

impl Connect for DirectoryConfig {
    fn connect(self) -> BoxFuture<Result<(Arc<dyn Transport>, BusConfig)>> {
        Box::pin(async move {
            let transport: Arc<dyn Transport> = DirectoryTransport::connect(self).await?;
            Ok((transport, BusConfig::default()))
        })
    }
}

fn invalid(why: impl Into<String>) -> tidings_core::Error {
    error(ErrorKind::Config, why).with_operation("connect")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_url_says_it_all_and_what_is_wrong_is_named() {
        let config = DirectoryConfig::from_url("dir://target/x?namespace=a.B&poll_ms=5").unwrap();
        assert_eq!(config, DirectoryConfig { namespace: "a.B".into(), poll_ms: 5, ..DirectoryConfig::at("target/x") });
        for (url, named) in [
            ("dir://", "path"),
            ("file:///x", "dir://"),
            ("dir:///x?polll_ms=1", "polll_ms"),
            ("dir:///x?poll_ms=0", "poll_ms"),
            ("dir:///x?poll_ms=a", "poll_ms"),
        ] {
            let error = DirectoryConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(named), "{url}: {error}");
        }
    }

    #[test]
    fn namespaces_have_folders_of_their_own() {
        let folder = |namespace: &str| DirectoryConfig { namespace: namespace.into(), ..Default::default() }.folder();
        let folders = ["", "_", "a", "A", "..", "a/b", "a%2fb", "%61"].map(folder);
        for (i, a) in folders.iter().enumerate() {
            assert_eq!(a.components().count(), 1);
            assert!(folders[..i].iter().all(|b| !a.as_os_str().eq_ignore_ascii_case(b)), "{folders:?}");
        }
    }
}
