//! What the gateway's error codes mean, one line for each.

use std::time::Duration;

use crate::platform::{Affected, Common, Denial, RefusalKind};

#[derive(Clone, Copy)]
enum Meaning {
    Throttled(Affected),
    Denied(Denial),
    Outage,
    Misconfigured(Common),
}

/// Codes without their `gw.`: some replies leave it out, and the letters' case varies (`QosApi`, `QosAPI`).
const TABLE: [(&str, Meaning); 13] = [
    ("QosAppFrequencyLimit", Meaning::Throttled(Affected::Account)),
    ("QosAPIFrequencyLimit", Meaning::Throttled(Affected::Everyone)),
    ("401", Meaning::Denied(Denial::Token)),
    ("SignatureInvalid", Meaning::Denied(Denial::Account)),
    ("SignatureMissing", Meaning::Denied(Denial::Account)),
    ("AppKeyNotFound", Meaning::Denied(Denial::Account)),
    ("AppKeyMissing", Meaning::Denied(Denial::Account)),
    // The app may not use this API: nothing is said about the item.
    ("APIACLDecline", Meaning::Denied(Denial::Account)),
    ("APIUnsupported", Meaning::Misconfigured(Common::Form)),
    ("ParamMissing", Meaning::Misconfigured(Common::Params)),
    // The service behind the gateway.
    ("ISPInvokeError", Meaning::Outage),
    ("ISPInvokeTimeout", Meaning::Outage),
    ("ISPConnectError", Meaning::Outage),
];

/// What a code of the table means; `wait` is what `Retry-After` said.
#[must_use]
pub fn known(code: &str, wait: Option<Duration>) -> Option<RefusalKind> {
    let name = without_gw(code).unwrap_or(code);
    let (_, meaning) = TABLE.iter().find(|(known, _)| known.eq_ignore_ascii_case(name))?;
    Some(match *meaning {
        Meaning::Throttled(scope) => RefusalKind::Throttled { scope, wait },
        Meaning::Denied(denial) => RefusalKind::Denied(denial),
        Meaning::Outage => RefusalKind::Outage,
        Meaning::Misconfigured(common) => RefusalKind::Misconfigured(common),
    })
}

/// Whether a code is of the gateway's own family, which grows: one that is not in the table is an outage.
#[must_use]
pub fn is_of_the_gateway(code: &str) -> bool {
    without_gw(code).is_some()
}

/// Whether the gateway's words say that the token is dead. It does so with various codes, or none.
#[must_use]
pub fn says_unauthorised(words: &str) -> bool {
    words.to_ascii_lowercase().contains("need user authorized")
}

/// Whether the words say that the item was taken off the shelf.
#[must_use]
pub fn says_off_shelf(words: &str) -> bool {
    words.contains("已下架")
}

fn without_gw(code: &str) -> Option<&str> {
    let (gw, name) = code.split_at_checked(3)?;
    gw.eq_ignore_ascii_case("gw.").then_some(name)
}
