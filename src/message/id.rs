//! Names and ids as types of their own, so that one cannot be passed for another.

use std::{fmt, sync::Arc};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is not a valid id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// Nothing but white space.
    #[error("{what} is empty")]
    Empty {
        /// Which id.
        what: &'static str,
    },
    /// Longer than the limit.
    #[error("{what} has {found} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which id.
        what: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A character that no id has: white space inside, a control character.
    #[error("{what} has the character {character:?} at byte {at}")]
    Character {
        /// Which id.
        what: &'static str,
        /// The offending character.
        character: char,
        /// Its position in bytes.
        at: usize,
    },
}

/// Reads a text, but not by way of a `String`: a record has five ids, and reading records is mostly a matter of
/// allocations. `what`: what is expected, for who meets something else.
pub(super) fn from_text<'de, D: Deserializer<'de>, T, E: fmt::Display>(
    deserializer: D,
    what: &'static str,
    read: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, D::Error> {
    struct Visitor<F>(&'static str, F);
    impl<T, E: fmt::Display, F: FnOnce(&str) -> Result<T, E>> de::Visitor<'_> for Visitor<F> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
        fn visit_str<R: de::Error>(self, text: &str) -> Result<T, R> {
            self.1(text).map_err(R::custom)
        }
    }
    deserializer.deserialize_str(Visitor(what, read))
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $limit:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                from_text(deserializer, "a string", |text| $name::new(text))
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "minLength": 1, "maxLength": $limit})
            }
        }

        impl $name {
            /// The longest allowed text, in bytes.
            pub const LIMIT: usize = $limit;

            /// Checks a text: not empty, not over [`Self::LIMIT`] bytes, no white space or control characters.
            ///
            /// # Errors
            /// [`InvalidId`] says what is wrong with it.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidId> {
                check($what, $limit, text.as_ref())?;
                Ok(Self(Arc::from(text.as_ref())))
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.as_ref().to_owned()
            }
        }
    };
}

fn check(what: &'static str, limit: usize, text: &str) -> Result<(), InvalidId> {
    if text.trim().is_empty() {
        return Err(InvalidId::Empty { what });
    }
    if text.len() > limit {
        return Err(InvalidId::TooLong { what, found: text.len(), limit });
    }
    // Nearly all of them: their characters need no closer look.
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    match text.char_indices().find(|(_, c)| c.is_whitespace() || c.is_control()) {
        Some((at, character)) => Err(InvalidId::Character { what, character, at }),
        None => Ok(()),
    }
}

id!(
    /// A vendor's product id, kept as text: 1688's ids exceed 2^53, Amazon's have letters.
    ItemId, "the item id", 256
);
id!(
    /// One request for one item: its `ce_id`, else where it stands (`topic/partition/offset`).
    RequestId, "the request id", 256
);
id!(
    /// The IDs that a user submitted together.
    BatchId, "the batch name", 128
);
id!(
    /// A vendor API that weir collects from, as named in the configuration.
    SourceName, "the source name", 64
);

impl SourceName {
    /// Whose a record is if that is part of what cannot be read.
    #[must_use]
    pub fn unknown() -> Self {
        Self("unknown".into())
    }
}

id!(
    /// What logs, records and rows call an account; never its key.
    AccountAlias, "the account alias", 64
);
