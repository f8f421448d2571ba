//! The topic id that prefixes the metadata of each commit, so that offsets of a deleted topic are recognised. Pure.
//!
//! `T1:<topic id>;<metadata>`. A commit without the prefix was made before weir knew topic ids, or by another program:
//! it is taken to be about the topic that exists. Versions before the prefix refuse such a commit, so nothing is lost.

use super::{
    Committed,
    topic_ids::{TopicId, TopicIds},
};

const KIND: &str = "T1:";

/// What it adds to the metadata, in bytes.
pub const LENGTH: usize = KIND.len() + TopicId::LENGTH + 1;

/// The metadata of a commit for this log.
#[must_use]
pub fn marked(id: Option<TopicId>, metadata: &str) -> String {
    id.map_or_else(|| metadata.to_owned(), |id| format!("{KIND}{id};{metadata}"))
}

/// Which log a commit is about, if it says so, and what its stage has said.
#[must_use]
pub fn read(metadata: &str) -> (Option<TopicId>, &str) {
    let parts = metadata.strip_prefix(KIND).and_then(|rest| rest.split_once(';'));
    let parts = parts.and_then(|(id, rest)| Some((id.parse().ok()?, rest)));
    parts.map_or((None, metadata), |(id, rest)| (Some(id), rest))
}

/// What the group has committed for the log that is there; `None` if the commit is about another one: its offsets mean
/// nothing here.
#[must_use]
pub fn of_this_log(topic: &str, committed: &Committed, ids: &TopicIds) -> Option<Committed> {
    let (of, metadata) = read(&committed.metadata);
    let is_this = of.zip(ids.get(topic)).is_none_or(|(of, is)| of == *is);
    is_this.then(|| Committed { offset: committed.offset, metadata: metadata.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            ledger::{BROKERS_LIMIT, METADATA_LIMIT},
            topic_ids::id,
        },
        *,
    };

    #[test]
    fn what_is_written_is_read_back_and_fits_the_brokers_limit() {
        for metadata in ["", "L1:AAAA", "B1:<900;100-111/2+3!3-8", "C1:7"] {
            let text = marked(Some(id(7)), metadata);
            assert_eq!((text.len(), read(&text)), (LENGTH + metadata.len(), (Some(id(7)), metadata)));
            assert_eq!(read(&marked(None, metadata)), (None, metadata));
        }
        assert_eq!(METADATA_LIMIT + LENGTH, BROKERS_LIMIT);
        // Not ours to read: the stage says so.
        for foreign in ["T1:", "T1:short;L1:", "T2:AAAAAAAAAAAAAAAAAAAAAA;", "hello"] {
            assert_eq!(read(foreign), (None, foreign));
        }
    }

    #[test]
    fn a_commit_counts_for_its_own_log_and_an_old_one_for_the_log_that_is_there() {
        let ids: TopicIds = [("t".to_owned(), id(1))].into();
        let of = |of, ids: &TopicIds| {
            let committed = Committed { offset: 9, metadata: marked(of, "L1:") };
            of_this_log("t", &committed, ids).map(|committed| committed.metadata)
        };
        let own = Some("L1:".to_owned());
        assert_eq!(of(Some(id(1)), &ids), own);
        assert_eq!(of(Some(id(2)), &ids), None);
        assert_eq!((of(None, &ids), of(Some(id(2)), &TopicIds::new())), (own.clone(), own));
    }
}
