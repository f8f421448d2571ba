//! Which of a source's two topics a request goes by.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A way to a source's calls. Which one a request goes by is its topic's; a retry brings it back to the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// The backlog.
    #[default]
    Bulk,
    /// Overtakes the backlog.
    Express,
}

impl Lane {
    /// Both, the one that overtakes first.
    pub const ALL: [Self; 2] = [Self::Express, Self::Bulk];

    /// The share of the calls that express requests get while the backlog waits too, if nobody says otherwise.
    #[must_use]
    pub const fn express_share() -> f64 {
        0.5
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Bulk => Self::Express,
            Self::Express => Self::Bulk,
        }
    }

    /// Whether it is the backlog; so records of before there were lanes say it.
    #[must_use]
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub const fn is_bulk(&self) -> bool {
        matches!(self, Self::Bulk)
    }

    /// The word in records and headers.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Express => "express",
        }
    }

    /// The lane of this word.
    #[must_use]
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.as_str() == word)
    }
}
