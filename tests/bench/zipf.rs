//! Which items people ask for: few very often.

use weir::runtime::clock::Dice;

/// Items by Zipf's law with exponent 1: the n-th is asked for a n-th as often as the first.
pub struct Zipf {
    sums: Vec<f64>,
    dice: Dice,
}

impl Zipf {
    pub fn new(items: usize, seed: u64) -> Self {
        let mut sum = 0.0;
        let next = |rank: usize| {
            sum += 1.0 / rank as f64;
            sum
        };
        Self { sums: (1..=items).map(next).collect(), dice: Dice::seeded(seed) }
    }

    pub fn next(&self) -> usize {
        let at = self.dice.fraction() * self.sums.last().copied().unwrap_or_default();
        self.sums.partition_point(|sum| *sum < at).min(self.sums.len() - 1)
    }
}
