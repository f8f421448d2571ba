//! Which records of a topic have a row, by their offsets: what `verify` proves and `replay` fills up.

use std::ops::Range;

use tokio::time::timeout;

use super::{connection::Trouble, insert::Store};
use crate::{
    kafka::{Partition, page::Page},
    message::envelope::Kind,
};

/// Where the rows of a kind of record are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The table of the kind.
    pub table: String,
    /// Whether records that cannot be read are rows of `dead_letters`.
    pub keeps_unreadable: bool,
}

impl Place {
    /// The tables that the sink writes.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        let (table, keeps_unreadable) = match kind {
            // fetch makes the dead letters of unreadable requests.
            Kind::Request => ("requests", false),
            Kind::Result => ("observations", true),
            Kind::Failure => ("failures", true),
            Kind::Change => ("item_changes", true),
            // Nothing of the control topic has a row.
            Kind::DeadLetter | Kind::Cancellation => ("dead_letters", true),
        };
        Self { table: table.to_owned(), keeps_unreadable }
    }

    fn has_second_table(&self) -> bool {
        self.keeps_unreadable && self.table != "dead_letters"
    }
}

impl Store {
    /// The offsets of a partition that have a row, those of `range` on the page of its start.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn present(&self, place: &Place, partition: &Partition, range: &Range<i64>) -> Result<Page, Trouble> {
        let mut page = Page::of(range.start);
        let first = page.range().start;
        let of = |table: &str| {
            format!(
                "SELECT toUInt32(offset - {first}) AS place FROM {table} WHERE topic = {{topic: String}} \
                 AND partition = {} AND offset >= {} AND offset < {}",
                partition.number,
                range.start,
                range.end.min(page.range().end),
            )
        };
        let mut sql = of(&identifier(&place.table));
        if place.has_second_table() {
            sql = format!("{sql} UNION ALL {}", of("dead_letters"));
        }
        let query = self.client.query_raw(&sql).param("topic", partition.topic.as_ref());
        let mut rows = query.fetch::<u32>()?;
        loop {
            let row = timeout(self.timeout, rows.next()).await.map_err(|_| Trouble::timed_out(self.timeout))??;
            match row {
                Some(place) => page.add(first + i64::from(place)),
                None => return Ok(page),
            }
        }
    }
}

/// A table's name as SQL takes it, whatever is in it.
pub(super) fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}
