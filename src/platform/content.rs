//! What the bytes of a reply are: unpacked and read as text whatever its headers say of them, or else named. Pure.

use std::{borrow::Cow, io::Read};

use bytes::Bytes;
use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

/// So many packings inside one another are undone: a server and a proxy may each do theirs.
const LAYERS_MAX: usize = 4;

/// The largest window that a zstd frame may ask for, as a power of 2: the 8 MiB of RFC 9659.
const ZSTD_WINDOW: u32 = 23;

/// Why a packed reply has no content.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unpackable {
    /// It holds more than may be read.
    TooLong,
    /// It breaks off, or is damaged.
    Broken(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Gzip,
    Zlib,
    Deflate,
    Zstd,
    Brotli,
}

impl Packing {
    /// By what the first bytes say. Brotli and bare deflate have no mark of their own.
    fn seen(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x1f, 0x8b, 0x08, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            // A window of 32 KiB, and a checksum over both bytes.
            [0x78, flags, ..] if (0x7800 + u16::from(*flags)).is_multiple_of(31) => Some(Self::Zlib),
            _ => None,
        }
    }

    /// What a word of `Content-Encoding` makes of these bytes; nothing if they are not so packed at all.
    fn said(word: &str, bytes: &[u8]) -> Option<Self> {
        match word.trim().to_ascii_lowercase().as_str() {
            "br" => Some(Self::Brotli),
            // Some servers send zlib's form, as they should, and some the bare one.
            "deflate" => Self::seen(bytes).or(Some(Self::Deflate)),
            // The bytes know better whether they are gzip than the header.
            _ => Self::seen(bytes),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zlib => "zlib",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
            Self::Brotli => "brotli",
        }
    }

    /// The content, of at most `limit` bytes.
    fn undone(self, bytes: &[u8], limit: usize) -> Result<Vec<u8>, Unpackable> {
        let read = |reader: &mut dyn Read| {
            let mut content = Vec::with_capacity((4 * bytes.len()).min(limit));
            let read = reader.take(limit as u64 + 1).read_to_end(&mut content);
            read.map_err(|_| Unpackable::Broken(self.name()))?;
            if content.len() > limit { Err(Unpackable::TooLong) } else { Ok(content) }
        };
        match self {
            Self::Gzip => read(&mut flate2::bufread::MultiGzDecoder::new(bytes)),
            Self::Zlib => read(&mut flate2::bufread::ZlibDecoder::new(bytes)),
            Self::Deflate => read(&mut flate2::bufread::DeflateDecoder::new(bytes)),
            Self::Brotli => read(&mut brotli_decompressor::Decompressor::new(bytes, 4_096)),
            Self::Zstd => {
                let broken = |_| Unpackable::Broken(self.name());
                let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(broken)?;
                decoder.window_log_max(ZSTD_WINDOW).map_err(broken)?;
                read(&mut decoder)
            }
        }
    }
}

/// Whether there is anything to unpack.
pub(super) fn is_packed(encodings: &str, bytes: &[u8]) -> bool {
    Packing::seen(bytes).is_some() || !encodings.trim().is_empty()
}

/// The content of a reply of at most `limit` bytes, unpacked as `Content-Encoding` says and as the bytes themselves say.
///
/// # Errors
/// [`Unpackable`]
pub(super) fn unpacked(encodings: &str, bytes: Bytes, limit: usize) -> Result<Bytes, Unpackable> {
    // The last word was done last. Whatever else the bytes are seen to be is undone too.
    let said = encodings.rsplit(',').filter(|word| !word.trim().is_empty());
    let mut content = bytes;
    for word in said.map(Some).chain(std::iter::repeat(None)).take(LAYERS_MAX) {
        let packing = match word {
            Some(word) => Packing::said(word, &content),
            None => Packing::seen(&content),
        };
        let Some(packing) = packing else {
            if word.is_none() {
                break;
            }
            continue;
        };
        content = match packing.undone(&content, limit) {
            Ok(unpacked) => unpacked.into(),
            // A header without its packing: the text is there as it is.
            Err(Unpackable::Broken(_)) if std::str::from_utf8(&content).is_ok() => continue,
            Err(error) => return Err(error),
        };
    }
    Ok(content)
}

/// The text of a reply as UTF-8 without a mark or control characters; the bytes as they are if they are no text.
///
/// A mark decides, then the charset that `Content-Type` names, then the bytes. Bytes that make no character are replaced
/// if they are few: an item whose title was cut within a character is still an item.
pub(super) fn text(content_type: &str, bytes: &Bytes) -> Bytes {
    let (encoding, mark) = match Encoding::for_bom(bytes) {
        Some((encoding, length)) => (encoding, length),
        None => (charset(content_type, bytes), 0),
    };
    let bytes = bytes.slice(mark..);
    if encoding == UTF_8 && simdutf8::basic::from_utf8(&bytes).is_ok() {
        return without_controls(bytes);
    }
    let (decoded, has_errors) = encoding.decode_without_bom_handling(&bytes);
    if has_errors && !is_nearly_whole(&decoded) {
        return bytes;
    }
    without_controls(decoded.into_owned().into())
}

