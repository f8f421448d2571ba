//! Secrets: where they may stand, and how they are read without ever being shown.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize, de};

/// The longest file that is read for one secret, in bytes.
const SECRET_LIMIT: u64 = 64 * 1024;

/// Where a secret is: `{ env = "NAME" }` or `{ file = "path" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretRef {
    /// In this environment variable.
    Env(String),
    /// In this file, with or without a line's end; a relative path begins at the configuration's folder.
    File(PathBuf),
}

/// Where relative paths begin, and how the environment is read.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// The folder of the configuration.
    pub folder: &'a Path,
    /// A variable of the environment.
    pub env: &'a dyn Fn(&str) -> Option<String>,
}

/// Why a secret cannot be had. No message has one in it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The variable is not there.
    #[error("{what}: the environment variable {name} is not set: export it")]
    Unset {
        /// What it is needed for.
        what: String,
        /// The variable.
        name: String,
    },
    /// The file cannot be read.
    #[error("{what}: cannot read {}: {error}", path.display())]
    Read {
        /// What is in it.
        what: String,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Others can read the file.
    #[error(
        "{what}: {} holds secrets, but others than its owner can read it (mode {mode:03o}): chmod 600 {}",
        path.display(), path.display()
    )]
    Exposed {
        /// What is in it.
        what: String,
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

impl SecretRef {
    /// The secret. `what` names it in errors.
    ///
    /// # Errors
    /// [`SecretError`]
    pub fn resolve(&self, what: &str, at: Surroundings<'_>) -> Result<SecretString, SecretError> {
        match self {
            Self::Env(name) => (at.env)(name)
                .map(|text| SecretString::from(text.trim()))
                .ok_or_else(|| SecretError::Unset { what: what.to_owned(), name: name.clone() }),
            // Orchestrators mount secrets readable for all inside the container.
            Self::File(path) => read(what, &at.folder.join(path), SECRET_LIMIT, Readers::Anyone),
        }
    }
}

impl<'de> Deserialize<'de> for SecretRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RefVisitor)
    }
}

/// Refuses a secret that stands right there, with a message that does not repeat it.
struct RefVisitor;

impl RefVisitor {
    fn inline<E: de::Error>() -> E {
        E::custom(
            "a secret must not stand in the configuration: write { env = \"NAME\" } or { file = \"path\" }, \
             or put the account into accounts_file",
        )
    }
}

impl<'de> de::Visitor<'de> for RefVisitor {
    type Value = SecretRef;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{ env = \"NAME\" } or { file = \"path\" }")
    }
    fn visit_str<E: de::Error>(self, _: &str) -> Result<SecretRef, E> {
        Err(Self::inline())
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<SecretRef, E> {
        Err(Self::inline())
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<SecretRef, E> {
        Err(Self::inline())
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<SecretRef, E> {
        Err(Self::inline())
    }
    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<SecretRef, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Keys {
            env: Option<String>,
            file: Option<PathBuf>,
        }
        match Keys::deserialize(de::value::MapAccessDeserializer::new(map))? {
            Keys { env: Some(name), file: None } => Ok(SecretRef::Env(name)),
            Keys { env: None, file: Some(path) } => Ok(SecretRef::File(path)),
            _ => Err(de::Error::custom("write either env or file")),
        }
    }
}

/// A secret that stands in a file of secrets. A wrong type is refused without repeating the value.
pub(super) struct Inline(pub(super) SecretString);

impl<'de> Deserialize<'de> for Inline {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Text(String),
            Other(de::IgnoredAny),
        }
        match Either::deserialize(deserializer)? {
            Either::Text(text) => Ok(Self(text.into())),
            Either::Other(_) => Err(de::Error::custom("a secret must be a text in quotes")),
        }
    }
}

/// Who may be able to read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Readers {
    Anyone,
    OwnerOnly,
}

/// The trimmed text of a file.
pub(super) fn read(what: &str, path: &Path, limit: u64, readers: Readers) -> Result<SecretString, SecretError> {
    let failed = |error| SecretError::Read { what: what.to_owned(), path: path.to_owned(), error };
    let file = File::open(path).map_err(failed)?;
    let mode = others_mode(&file).map_err(failed)?;
    if let (Some(mode), Readers::OwnerOnly) = (mode, readers) {
        return Err(SecretError::Exposed { what: what.to_owned(), path: path.to_owned(), mode });
    }
    let mut text = String::new();
    let bytes = file.take(limit + 1).read_to_string(&mut text).map_err(failed)?;
    if bytes as u64 > limit {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes"))));
    }
    Ok(text.trim().into())
}

/// The permissions of an open file, if they let others than its owner in.
#[cfg(unix)]
fn others_mode(file: &File) -> io::Result<Option<u32>> {
    use std::os::unix::fs::PermissionsExt;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    Ok((mode & 0o077 != 0).then_some(mode))
}

#[cfg(not(unix))]
#[allow(clippy::unnecessary_wraps, reason = "the same signature as on Unix")]
fn others_mode(_: &File) -> io::Result<Option<u32>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Table {
        key: SecretRef,
    }

    fn parse(value: &str) -> Result<SecretRef, String> {
        let table = <Toml as Format>::from_str::<Table>(&format!("key = {value}"));
        table.map(|table| table.key).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_secret_is_named_by_variable_or_file() {
        assert_eq!(parse(r#"{ env = "APP" }"#), Ok(SecretRef::Env("APP".to_owned())));
        assert_eq!(parse(r#"{ file = "run/app" }"#), Ok(SecretRef::File("run/app".into())));
    }

    #[test]
    fn an_inline_secret_is_refused_without_being_repeated() {
        for value in [r#""hunter22""#, "220022", "-220022", "2.20022", "true", "[220022]"] {
            let error = parse(value).unwrap_err();
            assert!(!error.contains("22"), "{error}");
            assert!(error.contains("{ env = \"NAME\" }"), "{error}");
        }
        for value in ["{}", r#"{ env = "A", file = "b" }"#, r#"{ text = "hunter22" }"#] {
            let error = parse(value).unwrap_err();
            assert!(error.contains("env") && !error.contains("22"), "{error}");
        }
    }

    #[test]
    fn a_secret_is_read_without_its_line_end() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("app"), "hunter22\n").unwrap();
        let env = |name: &str| (name == "APP").then(|| "from env".to_owned());
        let at = Surroundings { folder: folder.path(), env: &env };
        let text = |at_ref: SecretRef| {
            at_ref.resolve("x", at).map(|secret| secrecy::ExposeSecret::expose_secret(&secret).to_owned())
        };
        assert_eq!(text(SecretRef::File("app".into())).unwrap(), "hunter22");
        assert_eq!(text(SecretRef::Env("APP".to_owned())).unwrap(), "from env");
        let unset = text(SecretRef::Env("NONE".to_owned())).unwrap_err().to_string();
        assert_eq!(unset, "x: the environment variable NONE is not set: export it");
        let missing = text(SecretRef::File("none".into())).unwrap_err().to_string();
        assert!(missing.contains("cannot read") && missing.contains("none"), "{missing}");
    }
}
