//! The headers of a vendor's reply: all of them, within a bound.

use std::{borrow::Cow, fmt};

/// The header lines of a reply in the order in which they came.
///
/// At most [`Headers::LIMIT`] bytes are kept: a line that does not fit any more is left out, the others stay.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Box<str>, Box<str>)>);

impl Headers {
    /// The most that is kept of one reply's headers, in bytes of names and values.
    pub const LIMIT: usize = 32 * 1024;

    /// Keeps these lines. Names are kept in small letters, bytes of a value that are no UTF-8 are replaced.
    pub fn new<N: AsRef<str>, V: AsRef<[u8]>>(lines: impl IntoIterator<Item = (N, V)>) -> Self {
        let mut room = Self::LIMIT;
        let fits = |(name, value): (N, V)| {
            let (name, value) = (name.as_ref(), value.as_ref());
            room = room.checked_sub(name.len() + value.len())?;
            Some((name.to_ascii_lowercase().into(), String::from_utf8_lossy(value).into()))
        };
        Self(lines.into_iter().filter_map(fits).collect())
    }

    /// The value of a header by its name in small letters, several lines of it joined by `, ` (RFC 9110, 5.3).
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        let mut lines = self.0.iter().filter(|(found, _)| **found == *name).map(|(_, value)| &**value);
        let first = lines.next()?;
        Some(match lines.next() {
            None => Cow::Borrowed(first),
            Some(second) => {
                let all: Vec<&str> = [first, second].into_iter().chain(lines).collect();
                Cow::Owned(all.join(", "))
            }
        })
    }

    /// Every line, its name in small letters.
    pub fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }
}

/// The names alone: a value may be a session's cookie.
impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.lines().map(|(name, _)| name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_found_by_its_name_with_all_its_lines() {
        let headers = Headers::new([("Retry-After", "7"), ("X-A", "1"), ("x-a", "2"), ("X-A", "3")]);
        assert_eq!(headers.get("retry-after").as_deref(), Some("7"));
        assert_eq!(headers.get("x-a").as_deref(), Some("1, 2, 3"));
        assert_eq!(headers.get("date"), None);
        assert_eq!(headers.lines().count(), 4);
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_what_comes_after_it_is_kept() {
        let long = "x".repeat(Headers::LIMIT / 2);
        let lines = [("a", long.as_str()), ("b", &long), ("retry-after", "7")];
        let headers = Headers::new(lines);
        assert_eq!((headers.get("a").is_some(), headers.get("b")), (true, None));
        assert_eq!(headers.get("retry-after").as_deref(), Some("7"));
        let kept: usize = headers.lines().map(|(name, value)| name.len() + value.len()).sum();
        assert!(kept <= Headers::LIMIT, "{kept}");
    }

    #[test]
    fn values_that_are_no_text_are_kept_as_far_as_they_are_and_none_is_printed() {
        let headers = Headers::new([("set-cookie", &b"sid=hunter22\xff"[..])]);
        assert_eq!(headers.get("set-cookie").as_deref(), Some("sid=hunter22\u{fffd}"));
        assert_eq!(format!("{headers:?}"), r#"["set-cookie"]"#);
    }
}
