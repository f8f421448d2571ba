//! The history of a request's failed attempts, bounded in number and, with the request, in bytes. Pure.

use std::borrow::Cow;

use crate::{
    message::{
        Attempt, Request,
        codec::{self, REQUEST_LIMIT},
    },
    runtime::clock::Timestamp,
};

/// How many attempts a request carries. Those that spent one are all kept, however many are allowed, since they are
/// what is counted; of the others the middle is left out.
pub const LIMIT: usize = 50;

/// How many attempts that spent nothing are kept in any case: enough to see how many came in a row.
pub const SPARE_MIN: usize = 12;

/// How many of the oldest attempts are kept when some are left out: they show how it began.
const HEAD: usize = 5;

/// How many bytes of the vendor's words are kept of the first and the last attempt when there is no room for all.
const WORDS: usize = 500;

/// How many bytes of its code are kept then; a code is short, unless a vendor is strange.
const CODE: usize = 64;

/// The most bytes that JSON makes of one byte of text (`\u0000`).
const ESCAPED: usize = 6;

/// About how many bytes an attempt has without its texts.
const BARE: usize = 250;

/// The request with `attempt` at the end of its history, which stays bounded.
#[must_use]
pub fn extended(request: &Request, attempt: &Attempt) -> Request {
    let mut request = request.clone();
    request.calls = request.calls.saturating_add(1);
    request.called_at = first_call(&request, attempt);
    request.history.push(attempt.clone());
    let total = request.history.len();
    let spent = request.history.iter().filter(|attempt| attempt.is_spent()).count();
    leave_out(&mut request, (total - spent).saturating_sub(LIMIT.saturating_sub(spent).max(SPARE_MIN)), HEAD);
    fit(&mut request);
    request
}

/// When the request was first called for, `attempt` being its last failure; nothing if weir has always held it back.
#[must_use]
pub fn first_call(request: &Request, attempt: &Attempt) -> Option<Timestamp> {
    let calls = request.history.iter().chain([attempt]).filter(|attempt| !attempt.is_held_back());
    // Earlier versions of weir do not write the time down: of theirs the first call is what the history has.
    request.called_at.or_else(|| calls.map(|attempt| attempt.at).min())
}

/// How many bytes the request has, if that is more than a topic of requests takes.
#[must_use]
pub fn too_long(request: &Request) -> Option<usize> {
    if estimate(request) <= REQUEST_LIMIT {
        return None;
    }
    Some(codec::json_of(request).len()).filter(|length| *length > REQUEST_LIMIT)
}

/// Leaves out `surplus` attempts that spent nothing, the oldest after the first `head`.
fn leave_out(request: &mut Request, mut surplus: usize, head: usize) {
    let last = request.history.len().saturating_sub(1);
    let mut index = 0;
    request.history.retain(|attempt| {
        let left_out = surplus > 0 && (head..last).contains(&index) && !attempt.is_spent();
        surplus -= usize::from(left_out);
        index += 1;
        !left_out
    });
}

/// A request near the limit must not outgrow it by its history: then its words go, from the oldest to the newest but
/// not those of the first and the last attempt; then attempts that spent nothing; then even those words.
fn fit(request: &mut Request) {
    let Some(length) = too_long(request) else { return };
    let mut surplus = length - REQUEST_LIMIT;
    let last = request.history.len().saturating_sub(1);
    for attempt in request.history.iter_mut().take(last).skip(1) {
        surplus = surplus.saturating_sub(shorten(attempt, 0));
        if surplus == 0 {
            return;
        }
    }
    leave_out(request, usize::MAX, 1);
    for words in [WORDS, 0] {
        if too_long(request).is_some() {
            request.history.iter_mut().for_each(|attempt| _ = shorten(attempt, words));
        }
    }
}

