//! Which records of a topic have a row, by their offsets: what `verify` proves and `replay` fills up.

use std::ops::Range;

use tokio::time::timeout;

use super::{connection::Trouble, insert::Store, row};
use crate::{
    kafka::{Partition, page::Page},
    message::envelope::Kind,
};

/// Where the rows of a kind of record are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The table of the kind.
    pub table: String,
}

impl Place {
    /// The tables that the sink writes.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        Self { table: row::table(kind).to_owned() }
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
        let table = identifier(&place.table);
        let sql = format!(
            "SELECT toUInt32(offset - {first}) AS place FROM {table} WHERE topic = {{topic: String}} \
             AND partition = {} AND offset >= {} AND offset < {}",
            partition.number,
            range.start,
            range.end.min(page.range().end),
        );
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
