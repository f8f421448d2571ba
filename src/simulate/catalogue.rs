//! What the seeded world holds under an item id, and how asking for it goes wrong.

use std::collections::{HashMap, VecDeque};

use super::dice::{Question, below, fraction, roll};

/// Which part of all ids has which fate, each from 0 to 1.
///
/// `absent` and `off_shelf` are what the item *is*; the others are how a call for it goes *wrong*, and befall
/// items of every kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    /// Ids that no product has.
    pub absent: f64,
    /// Products that are no longer sold.
    pub off_shelf: f64,
    /// Items whose first calls are throttled although the account is within its quota.
    pub throttled: f64,
    /// Items whose first one to three calls meet an outage.
    pub failing: f64,
    /// Items whose first one or two replies make no sense.
    pub broken: f64,
    /// Items whose every call meets an outage.
    pub hopeless: f64,
}

impl Shares {
    /// Every item is found at the first call.
    pub const NONE: Self =
        Self { absent: 0.0, off_shelf: 0.0, throttled: 0.0, failing: 0.0, broken: 0.0, hopeless: 0.0 };

    /// The sum of what an item is, and of what goes wrong with it; neither may exceed 1.
    pub(super) fn sums(&self) -> [f64; 2] {
        [self.absent + self.off_shelf, self.throttled + self.failing + self.broken + self.hopeless]
    }
}

impl Default for Shares {
    fn default() -> Self {
        Self { absent: 0.02, off_shelf: 0.03, throttled: 0.005, failing: 0.01, broken: 0.002, hopeless: 0.0005 }
    }
}

/// What is under an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shelf {
    Found,
    Absent,
    OffShelf(OffShelf),
}

/// The gateway's ways to say that a product is no longer sold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OffShelf {
    /// The product with this status instead of `published`.
    Status(&'static str),
    /// No product, and a message that says so.
    Message,
}

/// How asking for an item goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    None,
    Throttled { times: u32 },
    Failing { times: u32 },
    Broken { times: u32 },
    Hopeless,
}

/// One call's mishap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mishap {
    /// `gw.ISPInvokeTimeout`: the gateway works, the service behind it does not.
    Timeout,
    /// HTTP 500 with JSON that is no gateway's.
    InternalError,
    /// HTTP 502 with a proxy's page.
    BadGateway,
    /// The connection closes without a reply.
    Cut,
    /// HTTP 200, JSON that stops in the middle.
    Truncated,
    /// HTTP 200 with a page.
    Page,
    /// HTTP 200 with nothing.
    Empty,
    /// Another item's product.
    WrongItem,
}

const OUTAGES: [Mishap; 5] =
    [Mishap::Timeout, Mishap::InternalError, Mishap::BadGateway, Mishap::Cut, Mishap::Truncated];
const NONSENSE: [Mishap; 4] = [Mishap::Truncated, Mishap::Page, Mishap::Empty, Mishap::WrongItem];

/// The seeded world.
#[derive(Clone, Copy, Debug)]
pub(super) struct Catalogue {
    pub(super) seed: u64,
    pub(super) shares: Shares,
}

impl Catalogue {
    /// What is under `id`; the same for ever.
    pub(super) fn shelf(&self, id: u64) -> Shelf {
        let at = fraction(roll(self.seed, Question::Shelf, id));
        if at < self.shares.absent {
            Shelf::Absent
        } else if at < self.shares.absent + self.shares.off_shelf {
            Shelf::OffShelf(match below(roll(self.seed, Question::OffShelf, id), 4) {
                0 => OffShelf::Status("member expired"),
                1 => OffShelf::Status("member deleted"),
                2 => OffShelf::Status("deleted"),
                _ => OffShelf::Message,
            })
        } else {
            Shelf::Found
        }
    }

    /// How asking for `id` goes wrong; the same for ever.
    pub(super) fn trouble(&self, id: u64) -> Trouble {
        let Shares { throttled, failing, broken, hopeless, .. } = self.shares;
        let at = fraction(roll(self.seed, Question::Trouble, id));
        let times = |most| 1 + u32::try_from(below(roll(self.seed, Question::Times, id), most)).unwrap_or(0);
        if at < hopeless {
            Trouble::Hopeless
        } else if at < hopeless + throttled {
            Trouble::Throttled { times: times(2) }
        } else if at < hopeless + throttled + failing {
            Trouble::Failing { times: times(3) }
        } else if at < hopeless + throttled + failing + broken {
            Trouble::Broken { times: times(2) }
        } else {
            Trouble::None
        }
    }

    /// What happens to the call for `id` that follows `asked` earlier ones. (Throttles come before the item is
    /// looked at, hence not from here.)
    pub(super) fn mishap(&self, id: u64, asked: u32) -> Option<Mishap> {
        match self.trouble(id) {
            Trouble::Failing { times } if asked < times => Some(self.pick(&OUTAGES, id, asked)),
            Trouble::Broken { times } if asked < times => Some(self.pick(&NONSENSE, id, asked)),
            Trouble::Hopeless => Some(self.pick(&OUTAGES, id, asked)),
            Trouble::None | Trouble::Throttled { .. } | Trouble::Failing { .. } | Trouble::Broken { .. } => None,
        }
    }

