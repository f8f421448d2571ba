//! A cached answer: the part of a result that does not depend on the request, its expiry times, and their encoding.
//! Pure.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::{sync::Arc, time::Duration};

use super::policy::{Ends, Habit};
use crate::{
    message::{Columns, Status},
    runtime::clock::Timestamp,
};

/// Version of the bytes: what another version wrote is no answer.
const VERSION: u8 = b'1';

/// Shorter ones are not worth the time.
const COMPRESS_FROM: usize = 1_024;

/// zstd's level: a product's JSON of 20 KB becomes a quarter in some 50 µs.
const LEVEL: i32 = 1;

/// No reply is longer, see [`crate::platform::http::BODY_LIMIT`]; columns repeat some of it.
const LENGTH_MAX: usize = 64 * 1024 * 1024;

/// How many bytes [`Kept::to_bytes`] begins with that order answers by their age.
pub const STAMP: usize = 16;

/// What the vendor said of an item.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Found, absent or off the shelf.
    pub status: Status,
    /// What weir understood of it.
    #[serde(default)]
    pub columns: Columns,
    /// Of its watched columns.
    #[serde(default)]
    pub fingerprint: String,
    /// The vendor's JSON for the item, byte for byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<Box<RawValue>>,
}

impl Answer {
    /// About how many bytes of memory it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        let Columns { title, price, price_text, currency, stock, sku_info, category_id, seller_nick, .. } =
            &self.columns;
        let columns = [title, price, price_text, currency, stock, sku_info, category_id, seller_nick];
        let columns: usize = columns.into_iter().flatten().map(String::len).sum();
        let further: usize = self.columns.further.iter().map(|(name, value)| name.len() + value.len()).sum();
        size_of::<Self>()
            + columns
            + further
            + self.fingerprint.len()
            + self.raw.as_ref().map_or(0, |raw| raw.get().len())
    }
}

/// An answer with all that is known of it.
#[derive(Clone, Debug)]
pub struct Kept {
    /// What the vendor said.
    pub answer: Arc<Answer>,
    /// For how long it counts.
    pub ends: Ends,
    /// What is known of the item.
    pub habit: Habit,
}

/// Ends and habit as JSON: the head of the bytes.
#[derive(Serialize, Deserialize)]
struct Head {
    fetched_at: i64,
    soft_at: i64,
    hard_at: i64,
    delta_ms: u64,
    hits: u32,
    steady: i8,
    /// Bytes of the body before it was compressed; 0 = it is not.
    whole: usize,
}

impl Kept {
    /// For Redis: 16 digits of the time at which it was fetched, the version, its head as JSON, a line feed, and the
    /// answer as JSON, compressed where that pays. `None` if it cannot be written.
    #[must_use]
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let body = serde_json::to_vec(&*self.answer).ok()?;
        let compressed = (body.len() >= COMPRESS_FROM)
            .then(|| zstd::bulk::compress(&body, LEVEL).ok())
            .flatten()
            // Less than a fifth saved is not worth the reader's time.
            .filter(|compressed| compressed.len() < body.len() / 5 * 4);
        let head = Head {
            fetched_at: self.ends.fetched_at.as_millis(),
            soft_at: self.ends.soft_at.as_millis(),
            hard_at: self.ends.hard_at.as_millis(),
            delta_ms: u64::try_from(self.ends.delta.as_millis()).unwrap_or(u64::MAX),
            hits: self.habit.hits,
            steady: self.habit.steady,
            whole: compressed.as_ref().map_or(0, |_| body.len()),
        };
        let mut bytes = stamp(self.ends.fetched_at).into_bytes();
        bytes.push(VERSION);
        serde_json::to_writer(&mut bytes, &head).ok()?;
        bytes.push(b'\n');
        bytes.extend_from_slice(compressed.as_deref().unwrap_or(&body));
        Some(bytes)
    }

    /// What [`Self::to_bytes`] wrote; `None` for anything else, which is no answer.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.get(STAMP..)?.strip_prefix(&[VERSION])?;
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let head: Head = serde_json::from_slice(&rest[..end]).ok()?;
        let body = &rest[end + 1..];
        let answer = match head.whole {
            0 => serde_json::from_slice(body).ok()?,
            whole if whole > LENGTH_MAX => return None,
            whole => serde_json::from_slice(&zstd::bulk::decompress(body, whole).ok()?).ok()?,
        };
        let [fetched_at, soft_at, hard_at] = [head.fetched_at, head.soft_at, head.hard_at].map(Timestamp::from_millis);
        let ends = Ends { fetched_at, soft_at, hard_at, delta: Duration::from_millis(head.delta_ms) };
        Some(Self { answer: Arc::new(answer), ends, habit: Habit { hits: head.hits, steady: head.steady } })
    }
}

/// A time as 16 digits: in the order of texts.
#[must_use]
pub fn stamp(at: Timestamp) -> String {
    format!("{:016}", at.as_millis().clamp(0, 9_999_999_999_999_999))
}

/// The time of a [`stamp`].
#[must_use]
pub fn stamped(text: &str) -> Option<Timestamp> {
    text.parse().ok().map(Timestamp::from_millis)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn kept(fetched_at: i64, raw: &str) -> Kept {
        let [fetched_at, soft_at, hard_at] =
            [0, 60_000, 600_000].map(|later| Timestamp::from_millis(fetched_at + later));
        let answer = Answer {
            status: Status::Found,
            columns: Columns { price: Some("9.90".to_owned()), ..Columns::default() },
            fingerprint: "f".to_owned(),
            raw: Some(RawValue::from_string(raw.to_owned()).unwrap()),
        };
        let ends = Ends { fetched_at, soft_at, hard_at, delta: Duration::from_millis(210) };
        Kept { answer: Arc::new(answer), ends, habit: Habit { hits: 7, steady: -2 } }
    }

    #[test]
    fn what_is_written_is_read_byte_for_byte() {
        let long = format!("{{\"price\": 9.90,  \"text\":\"{}\"}}", "长".repeat(5_000));
        for raw in ["{\"a\":  1.0e2}", long.as_str()] {
            let kept = kept(1_800_000_000_000, raw);
            let bytes = kept.to_bytes().unwrap();
            let read = Kept::from_bytes(&bytes).unwrap();
            assert_eq!(read.answer.raw.as_ref().unwrap().get(), raw);
            assert_eq!((read.ends, read.habit, &read.answer.columns), (kept.ends, kept.habit, &kept.answer.columns));
            assert!(bytes.len() < 2_000, "what is long and repeats itself is compressed: {}", bytes.len());
        }
    }

    #[test]
    fn bytes_are_ordered_by_the_time_of_the_answer() {
        let bytes = |at| kept(at, "1").to_bytes().unwrap();
        assert!(bytes(999_999_999_999)[..STAMP] < bytes(1_000_000_000_000)[..STAMP]);
        assert_eq!(stamped(&stamp(Timestamp::from_millis(1_800_000_000_001))).unwrap().as_millis(), 1_800_000_000_001);
    }

    #[test]
    fn anything_else_is_no_answer() {
        let good = kept(1_800_000_000_000, "1").to_bytes().unwrap();
        let mut newer = good.clone();
        newer[STAMP] = b'2';
        for bytes in [&b""[..], b"0001800000000000", &good[..good.len() - 1], &newer, b"0001800000000000{}\n{}"] {
            assert!(Kept::from_bytes(bytes).is_none(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
