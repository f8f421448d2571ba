//! A watched column of an item that is not what it was: old and new, and how two observations are compared. Pure.

use rust_decimal::Decimal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BatchId, ItemId, Observation, RequestId, SourceName, Status, price};
use crate::runtime::clock::Timestamp;

/// Which column has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// What the vendor says of the item: found, absent, off the shelf.
    Status,
    /// The price.
    Price,
    /// The title.
    Title,
    /// How many are for sale.
    Stock,
    /// The customers' score.
    Rating,
}

impl Field {
    /// The word in records and rows.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Price => "price",
            Self::Title => "title",
            Self::Stock => "stock",
            Self::Rating => "rating",
        }
    }
}

/// One watched column of one item has changed.
///
/// The status is compared with the observation before; the other columns with the last one that found the item, since
/// an item that is off the shelf for a day has no price then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir change v1")]
pub struct Change {
    /// Which source.
    pub source: SourceName,
    /// Which item.
    pub item: ItemId,
    /// What has changed.
    pub field: Field,
    /// The value before, as the vendor wrote it; none if it had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// The value now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<String>,
    /// Of a price: ISO 4217.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// When the vendor last answered with the old value.
    pub old_at: Timestamp,
    /// When the vendor first answered with the new one.
    pub new_at: Timestamp,
    /// The batch of the request that brought the new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchId>,
    /// That request.
    pub request_id: RequestId,
}

/// What is remembered of an item, to compare its next observation with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// When the vendor last answered for it.
    pub fetched_at: Timestamp,
    /// What it said.
    pub status: Status,
    /// The fingerprint of that answer.
    pub fingerprint: String,
    /// When it was last found; `None`: never.
    pub found_at: Option<Timestamp>,
    /// The price then, in words if it was more than a number.
    pub price: Option<String>,
    /// The title then.
    pub title: Option<String>,
    /// The stock then.
    pub stock: Option<String>,
    /// The rating then.
    pub rating: Option<String>,
}

impl Watched {
    /// What an observation changes against what is remembered, and what is to be remembered from now on; `None` if it
    /// is no news: older than what is known, or the same answer once more (a cache's).
    ///
    /// Whether anything has changed at all says the fingerprint, which was decided when the answer came: `10.0` and
    /// `10.00` are one price.
    #[must_use]
    pub fn compare(before: Option<&Self>, seen: &Observation) -> Option<(Vec<Change>, Self)> {
        let Some(before) = before else { return Some((Vec::new(), Self::first(seen))) };
        if seen.fetched_at <= before.fetched_at {
            return None;
        }
        let now = before.next(seen);
        // Without one, from another writer, the columns themselves decide.
        let is_same = !seen.fingerprint.is_empty() && before.fingerprint == seen.fingerprint;
        let changes = if is_same { Vec::new() } else { before.changes(&now, seen) };
        Some((changes, now))
    }

    fn first(seen: &Observation) -> Self {
        let nothing = Self {
            fetched_at: seen.fetched_at,
            status: seen.status,
            fingerprint: String::new(),
            found_at: None,
            price: None,
            title: None,
            stock: None,
            rating: None,
        };
        nothing.next(seen)
    }

    /// The same item after one more observation.
    fn next(&self, seen: &Observation) -> Self {
        let now = Self {
            fetched_at: seen.fetched_at,
            status: seen.status,
            fingerprint: seen.fingerprint.clone(),
            ..self.clone()
        };
        if seen.status != Status::Found {
            return now;
        }
        let columns = &seen.columns;
        Self {
            found_at: Some(seen.fetched_at),
            price: price::shown(columns.price.as_deref(), columns.price_text.as_deref()).map(str::to_owned),
            title: columns.title.clone(),
            stock: columns.stock.clone(),
            rating: columns.rating.clone(),
            ..now
        }
    }

    fn changes(&self, now: &Self, seen: &Observation) -> Vec<Change> {
        let change = |field, old: Option<&str>, new: Option<&str>, old_at| Change {
            source: seen.source.clone(),
            item: seen.item.clone(),
            field,
            old: old.map(str::to_owned),
            new: new.map(str::to_owned),
            currency: seen.columns.currency.clone().filter(|_| field == Field::Price),
            old_at,
            new_at: seen.fetched_at,
            batch: seen.batch.clone(),
            request_id: seen.request_id.clone(),
        };
        let mut changes = Vec::new();
        if self.status != now.status {
            let (old, new) = (self.status.as_str(), now.status.as_str());
            changes.push(change(Field::Status, Some(old), Some(new), self.fetched_at));
        }
        let Some(found_at) = self.found_at.filter(|_| now.status == Status::Found) else { return changes };
        let columns = [
            (Field::Price, &self.price, &now.price),
            (Field::Title, &self.title, &now.title),
            (Field::Stock, &self.stock, &now.stock),
            (Field::Rating, &self.rating, &now.rating),
        ];
        for (field, old, new) in columns {
            if value(field, old.as_deref()) != value(field, new.as_deref()) {
                changes.push(change(field, old.as_deref(), new.as_deref(), found_at));
            }
        }
        changes
    }
}