/// The charset of bytes without a mark.
fn charset(content_type: &str, bytes: &[u8]) -> &'static Encoding {
    let params = content_type.split(';').skip(1).filter_map(|param| param.split_once('='));
    let named = params.into_iter().find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"));
    let named = named
        .and_then(|(_, value)| Encoding::for_label_no_replacement(value.trim_matches([' ', '"', '\'']).as_bytes()));
    match (named, bytes) {
        // JSON begins with an ASCII character.
        (_, [0, second, ..]) if *second != 0 => UTF_16BE,
        (_, [first, 0, ..]) if *first != 0 => UTF_16LE,
        (Some(named), _) if !is_utf8_after_all(named, bytes) => named,
        _ => UTF_8,
    }
}

/// Whether a reply is UTF-8 though a header names another charset, as servers do whose default it is: no text of several
/// characters is UTF-8 by chance.
fn is_utf8_after_all(named: &'static Encoding, bytes: &[u8]) -> bool {
    // Two bytes that are one character in both are not so rare where each character has two.
    let is_certain = |text: &str| named.is_single_byte() || text.chars().any(|c| c >= '\u{800}');
    std::str::from_utf8(bytes).is_ok_and(is_certain)
}

/// Whether so little was replaced that it is a text all the same, and not one in a charset that nobody named.
fn is_nearly_whole(decoded: &str) -> bool {
    let foreign = decoded.chars().filter(|c| !c.is_ascii()).count();
    let replaced = decoded.chars().filter(|c| *c == '\u{fffd}').count();
    replaced <= 1 + (foreign - replaced) / 4
}

/// A space for each control character that JSON allows nowhere, or only outside of texts: those are where a server has
/// not escaped what somebody typed.
fn without_controls(text: Bytes) -> Bytes {
    if !text.iter().any(|byte| *byte < b' ') {
        return text;
    }
    let (mut in_text, mut is_escaped) = (false, false);
    let bad = |byte: &u8| {
        let (was_in_text, was_escaped) = (in_text, is_escaped);
        in_text ^= *byte == b'"' && !was_escaped;
        is_escaped = was_in_text && *byte == b'\\' && !was_escaped;
        *byte < b' ' && (was_in_text || !b"\t\n\r".contains(byte))
    };
    let bad: Vec<bool> = text.iter().map(bad).collect();
    if !bad.contains(&true) {
        return text;
    }
    text.iter().zip(bad).map(|(byte, bad)| if bad { b' ' } else { *byte }).collect()
}

