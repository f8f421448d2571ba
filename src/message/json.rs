//! Reads JSON as the libraries that vendors use do: of doubled names in an object the last counts.
//!
//! serde's structs refuse a field that comes twice. A reply or a record with one is rare, so the usual way is taken
//! first, and a text is read a second time only if a doubled field is all that was wrong.

use std::{
    borrow::Cow,
    collections::{HashMap, hash_map::Entry},
};

use serde::{
    Deserialize, Deserializer, de,
    de::value::{MapDeserializer, SeqDeserializer},
};
use serde_json::{Error, value::RawValue};

/// Reads a value. Raw values in it stay as they are, doubled names and all.
///
/// # Errors
/// The text is no JSON, or not of this shape; of doubled fields only the last has to be.
pub fn from_str<'de, T: Deserialize<'de>>(json: &'de str) -> Result<T, Error> {
    let error = match serde_json::from_str(json) {
        Err(error) if error.is_data() => error,
        read => return read,
    };
    // What did not fit may be the first of two. If nothing is doubled the first error has the better position.
    let is_doubled = error.to_string().starts_with("duplicate field");
    T::deserialize(Last(json)).map_err(|second| if is_doubled { second } else { error })
}

/// The same from bytes.
///
/// # Errors
/// As [`from_str`]; or the bytes are not UTF-8.
pub fn from_slice<'de, T: Deserialize<'de>>(json: &'de [u8]) -> Result<T, Error> {
    // From a slice every text is checked by itself, which is a tenth of the reading; all of it at once is nearly free.
    match simdutf8::basic::from_utf8(json) {
        Ok(text) => from_str(text),
        Err(_) => serde_json::from_slice(json),
    }
}

/// A JSON text whose structs keep the last of each field.
struct Last<'de>(&'de str);

impl<'de> Last<'de> {
    fn begins_with(&self, first: char) -> bool {
        self.0.trim_ascii_start().starts_with(first)
    }

