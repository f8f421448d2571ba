//! What SQL that a person wrote says of the format of its answer.

use super::exit::Ended;

/// Refuses SQL that ends in a FORMAT of its own where `option` asks for another: ClickHouse would take the one in the
/// SQL without a word.
pub(super) fn expect_format(sql: &str, wanted: &str, option: &str) -> Result<(), Ended> {
    match format_in(sql) {
        Some(found) if !found.eq_ignore_ascii_case(wanted) => Err(Ended::usage(format!(
            "the SQL says FORMAT {found}, and {option} asks for {wanted}: take one of them away"
        ))),
        Some(_) | None => Ok(()),
    }
}

/// The name in the FORMAT clause at the end of a query, if it has one.
///
/// Whether a word is the clause or a column of that name says what stands around it: `ORDER BY format DESC` is no
/// FORMAT, nor is `FROM format f`.
fn format_in(sql: &str) -> Option<&str> {
    let tokens = tokens(sql);
    let clause = |window: &[Token<'_>]| {
        let [before, Token::Word(word), Token::Word(_)] = window else { return false };
        word.eq_ignore_ascii_case("format") && ends_an_expression(before)
    };
    let at = tokens.windows(3).rposition(clause)?;
    let Token::Word(name) = tokens[at + 2] else { return None };
    match tokens.get(at + 3) {
        None | Some(Token::Sign(';')) => Some(name),
        Some(Token::Word(word)) if word.eq_ignore_ascii_case("settings") => Some(name),
        Some(_) => None,
    }
}

/// Whether a clause may begin behind this.
fn ends_an_expression(token: &Token<'_>) -> bool {
    const GO_ON: [&str; 21] = [
        "select", "distinct", "from", "join", "where", "prewhere", "having", "qualify", "by", "on", "using", "and",
        "or", "not", "in", "like", "ilike", "between", "as", "when", "then",
    ];
    match token {
        Token::Word(word) => !GO_ON.iter().any(|go_on| word.eq_ignore_ascii_case(go_on)),
        Token::Quoted => true,
        Token::Sign(sign) => matches!(sign, ')' | ']' | '}' | '*'),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    /// A keyword, a name or a number.
    Word(&'a str),
    /// A text or a name in quotes, or a heredoc.
    Quoted,
    Sign(char),
}

/// The tokens of a query; comments are none.
fn tokens(sql: &str) -> Vec<Token<'_>> {
    let (mut tokens, mut rest) = (Vec::new(), sql);
    while let Some(first) = rest.chars().next() {
        let (token, length) = token(rest, first);
        tokens.extend(token);
        rest = &rest[length..];
    }
    tokens
}

/// The token that a text begins with, and its length; none for white space and comments.
fn token(text: &str, first: char) -> (Option<Token<'_>>, usize) {
    let until = |end: &str, from: usize| text[from..].find(end).map_or(text.len(), |at| from + at + end.len());
    match first {
        _ if first.is_whitespace() => (None, first.len_utf8()),
        _ if text.starts_with("--") || text.starts_with("# ") || text.starts_with("#!") => (None, until("\n", 0)),
        _ if text.starts_with("/*") => (None, until("*/", 2)),
        '\'' | '"' | '`' => (Some(Token::Quoted), quoted(text, first)),
        '$' => match heredoc(text) {
            Some(tag) => (Some(Token::Quoted), until(tag, tag.len())),
            None => (Some(Token::Sign('$')), 1),
        },
        _ if is_of_a_word(first) => {
            let length = text.find(|letter| !is_of_a_word(letter)).unwrap_or(text.len());
            (Some(Token::Word(&text[..length])), length)
        }
        _ => (Some(Token::Sign(first)), first.len_utf8()),
    }
}

fn is_of_a_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// The length of what stands between two quotes, these included. A quote inside is doubled or behind a backslash; the
/// second of two begins another quoted text here, which comes to the same.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, letter) in text.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if letter == quote => return at + quote.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// The tag of a heredoc, `$$` or `$name$`.
fn heredoc(text: &str) -> Option<&str> {
    let name = text[1..].find('$')?;
    text[1..=name].chars().all(is_of_a_word).then(|| &text[..name + 2])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_format_at_the_end_is_found() {
        for sql in [
            "SELECT 1 FORMAT JSON",
            "select * format JSON ;\n",
            "SELECT count() FROM items\nFORMAT\nJSON -- as a document",
            "SELECT a FROM items LIMIT 5 FORMAT JSON SETTINGS max_threads = 1",
            "SELECT 'FORMAT CSV' AS format FORMAT JSON",
            "SELECT format('{}', a) FROM items WHERE a = 'it''s' /* FORMAT CSV */ FORMAT JSON",
            "SELECT [1] FORMAT JSON",
            "SELECT $$ FORMAT CSV $$ FORMAT JSON",
        ] {
            assert_eq!(format_in(sql), Some("JSON"), "{sql}");
        }
    }

    #[test]
    fn the_word_elsewhere_is_no_format() {
        for sql in [
            "",
            "FORMAT",
            "SELECT 1",
            "SELECT 'x FORMAT JSON'",
            "SELECT 'it\\'s FORMAT JSON'",
            "SELECT 1 -- FORMAT JSON",
            "SELECT 1 # FORMAT JSON",
            "SELECT 1 /* FORMAT JSON */",
            "SELECT a AS \"x FORMAT JSON\", `b FORMAT JSON`",
            "SELECT $x$ 1 FORMAT JSON $x$",
            "SELECT a FROM t ORDER BY format DESC",
            "SELECT a FROM t ORDER BY a, format DESC",
            "SELECT format f",
            "SELECT * FROM format f",
            "SELECT format FROM t",
            "SELECT a.format f",
            "SELECT format('{} {}', a, b)",
            "SELECT 1 AS format",
            "INSERT INTO t FORMAT CSV 1,2",
        ] {
            assert_eq!(format_in(sql), None, "{sql}");
        }
    }

    #[test]
    fn two_formats_are_refused_and_one_said_twice_is_not() {
        let error = expect_format("SELECT 1 FORMAT JSON", "CSVWithNames", "--csv").unwrap_err();
        assert_eq!(error.exit, crate::cli::exit::Exit::Usage);
        assert_eq!(error.message, "the SQL says FORMAT JSON, and --csv asks for CSVWithNames: take one of them away");
        assert!(expect_format("SELECT 1 FORMAT csvwithnames", "CSVWithNames", "--csv").is_ok());
        assert!(expect_format("SELECT 1", "CSVWithNames", "--csv").is_ok());
    }

    proptest! {
        #[test]
        fn any_text_has_tokens_and_a_format_behind_a_query_is_found(text in "\\PC{0,40}", name in "[A-Z][a-z]{2,8}") {
            let _ = format_in(&text);
            let quoted = text.replace('\\', "\\\\").replace('\'', "''");
            let sql = format!("SELECT '{quoted}' FORMAT {name}");
            prop_assert_eq!(format_in(&sql), Some(name.as_str()));
            let within = format!("SELECT 1, '{quoted} FORMAT {name}'");
            prop_assert_eq!(format_in(&within), None);
        }
    }
}