/// A column's value without its formatting, as the fingerprint sees it too.
pub(super) fn value(field: Field, text: Option<&str>) -> String {
    let text = text.unwrap_or_default();
    match field {
        Field::Status => text.to_owned(),
        Field::Title => text.trim().to_owned(),
        Field::Price => price::meaning(Some(text), None),
        Field::Stock | Field::Rating => {
            text.parse::<Decimal>().map_or_else(|_| text.to_owned(), |number| number.normalize().to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Columns, Via};

    fn seen(at: i64, status: Status, price: &str, title: &str) -> Observation {
        let columns = Columns {
            price: Some(price.to_owned()).filter(|_| status == Status::Found),
            title: Some(title.to_owned()).filter(|_| status == Status::Found),
            currency: Some("CNY".to_owned()),
            ..Columns::default()
        };
        Observation {
            request_id: RequestId::new(format!("r{at}")).unwrap(),
            source: SourceName::new("s").unwrap(),
            instead_of: None,
            item: ItemId::new("1").unwrap(),
            batch: None,
            status,
            via: Via::Call,
            calls: 1,
            account: None,
            requested_at: Timestamp::from_millis(at),
            fetched_at: Timestamp::from_millis(at),
            latency_ms: 1,
            fingerprint: columns.fingerprint(status),
            columns,
            raw: None,
        }
    }

    /// Field, old, new and old time of every change in a row of observations.
    fn changes(row: &[Observation]) -> Vec<(&'static str, String, String, i64)> {
        let mut watched = None;
        let mut all = Vec::new();
        for observation in row {
            let Some((changes, now)) = Watched::compare(watched.as_ref(), observation) else { continue };
            watched = Some(now);
            all.extend(changes.into_iter().map(|change| {
                let text = |value: Option<String>| value.unwrap_or_default();
                (change.field.as_str(), text(change.old), text(change.new), change.old_at.as_millis())
            }));
        }
        all
    }

    fn change(field: &'static str, old: &str, new: &str, at: i64) -> (&'static str, String, String, i64) {
        (field, old.to_owned(), new.to_owned(), at)
    }

    #[test]
    fn the_first_observation_is_no_change_and_formatting_is_none_either() {
        let row = [(1, "10.0", "cup"), (2, "10.00", " cup "), (3, "10", "cup")];
        assert_eq!(changes(&row.map(|(at, price, title)| seen(at, Status::Found, price, title))), []);
    }

    #[test]
    fn a_price_in_another_form_is_no_change_and_a_range_is_shown_as_it_is() {
        let forms = [(1, "12", None), (2, "12.00", Some("￥12.00")), (3, "12.00", Some("12.00-15.00"))];
        let forms = forms.into_iter().chain([(4, "12", Some("12 ~ 15元")), (5, "9", Some("特价9元"))]);
        let row = forms.map(|(at, price, words)| {
            let mut seen = seen(at, Status::Found, price, "cup");
            seen.columns.price_text = words.map(str::to_owned);
            seen.fingerprint = seen.columns.fingerprint(Status::Found);
            seen
        });
        let expected = [change("price", "12.00", "12.00-15.00", 2), change("price", "12 ~ 15元", "9", 4)];
        assert_eq!(changes(&row.collect::<Vec<_>>()), expected);
    }

    #[test]
    fn each_column_is_compared_with_the_last_time_that_the_item_was_found() {
        let row = [
            seen(1, Status::Found, "10", "cup"),
            seen(2, Status::OffShelf, "", ""),
            seen(3, Status::OffShelf, "", ""),
            seen(4, Status::Found, "8", "cup"),
            seen(5, Status::Found, "8.0", "big cup"),
        ];
        let expected = [
            change("status", "found", "off_shelf", 1),
            change("status", "off_shelf", "found", 3),
            change("price", "10", "8", 1),
            change("title", "cup", "big cup", 4),
        ];
        assert_eq!(changes(&row), expected);
    }

    #[test]
    fn an_item_first_seen_as_absent_has_no_old_price() {
        let row = [seen(1, Status::Absent, "", ""), seen(2, Status::Found, "8", "cup")];
        assert_eq!(changes(&row), [change("status", "absent", "found", 1)]);
    }

    #[test]
    fn what_is_older_or_the_same_answer_again_is_no_news() {
        let row = [(5, "10"), (4, "9"), (5, "11"), (6, "10")];
        assert_eq!(changes(&row.map(|(at, price)| seen(at, Status::Found, price, "cup"))), []);
    }

    #[test]
    fn results_of_another_writer_without_fingerprints_are_compared_by_their_columns() {
        let row = [(1, "10.0"), (2, "10"), (3, "9")].map(|(at, price)| {
            let seen = seen(at, Status::Found, price, "cup");
            Observation { fingerprint: String::new(), ..seen }
        });
        assert_eq!(changes(&row), [change("price", "10", "9", 2)]);
    }

    #[test]
    fn a_price_that_goes_away_is_a_change_to_nothing() {
        let mut gone = seen(2, Status::Found, "", "cup");
        gone.columns.price = None;
        gone.fingerprint = gone.columns.fingerprint(Status::Found);
        assert_eq!(changes(&[seen(1, Status::Found, "10", "cup"), gone]), [change("price", "10", "", 1)]);
    }
}
