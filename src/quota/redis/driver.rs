//! The task that talks to Redis.

use std::{sync::Arc, time::Duration};

use ::redis::{AsyncConnectionConfig, Client, PushInfo, PushKind, RedisResult, Value};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::{
    Shared,
    local::Step,
    offset::Offset,
    purse_wire,
    spending::Spending,
    wire::{self, Knowledge, PIECE, Reply, Server, What, Word, Writing},
};
use crate::{
    quota::{Aliases, Past, limit::Micros, plan::Plan, purse::register::News},
    runtime::{backoff::Backoff, clock::sleep_until_due},
};

/// A reply that takes longer is not waited for: its slots count as used.
const REPLY_WITHIN: Duration = Duration::from_secs(1);
/// Between two attempts to connect.
const RETRY: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
/// Before a state that another process is writing is looked at again.
const BUSY: Duration = Duration::from_millis(50);
/// How often what is spent of long budgets is remembered, at most.
const REMEMBER: Duration = Duration::from_secs(2);
/// For so long after it began a worker can say that nobody has called before, if somebody has looked.
const READ_LASTS: Duration = Duration::from_secs(10);
/// How often it is looked whether the connection still leads to the server that it led to: who has nothing to ask would
/// else not see that it is away.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How many leases are timed.
const TIMED: usize = 4_096;

#[allow(clippy::struct_excessive_bools, reason = "each is said to the script as it is")]
pub struct Driver {
    shared: Arc<Shared>,
    client: Client,
    key: String,
    plan: Plan,
    names: Vec<String>,
    ahead: Micros,
    /// This process has told Redis its plan.
    is_configured: bool,
    /// This process has had slots: whatever state is missing was lost.
    has_called: bool,
    /// Until when it holds that somebody has looked for reports of earlier calls.
    read_until: Option<Instant>,
    /// Nobody has called since `memory`.
    is_quiet: bool,
    /// What is spent of long budgets, as Redis said lately.
    memory: Option<String>,
    /// When to ask for it again; `None` = there is no such budget.
    remember_at: Option<Instant>,
    remember_every: Duration,
    /// What it has said so far, while it is asked piece by piece, and of how many accounts.
    hearing: Option<(serde_json::Value, usize)>,
    look_at: Instant,
}

impl Driver {
    pub fn new(
        shared: Arc<Shared>,
        client: Client,
        key: String,
        plan: Plan,
        names: Vec<String>,
        ahead: Micros,
        (aliases, past): (&Aliases, &Past),
    ) -> Self {
        // A few megabytes with 10,000 accounts.
        let accounts = u32::try_from(names.len()).unwrap_or(u32::MAX);
        let remember_every = REMEMBER.max(Duration::from_millis(5).saturating_mul(accounts));
        let remember_at = has_long_budgets(&plan).then(|| Instant::now() + remember_every);
        let known = past.is_known.then(|| Spending::of(past, &plan, aliases));
        let is_quiet = known.is_some() && past.is_quiet();
        let memory = known.as_ref().map(Spending::json);
        *shared.spending() = known.map(Arc::new);
        let (is_configured, has_called) = (false, past.is_known);
        let read_until = past.is_read.then(|| Instant::now() + READ_LASTS);
        Self {
            shared,
            client,
            key,
            plan,
            names,
            ahead,
            is_configured,
            has_called,
            read_until,
            is_quiet,
            memory,
            remember_at,
            remember_every,
            hearing: None,
            look_at: Instant::now(),
        }
    }

    /// Works until it is aborted.
    pub async fn run(mut self) {
        let mut retry = RETRY;
        loop {
            let lost = match timeout(REPLY_WITHIN * 3, self.connect()).await {
                Ok(Ok(mut server)) => match self.introduce(&mut server).await {
                    Ok(()) => {
                        info!(key = self.key, "connected to Redis");
                        retry.reset();
                        self.shared.local().connected(true, Instant::now());
                        self.serve(&mut server).await
                    }
                    Err(error) => error,
                },
                Ok(Err(error)) => error,
                Err(_) => ::redis::RedisError::from((::redis::ErrorKind::Io, "no answer in time")),
            };
            self.disconnected();
            warn!(
                key = self.key,
                error = %lost,
                "lost the connection to Redis: calls stop in up to {} s, when the leased slots are used, until it is back",
                super::AHEAD.as_secs()
            );
            sleep(retry.failed()).await;
        }
    }

    fn disconnected(&self) {
        if let Some(purse) = self.shared.purse.get() {
            purse.lost();
        }
        self.shared.local().connected(false, Instant::now());
    }

