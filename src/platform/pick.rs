//! Takes the values at some JSON pointers out of a text in one pass, each as its own bytes.
//!
//! Parsing a whole reply into a tree costs an allocation for every member, though a handful is wanted; and
//! only the bytes themselves keep `10.00` and ids beyond 2^53 as they came.

use std::fmt;

use serde::de::{self, Deserialize, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess};
use serde_json::value::RawValue;

/// A text that is no JSON pointer (RFC 6901).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a JSON pointer: write /name/name, with ~1 for a / and ~0 for a ~ inside a name")]
pub struct InvalidPointer(pub String);

/// What [`Picker::pick`] found: for each pointer, in the order given, its value or nothing.
pub type Picked<'a> = Vec<Option<&'a RawValue>>;

/// A set of pointers, ready to be looked up in many texts.
#[derive(Clone, Debug, Default)]
pub struct Picker {
    root: Node,
    pointers: usize,
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// Which pointers end here.
    ends: Vec<usize>,
    children: Vec<(String, Node)>,
}

impl Picker {
    /// Prepares the pointers; those that are `None` find nothing.
    ///
    /// # Errors
    /// [`InvalidPointer`] for the first that is none.
    pub fn new<'p>(pointers: impl IntoIterator<Item = Option<&'p str>>) -> Result<Self, InvalidPointer> {
        let mut picker = Self::default();
        for (index, pointer) in pointers.into_iter().enumerate() {
            picker.pointers = index + 1;
            if let Some(pointer) = pointer {
                let names = names(pointer)?;
                names.fold(&mut picker.root, |node, name| node.child(name)).ends.push(index);
            }
        }
        Ok(picker)
    }

    /// Looks the pointers up in a JSON text. Of a name that occurs twice in an object the
    /// last counts, with all that is in it and nothing of the first.
    ///
    /// # Errors
    /// If the text is not JSON.
    pub fn pick<'a>(&self, json: &'a str) -> Result<Picked<'a>, serde_json::Error> {
        let mut found = vec![None; self.pointers];
        let mut deserializer = serde_json::Deserializer::from_str(json);
        Visit { node: &self.root, found: &mut found }.deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(found)
    }
}

fn names(pointer: &str) -> Result<impl Iterator<Item = String>, InvalidPointer> {
    let escapes_are_right = pointer.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    if !(pointer.is_empty() || pointer.starts_with('/')) || !escapes_are_right {
        return Err(InvalidPointer(pointer.to_owned()));
    }
    Ok(pointer.split('/').skip(1).map(|name| name.replace("~1", "/").replace("~0", "~")))
}

impl Node {
    fn child(&mut self, name: String) -> &mut Self {
        let at = self.children.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
            self.children.push((name, Self::default()));
            self.children.len() - 1
        });
        &mut self.children[at].1
    }

    /// Forgets what was found at this node and below it.
    fn forget(&self, found: &mut Picked<'_>) {
        self.ends.iter().for_each(|&end| found[end] = None);
        self.children.iter().for_each(|(_, child)| child.forget(found));
    }

    fn find(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|(known, _)| known == name).map(|(_, child)| child)
    }
}

struct Visit<'n, 'f, 'a> {
    node: &'n Node,
    found: &'f mut Picked<'a>,
}

impl<'a> DeserializeSeed<'a> for Visit<'_, '_, 'a> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.node.ends.is_empty() {
            return deserializer.deserialize_any(self);
        }
        let raw = <&RawValue>::deserialize(deserializer)?;
        for &end in &self.node.ends {
            self.found[end] = Some(raw);
        }
        if self.node.children.is_empty() {
            return Ok(());
        }
        // A pointer ends here and another goes on: the inside is read a second time.
        let mut inside = serde_json::Deserializer::from_str(raw.get());
        de::Deserializer::deserialize_any(&mut inside, self).map_err(de::Error::custom)
    }
}

