//! W3C trace context: one trace from a request to its row.
//!
//! <https://www.w3.org/TR/trace-context/>

use crate::runtime::clock::Dice;

/// The trace of `parent` with a new span id; a new trace if there is none, or none that is well-formed.
#[must_use]
pub fn continued(parent: Option<&str>, dice: &Dice) -> String {
    let trace = parent.and_then(trace_id).map_or_else(|| format!("{:032x}", dice.bits()), str::to_owned);
    format!("00-{trace}-{:016x}-01", dice.bits() >> 64)
}

/// The trace id of a well-formed `traceparent` of any version.
fn trace_id(parent: &str) -> Option<&str> {
    let mut parts = parent.split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length| text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let zero = |text: &str| text.bytes().all(|b| b == b'0');
    (hex(version, 2) && hex(trace, 32) && hex(span, 16) && !zero(trace)).then_some(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_continued_with_a_new_span() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let next = continued(Some(parent), &Dice::seeded(1));
        assert!(next.starts_with("00-0af7651916cd43dd8448eb211c80319c-"), "{next}");
        assert_ne!(next, parent);
    }

    #[test]
    fn a_missing_or_broken_parent_begins_a_new_trace() {
        for parent in [None, Some("nonsense"), Some("00-00000000000000000000000000000000-b7ad6b7169203331-01")] {
            let next = continued(parent, &Dice::seeded(1));
            assert!(trace_id(&next).is_some(), "{next}");
        }
    }
}