    /// Lets `serde_json` read it, where nothing inside can have a doubled field.
    fn plain<T>(
        self,
        read: impl FnOnce(&mut serde_json::Deserializer<serde_json::de::StrRead<'de>>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut deserializer = serde_json::Deserializer::from_str(self.0);
        let value = read(&mut deserializer)?;
        deserializer.end()?;
        Ok(value)
    }
}

/// The members of an object, each name once.
struct Members<'de>(Vec<(Cow<'de, str>, &'de RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members: Vec<(Cow<'de, str>, &RawValue)> = Vec::new();
                let mut places: HashMap<Cow<'de, str>, usize> = HashMap::new();
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &RawValue>()? {
                    match places.entry(name) {
                        Entry::Occupied(place) => members[*place.get()].1 = value,
                        Entry::Vacant(place) => {
                            members.push((place.key().clone(), value));
                            place.insert(members.len() - 1);
                        }
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// A member's name, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> de::IntoDeserializer<'de, Error> for Last<'de> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

/// What has nothing inside that could come twice, or takes the last by itself.
macro_rules! plain {
    ($($method:ident)*) => {$(
        fn $method<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.plain(|plain| plain.$method(visitor))
        }
    )*};
}

impl<'de> Deserializer<'de> for Last<'de> {
    type Error = Error;

    fn deserialize_struct<V: de::Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if !self.begins_with('{') {
            return self.plain(|plain| plain.deserialize_struct(name, fields, visitor));
        }
        let Members(members) = serde_json::from_str(self.0)?;
        let members = members.into_iter().map(|(name, value)| (name, Last(value.get())));
        visitor.visit_map(MapDeserializer::new(members))
    }

    fn deserialize_seq<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if !self.begins_with('[') {
            return self.plain(|plain| plain.deserialize_seq(visitor));
        }
        let elements: Vec<&RawValue> = serde_json::from_str(self.0)?;
        visitor.visit_seq(SeqDeserializer::new(elements.into_iter().map(|element| Last(element.get()))))
    }

    fn deserialize_map<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if !self.begins_with('{') {
            return self.plain(|plain| plain.deserialize_map(visitor));
        }
        let Members(members) = serde_json::from_str(self.0)?;
        let members = members.into_iter().map(|(name, value)| (name, Last(value.get())));
        visitor.visit_map(MapDeserializer::new(members))
    }

    fn deserialize_option<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.trim_ascii() == "null" { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: de::Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        // serde_json's own types (a raw value) are newtypes whose name its reader knows.
        if name.starts_with("$serde_json::") {
            return self.plain(|plain| plain.deserialize_newtype_struct(name, visitor));
        }
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: de::Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.plain(|plain| plain.deserialize_enum(name, variants, visitor))
    }

    fn deserialize_unit_struct<V: de::Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Error> {
        self.plain(|plain| plain.deserialize_unit_struct(name, visitor))
    }

    fn deserialize_tuple<V: de::Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: de::Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    plain! {
        deserialize_any deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_i128 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
        deserialize_f32 deserialize_f64 deserialize_char deserialize_str deserialize_string deserialize_bytes
        deserialize_byte_buf deserialize_unit deserialize_identifier deserialize_ignored_any
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Shape {
        text: Option<String>,
        number: Option<u32>,
        inner: Option<Box<Shape>>,
        list: Vec<Shape>,
        map: BTreeMap<String, Shape>,
        raw: Option<Box<RawValue>>,
    }

    /// A JSON text of a shape, and the same in which each member stands twice, first with something else.
    fn shape() -> impl Strategy<Value = (String, String)> {
        let leaf = prop_oneof![
            ("[a-z\u{fc}]{0,5}", 0..9_u8).prop_map(|(text, _)| {
                let text = serde_json::to_string(&text).unwrap();
                (format!(r#"{{"text":{text}}}"#), format!(r#"{{"text":[1],"te\u0078t":{text}}}"#))
            }),
            any::<u32>()
                .prop_map(|n| (format!(r#"{{"number":{n}}}"#), format!(r#"{{ "number" : null ,"number":{n}}}"#))),
            Just((r#"{"raw":{"a":1,"a":2.00}}"#.to_owned(), r#"{"raw":7,"raw":{"a":1,"a":2.00}}"#.to_owned())),
            Just(("{}".to_owned(), "{}".to_owned())),
        ];
        leaf.prop_recursive(4, 20, 3, |inner| {
            prop_oneof![
                inner.clone().prop_map(|(one, two)| {
                    (format!(r#"{{"inner":{one}}}"#), format!(r#"{{"inner":{{"text":"gone"}},"inner":{two}}}"#))
                }),
                prop::collection::vec(inner.clone(), 0..3).prop_map(|all| {
                    let (one, two): (Vec<_>, Vec<_>) = all.into_iter().unzip();
                    let (one, two) = (one.join(","), two.join(" , "));
                    (format!(r#"{{"list":[{one}]}}"#), format!(r#"{{"list":[{{}}],"list":[ {two} ]}}"#))
                }),
                inner.prop_map(|(one, two)| {
                    (format!(r#"{{"map":{{"k":{one}}}}}"#), format!(r#"{{"map":{{}},"map":{{"k":{{}},"k":{two}}}}}"#))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn of_doubled_members_the_last_counts_at_every_depth((once, twice) in shape()) {
            let expected: Shape = serde_json::from_str(&once).unwrap();
            let found: Shape = from_str(&twice).unwrap();
            prop_assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{}", twice);
        }
    }

    #[test]
    fn an_object_of_very_many_members_that_does_not_fit_is_read_in_a_moment() {
        let members: Vec<String> = (0..300_000).map(|number| format!(r#""{number}":1"#)).collect();
        let json = format!(r#"{{"number":"none",{}}}"#, members.join(","));
        let began_at = tokio::time::Instant::now();
        assert!(from_str::<Shape>(&json).is_err());
        assert!(began_at.elapsed() < std::time::Duration::from_secs(20), "{:?}", began_at.elapsed());
    }

    #[test]
    fn what_is_wrong_stays_an_error() {
        for json in ["", "{", r#"{"number":1,"number":-1}"#, r#"{"text":1,"text":"a""#, r#"{"text":"a","text":"b"} x"#]
        {
            assert!(from_str::<Shape>(json).is_err(), "{json}");
        }
        assert_eq!(
            from_str::<Shape>(r#"{"number":-1,"number":1}"#).unwrap().number,
            Some(1),
            "only the last has to fit"
        );
    }
}