impl<'a> de::Visitor<'a> for Visit<'_, '_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(child) = map.next_key_seed(Name(self.node))? {
            match child {
                Some(node) => {
                    // The name may have come before, with something else inside.
                    node.forget(self.found);
                    map.next_value_seed(Visit { node, found: self.found })?;
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<(), A::Error> {
        for index in 0_usize.. {
            let child = if self.node.children.is_empty() { None } else { self.node.find(&index.to_string()) };
            let more = match child {
                Some(node) => seq.next_element_seed(Visit { node, found: self.found })?.is_some(),
                None => seq.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                break;
            }
        }
        Ok(())
    }

    // Anything else has no inside: the pointers that go on find nothing.
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// Reads a member's name and says which child it leads to, without keeping it.
struct Name<'n>(&'n Node);

impl<'de, 'n> DeserializeSeed<'de> for Name<'n> {
    type Value = Option<&'n Node>;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'n> de::Visitor<'_> for Name<'n> {
    type Value = Option<&'n Node>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.find(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str =
        r#" {"a": {"b": [ {"c": 10.00}, {"c": "x", "d/e": null} ], "n": 58218860983545941 }, "z": [1,2]} "#;

    fn pick<'a>(pointers: &[&str], json: &'a str) -> Vec<Option<&'a str>> {
        let picker = Picker::new(pointers.iter().copied().map(Some)).unwrap();
        picker.pick(json).unwrap().into_iter().map(|raw| raw.map(RawValue::get)).collect()
    }

    #[test]
    fn each_value_comes_as_its_own_bytes() {
        let found = pick(&["/a/b/0/c", "/a/n", "/a/b/1/d~1e", "/a/b", "/nothing", "/z/7", "/a/n/m"], JSON);
        let inner = r#"[ {"c": 10.00}, {"c": "x", "d/e": null} ]"#;
        assert_eq!(found, [Some("10.00"), Some("58218860983545941"), Some("null"), Some(inner), None, None, None]);
    }

    #[test]
    fn the_empty_pointer_is_the_whole_text() {
        assert_eq!(pick(&["", "/z", "/z"], JSON), [Some(JSON.trim()), Some("[1,2]"), Some("[1,2]")]);
    }

    #[test]
    fn any_json_may_stand_where_an_object_was_hoped_for() {
        for json in ["null", "true", "-1", "1e400", "\"a\"", "[]", r#"{"a":1}"#, r#"{"a":[[["b"]]]}"#] {
            assert_eq!(pick(&["/a/b", "/a/b/0/c"], json), [None, None], "{json}");
        }
    }

    #[test]
    fn of_a_doubled_name_the_last_counts_with_all_that_is_in_it() {
        let json = r#"{"a":{"b":1,"c":2},"a":{"c":3,"c":4},"z":[{"y":1}],"z":null}"#;
        assert_eq!(pick(&["/a/b", "/a/c", "/z/0/y", "/z"], json), [None, Some("4"), None, Some("null")]);
        assert_eq!(pick(&["/a", "/a/b"], json), [Some(r#"{"c":3,"c":4}"#), None]);
        assert_eq!(pick(&["/0/a"], r#"[{"a":1,"a":2}]"#), [Some("2")]);
    }

    #[test]
    fn broken_json_is_an_error_wherever_it_breaks() {
        let picker = Picker::new([Some("/a/b"), Some("/a")]).unwrap();
        for json in ["", "{", r#"{"a":{"b":1}"#, r#"{"a":{"b":01}}"#, r#"{"a":1} x"#, r#"{"q":nul}"#] {
            assert!(picker.pick(json).is_err(), "{json}");
        }
    }

    #[test]
    fn what_is_no_pointer_is_named() {
        for pointer in ["a/b", "/a~", "/a~2"] {
            assert_eq!(Picker::new([Some(pointer)]).unwrap_err(), InvalidPointer(pointer.to_owned()));
        }
    }
}
