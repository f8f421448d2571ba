//! A compact set of the ids already enqueued.

use std::collections::HashSet;

use sha1::{Digest, Sha1};

use crate::message::Request;

/// Ten bytes of a digest tell requests apart: with ten million of them the chance that any two are taken for the
/// same is below 10⁻¹⁰, and the set takes about 200 MB.
type Mark = [u8; 10];

/// The requests that have been seen.
#[derive(Debug, Default)]
pub struct Seen(HashSet<Mark>);

impl Seen {
    /// Whether this is the first request for its item with its parameters.
    pub fn is_new(&mut self, request: &Request) -> bool {
        let digest = digest(request);
        let mut mark = Mark::default();
        mark.copy_from_slice(&digest[..10]);
        self.0.insert(mark)
    }
}

/// What makes two requests ask for the same: item and parameters.
pub(super) fn digest(request: &Request) -> [u8; 20] {
    let mut hash = Sha1::new();
    let mut part = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    part(request.item.as_str());
    for (name, value) in &request.params {
        part(name);
        part(value);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ItemId;

    fn request(item: &str, params: &[(&str, &str)]) -> Request {
        let params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Request { params, ..Request::new(ItemId::new(item).unwrap()) }
    }

    #[test]
    fn the_same_item_with_the_same_parameters_is_a_duplicate() {
        let mut seen = Seen::default();
        let first =
            [request("1", &[]), request("1", &[("zip", "1")]), request("1", &[("zip", "2")]), request("2", &[])];
        assert!(first.iter().all(|request| seen.is_new(request)));
        assert!(!first.iter().any(|request| seen.is_new(request)));
    }

    #[test]
    fn texts_that_only_join_to_the_same_are_different() {
        assert_ne!(digest(&request("1", &[("ab", "c")])), digest(&request("1", &[("a", "bc")])));
    }
}
