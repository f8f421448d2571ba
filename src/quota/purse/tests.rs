//! A fleet that spends budgets of batches in virtual time while its ledger is flushed, set back and cut off, and workers
//! are killed.

use std::{collections::HashMap, sync::Arc};

use super::{
    ledger::Ledger,
    register::{Ask, News, TELL},
    *,
};
use crate::{
    message::BatchPart,
    quota::{
        Micros,
        money::{BudgetConfig, Money, OnBudget},
    },
    runtime::clock::Dice,
};

const BLOCK: u64 = 16;
const ALLOWED: u64 = 3_000;
const STEP: Duration = Duration::from_millis(50);
const BATCHES: [&str; 2] = ["one", "other"];

fn batch(name: &str) -> BatchId {
    BatchId::new(name).unwrap()
}

struct Worker {
    own: Own,
    holder: String,
    /// Cut off from the ledger until then.
    cut_until: Instant,
    is_alive: bool,
    /// What it wants to call for.
    wants: Vec<BatchId>,
}

struct World {
    dice: Dice,
    began_at: Instant,
    now: Instant,
    register: Register,
    /// As it was a while ago.
    backup: Register,
    run: u64,
    workers: Vec<Worker>,
    /// What was sent, and arrives when nobody waits for its answer any more.
    late: Vec<Input>,
    topic: Ledger,
    /// Calls by batch and holder.
    made: HashMap<(BatchId, String), u64>,
    /// The last loss of state, and the last kill: what happens to both in the same second nobody can know.
    lost_at: Instant,
    killed_at: Instant,
    faults: bool,
    seen: Seen,
}

/// What happened.
#[derive(Debug, Default)]
struct Seen {
    kills: u64,
    losses: u64,
    cuts: u64,
    asks: u64,
    calls: u64,
}

impl World {
    fn new(seed: u64, workers: usize) -> Self {
        let now = Instant::now();
        let mut world = Self {
            dice: Dice::seeded(seed),
            began_at: now,
            now,
            register: Register::default(),
            backup: Register::default(),
            run: 0,
            workers: Vec::new(),
            late: Vec::new(),
            topic: Ledger::default(),
            made: HashMap::new(),
            lost_at: now,
            killed_at: now,
            faults: true,
            seen: Seen::default(),
        };
        (0..workers).for_each(|_| world.join());
        world
    }

    fn join(&mut self) {
        let holder = format!("w{}", self.workers.len());
        let mut own = Own::new(holder.clone(), (ALLOWED, OnBudget::Stop), self.topic.clone(), None);
        own.set_block(BLOCK);
        let (cut_until, wants) = (self.now, Vec::new());
        self.workers.push(Worker { own, holder, cut_until, is_alive: true, wants });
    }

    fn happens(&self, share: f64) -> bool {
        self.faults && self.dice.fraction() < share
    }

    fn pick(&self, of: usize) -> usize {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let picked = (self.dice.fraction() * of as f64) as usize;
        picked.min(of - 1)
    }

    fn run(&mut self, span: Duration) {
        let until = self.now + span;
        while self.now < until {
            self.now += STEP;
            self.harm();
            for index in 0..self.workers.len() {
                self.work(index);
                self.talk(index);
            }
            let since = self.now - self.began_at;
            if since.as_millis().is_multiple_of(1_000) {
                self.report();
            }
            if since.as_millis().is_multiple_of(2_000) {
                self.backup = self.register.clone();
            }
            self.judge();
        }
    }

    fn harm(&mut self) {
        let apart = Duration::from_secs(3);
        let living: Vec<usize> = (0..self.workers.len()).filter(|index| self.workers[*index].is_alive).collect();
        let one = living[self.pick(living.len())];
        if self.now > self.lost_at + apart && self.happens(0.002) {
            self.workers[one].is_alive = false;
            (self.killed_at, self.seen.kills) = (self.now, self.seen.kills + 1);
            self.join();
        }
        if self.happens(0.005) {
            self.seen.cuts += 1;
            self.workers[one].own.lost();
            self.workers[one].cut_until = self.now + Duration::from_secs(20).mul_f64(self.dice.fraction());
        }
        if self.now > self.killed_at + apart && self.happens(0.002) {
            (self.lost_at, self.seen.losses) = (self.now, self.seen.losses + 1);
            // A flush, or a replica that had not got the end of it.
            if self.dice.fraction() < 0.5 {
                self.register = Register::default();
            } else {
                self.register = self.backup.clone();
                self.run += 1;
            }
            self.backup = self.register.clone();
        }
        if !self.late.is_empty() && (!self.faults || self.dice.fraction() < 0.1) {
            let input = self.late.remove(0);
            self.serve(&input);
        }
    }

