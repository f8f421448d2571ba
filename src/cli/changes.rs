//! The changes stage's store of last known values, in ClickHouse.

use std::collections::HashMap;

use crate::{
    changes::{Key, Memory},
    message::Watched,
    store::{Store, Trouble},
};

impl Memory for Store {
    type Error = Trouble;

    async fn recall(&self, items: &[Key]) -> Result<HashMap<Key, Watched>, Trouble> {
        self.watched(items).await
    }

    async fn remember(&self, items: &HashMap<Key, Watched>) -> Result<(), Trouble> {
        Self::remember(self, items).await
    }
}
