//! Tokens in Redis, sealed, shared by the processes of any number of machines.
//!
//! `{prefix}:tokens:{source}` is a hash of alias → `revision:sealed`. Beside it `…:changes` orders the aliases by their
//! last change, so that a watcher reads what is new and nothing else, and `…:renewing:<alias>` is the claim of whoever
//! renews. `…:epoch` is another one whenever all of it began anew. All keys of a source share a hash tag, so a cluster
//! keeps them together.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use ::redis::{AsyncConnectionConfig, Client, RedisResult, Script, aio::MultiplexedConnection};
use async_trait::async_trait;
use tokio::{sync::Mutex, time::Instant};

use super::{
    Changes, Claim, Held, Mark, Record, StoreError, TokenStore,
    seal::{Sealer, Unopened},
};
use crate::{
    message::{AccountAlias, SourceName},
    runtime::redis_server,
};

/// How long Redis may take to answer.
const REPLY_WITHIN: Duration = Duration::from_secs(2);

/// How often it is looked which server the connection leads to.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// KEYS: tokens, changes, epoch; ARGV: alias, revision, sealed, a name for a state that begins now. 1 if it was kept.
const PUT: &str = "
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SET', KEYS[3], ARGV[4]) end
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and tonumber(string.match(known, '^(%d+):')) >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ':' .. ARGV[3])
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
redis.call('ZADD', KEYS[2], (tonumber(last[2]) or 0) + 1, ARGV[1])
return 1";

/// KEYS: tokens, changes, epoch; ARGV: the change that is known. The epoch, the last change, the one from which on the
/// reply tells, then aliases and values in turn.
const CHANGES: &str = "
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
last = tonumber(last[2]) or 0
local since = tonumber(ARGV[1])
if last < since then since = 0 end
local reply = { redis.call('GET', KEYS[3]) or '', last, since }
for _, alias in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. since, '+inf')) do
  reply[#reply + 1], reply[#reply + 2] = alias, redis.call('HGET', KEYS[1], alias) or ''
end
return reply";

/// KEYS: claim; ARGV: owner.
const RELEASE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

/// Tokens in one Redis.
pub struct RedisStore {
    client: Client,
    link: Mutex<Option<Link>>,
    prefix: String,
    sealer: Sealer,
}

/// A connection, and the server that it leads to.
#[derive(Clone)]
struct Link {
    connection: MultiplexedConnection,
    /// Empty if the user that we are may not ask for it.
    run_id: String,
    looked_at: Instant,
}

impl Link {
    async fn new(mut connection: MultiplexedConnection) -> RedisResult<Self> {
        let run_id = redis_server::run_id_if_told(&mut connection).await?;
        Ok(Self { connection, run_id, looked_at: Instant::now() })
    }

    /// Whether it still leads to the server that it led to.
    async fn is_still_there(&mut self) -> bool {
        if self.looked_at.elapsed() >= LOOK_EVERY {
            let is_same = redis_server::run_id_if_told(&mut self.connection).await.is_ok_and(|now| now == self.run_id);
            self.looked_at = Instant::now();
            return is_same;
        }
        true
    }
}

/// Which state a mark belongs to: that of one run of a server, since it was last empty. A server that has taken over may
/// have other changes under the same numbers.
fn state_of(run_id: &str, epoch: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (run_id, epoch).hash(&mut hasher);
    hasher.finish()
}

impl RedisStore {
    /// A store in the Redis at `url`, under keys that begin with `prefix`. Connects when it is used.
    ///
    /// # Errors
    /// If the address is none.
    pub fn new(url: &str, prefix: &str, sealer: Sealer) -> RedisResult<Self> {
        let client = Client::open(url)?;
        Ok(Self { client, link: Mutex::new(None), prefix: prefix.to_owned(), sealer })
    }

    fn keys(&self, source: &SourceName) -> [String; 3] {
        let tokens = format!("{}:tokens:{{{source}}}", self.prefix);
        [tokens.clone(), format!("{tokens}:changes"), format!("{tokens}:epoch")]
    }

    async fn connected(&self) -> RedisResult<Link> {
        let mut kept = self.link.lock().await;
        if let Some(link) = &mut *kept
            && link.is_still_there().await
        {
            return Ok(link.clone());
        }
        *kept = None;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(REPLY_WITHIN))
            .set_response_timeout(Some(REPLY_WITHIN));
        let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(kept.insert(Link::new(connection).await?).clone())
    }

    /// Asks, and forgets the connection if that fails: the next question makes a new one.
    async fn ask<T>(&self, ask: impl AsyncFnOnce(MultiplexedConnection) -> RedisResult<T>) -> Result<T, StoreError> {
        let asked = match self.connected().await {
            Ok(link) => ask(link.connection).await,
            Err(error) => Err(error),
        };
        if asked.is_err() {
            *self.link.lock().await = None;
        }
        Ok(asked?)
    }

    /// What has changed since this change: the state's own mark, the last change, whether that is all there is, and aliases
    /// with their sealed records.
    async fn changes_since(
        &self,
        source: &SourceName,
        since: u64,
    ) -> Result<(u64, u64, bool, Vec<String>), StoreError> {
        let [tokens, changes, epoch] = self.keys(source);
        let link = self.connected().await?;
        let mut reply: Vec<String> = self
            .ask(async |mut connection| {
                let script = Script::new(CHANGES);
                let mut ask = script.key(tokens);
                ask.key(changes).key(epoch).arg(since).invoke_async(&mut connection).await
            })
            .await?;
        let records = reply.split_off(reply.len().min(3));
        let number = |place: usize| reply.get(place).and_then(|number| number.parse().ok()).unwrap_or_default();
        let (last, from): (u64, u64) = (number(1), number(2));
        let epoch = reply.first().map(String::as_str).unwrap_or_default();
        Ok((state_of(&link.run_id, epoch), last, from == 0, records))
    }

    fn opened(&self, source: &SourceName, alias: &AccountAlias, value: &str) -> Result<Record, StoreError> {
        let place = owner(source, alias);
        let damaged = |why: &str| StoreError::Damaged { place: format!("Redis of {place}"), why: why.to_owned() };
        let (_, sealed) = value.split_once(':').ok_or_else(|| damaged("no revision"))?;
        let text = self.sealer.open(&place, sealed).map_err(|unopened| match unopened {
            Unopened::OtherKey => StoreError::OtherKey { place: place.clone() },
            Unopened::Damaged => damaged("it was changed, or belongs to another account"),
        })?;
        serde_json::from_str(&text).map_err(|_| damaged("not the JSON that weir writes"))
    }
}

