//! Terminal output: results on standard output, notes and progress on standard error.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use comfy_table::{CellAlignment, Table, presets::NOTHING};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

/// How often a progress is written where no bar can be drawn.
const EVERY: Duration = Duration::from_secs(2);

/// Writes a line of the answer.
///
/// # Errors
/// If standard output is closed: the command ends quietly then.
pub fn say(line: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{line}")
}

/// Writes a line that is no part of the answer.
pub fn note(line: &str) {
    // If standard error is closed, nobody reads notes.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// A bar on a terminal, a line every two seconds elsewhere.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    is_terminal: bool,
    /// When a line was written last; the first comes after as long as the others.
    written: Instant,
}

impl Progress {
    /// Steps of the bar.
    const STEPS: u64 = 1_000;

    /// A progress that begins now.
    #[must_use]
    pub fn new() -> Self {
        let is_terminal = io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(Self::STEPS), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}") {
            bar.set_style(style.progress_chars("█▌ "));
        }
        Self { bar, is_terminal, written: Instant::now() }
    }

    /// Shows how far it is, from 0 to 1 if that is known.
    pub fn show(&mut self, share: Option<f64>, message: impl FnOnce() -> String) {
        if self.is_terminal {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            let step = (share.unwrap_or(0.0).clamp(0.0, 1.0) * Self::STEPS as f64) as u64;
            self.bar.set_position(step);
            self.bar.set_message(message());
        } else if self.written.elapsed() >= EVERY {
            self.written = Instant::now();
            let percent = share.map(|share| format!("{:>3.0}%  ", (share * 100.0).floor())).unwrap_or_default();
            note(&format!("{percent}{}", message()));
        }
    }

    /// Writes a note that stays above the bar.
    pub fn note(&self, line: &str) {
        self.bar.suspend(|| note(line));
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

/// A table with a head, two spaces between columns as wide as their widest cell; columns of numbers stand to the right.
#[must_use]
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let is_number = |cell: &str| !cell.is_empty() && cell.chars().all(|c| c.is_ascii_digit() || ",.%-".contains(c));
    let is_of_numbers = |column: usize| {
        let mut cells = rows.iter().filter_map(|row| row.get(column)).peekable();
        cells.peek().is_some() && cells.all(|cell| is_number(cell))
    };
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(head.to_vec()).add_rows(rows.iter().cloned());
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if is_of_numbers(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// A number with a separator every three digits.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number with what is counted: `1 row`, `1,234 rows`.
#[must_use]
pub fn counted(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(number), agree(number, "", "s"))
}

/// The word that goes with one of something, or with several: `is`, `are`.
#[must_use]
pub const fn agree<'a>(number: u64, one: &'a str, several: &'a str) -> &'a str {
    if number == 1 { one } else { several }
}

/// A duration as people say it: `45 s`, `3 min 20 s`, `2 h 5 min`.
#[must_use]
pub fn spoken(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3_600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// A rate as people read it.
#[must_use]
pub fn per_second(rate: f64) -> String {
    if rate < 10.0 { format!("{rate:.1}/s") } else { format!("{rate:.0}/s") }
}

/// How fast something has gone lately, from samples of a counter.
#[derive(Debug, Default)]
pub struct Rate(std::collections::VecDeque<(Instant, u64)>);

impl Rate {
    const WINDOW: Duration = Duration::from_secs(10);

    /// Adds a sample and says how many per second there were over the last ten seconds.
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    pub fn add(&mut self, now: Instant, count: u64) -> f64 {
        self.0.push_back((now, count));
        while self.0.len() > 2 && self.0.get(1).is_some_and(|(at, _)| now - *at >= Self::WINDOW) {
            self.0.pop_front();
        }
        let (since, before) = self.0.front().copied().unwrap_or((now, count));
        let seconds = (now - since).as_secs_f64();
        if seconds > 0.0 { count.saturating_sub(before) as f64 / seconds } else { 0.0 }
    }

    /// A rate, and how long `left` more take at it: `980/s, 12 s left`; nothing if nothing moves.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "an estimate for people")]
    pub fn words(rate: f64, left: Option<u64>) -> String {
        if rate <= 0.0 {
            return String::new();
        }
        let left = left.map(|left| spoken(Duration::from_secs_f64((left as f64 / rate).min(1e9))));
        let left = left.map(|left| format!(", {left} left")).unwrap_or_default();
        format!(", {}{left}", per_second(rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_durations_spoken() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([5, 200, 7_500].map(|s| spoken(Duration::from_secs(s))), ["5 s", "3 min 20 s", "2 h 5 min"]);
    }

    #[test]
    fn one_of_something_is_not_several() {
        let words = |number| format!("{} {} left", counted(number, "dead letter"), agree(number, "is", "are"));
        let expected = ["0 dead letters are left", "1 dead letter is left", "1,000 dead letters are left"];
        assert_eq!([0, 1, 1_000].map(words), expected);
    }

    #[test]
    fn a_table_is_aligned() {
        let rows = vec![vec!["a".to_owned(), "1,000".to_owned()], vec!["bcd".to_owned(), "7".to_owned()]];
        assert_eq!(table(&["name", "n"], &rows), "name      n\na     1,000\nbcd       7");
    }

    #[test]
    fn characters_that_fill_two_places_keep_the_columns_in_line() {
        let rows = vec![vec!["杯子".to_owned(), "x".to_owned()], vec!["cup".to_owned(), "y".to_owned()]];
        assert_eq!(table(&["item", "z"], &rows), "item  z\n杯子  x\ncup   y");
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_looks_back_ten_seconds() {
        let mut rate = Rate::default();
        let mut last = 0.0;
        for second in 0..=30_u64 {
            last = rate.add(Instant::now(), if second < 15 { second * 100 } else { 1_500 });
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(last.abs() < 1e-9, "{last}");
        assert_eq!(Rate::words(100.0, Some(12_000)), ", 100/s, 2 min 0 s left");
        assert_eq!(Rate::words(0.0, Some(12_000)), "");
    }
}
