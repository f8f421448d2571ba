//! One line of a file → a request, nothing, or the reason why it is neither.

use std::io::{self, BufRead};

use crate::{
    message::{
        Request, SourceName,
        codec::{self, REQUEST_LIMIT, Raw},
    },
    runtime::clock::Timestamp,
};

/// A line that cannot be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Its number, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub why: String,
}

/// What a line says: an item's id, or a request as a JSON object. `None` for blank lines and `#` comments.
///
/// # Errors
/// The reason, in the words that a dead letter would have.
pub fn read_line(line: &[u8], source: &SourceName, now: Timestamp) -> Result<Option<Request>, String> {
    let text = line.trim_ascii_start();
    if text.is_empty() || text.starts_with(b"#") {
        return Ok(None);
    }
    // Judged exactly as fetch judges it: what passes here does not die there.
    let raw = Raw { topic: "", partition: 0, offset: 0, time: now, headers: &[], value: Some(line) };
    let received = codec::read_request(&raw, source);
    // The line's number in the file is told beside; that it is the first of its own would confuse.
    received
        .map(|received| Some(received.request))
        .map_err(|why| why.to_string().replace("at line 1 column", "at column"))
}

/// The lines of a file, none longer in memory than a request may be.
#[derive(Debug)]
pub struct Lines<R> {
    input: R,
    number: u64,
    bytes: u64,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The lines of `input`.
    pub fn new(input: R) -> Self {
        Self { input, number: 0, bytes: 0, line: Vec::new() }
    }

    /// How many bytes have been read.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next line with its number from 1, without its end; `None` after the last. Of a line that is too long
    /// the beginning, still too long to be a request.
    ///
    /// # Errors
    /// What reading fails with; and a file in UTF-16, of which no line could be read.
    pub fn next_line(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        self.line.clear();
        let mut found = false;
        loop {
            let buffer = match self.input.fill_buf() {
                Ok(buffer) => buffer,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if buffer.is_empty() {
                break;
            }
            found = true;
            let end = buffer.iter().position(|&byte| byte == b'\n');
            let piece = &buffer[..end.unwrap_or(buffer.len())];
            let room = (REQUEST_LIMIT + 1).saturating_sub(self.line.len());
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            let used = end.map_or(buffer.len(), |end| end + 1);
            self.input.consume(used);
            self.bytes += used as u64;
            if end.is_some() {
                break;
            }
        }
        if !found {
            return Ok(None);
        }
        self.number += 1;
        if self.number == 1 {
            self.drop_mark()?;
        }
        Ok(Some((self.number, &self.line)))
    }

    /// Windows' programs put a mark in front of the first line.
    fn drop_mark(&mut self) -> io::Result<()> {
        match self.line.as_slice() {
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "the text is UTF-16; save it as UTF-8"))
            }
            [0xef, 0xbb, 0xbf, ..] => {
                self.line.drain(..3);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(line: &[u8]) -> Result<Option<Request>, String> {
        read_line(line, &SourceName::new("ali1688").unwrap(), Timestamp::default())
    }

    fn all(input: &[u8], buffer: usize) -> Vec<(u64, Vec<u8>)> {
        let mut lines = Lines::new(io::BufReader::with_capacity(buffer, input));
        let mut out = Vec::new();
        while let Some((number, line)) = lines.next_line().unwrap() {
            out.push((number, line.to_vec()));
        }
        assert_eq!(lines.bytes(), input.len() as u64);
        out
    }

    #[test]
    fn an_id_a_json_object_and_a_json_text_are_requests() {
        for line in ["584051070147", " 584051070147 \r", "\"584051070147\"", r#"{"item":"584051070147"}"#] {
            assert_eq!(read(line.as_bytes()).unwrap().unwrap().item.as_str(), "584051070147", "{line}");
        }
    }

    #[test]
    fn blank_lines_and_comments_are_nothing() {
        for line in ["", "  \t\r", "# a comment", "  #1"] {
            assert_eq!(read(line.as_bytes()), Ok(None), "{line:?}");
        }
    }

    #[test]
    fn a_wrong_line_says_what_is_wrong() {
        let long = "1".repeat(300);
        for (line, expected) in [
            ("12 34", "character ' '"),
            ("1,2", ""),
            (&long, "300 bytes"),
            ("{\"item\":", "column"),
            ("{\"item\":\"1\",\"source\":\"taobao\"}", "taobao"),
        ] {
            match read(line.as_bytes()) {
                Err(why) => assert!(why.contains(expected), "{why}"),
                Ok(_) => assert_eq!(expected, "", "{line} was taken"),
            }
        }
        assert!(read(b"\xff12").unwrap_err().contains("not UTF-8"));
    }

    #[test]
    fn the_mark_is_dropped_the_last_line_needs_no_end_and_numbers_count_from_one() {
        let expected = vec![(1, b"a\r".to_vec()), (2, b"".to_vec()), (3, b"b".to_vec())];
        assert_eq!(all(b"\xef\xbb\xbfa\r\n\nb", 2), expected);
        assert_eq!(all(b"\xef\xbb\xbfa\r\n\nb\n", 4096), expected);
        assert_eq!(all(b"", 16), []);
    }

    #[test]
    fn utf_16_is_refused_with_advice() {
        let error = Lines::new(&b"\xff\xfe1\x002\x00"[..]).next_line().unwrap_err();
        assert!(error.to_string().contains("save it as UTF-8"));
    }

    #[test]
    fn an_endless_line_takes_no_more_memory_than_a_request_and_the_next_is_read() {
        let mut input = vec![b'x'; 3 * REQUEST_LIMIT];
        input.extend_from_slice(b"\n42");
        let lines = all(&input, 1000);
        assert_eq!(lines[0].1.len(), REQUEST_LIMIT + 1);
        assert!(read(&lines[0].1).is_err());
        assert_eq!(lines[1], (2, b"42".to_vec()));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_and_every_line_is_seen_once(
            lines in prop::collection::vec(prop::collection::vec(any::<u8>().prop_filter("no end of line", |b| *b != b'\n'), 0..40), 1..20),
            buffer in 1..64_usize,
        ) {
            let mut lines = lines;
            // A mark in front is a matter of its own.
            lines[0].insert(0, b' ');
            let input = lines.join(&b'\n');
            let found = all(&input, buffer);
            for (_, line) in &found {
                let _ = read(line);
            }
            // No line after a last end of line.
            if lines.last().is_some_and(Vec::is_empty) && lines.len() > 1 {
                lines.pop();
            }
            prop_assert_eq!(found.into_iter().map(|(_, line)| line).collect::<Vec<_>>(), lines);
        }
    }
}
