//! Which parameters a call carries besides those of the vendor's protocol.

use std::collections::BTreeMap;

use crate::message::Request;

/// Adds what the source says of every call, then what the request says of its own.
///
/// A request's parameters are left out if the protocol or the source sets them, or the item's id goes by that name: a
/// producer must not be able to change whose call it is. Names in another case count too: nobody knows whether the
/// vendor tells them apart.
pub(super) fn add(
    form: &mut Vec<(String, String)>,
    (item_param, of_source): (&str, &BTreeMap<String, String>),
    request: Option<&Request>,
    is_protocols: impl Fn(&str) -> bool,
) {
    let is_taken = |name: &str| {
        let mut taken = [item_param].into_iter().chain(of_source.keys().map(String::as_str));
        is_protocols(name) || taken.any(|taken| taken.eq_ignore_ascii_case(name))
    };
    let own = request.into_iter().flat_map(|request| &request.params).filter(|(name, _)| !is_taken(name));
    form.extend(of_source.iter().chain(own).map(|(name, value)| (name.clone(), value.clone())));
}

/// Whether `name` is one of these, in whatever case.
pub(super) fn is_one_of(name: &str, names: &[&str]) -> bool {
    names.iter().any(|known| known.eq_ignore_ascii_case(name))
}
