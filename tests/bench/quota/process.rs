//! What this process has used: CPU by threads, and memory.

use std::{fs, time::Duration};

/// The kernel's unit of CPU time in /proc, the same on every Linux that we know: 1/100 s.
const TICK: Duration = Duration::from_millis(10);

/// The CPU that all threads have used whose names do not begin with `but`.
pub fn cpu(but: &str) -> Duration {
    let threads = fs::read_dir("/proc/self/task").expect("Linux").filter_map(Result::ok);
    let of_thread = |thread: fs::DirEntry| -> Option<u32> {
        let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
        // pid (name) state …: the name may hold blanks, so the fields are counted from its end.
        let (head, fields) = stat.rsplit_once(") ")?;
        let name = head.split_once('(')?.1;
        let mut fields = fields.split(' ').skip(11);
        let (user, system): (u32, u32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (!name.starts_with(but)).then_some(user + system)
    };
    TICK * threads.filter_map(of_thread).sum::<u32>()
}

/// Resident memory, in KiB.
pub fn memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
