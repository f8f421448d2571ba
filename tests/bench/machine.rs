//! What the kernel says about processes and about the machine, from /proc.

use std::{
    fmt, fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// Linux counts CPU in steps of 10 ms, whatever the kernel's own clock.
const TICK: Duration = Duration::from_millis(10);

/// The CPU time that a process has used so far, its dead threads included.
pub fn cpu_of(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // The process's name, which may hold blanks, ends with the last bracket.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let ticks: u32 = fields.skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    Ok(TICK * ticks)
}

/// The CPU time that all processes together have used since the machine's start, the kernel's included.
pub fn cpu_of_all() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    // user nice system idle iowait irq softirq
    let ticks = fields.take(7).enumerate().filter(|(index, _)| !matches!(index, 3 | 4));
    let ticks: u64 = ticks.filter_map(|(_, field)| field.parse::<u64>().ok()).sum();
    Ok(TICK * u32::try_from(ticks).unwrap_or(u32::MAX))
}

/// How long something took, and how much CPU of this process and of all processes.
#[derive(Clone, Copy)]
pub struct Cost {
    pub wall: Duration,
    pub cpu: Duration,
    pub of_all: Duration,
}

/// Measures what this process does; nothing else may go on in it.
pub struct Meter {
    since: Instant,
    cpu: Duration,
    of_all: Duration,
}

impl Meter {
    pub fn start() -> Result<Self> {
        Ok(Self { since: Instant::now(), cpu: cpu_of(std::process::id())?, of_all: cpu_of_all()? })
    }

    pub fn end(&self) -> Result<Cost> {
        let cpu = cpu_of(std::process::id())?.saturating_sub(self.cpu);
        Ok(Cost { wall: self.since.elapsed(), cpu, of_all: cpu_of_all()?.saturating_sub(self.of_all) })
    }
}

/// Memory of a process in MB (10⁶ bytes).
pub struct Memory {
    /// Resident now.
    pub now: f64,
    /// The most that has been resident.
    pub peak: f64,
}

pub fn memory_of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let megabytes = |name: &str| -> Result<f64> {
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in {path}"))?;
        let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name}{line}"))?;
        Ok(kibibytes * 1024.0 / 1e6)
    };
    Ok(Memory { now: megabytes("VmRSS:")?, peak: megabytes("VmHWM:")? })
}

/// How busy the machine is with whatever else.
pub struct Load {
    averages: String,
    total: u64,
    idle: u64,
    steal: u64,
}

impl Load {
    pub fn now() -> Result<Self> {
        let averages = fs::read_to_string("/proc/loadavg")?.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
        let stat = fs::read_to_string("/proc/stat")?;
        let cpu = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
        let ticks: Vec<u64> = cpu.filter_map(|field| field.parse().ok()).collect();
        let at = |index: usize| ticks.get(index).copied().unwrap_or(0);
        Ok(Self { averages, total: ticks.iter().sum(), idle: at(3) + at(4), steal: at(7) })
    }

    /// The machine between two moments, in words.
    pub fn since(self, before: &Self) -> impl fmt::Display {
        let total = (self.total - before.total).max(1);
        #[allow(clippy::cast_precision_loss, reason = "ticks of a run")]
        let percent = |ticks: u64| ticks as f64 * 100.0 / total as f64;
        format!(
            "The machine: {} cores, {:.0} % busy, {:.1} % stolen by its host; load average {} before, {} after.",
            std::thread::available_parallelism().map_or(0, usize::from),
            100.0 - percent(self.idle - before.idle),
            percent(self.steal - before.steal),
            before.averages,
            self.averages,
        )
    }
}
