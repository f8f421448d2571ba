//! An error and its causes in one line.

use std::error::Error;

/// An error and its causes, the outermost first, no words twice: the outer ones alone often say "error sending request".
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{words}")]
    struct Told {
        words: &'static str,
        #[source]
        cause: Option<Box<Told>>,
    }

    fn told(words: &'static [&'static str]) -> Option<Box<Told>> {
        let (first, rest) = words.split_first()?;
        Some(Box::new(Told { words: first, cause: told(rest) }))
    }

    #[test]
    fn causes_follow_and_what_was_said_is_not_said_again() {
        let error = told(&["client error (Connect)", "tcp connect error", "error", "Connection refused"]).unwrap();
        assert_eq!(chain(&error), "client error (Connect): tcp connect error: Connection refused");
    }
}
