//! The task that talks to Redis.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use ::redis::{
    AsyncConnectionConfig, Client, Pipeline, PushInfo, PushKind, RedisError, RedisResult, Value,
    aio::MultiplexedConnection,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{Read, Shared, announced, write::Write};
use crate::{
    cache::key::Key,
    runtime::{
        backoff::Backoff,
        clock::{Clock, Timestamp},
        redis_server,
    },
};

/// Questions of one trip, at most.
const BATCH: usize = 256;
/// Changes of one trip, at most: each may be some megabytes long.
const CHANGES: usize = 64;
/// Trips of questions under way at once, at most.
const TRIPS: usize = 8;
/// Between two attempts to connect.
const RETRY: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
/// Connecting takes a few trips.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// How often it is looked whether the connection still leads to the server that it led to.
const PROBE: Duration = Duration::from_secs(1);
/// So much older than the last sign of the connection may be what was not heard: clocks differ, and the announcement of
/// an answer is as old as that.
const MISSED: Duration = Duration::from_secs(60);
/// Changes that wait for Redis to be back, at most; of more the oldest are lost.
const OWED: usize = 10_000;
/// Beyond so many only those wait that others have to hear of: each of the rest costs a call at most.
const OWED_OTHERS: usize = 1_000;
/// So many trips in a row may take too long before the connection is given up: a busy machine stands still for a moment,
/// too. Whoever asked goes on meanwhile.
const SLOW_TRIPS: u32 = 2;

pub struct Driver {
    client: Client,
    shared: Arc<Shared>,
    reads: mpsc::Receiver<Read>,
    writes: mpsc::Receiver<Write>,
    timeout: Duration,
    /// What others have to hear of, and has not been written yet.
    owed: VecDeque<Write>,
    /// Trips in a row that have taken too long.
    slow: u32,
    /// Up to when all announcements have been heard; nothing before the first connection.
    heard_until: Option<Timestamp>,
    clock: Clock,
    /// It was said that Redis is away.
    is_said: bool,
}

/// A connection, and the run of the server that it leads to; empty if we may not ask.
struct Link {
    connection: MultiplexedConnection,
    run_id: String,
}

impl Driver {
    pub fn new(
        client: Client,
        shared: Arc<Shared>,
        reads: mpsc::Receiver<Read>,
        writes: mpsc::Receiver<Write>,
        timeout: Duration,
    ) -> Self {
        Self {
            client,
            shared,
            reads,
            writes,
            timeout,
            owed: VecDeque::new(),
            slow: 0,
            heard_until: None,
            clock: Clock::System,
            is_said: false,
        }
    }

    /// Works until it is aborted.
    pub async fn run(mut self) {
        let mut retry = RETRY;
        loop {
            let lost = match timeout(CONNECT_WITHIN, self.connect()).await {
                Ok(Ok(link)) => {
                    info!("connected to Redis for the cache");
                    (retry, self.slow, self.is_said) = (RETRY, 0, false);
                    self.shared.is_up.store(true, Ordering::Relaxed);
                    self.serve(link).await
                }
                Ok(Err(error)) => error,
                Err(_) => RedisError::from((::redis::ErrorKind::Io, "no answer in time")),
            };
            self.shared.is_up.store(false, Ordering::Relaxed);
            if !std::mem::replace(&mut self.is_said, true) {
                warn!(error = %lost, "the cache lost its connection to Redis; each process uses its own memory until Redis is back");
            }
            self.decline();
            sleep(retry.failed()).await;
        }
    }

    /// Answers what waits with "unknown", and puts aside what must be said later.
    fn decline(&mut self) {
        while self.reads.try_recv().is_ok() {}
        while let Ok(write) = self.writes.try_recv() {
            self.owe(write);
        }
    }

    fn owe(&mut self, write: Write) {
        if write.matters() || (matches!(write, Write::Put { .. }) && self.owed.len() < OWED_OTHERS) {
            if self.owed.len() >= OWED {
                self.owed.pop_front();
                self.shared.counts.unwritten.fetch_add(1, Ordering::Relaxed);
            }
            self.owed.push_back(write);
        }
    }