/// What a body is that is not the JSON it should be, for people.
pub(super) fn name(body: &[u8]) -> Cow<'static, str> {
    const MARKS: [(&[u8], &str); 18] = [
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"GIF8", "a GIF image"),
        (b"\0\0\x01\0", "an icon"),
        (b"%PDF", "a PDF"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"BZh", "bzip2, which is not unpacked"),
        (b"\xfd7zXZ", "xz, which is not unpacked"),
        (b"\x04\x22\x4d\x18", "LZ4, which is not unpacked"),
        (b"\x7fELF", "a program"),
        (b"\x16\x03", "a TLS record"),
        (b"<!doctype html", "an HTML page"),
        (b"<html", "an HTML page"),
        (b"<head", "an HTML page"),
        (b"<script", "a script"),
        (b"<body", "an HTML page"),
        (b"<?xml", "XML"),
        (b"<", "markup"),
    ];
    let start = body.trim_ascii_start();
    if start.is_empty() {
        return if body.is_empty() { "an empty body" } else { "white space" }.into();
    }
    if body.starts_with(b"RIFF") && body.get(8..12) == Some(b"WEBP") {
        return "a WebP image".into();
    }
    let begins = |mark: &[u8]| start.get(..mark.len()).is_some_and(|start| start.eq_ignore_ascii_case(mark));
    if let Some((_, name)) = MARKS.iter().find(|(mark, _)| begins(mark)) {
        return (*name).into();
    }
    match std::str::from_utf8(body) {
        Ok(text) => match serde_json::from_str::<serde::de::IgnoredAny>(text) {
            Err(error) if error.is_eof() => "JSON that breaks off".into(),
            Err(error) if start.starts_with(b"{") || start.starts_with(b"[") => {
                format!("JSON with a mistake at line {} column {}", error.line(), error.column()).into()
            }
            Ok(_) | Err(_) => "plain text".into(),
        },
        Err(error) => {
            let text =
                body.iter().filter(|byte| **byte < b' ' && !byte.is_ascii_whitespace()).count() * 20 < body.len();
            if text {
                format!("text in a charset that Content-Type does not name (byte {} is not UTF-8)", error.valid_up_to())
                    .into()
            } else {
                "binary data".into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(content_type: &str, bytes: &[u8]) -> String {
        String::from_utf8_lossy(&text(content_type, &Bytes::copy_from_slice(bytes))).into_owned()
    }

    #[test]
    fn control_characters_are_spaces_wherever_json_does_not_allow_them() {
        let table = [
            ("{\"a\":\"1\t2\x1b[31m\"}", "{\"a\":\"1 2 [31m\"}"),
            ("{\n\t\"a\": 1\r\n}", "{\n\t\"a\": 1\r\n}"),
            ("{\"a\":\"\\\"\n\\\\\"\n}", "{\"a\":\"\\\" \\\\\"\n}"),
            ("{}\0\0", "{}  "),
            ("\x0c{}", " {}"),
        ];
        for (from, to) in table {
            assert_eq!(read("", from.as_bytes()), to);
        }
    }

    #[test]
    fn a_title_cut_within_a_character_is_read_and_another_charset_is_not_guessed() {
        let mut cut = "{\"title\":\"玻璃杯".as_bytes().to_vec();
        cut.pop();
        assert_eq!(read("", &[&cut[..], b"\"}"].concat()), "{\"title\":\"玻璃\u{fffd}\"}");
        assert_eq!(read("", b"{\"title\":\"caf\xc3\"}"), "{\"title\":\"caf\u{fffd}\"}");
        let gbk = b"{\"title\":\"\xb2\xa3\xc1\xa7\xb1\xad\"}";
        assert_eq!(text("", &Bytes::from_static(gbk)), &gbk[..]);
        assert!(name(gbk).contains("charset"), "{}", name(gbk));
        assert_eq!(read("x; charset=shift_jis", b"{\"t\":\"\x83J\x83b\x83v\"}"), "{\"t\":\"カップ\"}");
        assert_eq!(read("x; charset=big5", b"{\"t\":\"\xac\xc1\xbc\xfe\"}"), "{\"t\":\"玻璃\"}");
        assert_eq!(read("x; charset=klingon", b"{}"), "{}");
    }

    #[test]
    fn what_is_no_json_is_named() {
        let table: [(&[u8], &str); 12] = [
            (b"", "an empty body"),
            (b" \n", "white space"),
            (b"\n<!DOCTYPE HTML>", "an HTML page"),
            (b"<html>", "an HTML page"),
            (b"<?xml version='1.0'?>", "XML"),
            (b"\x89PNG\r\n\x1a\n\0\0\0\r", "a PNG image"),
            (b"RIFF\0\0\0\0WEBP", "a WebP image"),
            (b"{\"item\":", "JSON that breaks off"),
            (b"{\"item\":}", "JSON with a mistake at line 1 column 9"),
            (b"slow down", "plain text"),
            (b"\x01\x02\x03\x04\xff\x05", "binary data"),
            (b"BZh91AY", "bzip2, which is not unpacked"),
        ];
        for (body, expected) in table {
            assert_eq!(name(body), expected);
        }
    }

    #[test]
    fn what_is_packed_and_broken_says_so() {
        let gzip = hex::decode("1f8b0800000000000203ab56cacf").unwrap();
        assert_eq!(unpacked("", gzip.into(), 100), Err(Unpackable::Broken("gzip")));
        assert_eq!(unpacked("br, deflate", Bytes::from_static(b"{}"), 100), Ok(Bytes::from_static(b"{}")));
        assert_eq!(unpacked("zstd", Bytes::new(), 100), Ok(Bytes::new()));
    }

    proptest! {
        #[test]
        fn any_text_survives_any_packing_and_charset(
            words in "[ -~\u{a1}-\u{17f}\u{4e00}-\u{9fff}]{0,60}", layers in 0..3_usize, how in 0..4_usize,
        ) {
            let json = serde_json::to_string(&words).unwrap();
            let (content_type, mut bytes) = match how {
                0 => ("application/json", json.clone().into_bytes()),
                1 => ("x; charset=utf-8", [b"\xef\xbb\xbf", json.as_bytes()].concat()),
                2 => ("x; charset=gb18030", encoding_rs::GB18030.encode(&json).0.into_owned()),
                _ => ("x", std::iter::once(0xfeff).chain(json.encode_utf16()).flat_map(u16::to_le_bytes).collect()),
            };
            for layer in 0..layers {
                bytes = if layer == 0 { zstd::encode_all(&bytes[..], 1).unwrap() } else {
                    let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
                    std::io::Write::write_all(&mut packer, &bytes).unwrap();
                    packer.finish().unwrap()
                };
            }
            let content = unpacked("", bytes.into(), 10_000).unwrap();
            prop_assert_eq!(text(content_type, &content), json.as_bytes());
        }

        #[test]
        fn no_bytes_are_more_than_it_can_stand(bytes in prop::collection::vec(any::<u8>(), 0..200), type_ in "[a-z;=/ 8]{0,20}") {
            if let Ok(content) = unpacked("gzip, br, deflate", bytes.into(), 1_000) {
                prop_assert!(content.len() <= 1_000);
                let _ = name(&text(&type_, &content));
            }
        }
    }
}
