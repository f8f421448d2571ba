//! Reads the part of HTTP's structured fields (RFC 9651) that limits are written in: a list whose members have
//! parameters. Pure.

/// One member of a list: `"name";r=50;t=30`, or of a dictionary: `name=100`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// The item, or the key.
    pub name: String,
    /// What follows the `=` of a dictionary's member.
    value: Option<Value>,
    parameters: Vec<(String, Value)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Integer(i64),
    Text(String),
    /// A decimal, a truth value, bytes: nothing that a limit is told in.
    Other,
}

impl Member {
    /// The parameter, if it is a whole number. Of two with one name the last counts.
    #[must_use]
    pub fn integer(&self, name: &str) -> Option<i64> {
        match self.parameter(name)? {
            Value::Integer(number) => Some(*number),
            Value::Text(_) | Value::Other => None,
        }
    }

    /// The parameter, if it is a text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.parameter(name)? {
            Value::Text(text) => Some(text),
            Value::Integer(_) | Value::Other => None,
        }
    }

    /// The dictionary member's own value, if it is a whole number.
    #[must_use]
    pub fn own_integer(&self) -> Option<i64> {
        match self.value {
            Some(Value::Integer(number)) => Some(number),
            Some(Value::Text(_) | Value::Other) | None => None,
        }
    }

    fn parameter(&self, name: &str) -> Option<&Value> {
        self.parameters.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value)
    }
}

/// The members of a list or dictionary; `None` if the field is malformed anywhere.
#[must_use]
pub fn list(field: &str) -> Option<Vec<Member>> {
    let mut rest = Rest(field.trim_matches(' '));
    let mut members = Vec::new();
    while !rest.0.is_empty() {
        members.push(rest.member()?);
        rest.skip_space();
        if rest.0.is_empty() {
            break;
        }
        rest.take(',')?;
        rest.skip_space();
        // A comma with nothing behind it is malformed.
        rest.0.chars().next()?;
    }
    Some(members)
}

/// What is still to be read.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn skip_space(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t']);
    }

    fn take(&mut self, wanted: char) -> Option<()> {
        self.0 = self.0.strip_prefix(wanted)?;
        Some(())
    }

    /// As many characters as fit; at least one.
    fn span(&mut self, fits: impl Fn(char) -> bool) -> Option<&'a str> {
        let end = self.0.find(|c| !fits(c)).unwrap_or(self.0.len());
        let (span, rest) = self.0.split_at(end);
        self.0 = rest;
        (!span.is_empty()).then_some(span)
    }

    fn member(&mut self) -> Option<Member> {
        let mut member = Member::default();
        match self.value()? {
            Value::Text(name) => member.name = name,
            Value::Integer(_) | Value::Other => {}
        }
        if self.take('=').is_some() {
            member.value = Some(self.value()?);
        }
        while self.take(';').is_some() {
            self.0 = self.0.trim_start_matches(' ');
            let name = self.span(is_of_key)?.to_owned();
            let value = if self.take('=').is_some() { self.value()? } else { Value::Other };
            member.parameters.push((name, value));
        }
        Some(member)
    }

    fn value(&mut self) -> Option<Value> {
        match self.0.chars().next()? {
            '"' => self.quoted().map(Value::Text),
            '-' | '0'..='9' => self.number(),
            '?' => {
                self.take('?')?;
                matches!(self.span(|c| c.is_ascii_digit())?, "0" | "1").then_some(Value::Other)
            }
            ':' => {
                self.take(':')?;
                self.span(|c| c.is_ascii_alphanumeric() || "+/=".contains(c));
                self.take(':').map(|()| Value::Other)
            }
            'a'..='z' | 'A'..='Z' | '*' => Some(Value::Text(self.span(is_of_token)?.to_owned())),
            _ => None,
        }
    }

    fn quoted(&mut self) -> Option<String> {
        self.take('"')?;
        let (mut text, mut chars) = (String::new(), self.0.char_indices());
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.0 = &self.0[at + 1..];
                    return Some(text);
                }
                '\\' => text.push(chars.next().map(|(_, c)| c).filter(|c| "\"\\".contains(*c))?),
                ' '..='~' => text.push(c),
                _ => return None,
            }
        }
        None
    }

    /// At most 15 digits, or 12 before and 3 behind a point.
    fn number(&mut self) -> Option<Value> {
        let is_negative = self.take('-').is_some();
        let whole = self.span(|c| c.is_ascii_digit())?;
        if self.take('.').is_some() {
            let fraction = self.span(|c| c.is_ascii_digit())?;
            return (whole.len() <= 12 && fraction.len() <= 3).then_some(Value::Other);
        }
        let number: i64 = if whole.len() <= 15 { whole.parse().ok()? } else { return None };
        Some(Value::Integer(if is_negative { -number } else { number }))
    }
}

fn is_of_key(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || "_-.*".contains(c)
}

fn is_of_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_their_parameters_are_read() {
        let members = list(r#""a\\b";r=-5;t="x, y" , token;?q"#);
        assert_eq!(members, None, "a key does not begin with a question mark");
        let members = list(r#""a\\b";r=-5;t="x, y";r=6 , token;q=?1;z, k=3;p=:YQ==:, 1.5"#).unwrap();
        let names: Vec<_> = members.iter().map(|member| member.name.as_str()).collect();
        assert_eq!(names, [r"a\b", "token", "k", ""]);
        assert_eq!(
            (members[0].integer("r"), members[0].text("t"), members[0].integer("t")),
            (Some(6), Some("x, y"), None)
        );
        assert_eq!((members[2].own_integer(), members[1].own_integer()), (Some(3), None));
        assert_eq!(list("").unwrap(), []);
    }

    #[test]
    fn what_is_malformed_is_nothing() {
        for field in
            ["\"", "\"a", "\"a\\x\"", "\"ä\"", "a b", "a,", ",a", "a;", "a;R=1", "a;r=", "a;r=1.", "a;r=1.2345", "a==1"]
        {
            assert_eq!(list(field), None, "{field}");
        }
    }
}
