//! Budgets of batches on a real Redis that is flushed, stopped and restarted: what a fleet spends is never more, and
//! what nobody holds any more is not lost.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use redis::Value;
use tokio::{task::JoinSet, time::Instant};
use weir::{
    message::{BatchId, SourceName},
    quota::{
        Past, Pay, Purse, Quota,
        money::{BudgetConfig, Budgets, Money, OnBudget},
        purse::{
            ledger::Part,
            register::{Ask, Input, Output, Register, TELL},
        },
        redis::Redis,
    },
    runtime::clock::Dice,
};

use crate::{
    stack::{eventually, unique},
    workers::{Fleet, Server},
};

const ALLOWED: u64 = 2_000;

fn batch(name: &str) -> BatchId {
    BatchId::new(name).unwrap()
}

fn purse(past: &Past, on_budget: OnBudget) -> Arc<Purse> {
    let money = |text: &str| Money::parse(text).unwrap();
    let budget = BudgetConfig { per_batch: Some(money(&ALLOWED.to_string())), ..BudgetConfig::default() };
    Arc::new(Purse::new(&Budgets::new(money("1"), &budget, on_budget), past).unwrap())
}

/// A worker that spends as fast as it may.
struct Spender {
    purse: Arc<Purse>,
    quota: Arc<Redis>,
    made: Arc<AtomicU64>,
    /// Nothing is left.
    is_done: Arc<AtomicU64>,
    task: JoinSet<()>,
}