    async fn connect(&mut self) -> RedisResult<Link> {
        let near = self.shared.near.clone();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_WITHIN))
            .set_response_timeout(Some(self.timeout))
            .set_push_sender(move |push: PushInfo| -> Result<(), Infallible> {
                if push.kind == PushKind::Message
                    && let Some(Value::BulkString(payload)) = push.data.last()
                    && let Some((key, at)) = announced(payload)
                {
                    near.drop_older(&key, at);
                }
                Ok(())
            });
        let mut connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        let run_id = redis_server::run_id_if_told(&mut connection).await?;
        connection.subscribe(self.shared.channel()).await?;
        self.catch_up(&mut connection).await?;
        Ok(Link { connection, run_id })
    }

    /// Hears of what others have dropped while there was no connection, or one to a server that was demoted.
    async fn catch_up(&mut self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let now = self.clock.now();
        if let Some(heard_until) = self.heard_until {
            let since = heard_until.as_millis().saturating_sub(MISSED.as_millis().try_into().unwrap_or(i64::MAX));
            let mut missed = ::redis::cmd("ZRANGEBYSCORE");
            let missed: Vec<Vec<u8>> =
                missed.arg(self.shared.drops_key()).arg(since).arg("+inf").query_async(connection).await?;
            for (key, at) in missed.iter().filter_map(|text| announced(text)) {
                self.shared.near.drop_older(&key, at);
            }
        }
        self.heard_until = Some(now);
        Ok(())
    }

    /// Does what is asked for, until the connection fails.
    async fn serve(&mut self, Link { connection, run_id: known }: Link) -> RedisError {
        // Tasks of their own: answers do not wait until something long is written.
        let mut trips = JoinSet::new();
        let (mut asked, mut changes) = (Vec::new(), Vec::new());
        let mut renew = interval(self.shared.claim / 3);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probe = interval(PROBE);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if !self.owed.is_empty() {
                let owed: Vec<_> = (0..CHANGES).map_while(|_| self.owed.pop_front()).collect();
                let done = self.write(&connection, owed).await;
                if let Some(error) = self.judge(done) {
                    return error;
                }
            }
            tokio::select! {
                Some(done) = trips.join_next() => {
                    // One that was cut off has told nobody anything; so it ends, too, when the process does.
                    if let Some(error) = done.ok().and_then(|done| self.judge(done)) {
                        return error;
                    }
                }
                _ = self.reads.recv_many(&mut asked, BATCH), if trips.len() < TRIPS => {
                    trips.spawn(answer(connection.clone(), Arc::clone(&self.shared), std::mem::take(&mut asked)));
                }
                _ = self.writes.recv_many(&mut changes, CHANGES) => {
                    // In turn: a release must not overtake the answer before it.
                    let done = self.write(&connection, std::mem::take(&mut changes)).await;
                    if let Some(error) = self.judge(done) {
                        return error;
                    }
                }
                _ = renew.tick() => {
                    let claims: Vec<_> = self.shared.claims().iter().map(|(k, t)| (k.clone(), t.clone())).collect();
                    let renewals = claims.into_iter().map(|(key, token)| Write::Renew { key, token }).collect();
                    let done = self.write(&connection, renewals).await;
                    if let Some(error) = self.judge(done) {
                        return error;
                    }
                }
                _ = probe.tick() => {
                    let now = self.clock.now();
                    let looked = redis_server::run_id_if_told(&mut connection.clone()).await;
                    match &looked {
                        Ok(run_id) if *run_id == known => self.heard_until = Some(now),
                        // Behind the same address, as a proxy or a load balancer has it.
                        Ok(_) => return RedisError::from((::redis::ErrorKind::Io, "another server answers now")),
                        Err(_) => {}
                    }
                    if let Some(error) = self.judge(looked.map(drop)) {
                        return error;
                    }
                }
            }
        }
    }

    /// Whether the connection is lost with this trip.
    fn judge(&mut self, done: RedisResult<()>) -> Option<RedisError> {
        match done {
            Ok(()) => {
                self.slow = 0;
                None
            }
            Err(error) if error.is_timeout() && self.slow < SLOW_TRIPS => {
                self.slow += 1;
                None
            }
            Err(error) if redis_server::is_lost(&error) => Some(error),
            // It is loading, or full: a new connection would hear the same.
            Err(error) => {
                debug!(%error, "Redis refused a command of the cache");
                self.shared.counts.unanswered.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Writes these changes in one trip. If it fails, those that matter are owed.
    async fn write(&mut self, connection: &MultiplexedConnection, changes: Vec<Write>) -> RedisResult<()> {
        let mut pipeline = Pipeline::new();
        for change in &changes {
            change.add_to(&mut pipeline, &self.shared);
        }
        if !pipeline.is_empty() {
            self.shared.counts.trips.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = pipeline.query_async::<()>(&mut connection.clone()).await {
                for change in changes.into_iter().filter(|_| redis_server::is_lost(&error)) {
                    self.owe(change);
                }
                return Err(error);
            }
        }
        for change in changes {
            if let Write::Flush(done) = change {
                let _ = done.send(());
            }
        }
        Ok(())
    }
}

/// Answers these questions in two trips at most.
async fn answer(mut connection: MultiplexedConnection, shared: Arc<Shared>, asked: Vec<Read>) -> RedisResult<()> {
    let (mut gets, mut claims) = (Vec::new(), Vec::new());
    for read in asked {
        match read {
            Read::Get(key, reply) => gets.push((key, reply)),
            Read::Claim(key, token, reply) => claims.push((key, token, reply)),
        }
    }
    if !gets.is_empty() {
        get(&mut connection, &shared, gets).await?;
    }
    if claims.is_empty() { Ok(()) } else { claim(&mut connection, &shared, claims).await }
}

type Reply<T> = oneshot::Sender<T>;

/// A claim that is wanted: for what, with which token, and who wants to know.
type Wish = (Key, String, Reply<(bool, Option<Vec<u8>>)>);

async fn get(
    connection: &mut MultiplexedConnection,
    shared: &Shared,
    gets: Vec<(Key, Reply<Option<Vec<u8>>>)>,
) -> RedisResult<()> {
    let mut command = ::redis::cmd("MGET");
    for (key, _) in &gets {
        command.arg(shared.answer_key(key));
    }
    shared.counts.trips.fetch_add(1, Ordering::Relaxed);
    let found: Vec<Option<Vec<u8>>> = command.query_async(connection).await?;
    for ((_, reply), bytes) in gets.into_iter().zip(found) {
        // Whoever asked may have gone on meanwhile.
        let _ = reply.send(bytes);
    }
    Ok(())
}

async fn claim(connection: &mut MultiplexedConnection, shared: &Shared, claims: Vec<Wish>) -> RedisResult<()> {
    let millis = u64::try_from(shared.claim.as_millis()).unwrap_or(u64::MAX);
    let mut pipeline = Pipeline::new();
    for (key, token, _) in &claims {
        pipeline.cmd("SET").arg(shared.claim_key(key)).arg(token).arg("NX").arg("PX").arg(millis);
        // After the claim: whoever had it before has written its answer by now.
        pipeline.cmd("GET").arg(shared.answer_key(key));
    }
    shared.counts.trips.fetch_add(1, Ordering::Relaxed);
    let replies: Vec<Value> = pipeline.query_async(connection).await?;
    for ((key, token, reply), pair) in claims.into_iter().zip(replies.chunks_exact(2)) {
        let is_ours = pair[0] == Value::Okay;
        let bytes: Option<Vec<u8>> = ::redis::from_redis_value_ref(&pair[1]).unwrap_or_default();
        if reply.send((is_ours, bytes)).is_err() && is_ours {
            shared.write(Write::Release { key, token });
        }
    }
    Ok(())
}