    fn work(&mut self, index: usize) {
        if self.dice.fraction() < 0.01 {
            let wants = BATCHES.iter().filter(|_| self.dice.fraction() < 0.5).map(|name| batch(name)).collect();
            self.workers[index].wants = wants;
        }
        let worker = &mut self.workers[index];
        for batch in worker.wants.iter().filter(|_| worker.is_alive) {
            for _ in 0..3 {
                if self.dice.fraction() < 0.3 && worker.own.charge(batch, self.now) == Pay::Go {
                    let made = self.made.entry((batch.clone(), worker.holder.clone())).or_default();
                    (*made, self.seen.calls) = (*made + 1, self.seen.calls + 1);
                    if self.dice.fraction() < 0.01 {
                        worker.own.refund(batch, self.now);
                        *made -= 1;
                    }
                }
            }
        }
    }

    /// What there is to be said is said, if it arrives.
    fn talk(&mut self, index: usize) {
        let worker = &self.workers[index];
        if !worker.is_alive || worker.cut_until > self.now {
            return;
        }
        while let Some(input) = self.workers[index].own.say(self.now) {
            self.seen.asks += 1;
            if self.happens(0.01) {
                // Sooner or later, and then nobody is there for the answer.
                match self.pick(3) {
                    0 => {}
                    1 => self.late.push(input),
                    _ => drop(self.serve(&input)),
                }
                return self.workers[index].own.lost();
            }
            let output = self.serve(&input);
            self.workers[index].own.take(output, self.now);
        }
    }

    fn serve(&mut self, input: &Input) -> Output {
        let now: Micros = 1_000_000 + micros(self.now - self.began_at);
        let (output, news) = self.register.serve(now, &self.run.to_string(), input);
        for worker in self.workers.iter_mut().filter(|worker| worker.is_alive && worker.cut_until <= self.now) {
            for news in &news {
                match news {
                    News::Born(birth) => worker.own.born(birth),
                    News::Word((batch, holder, part)) => worker.own.heard(batch, holder, *part, self.now),
                }
            }
        }
        output
    }

    /// Kafka is there all the time.
    fn report(&mut self) {
        for worker in self.workers.iter_mut().filter(|worker| worker.is_alive) {
            self.topic.read(&worker.own.reports());
        }
        let all = self.topic.reports(9, ALLOWED);
        self.workers.iter_mut().for_each(|worker| worker.own.read(&all));
    }

    fn made(&self, name: &str) -> u64 {
        self.made.iter().filter(|((batch, _), _)| batch.as_str() == name).map(|(_, made)| made).sum()
    }

    fn judge(&self) {
        for name in BATCHES {
            assert!(self.made(name) <= ALLOWED, "{} calls for {name}: {:?}", self.made(name), self.seen);
        }
    }

    /// What the dead hold and have not spent.
    fn buried(&self, name: &str) -> u64 {
        let dead = self.workers.iter().filter(|worker| !worker.is_alive);
        let rest = dead.map(|worker| {
            let part = self.topic.part(&batch(name), &worker.holder);
            let made = self.made.get(&(batch(name), worker.holder.clone())).copied().unwrap_or_default();
            assert!(part.granted >= made && part.granted - made <= BLOCK, "{part:?} {made}");
            part.granted - made
        });
        rest.sum()
    }
}

#[test]
fn no_budget_is_exceeded_whatever_happens_and_only_the_blocks_of_the_dead_are_lost() {
    for seed in 0..24 {
        let mut world = World::new(seed, 2 + usize::try_from(seed % 3).unwrap());
        world.run(Duration::from_secs(90));
        world.faults = false;
        // Whoever has died is given up, and everybody wants everything.
        for _ in 0..6 {
            world.workers.iter_mut().for_each(|worker| worker.wants = BATCHES.map(batch).into());
            world.run(Duration::from_secs(40));
        }
        world.workers.iter_mut().for_each(|worker| worker.wants = BATCHES.map(batch).into());
        for name in BATCHES {
            let (made, buried) = (world.made(name), world.buried(name));
            assert_eq!(made + buried, ALLOWED, "seed {seed}, {name}: {made} calls, {buried} buried: {:?}", world.seen);
            for worker in world.workers.iter_mut().filter(|worker| worker.is_alive) {
                assert_eq!(worker.own.charge(&batch(name), world.now), Pay::Spent, "seed {seed}");
            }
        }
        assert!(world.seen.asks * 4 < world.seen.calls + 8_000, "{:?}", world.seen);
    }
}