/// What a record is bound to: moved to another account it does not open.
fn owner(source: &SourceName, alias: &AccountAlias) -> String {
    format!("{source}/{alias}")
}

#[async_trait]
impl TokenStore for RedisStore {
    async fn try_writing(&self) -> Result<(), StoreError> {
        // Short-lived and of nobody: no source has such a name.
        let key = format!("{}:tokens:{{?}}", self.prefix);
        self.ask(async |mut connection| {
            ::redis::cmd("SET").arg(key).arg(1).arg("PX").arg(1).exec_async(&mut connection).await
        })
        .await
    }

    fn place(&self) -> String {
        "Redis, sealed".to_owned()
    }

    async fn changes(&self, source: &SourceName, mark: Mark) -> Result<Changes, StoreError> {
        let (mut state, mut last, mut is_whole, mut sealed) = self.changes_since(source, mark.0).await?;
        if state != mark.1 && !is_whole {
            (state, last, is_whole, sealed) = self.changes_since(source, 0).await?;
        }
        let mut records = Vec::new();
        for pair in sealed.chunks_exact(2) {
            if let (Ok(alias), false) = (AccountAlias::new(pair[0].as_str()), pair[1].is_empty()) {
                let record = self.opened(source, &alias, &pair[1])?;
                records.push((alias, record));
            }
        }
        // As long as nothing has ever been stored nothing is ever lost, and nothing need be compared.
        let is_whole = is_whole && (mark != Mark(last, state));
        Ok(Changes { mark: Mark(last, state), is_whole, records })
    }

    async fn get(&self, source: &SourceName, alias: &AccountAlias) -> Result<Option<Record>, StoreError> {
        let [tokens, ..] = self.keys(source);
        let value: Option<String> = self
            .ask(async |mut connection| {
                ::redis::cmd("HGET").arg(tokens).arg(alias.as_str()).query_async(&mut connection).await
            })
            .await?;
        value.map(|value| self.opened(source, alias, &value)).transpose()
    }

    async fn put(&self, source: &SourceName, alias: &AccountAlias, record: &Record) -> Result<bool, StoreError> {
        let place = owner(source, alias);
        let damaged = |why: &str| StoreError::Damaged { place: place.clone(), why: why.to_owned() };
        let text = serde_json::to_string(record).map_err(|_| damaged("it cannot be written as JSON"))?;
        let sealed = self.sealer.seal(&place, &text).map_err(|_| damaged("it cannot be sealed"))?;
        let [tokens, changes, epoch] = self.keys(source);
        self.ask(async |mut connection| {
            let script = Script::new(PUT);
            let mut put = script.key(tokens);
            put.key(changes).key(epoch).arg(alias.as_str()).arg(record.revision).arg(sealed);
            put.arg(uuid::Uuid::now_v7().simple().to_string());
            put.invoke_async(&mut connection).await
        })
        .await
    }

    async fn claim(
        &self,
        source: &SourceName,
        alias: &AccountAlias,
        lasts: Duration,
    ) -> Result<Option<Claim>, StoreError> {
        let key = format!("{}:renewing:{alias}", self.keys(source)[0]);
        let owner = uuid::Uuid::now_v7().to_string();
        let millis = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX);
        let set: Option<String> = self
            .ask(async |mut connection| {
                let mut set = ::redis::cmd("SET");
                set.arg(&key).arg(&owner).arg("NX").arg("PX").arg(millis);
                set.query_async(&mut connection).await
            })
            .await?;
        Ok(set.map(|_| Claim { held: Held::Lease { key, owner }, lasts }))
    }

    async fn release(&self, claim: Claim) {
        let Held::Lease { key, owner } = claim.held else { return };
        // If it cannot be released it ends by itself.
        let _ = self
            .ask(async |mut connection| {
                Script::new(RELEASE).key(key).arg(owner).invoke_async::<i64>(&mut connection).await
            })
            .await;
    }
}
