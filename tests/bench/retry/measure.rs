//! The measurements, in their order: each finds the crowd of the one before still waiting.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::{
    floor,
    machine::memory_of,
    process::{Bench, Process},
    scene::{Scene, now_ms},
    table::{Figure, Goal, Table},
};

/// When the crowd is due: long after the benchmark is over.
const LATER_MS: i64 = 8 * 3_600_000;

/// Marks of transactions that no reader passes.
const MARKS: i64 = 16;

/// Delays of which the lateness is measured, in milliseconds, and how many requests fail with each of them per second.
const DELAYS: [(&str, i64, &str, Goal); 3] = [
    ("1s", 1_000, "lateness p99 after 1 s", Goal::None),
    ("5s", 5_000, "lateness p99 after 5 s", Goal::AtMost(250.0)),
    ("30s", 30_000, "lateness p99 after 30 s", Goal::None),
];
const PER_SECOND: usize = 100;

pub struct Measurement<'a> {
    bench: &'a Bench,
    scene: &'a mut Scene,
    table: &'a mut Table,
    retry: Process,
}

#[allow(clippy::cast_precision_loss, reason = "counts and milliseconds of a run")]
fn rate(count: usize, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

#[allow(clippy::cast_precision_loss, reason = "milliseconds")]
fn percentile(sorted: &[i64], share: usize) -> f64 {
    sorted.get((sorted.len().max(1) - 1) * share / 100).map_or(0.0, |value| *value as f64)
}

impl<'a> Measurement<'a> {
    pub fn start(bench: &'a Bench, scene: &'a mut Scene, table: &'a mut Table) -> Result<Self> {
        let retry = bench.retry(&scene.own)?;
        Ok(Self { bench, scene, table, retry })
    }

    /// Lets so many wait; the memory that this takes, beside that of the same process before anybody has failed.
    pub async fn crowd(&mut self, count: usize) -> Result<()> {
        println!("Memory: {count} wait");
        // The first has come when it is ready.
        self.scene.fail("first", 1, now_ms())?;
        self.scene.come_again("first", 1, || self.retry.check())?;
        let idle = memory_of(self.retry.pid())?;

        let since = Instant::now();
        let mut left = count;
        while left > 0 {
            // Not faster than is dealt with: the broker's memory is not what is measured.
            let some = left.min(20_000);
            self.scene.fail("crowd", some, now_ms() + LATER_MS)?;
            left -= some;
            self.caught_up(100_000).await?;
        }
        self.caught_up(MARKS).await?;
        let took = since.elapsed();
        // What is still on its way through the group's last transaction.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let memory = memory_of(self.retry.pid())?;
        let megabytes = |what, goal, value, floor| Figure { what, unit: "MB", goal, value: Some(value), floor };
        self.table.add(megabytes("resident, all waiting", Goal::AtMost(50.0), memory.now, Some(idle.now)));
        self.table.add(megabytes("resident at most (peak)", Goal::None, memory.peak, Some(idle.peak)));
        self.table.add(Figure {
            what: "failures taken in and put to wait",
            unit: "/s",
            goal: Goal::None,
            value: Some(rate(count, took)),
            floor: None,
        });
        Ok(())
    }

    async fn caught_up(&mut self, behind: i64) -> Result<()> {
        while self.scene.behind(self.bench).await? > behind {
            self.retry.check()?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// kill -9 and a new start: how long until it sends what is due.
    pub fn restart(&mut self) -> Result<()> {
        println!("Start: killed and started again");
        self.retry.kill();
        self.scene.fail("due", 100, now_ms())?;
        let since = Instant::now();
        self.retry = self.bench.retry(&self.scene.own)?;
        self.scene.come_again("due", 100, || self.retry.check())?;
        let (took, cpu) = (since.elapsed(), self.retry.cpu()?);
        let seconds =
            |what, goal, time: Duration| Figure { what, unit: "s", goal, value: Some(time.as_secs_f64()), floor: None };
        self.table.add(seconds("kill -9, start, what is due sent", Goal::AtMost(5.0), took));
        self.table.add(seconds("CPU for that", Goal::None, cpu));
        Ok(())
    }

    /// So many are due at one moment: how fast they leave, beside a bare consumer and producer with transactions.
    pub async fn due_at_once(&mut self, count: usize) -> Result<()> {
        println!("Throughput: {count} due at one moment");
        let lead = Duration::from_secs(10) + Duration::from_millis(u64::try_from(count / 5)?);
        let due_at = now_ms() + i64::try_from(lead.as_millis())?;
        self.scene.fail("burst", count, due_at)?;
        self.caught_up(MARKS).await?;
        ensure!(now_ms() < due_at, "not all were put to wait before they were due: the machine is too busy");
        let came = self.scene.come_again("burst", count, || self.retry.check())?;
        let last = came.iter().map(|again| again.seen_at).max().unwrap_or(due_at);
        ensure!(came.iter().all(|again| again.seen_at >= due_at), "some came early");
        let took = Duration::from_millis(u64::try_from(last - due_at)?);
        let floor = floor::copy(self.bench, &self.scene.own, count, &self.scene.sample()?).await?;
        self.table.add(Figure {
            what: "due requests sent",
            unit: "/s",
            goal: Goal::AtLeast(10_000.0),
            value: Some(rate(count, took)),
            floor: Some(rate(count, floor.copied)),
        });
        let peak = memory_of(self.retry.pid())?.peak;
        let unit = "MB";
        self.table.add(Figure {
            what: "resident at most since the start",
            unit,
            goal: Goal::None,
            value: Some(peak),
            floor: None,
        });
        Ok(())
    }

    /// Some fail all the time with different delays: how late each becomes visible.
    pub async fn punctuality(&mut self, seconds: u64) -> Result<()> {
        println!("Lateness: {PER_SECOND}/s of each delay for {seconds} s");
        let floor = floor::lateness(self.bench, &self.scene.own).await?;
        let steps = usize::try_from(seconds)? * 20;
        for _ in 0..steps {
            for (kind, delay, ..) in DELAYS {
                self.scene.fail(kind, PER_SECOND / 20, now_ms() + delay)?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for (kind, _, what, goal) in DELAYS {
            let came = self.scene.come_again(kind, steps * (PER_SECOND / 20), || self.retry.check())?;
            let mut late: Vec<i64> = came.iter().map(|again| again.seen_at - again.due_at).collect();
            late.sort_unstable();
            ensure!(late.first().is_some_and(|first| *first >= 0), "some came early");
            self.table.add(Figure {
                what,
                unit: "ms",
                goal,
                value: Some(percentile(&late, 99)),
                floor: Some(percentile(&floor, 99)),
            });
            println!(
                "  after {kind}: p50 {} ms, p90 {} ms, p99 {} ms, at most {} ms",
                percentile(&late, 50),
                percentile(&late, 90),
                percentile(&late, 99),
                percentile(&late, 100)
            );
        }
        Ok(())
    }

    pub fn end(mut self) -> Result<()> {
        self.retry.check()
    }
}
