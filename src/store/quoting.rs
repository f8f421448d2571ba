//! Quoting of identifiers and strings for ClickHouse's SQL.

/// A table's name as SQL takes it, whatever is in it.
#[must_use]
pub fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}

/// A text as SQL takes it, whatever is in it.
#[must_use]
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_in_sql_cannot_end_its_quotes() {
        assert_eq!(quoted(r"a'b\"), r"'a\'b\\'");
        assert_eq!(quoted("monday"), "'monday'");
        assert_eq!(quoted("o'clock\\"), "'o\\'clock\\\\'");
    }
}