    async fn connect(&mut self) -> RedisResult<Server> {
        let shared = Arc::clone(&self.shared);
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(REPLY_WITHIN))
            .set_response_timeout(Some(REPLY_WITHIN))
            .set_push_sender(move |push: PushInfo| -> Result<(), std::convert::Infallible> {
                hear(&shared, &push);
                Ok(())
            });
        let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut server = Server::new(connection, self.key.clone()).await?;
        let worker = uuid::Uuid::now_v7().to_string();
        server.subscribe(&worker).await?;
        // Perhaps another machine, with another clock.
        self.shared.local().offset = None;
        self.shared.local().worker = worker;
        self.hearing = None;
        Ok(server)
    }

    /// Writes the plan, if this process has not.
    async fn introduce(&mut self, server: &mut Server) -> RedisResult<()> {
        if self.is_configured { Ok(()) } else { self.configure(server).await }
    }

    async fn configure(&mut self, server: &mut Server) -> RedisResult<()> {
        let plan = (&self.plan, self.names.as_slice());
        let knowledge = Knowledge {
            is_known: self.has_called,
            is_read: self.read_until.is_some_and(|until| Instant::now() < until),
            // Later on somebody may have called.
            is_quiet: std::mem::take(&mut self.is_quiet),
            memory: self.memory.as_deref(),
        };
        let worker = self.shared.local().worker.clone();
        let writing = Writing::new(plan, self.ahead, knowledge, &worker);
        let reply = self.write(server, &writing).await?;
        self.is_configured = true;
        // Of later states nobody can say that nobody has called before them.
        self.read_until = None;
        self.hearing = None;
        if let What::Configured(birth) = reply.what {
            let mut local = self.shared.local();
            if birth != local.birth {
                local.tell_again(Instant::now());
            }
            local.birth = birth;
        }
        Ok(())
    }

    /// Writes a plan, piece by piece, when nobody else writes one.
    async fn write(&self, server: &mut Server, writing: &Writing) -> RedisResult<Reply> {
        // Somebody else has begun anew meanwhile, or Redis has lost it.
        let mut attempts = 20;
        let mut reply = server.configure(writing).await?;
        let mut written = 0;
        loop {
            self.learn(&reply);
            reply = match reply.what {
                What::Loading => {
                    let first = written;
                    written = (first + PIECE).min(writing.len());
                    server.write_accounts(writing, first).await?
                }
                What::Busy => {
                    sleep(BUSY).await;
                    server.configure(writing).await?
                }
                What::Unknown { .. } if attempts > 0 => {
                    (attempts, written) = (attempts - 1, 0);
                    sleep(BUSY).await;
                    server.configure(writing).await?
                }
                What::Unknown { .. }
                | What::Done
                | What::Configured(_)
                | What::Slots { .. }
                | What::Memory(_)
                | What::Holds { .. } => return Ok(reply),
            };
        }
    }

    /// Asks for the next piece of what is spent, and for another one at once if it was not the last.
    async fn remember(&mut self, server: &mut Server) -> RedisResult<()> {
        let birth = self.shared.local().birth.clone();
        let first = self.hearing.as_ref().map_or(0, |(_, heard)| *heard);
        let end = (first + PIECE).min(self.names.len());
        let reply = server.remember(&birth, &self.names[first..end], first == 0).await?;
        if let What::Memory(memory) = &reply.what
            && let Ok(mut memory) = serde_json::from_str::<serde_json::Value>(memory)
        {
            let mut heard = match self.hearing.take() {
                Some((mut heard, _)) => {
                    if let (Some(all), Some(more)) =
                        (heard["accounts"].as_object_mut(), memory["accounts"].as_object_mut())
                    {
                        all.append(more);
                    }
                    heard
                }
                None => memory.take(),
            };
            self.learn(&reply);
            if end < self.names.len() {
                self.hearing = Some((heard, end));
            } else {
                self.remember_at = Some(Instant::now() + self.remember_every);
                self.keep(heard.take()).await;
            }
            return Ok(());
        }
        self.hearing = None;
        self.remember_at = Some(Instant::now() + self.remember_every);
        self.take(server, reply).await
    }

    /// Keeps what is spent.
    async fn keep(&mut self, memory: serde_json::Value) {
        let (plan, names) = (self.plan.clone(), self.names.clone());
        // A few megabytes with 10,000 accounts.
        let read = tokio::task::spawn_blocking(move || {
            let memory = memory.to_string();
            (Spending::read(&memory, &plan, &names), memory)
        });
        if let Ok((spending, memory)) = read.await {
            self.memory = Some(memory);
            *self.shared.spending() = spending.map(Arc::new);
        }
    }

    /// Does what there is to do, until the connection fails.
    async fn serve(&mut self, server: &mut Server) -> ::redis::RedisError {
        loop {
            if self.has_called
                && self.remember_at.is_some_and(|at| at <= Instant::now())
                && let Err(error) = self.remember(server).await
            {
                return error;
            }
            if self.look_at <= Instant::now() {
                self.look_at = Instant::now() + LOOK_EVERY;
                if let Err(error) = server.look().await {
                    return error;
                }
            }
            if let Some(purse) = self.shared.purse.get()
                && let Some(input) = purse.say()
            {
                match server.purse(&input).await {
                    Ok(reply) => {
                        self.shared.counts().operations += 1;
                        purse.take(reply);
                    }
                    Err(error) => return error,
                }
            }
            let step = self.shared.local().step(Instant::now());
            let done = match step {
                Step::Wait(until) => {
                    self.wait(until).await;
                    continue;
                }
                Step::Hold(holds) => {
                    let reply = server.hold(&holds).await;
                    reply.inspect(|reply| {
                        if !matches!(reply.what, What::Unknown { .. }) {
                            self.shared.local().told(holds.len());
                        }
                    })
                }
                Step::Pace(paces) => {
                    let worker = self.shared.local().worker.clone();
                    let reply = server.pace(&worker, &paces).await;
                    reply.inspect(|reply| {
                        if !matches!(reply.what, What::Unknown { .. }) {
                            self.shared.local().told_paces(paces.len());
                        }
                    })
                }
                Step::Holds(ask) => server.holds(&ask).await,
                Step::Lease(ask) => server.lease(&ask).await.inspect(|reply| self.time(reply)),
            };
            let done = match done {
                Ok(reply) => self.take(server, reply).await,
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                return error;
            }
        }
    }

    async fn wait(&self, until: Option<Instant>) {
        let purse = async {
            match self.shared.purse.get() {
                Some(purse) => purse.due().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.shared.wake.notified() => {}
            () = purse => {}
            () = sleep_until(self.look_at) => {}
            () = sleep_until_due(until) => {}
            () = sleep_until_due(self.remember_at), if self.has_called => {}
        }
    }

    async fn take(&mut self, server: &mut Server, reply: Reply) -> RedisResult<()> {
        self.learn(&reply);
        match reply.what {
            What::Unknown { ahead } => {
                if ahead > 0 {
                    let ahead = Duration::from_micros(ahead);
                    warn!(
                        key = self.key,
                        ?ahead,
                        "Redis' clock is behind the quota state: it jumped ahead before, or was set back. Rebuilding \
                         the state from what workers know; calls paused for some seconds"
                    );
                } else {
                    warn!(
                        key = self.key,
                        "quota state missing in Redis; rebuilding it from what workers and reports know, calls paused meanwhile"
                    );
                }
                self.configure(server).await?;
            }
            What::Slots { slots, next_at, seq } => {
                self.has_called |= !slots.is_empty();
                self.shared.local().receive(slots, next_at, seq, reply.received);
            }
            What::Holds { holds, seq } => self.shared.local().replace_holds(&holds, seq, reply.received),
            What::Memory(_) | What::Configured(_) | What::Busy | What::Loading | What::Done => {}
        }
        Ok(())
    }

    /// What a reply says about the clocks.
    fn learn(&self, reply: &Reply) {
        self.shared.counts().operations += 1;
        let mut local = self.shared.local();
        match &mut local.offset {
            Some(offset) => offset.learn(reply.sent, reply.received, reply.shown),
            None => local.offset = Some(Offset::new(reply.sent, reply.received, reply.shown)),
        }
    }

    fn time(&self, reply: &Reply) {
        let mut counts = self.shared.counts();
        if counts.leases.len() == TIMED {
            counts.leases.pop_front();
        }
        counts.leases.push_back(reply.received - reply.sent);
    }
}

