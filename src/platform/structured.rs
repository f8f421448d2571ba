//! Reads the part of HTTP's structured fields (RFC 9651) that limits are written in: a list or a dictionary whose members
//! have parameters. Pure.

use sfv::{BareItem, Dictionary, List, ListEntry, Parameters, Parser, StringRef, TokenRef};

/// One member of a list: `"name";r=50;t=30`, or of a dictionary: `name=100`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Member {
    /// The item if it is a text, or the key.
    pub name: String,
    /// What follows the `=` of a dictionary's member.
    value: Option<BareItem>,
    parameters: Parameters,
}

impl Member {
    /// The parameter, if it is a whole number. Of two with one name the last counts.
    #[must_use]
    pub fn integer(&self, name: &str) -> Option<i64> {
        Some(self.parameters.get(name)?.as_integer()?.into())
    }

    /// The parameter, if it is a text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        text(self.parameters.get(name)?)
    }

    /// The dictionary member's own value, if it is a whole number.
    #[must_use]
    pub fn own_integer(&self) -> Option<i64> {
        Some(self.value.as_ref()?.as_integer()?.into())
    }

    fn of_list(entry: ListEntry) -> Self {
        let (item, parameters) = parts(entry);
        let name = item.as_ref().and_then(text).unwrap_or_default().to_owned();
        Self { name, value: None, parameters }
    }

    fn of_dictionary(key: &str, entry: ListEntry) -> Self {
        let (value, parameters) = parts(entry);
        Self { name: key.to_owned(), value, parameters }
    }
}

/// The members of a list or dictionary; `None` if the field is malformed anywhere.
#[must_use]
pub fn members(field: &str) -> Option<Vec<Member>> {
    if let Ok(list) = Parser::new(field).parse::<List>() {
        return Some(list.into_iter().map(Member::of_list).collect());
    }
    let dictionary = Parser::new(field).parse::<Dictionary>().ok()?;
    Some(dictionary.into_iter().map(|(key, entry)| Member::of_dictionary(key.as_str(), entry)).collect())
}

/// An inner list has no value of its own.
fn parts(entry: ListEntry) -> (Option<BareItem>, Parameters) {
    match entry {
        ListEntry::Item(item) => (Some(item.bare_item), item.params),
        ListEntry::InnerList(inner) => (None, inner.params),
    }
}

fn text(item: &BareItem) -> Option<&str> {
    item.as_string().map(StringRef::as_str).or_else(|| item.as_token().map(TokenRef::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_their_parameters_are_read() {
        let found = members(r#""a\\b";r=-5;t="x, y" , token;?q"#);
        assert_eq!(found, None, "a key does not begin with a question mark");
        let found = members(r#""a\\b";r=-5;t="x, y";r=6 , token;q=?1;z, 1.5"#).unwrap();
        let names: Vec<_> = found.iter().map(|member| member.name.as_str()).collect();
        assert_eq!(names, [r"a\b", "token", ""]);
        assert_eq!((found[0].integer("r"), found[0].text("t"), found[0].integer("t")), (Some(6), Some("x, y"), None));
        assert_eq!(found[1].own_integer(), None);
        let found = members("k=3;p=:YQ==:, token").unwrap();
        let names: Vec<_> = found.iter().map(|member| member.name.as_str()).collect();
        assert_eq!(names, ["k", "token"]);
        assert_eq!((found[0].own_integer(), found[1].own_integer()), (Some(3), None));
        assert_eq!(members("").unwrap(), []);
    }

    #[test]
    fn what_is_malformed_is_nothing() {
        for field in
            ["\"", "\"a", "\"a\\x\"", "\"ä\"", "a b", "a,", ",a", "a;", "a;R=1", "a;r=", "a;r=1.", "a;r=1.2345", "a==1"]
        {
            assert_eq!(members(field), None, "{field}");
        }
    }
}