/// How many bytes of JSON that saves.
fn shorten(attempt: &mut Attempt, words: usize) -> usize {
    let before = codec::json_of(attempt).len();
    let cut = |text: &mut String, limit| {
        if let Cow::Owned(short) = codec::shorten(text, limit) {
            *text = short;
        }
    };
    cut(&mut attempt.message, words);
    cut(&mut attempt.code, CODE);
    before.saturating_sub(codec::json_of(attempt).len())
}

/// No fewer bytes than the request's JSON has, without writing it.
fn estimate(request: &Request) -> usize {
    let params: usize = request.params.iter().map(|(name, value)| name.len() + value.len() + 6).sum();
    let history: usize =
        request.history.iter().map(|attempt| BARE + ESCAPED * (attempt.code.len() + attempt.message.len())).sum();
    BARE + ESCAPED * (params + request.item.as_str().len()) + history + 1_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        message::{Class, ItemId},
        runtime::clock::Timestamp,
    };

    fn attempt(class: Class, number: u32, words: &str) -> Attempt {
        Attempt {
            at: Timestamp::from_millis(1_700_000_000_000),
            account: None,
            class,
            code: "the.code".to_owned(),
            message: words.to_owned(),
            http_status: Some(500),
            latency_ms: number,
            not_before: None,
        }
    }

    /// A request whose own JSON has about so many bytes.
    fn request(bytes: usize) -> Request {
        let mut request = Request::new(ItemId::new("1").unwrap());
        request.params.insert("p".to_owned(), "x".repeat(bytes));
        request
    }

    #[test]
    fn a_request_near_the_limit_does_not_outgrow_it_by_its_history() {
        // Words that grow by six in JSON.
        for words in ["the vendor's words ".repeat(100), "\u{1}".repeat(2_000)] {
            for own in [1_000, 30_000, 55_000, 63_000] {
                let mut request = request(own);
                for number in 0..50 {
                    let class = if number % 10 == 9 { Class::Outage } else { Class::Throttled };
                    request = extended(&request, &attempt(class, number, &words));
                    assert_eq!(too_long(&request), None, "{own} bytes, {number} attempts");
                    let numbers: Vec<_> = request.history.iter().map(|attempt| attempt.latency_ms).collect();
                    assert_eq!((numbers[0], numbers[numbers.len() - 1]), (0, number), "the first and the last stay");
                }
                assert_eq!(request.attempts_spent(), 5, "what was spent is not forgotten");
                assert_eq!(request.calls, 50);
            }
        }
    }

    #[test]
    fn words_go_from_the_middle_first_and_only_when_there_is_no_room() {
        let mut request = request(50_000);
        for number in 0..10 {
            request = extended(&request, &attempt(Class::Outage, number, &"w".repeat(3_000)));
        }
        let lengths: Vec<_> = request.history.iter().map(|attempt| attempt.message.len()).collect();
        assert_eq!((lengths[0], lengths[9]), (3_000, 3_000));
        assert!(lengths[1..5].iter().all(|length| *length == "…".len()), "{lengths:?}");
        assert_eq!(lengths[8], 3_000, "{lengths:?}");
    }

    #[test]
    fn a_request_that_fills_the_limit_by_itself_is_seen_to_be_too_long() {
        let extended = extended(&request(REQUEST_LIMIT - 100), &attempt(Class::Outage, 0, "words"));
        assert!(too_long(&extended).is_some_and(|length| length > REQUEST_LIMIT));
    }

    #[test]
    fn the_estimate_is_never_below_the_truth() {
        for (own, words) in [(0, ""), (0, "\u{1}\u{2}"), (5_000, "ü"), (100, "\"\"\\")] {
            let mut long = request(own);
            long.params.insert("\u{1}".repeat(300), "\u{3}".repeat(300));
            for number in 0..40 {
                long.history.push(attempt(Class::Malformed, number, &words.repeat(50)));
            }
            assert!(estimate(&long) >= codec::json_of(&long).len());
        }
    }
}
