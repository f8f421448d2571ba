//! What the resellers' error codes mean, one line for each. They are texts, `0000` a good one.

use std::time::Duration;

use crate::platform::{
    Affected, Common, Denial, HttpReply, RefusalKind,
    reading::kind_of_status,
    taobao::errors::{ban_seconds, jitter},
};

/// A day's calls are used up, and nobody says when the day ends: asking once an hour is cheap.
const NEXT_LOOK: Duration = Duration::from_secs(60 * 60);

/// What a code says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// No error.
    Nothing,
    /// There is no such item.
    Absent,
    /// Anything else.
    Refused(RefusalKind),
}

/// What a code means, with the words beside it.
pub fn meaning(code: &str, words: &str, reply: &HttpReply) -> Said {
    let throttled = |wait| RefusalKind::Throttled { scope: Affected::Account, wait: reply.retry_after().or(wait) };
    let kind = match code.trim() {
        "" | "0" | "0000" => return Said::Nothing,
        "2000" => return Said::Absent,
        // The article's only one: more than 10 calls a second. It names no time; Taobao's own words may be passed on.
        "7" => throttled(ban_seconds(words).map(|seconds| Duration::from_secs(seconds.clamp(1, 24 * 60 * 60)))),
        "429" | "4008" => throttled(Some(Duration::from_millis(1_000 + jitter(&reply.body, 4_000)))),
        "4013" => throttled(Some(NEXT_LOOK)),
        // The key, its plan or its money.
        "4004" | "4005" | "4006" | "4007" | "4012" | "4016" => RefusalKind::Denied(Denial::Account),
        "4003" | "4010" | "4014" | "4015" => RefusalKind::Misconfigured(Common::Params),
        // 4009: maintenance, 4017: time-out.
        "4000" | "4001" | "4002" | "4009" | "4017" | "5000" => RefusalKind::Outage,
        // Codes that nobody has seen yet.
        _ => kind_of_status(reply).unwrap_or(RefusalKind::Unclear),
    };
    Said::Refused(kind)
}
