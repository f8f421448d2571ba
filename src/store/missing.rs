//! Inserts missing rows into any table of the schema, for `replay`.

use super::{
    columns::Columns,
    connection::Store,
    present::Place,
    row::{self, Parsed},
    trouble::Trouble,
};
use crate::message::codec::Raw;

/// What a row takes beside its record's value, about: its place, its names and times.
const OVERHEAD: usize = 512;

/// Rows of one kind and one partition, in the order of the offsets that they are known by.
#[derive(Debug, Default)]
pub struct Rows {
    /// The offset of each, and about what it weighs in bytes.
    places: Vec<(i64, usize)>,
    columns: Columns,
}

impl Rows {
    /// No rows yet, and about so many to come.
    #[must_use]
    pub fn expecting(rows: usize) -> Self {
        Self { places: Vec::with_capacity(rows), columns: Columns::expecting(rows) }
    }

    /// Adds the row of a record that has one. What it weighs follows from the record alone, so that rows are cut into
    /// the same inserts whenever they are read.
    pub fn add(&mut self, raw: &Raw<'_>, parsed: &Parsed) {
        self.places.push((raw.offset, OVERHEAD + raw.value.map_or(0, <[u8]>::len)));
        row::put(&mut self.columns, raw, parsed);
    }

    /// Takes rows from the front of `more` until there are `rows` of them, or they weigh `bytes`; true if it is so.
    pub fn fill_up(&mut self, more: &mut Self, (rows, bytes): (usize, usize)) -> bool {
        let mut weight = self.weight();
        let mut count = 0;
        let mut is_full = self.places.len() >= rows || weight >= bytes;
        for (_, more) in &more.places {
            if is_full {
                break;
            }
            weight += more;
            count += 1;
            is_full = self.places.len() + count >= rows || weight >= bytes;
        }
        let rest = more.split_off(count);
        let taken = std::mem::replace(more, rest);
        self.places.extend(taken.places);
        self.columns.append(taken.columns);
        is_full
    }

    fn split_off(&mut self, count: usize) -> Self {
        if count >= self.places.len() {
            return Self::default();
        }
        Self { places: self.places.split_off(count), columns: self.columns.split_off(count) }
    }

    /// Keeps those rows whose place in `kept` is true.
    pub fn retain(&mut self, kept: &[bool]) {
        let mut all = kept.iter();
        self.places.retain(|_| all.next().is_some_and(|kept| *kept));
        self.columns.retain(kept);
    }

    /// What they weigh, about, in bytes.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.places.iter().map(|(_, bytes)| bytes).sum()
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The offsets of their records, ascending.
    pub fn offsets(&self) -> impl Iterator<Item = i64> {
        self.places.iter().map(|(offset, _)| *offset)
    }

    /// The first and the last of them.
    #[must_use]
    pub fn ends(&self) -> Option<(i64, i64)> {
        self.places.first().zip(self.places.last()).map(|((first, _), (last, _))| (*first, *last))
    }
}

impl Store {
    /// Inserts rows under a token, as [`Store::insert_columns`] does.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps stored, perhaps not.
    pub async fn insert_missing(&self, place: &Place, rows: &Rows, token: &str) -> Result<(), Trouble> {
        self.insert_columns(&place.table, &rows.columns, token).await
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{message::codec::Unreadable, runtime::clock::Timestamp};

    fn add(rows: &mut Rows, offset: i64, size: usize) {
        let (time, value) = (Timestamp::from_millis(0), vec![b'x'; size]);
        let raw = Raw { topic: "t", partition: 0, offset, time, headers: &[], value: Some(&value) };
        rows.add(&raw, &Parsed::Raw(Unreadable::Empty));
    }

    /// The inserts that rows are cut into if they come in pieces of these lengths, as the offsets of each.
    fn cut(sizes: &[usize], pieces: &[usize], limits: (usize, usize)) -> Vec<Vec<i64>> {
        let (mut chunk, mut chunks, mut from) = (Rows::default(), Vec::new(), 0);
        for length in pieces.iter().cycle() {
            let to = (from + length).min(sizes.len());
            let mut piece = Rows::default();
            for (index, size) in sizes.iter().enumerate().take(to).skip(from) {
                add(&mut piece, i64::try_from(index).unwrap() * 2, *size);
            }
            while chunk.fill_up(&mut piece, limits) {
                chunks.push(std::mem::take(&mut chunk));
            }
            assert!(piece.is_empty());
            from = to;
            if from == sizes.len() {
                break;
            }
        }
        chunks.push(chunk);
        for chunk in &chunks {
            assert_eq!(chunk.columns.rows(), chunk.len());
        }
        chunks.iter().map(|chunk| chunk.offsets().collect()).collect()
    }

    proptest! {
        /// A resumed run must make the tokens of the one before it again.
        #[test]
        fn the_cuts_do_not_depend_on_the_pieces(
            sizes in prop::collection::vec(0_usize..3_000, 1..60),
            pieces in prop::collection::vec(1_usize..20, 1..5),
            rows in 1_usize..20, bytes in 1_000_usize..20_000,
        ) {
            let whole = cut(&sizes, &[sizes.len()], (rows, bytes));
            prop_assert_eq!(&cut(&sizes, &pieces, (rows, bytes)), &whole);
            prop_assert_eq!(whole.concat().len(), sizes.len());
            prop_assert!(whole.iter().all(|chunk| chunk.len() <= rows));
        }
    }

    #[test]
    fn what_is_there_is_left_out() {
        let mut rows = Rows::default();
        for offset in [3, 5, 9] {
            add(&mut rows, offset, 10);
        }
        rows.retain(&[true, false, true]);
        assert_eq!(
            (rows.offsets().collect::<Vec<_>>(), rows.columns.rows(), rows.ends()),
            (vec![3, 9], 2, Some((3, 9)))
        );
    }
}