#[test]
fn nothing_is_granted_in_a_new_state_before_everybody_had_the_time_to_tell() {
    let ask = |holder: &str, (keep, calls, want): (u64, u64, u64), seq: u64| Ask {
        batch: batch("one"),
        holder: holder.to_owned(),
        allowed: 40,
        keep,
        calls,
        want,
        seq,
    };
    let says = |register: &mut Register, now: Micros, read: bool, ask: Ask| {
        let input = Input { read, asks: vec![ask], ..Input::default() };
        register.serve(now, "run", &input).0.answers.remove(0)
    };
    let mut register = Register::default();
    assert_eq!(says(&mut register, 0, true, ask("a", (0, 0, 16), 1)).granted, 10, "nobody has ever called: at once");
    let mut register = Register::default();
    assert_eq!(says(&mut register, 0, false, ask("a", (10, 4, 16), 1)).granted, 10, "what it holds it keeps");
    assert_eq!(says(&mut register, TELL - 1, false, ask("b", (30, 30, 16), 1)).granted, 30);
    let late = says(&mut register, TELL, false, ask("a", (10, 10, 16), 2));
    assert_eq!((late.granted, late.is_spent), (10, true), "all of it is known now");
    // The same server's next run may know less than this one did.
    let input = Input { asks: vec![ask("c", (0, 0, 16), 1)], ..Input::default() };
    let (output, news) = register.serve(TELL, "next", &input);
    assert_eq!((output.answers[0].granted, output.answers[0].is_spent), (0, false));
    assert!(news.contains(&News::Born(output.birth)));
}

fn purse(past: &Past, on_budget: OnBudget) -> Arc<Purse> {
    let money = |text: &str| Money::parse(text).unwrap();
    let budget = BudgetConfig { per_batch: Some(money("100")), ..BudgetConfig::default() };
    Arc::new(Purse::new(&Budgets::new(money("1"), &budget, on_budget), past).unwrap())
}

fn charges(purse: &Purse, most: usize) -> usize {
    (0..most).take_while(|_| purse.charge(&batch("one")) == Pay::Go).count()
}

#[tokio::test(start_paused = true)]
async fn a_process_that_begins_again_goes_on_where_the_last_one_ended() {
    let first = purse(&Past::default(), OnBudget::Stop);
    assert_eq!(charges(&first, 30), 30);
    let mut killed = Past::default();
    killed.batches.read(&first.reports());
    first.close().await;
    let mut closed = Past::default();
    closed.batches.read(&first.reports());

    let next = purse(&closed, OnBudget::Stop);
    assert_eq!(charges(&next, 200), 70, "what was not spent was given back");
    assert_eq!(next.expect(&batch("one")), Pay::Spent);
    let next = purse(&killed, OnBudget::Stop);
    let left = charges(&next, 200);
    assert!((70 - 32..70).contains(&left), "{left}: the block of one that was killed counts as spent");
    assert_eq!(next.charge(&batch("one")), Pay::Wait, "it may still live");
    let since = Instant::now();
    while next.charge(&batch("one")) == Pay::Wait {
        next.changed().await;
    }
    assert_eq!((next.charge(&batch("one")), since.elapsed().as_secs()), (Pay::Spent, 60));
}

#[tokio::test(start_paused = true)]
async fn two_purses_of_one_ledger_share_a_budget_and_what_one_does_not_need_goes_to_the_other() {
    let purses = [purse(&Past::default(), OnBudget::Stop), purse(&Past::default(), OnBudget::Stop)];
    for purse in &purses {
        purse.share(BLOCK);
    }
    let (mut register, began_at) = (Register::default(), Instant::now());
    let mut made = [0, 0];
    while purses[1].expect(&batch("one")) != Pay::Spent {
        assert!(began_at.elapsed() < Duration::from_secs(60), "{made:?}");
        // The first one has work for a moment only.
        made[0] += if made[0] < 3 { charges(&purses[0], 1) } else { 0 };
        made[1] += charges(&purses[1], 1);
        for purse in &purses {
            while let Some(input) = purse.say() {
                let (output, news) = register.serve(micros(began_at.elapsed()), "", &Input { read: true, ..input });
                purse.take(output);
                for (news, purse) in news.iter().flat_map(|news| purses.iter().map(move |purse| (news, purse))) {
                    if let News::Word((batch, holder, part)) = news {
                        purse.heard(batch, holder, *part);
                    }
                }
            }
        }
        tokio::time::advance(STEP).await;
    }
    assert_eq!(made, [3, 97]);
    let parts = |report: &BatchReport| report.parts.iter().map(|part: &BatchPart| part.calls).sum::<u64>();
    assert_eq!(purses[0].reports().iter().map(parts).collect::<Vec<_>>(), [100], "each knows of all");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_ledger_that_only_listens_asks_again_by_himself_and_is_told() {
    let purse = purse(&Past::default(), OnBudget::Stop);
    purse.share(BLOCK);
    let (mut register, began_at) = (Register::default(), Instant::now());
    assert_eq!(purse.charge(&batch("one")), Pay::Wait);
    let serve = async {
        loop {
            purse.due().await;
            while let Some(input) = purse.say() {
                purse.take(register.serve(micros(began_at.elapsed()), "", &input).0);
            }
        }
    };
    tokio::select! {
        () = purse.changed() => {}
        () = serve => {}
    }
    assert_eq!(purse.charge(&batch("one")), Pay::Go);
    let took = began_at.elapsed();
    assert!((Duration::from_micros(TELL)..Duration::from_secs(6)).contains(&took), "{took:?}");
}