    /// Whether calls for `id` may be throttled without a reason.
    pub(super) fn may_throttle(&self, id: u64) -> bool {
        matches!(self.trouble(id), Trouble::Throttled { .. })
    }

    /// Whether calls for `id` may fail.
    pub(super) fn may_fail(&self, id: u64) -> bool {
        matches!(self.trouble(id), Trouble::Failing { .. } | Trouble::Broken { .. } | Trouble::Hopeless)
    }

    /// Whether the call for `id` that follows `asked` earlier ones is throttled without a reason.
    pub(super) fn throttles(&self, id: u64, asked: u32) -> bool {
        matches!(self.trouble(id), Trouble::Throttled { times } if asked < times)
    }

    fn pick(&self, among: &[Mishap], id: u64, asked: u32) -> Mishap {
        let bits = roll(self.seed, Question::Mishap, id.wrapping_mul(31).wrapping_add(u64::from(asked)));
        let at = usize::try_from(below(bits, among.len() as u64)).unwrap_or(0);
        among.get(at).copied().unwrap_or(Mishap::Timeout)
    }
}

/// How often each troubled item was asked for. Bounded: at its limit the item that has been in it longest is
/// forgotten, and goes wrong anew.
#[derive(Debug)]
pub(super) struct Askings {
    counts: HashMap<u64, u32>,
    order: VecDeque<u64>,
    limit: usize,
}

impl Askings {
    pub(super) fn new(limit: usize) -> Self {
        Self { counts: HashMap::new(), order: VecDeque::new(), limit: limit.max(1) }
    }

    /// How often `id` was asked for before this call, which is counted.
    pub(super) fn ask(&mut self, id: u64) -> u32 {
        if let Some(count) = self.counts.get_mut(&id) {
            let before = *count;
            *count = count.saturating_add(1);
            return before;
        }
        if self.counts.len() >= self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
        self.counts.insert(id, 1);
        self.order.push_back(id);
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: std::ops::Range<u64> = 600_000_000_000..600_000_100_000;

    fn catalogue(seed: u64) -> Catalogue {
        Catalogue { seed, shares: Shares::default() }
    }

    fn count(is: impl Fn(u64) -> bool) -> usize {
        IDS.filter(|id| is(*id)).count()
    }

    #[test]
    fn the_shares_are_met() {
        let world = catalogue(7);
        let counts = [
            count(|id| world.shelf(id) == Shelf::Absent),
            count(|id| matches!(world.shelf(id), Shelf::OffShelf(_))),
            count(|id| matches!(world.trouble(id), Trouble::Throttled { .. })),
            count(|id| matches!(world.trouble(id), Trouble::Failing { .. })),
            count(|id| matches!(world.trouble(id), Trouble::Broken { .. })),
            count(|id| world.trouble(id) == Trouble::Hopeless),
        ];
        for (found, expected) in counts.into_iter().zip([2_000_usize, 3_000, 500, 1_000, 200, 50]) {
            // Five standard deviations of a binomial, roughly.
            let slack = 5 * expected.isqrt();
            assert!(found.abs_diff(expected) < slack, "{counts:?}: {found} instead of {expected}");
        }
    }

    #[test]
    fn a_seed_decides_every_fate() {
        let (one, same, other) = (catalogue(7), catalogue(7), catalogue(8));
        let fate = |world: &Catalogue, id| (world.shelf(id), world.trouble(id), world.mishap(id, 0));
        assert_eq!(count(|id| fate(&one, id) != fate(&same, id)), 0);
        assert!(count(|id| fate(&one, id) != fate(&other, id)) > 1_000);
    }

    #[test]
    fn a_failing_item_recovers_within_three_calls_and_a_hopeless_one_never() {
        let world = catalogue(7);
        for id in IDS {
            match world.trouble(id) {
                Trouble::Failing { .. } | Trouble::Broken { .. } => {
                    assert!(world.mishap(id, 0).is_some(), "{id}");
                    assert_eq!(world.mishap(id, 3), None, "{id}");
                }
                Trouble::Hopeless => assert!((0..20).all(|asked| world.mishap(id, asked).is_some()), "{id}"),
                Trouble::Throttled { .. } => {
                    assert!(world.throttles(id, 0) && !world.throttles(id, 2), "{id}");
                    assert_eq!(world.mishap(id, 0), None, "{id}");
                }
                Trouble::None => assert!(world.mishap(id, 0).is_none() && !world.throttles(id, 0), "{id}"),
            }
        }
    }

    #[test]
    fn every_mishap_occurs() {
        let world = catalogue(7);
        for mishap in OUTAGES.into_iter().chain(NONSENSE) {
            assert!(count(|id| world.mishap(id, 0) == Some(mishap)) > 0, "{mishap:?}");
        }
    }

    #[test]
    fn askings_count_and_forget_the_oldest_at_their_limit() {
        let mut askings = Askings::new(2);
        assert_eq!([askings.ask(1), askings.ask(1), askings.ask(2), askings.ask(1)], [0, 1, 0, 2]);
        assert_eq!(askings.ask(3), 0);
        assert_eq!(askings.ask(2), 1, "2 is younger than 1");
        assert_eq!(askings.ask(1), 0, "1 was forgotten");
    }
}