impl Spender {
    fn start(fleet: &Fleet, past: &Past) -> Self {
        let (purse, quota) = (purse(past, OnBudget::Stop), fleet.quota_after(past));
        quota.fund(&purse);
        let (made, is_done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut task = JoinSet::new();
        task.spawn(spend(Arc::clone(&purse), Arc::clone(&made), Arc::clone(&is_done)));
        Self { purse, quota, made, is_done, task }
    }

    fn made(&self) -> u64 {
        self.made.load(Relaxed)
    }

    /// As if the process were gone; what it had spent.
    async fn kill(mut self) -> u64 {
        self.task.shutdown().await;
        drop(self.quota);
        self.made.load(Relaxed)
    }

    async fn spends(&self, calls: u64) {
        let from = self.made();
        eventually("a worker spends", async || (self.made() >= from + calls).then_some(())).await;
    }
}

async fn spend(purse: Arc<Purse>, made: Arc<AtomicU64>, is_done: Arc<AtomicU64>) {
    loop {
        match purse.charge(&batch("one")) {
            Pay::Go => {
                made.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Pay::Wait => purse.changed().await,
            Pay::Spent => {
                is_done.store(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn fleet(server: &Server) -> Fleet {
    Fleet::start(&server.url(), Fleet::limits(), 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_spend_a_batchs_budget_together_though_redis_forgets_it_stops_and_restarts() {
    let mut server = Server::start();
    let fleet = fleet(&server);
    let fresh = Past { is_read: true, ..Past::default() };
    let workers = [Spender::start(&fleet, &fresh), Spender::start(&fleet, &fresh)];
    for worker in &workers {
        worker.spends(100).await;
    }
    server.flush().await;
    for worker in &workers {
        // More than any block: it has got another one in the new state.
        worker.spends(200).await;
    }
    server.signal("-STOP");
    tokio::time::sleep(Duration::from_secs(2)).await;
    server.signal("-CONT");
    workers[0].spends(100).await;
    server.restart().await;
    eventually("nothing is left for either", async || {
        workers.iter().all(|worker| worker.is_done.load(Relaxed) == 1).then_some(())
    })
    .await;
    let made = workers.iter().map(Spender::made).sum::<u64>();
    assert_eq!(made, ALLOWED, "never more, and all of it");
    let operations: u64 = workers.iter().map(|worker| worker.quota.counts().operations).sum();
    assert!(operations * 5 < ALLOWED, "{operations} operations");
    // Each knows of all.
    for worker in &workers {
        let report = worker.purse.reports().remove(0);
        assert_eq!(report.parts.iter().map(|part| part.calls).sum::<u64>(), ALLOWED);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_its_block_at_most_and_one_that_ends_costs_nothing() {
    let server = Server::start();
    let fleet = fleet(&server);
    let fresh = Past { is_read: true, ..Past::default() };
    let [killed, ending, last] = [(); 3].map(|()| Spender::start(&fleet, &fresh));
    for worker in [&killed, &ending, &last] {
        worker.spends(60).await;
    }
    let block = {
        let report = killed.purse.reports().remove(0);
        let made = killed.made();
        report.parts.iter().map(|part| part.granted).max().unwrap() - made.min(60)
    };
    let mut made = killed.kill().await;
    let Spender { purse, quota, made: of_ending, mut task, .. } = ending;
    task.shutdown().await;
    purse.close().await;
    drop(quota);
    // Redis forgets too: the last one knows of both.
    server.flush().await;
    let deadline = Instant::now() + Duration::from_secs(150);
    while last.is_done.load(Relaxed) == 0 {
        assert!(Instant::now() < deadline, "{} of {ALLOWED}", last.made());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    made += of_ending.load(Relaxed) + last.made();
    assert!(made <= ALLOWED && made + block >= ALLOWED, "{made} of {ALLOWED}, block {block}");
}

/// One connection that says to the script what a register of the same steps is told.
struct Both {
    connection: redis::aio::MultiplexedConnection,
    script: redis::Script,
    key: String,
    register: Register,
    now: u64,
}

impl Both {
    async fn say(&mut self, input: &Input) -> (Output, Vec<Value>) {
        let text = serde_json::to_string(input).unwrap();
        let reply: Vec<Value> =
            self.script.key(&self.key).arg("run").arg(text).invoke_async(&mut self.connection).await.unwrap();
        self.now += 1;
        (self.register.serve(self.now, "run", input).0, reply)
    }
}

#[tokio::test]
async fn the_script_and_the_register_answer_the_same() {
    let server = Server::start();
    let client = redis::Client::open(server.url()).unwrap();
    let connection = eventually("Redis answers", async || client.get_multiplexed_async_connection().await.ok()).await;
    let source = SourceName::new("ali1688").unwrap();
    for read in [true, false] {
        let script = redis::Script::new(include_str!("../../src/quota/purse.lua"));
        let key = format!("{}:quota:{{{source}}}", unique("test"));
        let (register, connection) = (Register::default(), connection.clone());
        let mut both = Both { connection, script, key, register, now: TELL };
        let (dice, mut seqs) = (Dice::seeded(11), HashMap::new());
        let pick = |of: u64| u64::try_from(dice.bits() % u128::from(of)).unwrap();
        let mut seen = [0, 0];
        for _ in 0..600 {
            let holder = format!("w{}", pick(3));
            let seq = seqs.entry(holder.clone()).or_insert(0_u64);
            // Sometimes one that was overtaken.
            *seq = if pick(5) == 0 { seq.saturating_sub(1) } else { *seq + 1 };
            let (calls, name) = (pick(90), batch(["one", "other"][usize::try_from(pick(2)).unwrap()]));
            let keep = calls + pick(20);
            let want = pick(2) * pick(64);
            let ask = Ask { batch: name.clone(), holder, allowed: 200, keep, calls, want, seq: *seq };
            let part = Part { granted: pick(40), calls: pick(20), seq: pick(5) };
            let told = if pick(4) == 0 { vec![(name, format!("w{}", pick(4)), part)] } else { Vec::new() };
            let input = Input { read, all: pick(50) == 0, told, asks: vec![ask] };
            let (expected, reply) = both.say(&input).await;
            let answer = &expected.answers[0];
            let (is_spent, name) = (i64::from(answer.is_spent), answer.batch.as_str().as_bytes().to_vec());
            let numbers = [answer.seq, answer.granted].map(|n| i64::try_from(n).unwrap());
            let [Value::BulkString(_), Value::Array(answers), Value::Array(all)] = &reply[..] else {
                panic!("{reply:?}")
            };
            let calls = i64::try_from(answer.calls).unwrap();
            let line = [numbers[0], numbers[1], is_spent, calls].map(Value::Int);
            assert_eq!(answers, &[Value::Array([vec![Value::BulkString(name)], line.to_vec()].concat())], "{input:?}");
            assert_eq!(all.len(), expected.all.len());
            seen[usize::from(answer.is_spent)] += 1;
        }
        assert_eq!(seen.iter().all(|seen| *seen > 20), read, "{seen:?}: a new state is closed for a while");
    }
}
