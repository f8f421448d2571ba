//! The figures as a person reads them: goal, figure, floor, ratio.

use std::fmt;

use anyhow::Result;

use super::machine::Load;

/// Measures, and prints the table beside what the machine was doing meanwhile.
pub fn measured(measure: impl AsyncFnOnce(&mut Table) -> Result<()>) -> Result<()> {
    let (before, mut table) = (Load::now()?, Table::default());
    tokio::runtime::Runtime::new()?.block_on(measure(&mut table))?;
    println!("\n{table}\n{}", Load::now()?.since(&before));
    Ok(())
}

/// How wide what is measured is written at least.
const WIDE: usize = 36;

/// What a figure should be.
#[derive(Clone, Copy)]
pub enum Goal {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
    /// It only explains another figure.
    None,
}

/// One line of the table.
pub struct Figure {
    pub what: &'static str,
    pub unit: &'static str,
    pub goal: Goal,
    pub value: Option<f64>,
    /// What the same work costs, or reaches, without weir.
    pub floor: Option<f64>,
}

/// All lines, in the order in which they were measured.
#[derive(Default)]
pub struct Table(Vec<Figure>);

impl Table {
    /// Adds a figure, and shows it: the whole table comes at the end, which may be an hour away.
    pub fn add(&mut self, figure: Figure) {
        println!("{}", figure.line(WIDE));
        self.0.push(figure);
    }

    /// Adds a line that only explains the floor of the figure above.
    pub fn explain(&mut self, what: &'static str, unit: &'static str, floor: f64) {
        self.add(Figure { what, unit, goal: Goal::None, value: None, floor: Some(floor) });
    }
}

impl Figure {
    fn goal(&self) -> String {
        match self.goal {
            Goal::AtLeast(goal) => format!("≥ {}", self.number(goal)),
            Goal::AtMost(goal) => format!("≤ {}", self.number(goal)),
            Goal::None => String::new(),
        }
    }

    fn verdict(&self) -> &'static str {
        let Some(value) = self.value else { return "" };
        match self.goal {
            Goal::AtLeast(goal) if value < goal => "MISSED",
            Goal::AtMost(goal) if value > goal => "MISSED",
            Goal::AtLeast(_) | Goal::AtMost(_) => "ok",
            Goal::None => "",
        }
    }

    fn line(&self, wide: usize) -> String {
        let shown = |value: Option<f64>| value.map_or_else(String::new, |value| self.number(value));
        let ratio = self.value.zip(self.floor).map_or_else(String::new, |(v, floor)| format!("{:.2}", v / floor));
        line([self.what, &self.goal(), &shown(self.value), &shown(self.floor), &ratio, self.verdict()], wide)
    }

    fn number(&self, value: f64) -> String {
        let digits = usize::from(value.abs() < 100.0 && value.fract().abs() > 0.05);
        format!("{} {}", grouped(&format!("{value:.digits$}")), self.unit).trim_end().to_owned()
    }
}

/// `1234567.8` → `1,234,567.8`.
fn grouped(number: &str) -> String {
    let whole = number.split('.').next().unwrap_or(number).len();
    let comma = |at: usize| at > 0 && at < whole && (whole - at).is_multiple_of(3);
    number.chars().enumerate().flat_map(|(at, c)| comma(at).then_some(',').into_iter().chain([c])).collect()
}

/// The cells of a line under each other.
fn line([what, goal, value, floor, ratio, verdict]: [&str; 6], wide: usize) -> String {
    let line = format!("{what:<wide$} {goal:>14} {value:>14} {floor:>14} {ratio:>6}  {verdict}");
    line.trim_end().to_owned()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wide = self.0.iter().map(|figure| figure.what.chars().count()).max().unwrap_or_default().max(WIDE);
        writeln!(f, "{}", line(["", "goal", "figure", "floor", "ratio", ""], wide))?;
        self.0.iter().try_for_each(|figure| writeln!(f, "{}", figure.line(wide)))
    }
}