/// Whether there are budgets that a worker cannot wait out if they are forgotten.
fn has_long_budgets(plan: &Plan) -> bool {
    let accounts = plan.accounts.iter().map(|account| &account.rules);
    let mut rules = accounts.chain(&plan.addresses).chain([&plan.source]);
    rules.any(|rules| rules.budgets.iter().any(|budget| !budget.learns))
}

/// Takes an announcement of a hold.
fn hear(shared: &Shared, push: &PushInfo) {
    if push.kind != PushKind::Message {
        return;
    }
    if let Some(Value::BulkString(payload)) = push.data.last()
        && let Some(word) = wire::word(payload)
    {
        hear_word(shared, word);
    } else if let Some(Value::BulkString(payload)) = push.data.last()
        && let Some(told) = wire::announced(payload)
    {
        shared.local().announced(&told, Instant::now());
        shared.wake.notify_one();
    } else if let Some(Value::BulkString(payload)) = push.data.last()
        && let Some(paced) = wire::paced(payload)
    {
        shared.local().paced(&paced, Instant::now());
    } else if let Some(Value::BulkString(payload)) = push.data.last()
        && let Some(birth) = wire::born(payload)
    {
        shared.local().born(&birth, Instant::now());
        shared.wake.notify_one();
    } else if let Some(Value::BulkString(payload)) = push.data.last()
        && let Some(purse) = shared.purse.get()
        && let Some(news) = purse_wire::heard(payload)
    {
        match news {
            News::Born(birth) => purse.born(&birth),
            News::Word((batch, holder, part)) => purse.heard(&batch, &holder, part),
        }
    }
}

/// Takes what this worker alone is told.
fn hear_word(shared: &Shared, word: Word) {
    let mut local = shared.local();
    // Under the lock: what is passed on from here on is not due before somebody else looks.
    let now = Instant::now();
    match word {
        Word::Pass(asked) => local.pass(&asked, now),
        Word::Passed { slots } => {
            let slots = slots.into_iter().filter_map(|(name, at, address)| Some((name, at.parse().ok()?, address)));
            local.receive_passed(slots.collect(), now);
        }
    }
    drop(local);
    shared.wake.notify_one();
}
