//! Which items of a refused call are called for next, until it is known which of them are to blame. Pure.
//!
//! A vendor refuses a whole call for one bad item in it. Half of its items are called for again, and the others wait. If
//! that half is refused too, an item of it is to blame and nothing is known of the others: they are free, and travel with
//! whatever waits. If it is answered, the blame is among the others, and a half of them is next. An item that is refused
//! alone is to blame. So each of them costs about `log2(n) + 1` calls more; calling for both halves costs twice that,
//! since it forgets that the halves of a bad half cannot both be good.
//!
//! Nothing better than this is to be had by much: each call says one bit, and which 40 of 2,000 items are bad is
//! 279 bits. If the vendor's words name an item it is called for first, and an item that was refused alone travels alone
//! when it is asked for again: either costs two calls or one.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use crate::{fetch::backlog::Waits, kafka::Partition};

/// So many items are remembered that were refused alone; of more the first ones are forgotten.
const MOST_KNOWN: usize = 10_000;

/// Names the items that one refused call has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::fetch) struct GroupId(u64);

/// The items of refused calls.
#[derive(Debug)]
pub(super) struct Splits<T> {
    groups: BTreeMap<GroupId, Group<T>>,
    next_id: u64,
    /// How many calls of the source have been answered.
    answers: u64,
    /// How many were refused since, for what may be one item's.
    unanswered: u32,
    /// How many items wait here, by partition.
    counts: HashMap<Partition, usize>,
    known: Known,
    /// The last turn was an express request's.
    yielded: bool,
}

#[derive(Debug)]
struct Group<T> {
    /// What is called for next; `None`: its call is under way.
    next: Option<Vec<T>>,
    /// Once that is answered one of these is to blame.
    rest: Vec<T>,
    /// The code of the refusal, and how many calls had been answered before it.
    refused: Option<(String, u64)>,
}

/// Items that were refused alone, by their fingerprint.
#[derive(Debug, Default)]
struct Known {
    items: HashSet<u64>,
    /// The first to be forgotten first.
    order: VecDeque<u64>,
}

impl<T> Default for Splits<T> {
    fn default() -> Self {
        let (groups, counts, known) = (BTreeMap::new(), HashMap::new(), Known::default());
        Self { groups, next_id: 0, answers: 0, unanswered: 0, counts, known, yielded: false }
    }
}

impl<T: Waits> Splits<T> {
    /// So many calls in a row are refused without any answer: it is not one item's fault. Where half of all calls are
    /// refused for an item of theirs that happens by chance once in a million calls.
    const TOO_MANY: u32 = 20;

    /// A call for these items, more than one, was refused with this code; `group` if it was one of a group's. Items that
    /// are free again by that.
    pub(super) fn refused(&mut self, group: Option<GroupId>, mut items: Vec<T>, (code, words): (&str, &str)) -> Vec<T> {
        let known = group.and_then(|id| self.groups.get(&id)).and_then(|group| group.refused.clone());
        let free = group.map(|id| self.ended(id)).unwrap_or_default();
        let answers = known.filter(|(known, _)| known == code).map_or(self.answers, |(_, answers)| answers);
        if let Some(named) = only_named(&items, words) {
            items.swap(0, named);
            let rest = items.split_off(1);
            self.insert(items, rest, Some((code.to_owned(), answers)));
        } else {
            let rest = items.split_off((items.len() / 2).max(1));
            self.insert(items, rest, Some((code.to_owned(), answers)));
        }
        free
    }

    /// This item is to be called for alone.
    pub(super) fn push_alone(&mut self, item: T) {
        self.insert(vec![item], Vec::new(), None);
    }

    fn insert(&mut self, next: Vec<T>, rest: Vec<T>, refused: Option<(String, u64)>) {
        for item in next.iter().chain(&rest) {
            *self.counts.entry(item.partition().clone()).or_default() += 1;
        }
        self.groups.insert(GroupId(self.next_id), Group { next: Some(next), rest, refused });
        self.next_id += 1;
    }

    fn uncount<'a>(counts: &mut HashMap<Partition, usize>, items: impl IntoIterator<Item = &'a T>)
    where
        T: 'a,
    {
        for item in items {
            if let Some(count) = counts.get_mut(item.partition()) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(item.partition());
                }
            }
        }
    }

    /// Whether anything is to be called for that may be.
    pub(super) fn can_start(&self, may: impl Fn(&T) -> bool) -> bool {
        self.groups.values().any(|group| group.may_start(&may))
    }

    /// How many calls are to be made now.
    pub(super) fn calls(&self) -> usize {
        self.groups.values().filter(|group| group.next.is_some()).count()
    }

    /// Whether it is the turn of these. What a refused call has left came before all that waits, and takes turns with
    /// express requests alone. Items that only travel alone came like any other, and take turns with whatever waits: many
    /// of them would else hold up all bulk work.
    pub(super) fn is_turn(&mut self, may: impl Fn(&T) -> bool, express_waits: bool, bulk_waits: bool) -> bool {
        let is_left = self.groups.values().any(|group| group.refused.is_some() && group.may_start(&may));
        let others_wait = express_waits || (bulk_waits && !is_left);
        self.yielded = others_wait && !self.yielded;
        !self.yielded
    }

    /// The items of the next call.
    pub(super) fn take(&mut self, may: impl Fn(&T) -> bool) -> Option<(GroupId, Vec<T>)> {
        let first = |is_left: bool| {
            let mut groups = self.groups.iter();
            groups.find(|(_, group)| group.refused.is_some() == is_left && group.may_start(&may)).map(|(id, _)| *id)
        };
        let id = first(true).or_else(|| first(false))?;
        let group = self.groups.get_mut(&id)?;
        let items = group.next.take()?;
        Self::uncount(&mut self.counts, &items);
        Some((id, items))
    }

    /// These did not leave in the call that they were taken for.
    pub(super) fn put_back(&mut self, id: GroupId, items: Vec<T>) -> Vec<T> {
        match self.groups.get_mut(&id) {
            Some(group) if !items.is_empty() => {
                for item in &items {
                    *self.counts.entry(item.partition().clone()).or_default() += 1;
                }
                group.next.get_or_insert_default().extend(items);
                Vec::new()
            }
            Some(_) => self.ended(id),
            None => items,
        }
    }

    /// A call of the group was answered: the blame is among those that have waited.
    pub(super) fn answered(&mut self, id: GroupId) {
        let Some(group) = self.groups.get_mut(&id).filter(|group| group.next.is_none()) else { return };
        let mut next = std::mem::take(&mut group.rest);
        if next.is_empty() {
            self.groups.remove(&id);
            return;
        }
        group.rest = next.split_off((next.len() / 2).max(1));
        group.next = Some(next);
    }

    /// A call of the group has ended otherwise, with an item that was to blame alone or with what says nothing of the
    /// items: those that have waited are free.
    pub(super) fn ended(&mut self, id: GroupId) -> Vec<T> {
        let Some(Group { next, mut rest, .. }) = self.groups.remove(&id) else { return Vec::new() };
        rest.extend(next.into_iter().flatten());
        Self::uncount(&mut self.counts, &rest);
        rest
    }

    /// Whether an item of this group that was refused alone with this code is to blame by all that is known: the call
    /// that it was in before was refused with the same words, and others of the source have been answered since.
    pub(super) fn is_to_blame(&self, id: GroupId, code: &str) -> bool {
        let refused = self.groups.get(&id).and_then(|group| group.refused.as_ref());
        refused.is_some_and(|(known, _)| known == code) && self.others_were_answered(id)
    }

    /// Whether calls of the source were answered since one for this group was refused.
    pub(super) fn others_were_answered(&self, id: GroupId) -> bool {
        let refused = self.groups.get(&id).and_then(|group| group.refused.as_ref());
        refused.is_some_and(|(_, answers)| self.answers > *answers)
    }

    /// A call of the source was answered, or refused for what may be one item's.
    pub(super) fn note(&mut self, is_answered: bool) {
        if is_answered {
            self.answers += 1;
            self.unanswered = 0;
        } else {
            self.unanswered = self.unanswered.saturating_add(1);
        }
    }

    /// Whether so many calls were refused without any answer that the source is to blame and no item.
    pub(super) fn blames_source(&self) -> bool {
        self.unanswered >= Self::TOO_MANY
    }

    /// An item was refused alone, or answered.
    pub(super) fn learn(&mut self, item: u64, is_to_blame: bool) {
        if !is_to_blame {
            self.known.items.remove(&item);
        } else if self.known.items.insert(item) {
            self.known.order.push_back(item);
            if self.known.order.len() > MOST_KNOWN {
                let first = self.known.order.pop_front();
                first.and_then(|first| self.known.items.take(&first));
            }
        }
    }

    /// Whether the item was refused alone when it was called for last.
    pub(super) fn knows(&self, item: u64) -> bool {
        self.known.items.contains(&item)
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.counts.get(partition).copied().unwrap_or_default()
    }

    /// Replaces each item that waits by what `keep` makes of it. Items that are free by that: nothing can be said of those
    /// whose other half is gone.
    pub(super) fn sift(&mut self, mut keep: impl FnMut(T) -> Option<T>) -> Vec<T> {
        let (groups, mut free) = (std::mem::take(&mut self.groups), Vec::new());
        self.counts.clear();
        for (id, Group { next, rest, refused }) in groups {
            let next: Option<Vec<T>> = next.map(|next| next.into_iter().filter_map(&mut keep).collect());
            let rest: Vec<T> = rest.into_iter().filter_map(&mut keep).collect();
            if next.as_ref().is_some_and(Vec::is_empty) {
                free.extend(rest);
                continue;
            }
            for item in next.iter().flatten().chain(&rest) {
                *self.counts.entry(item.partition().clone()).or_default() += 1;
            }
            self.groups.insert(id, Group { next, rest, refused });
        }
        free
    }

    /// Takes out all that wait, but still knows of what the calls under way are.
    pub(super) fn free_waiting(&mut self) -> Vec<T> {
        self.counts.clear();
        let (mut groups, mut free) = (std::mem::take(&mut self.groups), Vec::new());
        groups.retain(|_, Group { next, rest, .. }| {
            let is_under_way = next.is_none();
            free.extend(next.take().into_iter().flatten().chain(rest.drain(..)));
            is_under_way
        });
        self.groups = groups;
        free
    }

    /// Takes out all that wait.
    pub(super) fn clear(&mut self) -> Vec<T> {
        self.counts.clear();
        let groups = std::mem::take(&mut self.groups).into_values();
        groups.flat_map(|Group { next, rest, .. }| next.into_iter().flatten().chain(rest)).collect()
    }
}

impl<T> Group<T> {
    fn may_start(&self, may: impl Fn(&T) -> bool) -> bool {
        self.next.as_ref().is_some_and(|next| next.iter().all(may))
    }
}

/// Which item the vendor's words name, if it is a single one.
fn only_named<T: Waits>(items: &[T], words: &str) -> Option<usize> {
    let mut named = items.iter().enumerate().filter(|(_, item)| names(words, item.item())).map(|(place, _)| place);
    let first = named.next()?;
    named.next().is_none().then_some(first)
}

/// Whether an id stands in these words, and not as a piece of something longer.
fn names(words: &str, id: &str) -> bool {
    // A shorter one stands there by chance: as a code or a count.
    const SHORTEST: usize = 5;
    let is_part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let is_whole = |(at, found): (usize, &str)| {
        !is_part(words[..at].chars().next_back()) && !is_part(words[at + found.len()..].chars().next())
    };
    id.len() >= SHORTEST && words.match_indices(id).any(is_whole)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fetch::backlog::Placed;

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Item {
        partition: Partition,
        id: String,
        number: usize,
    }

    impl Placed for Item {
        fn offset(&self) -> i64 {
            i64::try_from(self.number).unwrap()
        }
    }

    impl Waits for Item {
        type Group = ();
        fn group(&self) -> &() {
            &()
        }
        fn item(&self) -> &str {
            &self.id
        }
        fn partition(&self) -> &Partition {
            &self.partition
        }
    }

    fn item(number: usize) -> Item {
        let partition = Partition { topic: "t".into(), number: i32::try_from(number % 3).unwrap() };
        Item { partition, id: format!("610{number:06}"), number }
    }

    /// What became of items that were called for until all of them had an end.
    #[derive(Default, Debug)]
    struct Collected {
        calls: usize,
        answered: Vec<usize>,
        blamed: Vec<usize>,
    }

    /// Calls for items, so many at once, of which some are bad. `says`: the vendor's words for a call.
    fn collect(
        splits: &mut Splits<Item>,
        (count, most): (usize, usize),
        is_bad: impl Fn(usize) -> bool,
        says: impl Fn(&[Item]) -> String,
    ) -> Collected {
        let mut collected = Collected::default();
        let mut waiting: VecDeque<Item> = VecDeque::new();
        let print = |item: &Item| u64::try_from(item.number).unwrap();
        for item in (0..count).map(item) {
            if splits.knows(print(&item)) { splits.push_alone(item) } else { waiting.push_back(item) }
        }
        loop {
            let (group, items) = match splits.take(|_| true) {
                Some((group, items)) => (Some(group), items),
                None => (None, waiting.drain(..most.min(waiting.len())).collect::<Vec<_>>()),
            };
            if items.is_empty() {
                assert!(splits.clear().is_empty() && splits.counts.is_empty(), "all have an end");
                return collected;
            }
            collected.calls += 1;
            let is_refused = items.iter().any(|item| is_bad(item.number));
            splits.note(!is_refused);
            let free = match (is_refused, group) {
                (false, group) => {
                    collected.answered.extend(items.iter().map(|item| item.number));
                    if let Some(group) = group {
                        splits.answered(group);
                    }
                    vec![]
                }
                (true, group) if items.len() == 1 => {
                    collected.blamed.push(items[0].number);
                    splits.learn(print(&items[0]), true);
                    group.map(|group| splits.ended(group)).unwrap_or_default()
                }
                (true, group) => {
                    let words = says(&items);
                    splits.refused(group, items, ("15/-4003", &words))
                }
            };
            for item in free.into_iter().rev() {
                waiting.push_front(item);
            }
        }
    }

    fn silent(_: &[Item]) -> String {
        "invalid item id".to_owned()
    }

    /// 40 of 2,000, by a seeded shuffle.
    fn bad_of(seed: u64) -> HashSet<usize> {
        let dice = crate::runtime::clock::Dice::seeded(seed);
        let mut bad = HashSet::new();
        while bad.len() < 40 {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below 2,000")]
            bad.insert((dice.fraction() * 2_000.0) as usize);
        }
        bad
    }

    #[test]
    fn forty_bad_items_of_two_thousand_are_found_with_few_more_calls_than_any_way_needs() {
        // Which 40 of 2,000 is log2 of their combinations: no way needs fewer calls on average, each says one bit.
        let bound = 279;
        for most in [20, 40] {
            let (mut unnamed, mut named, mut again) = (0, 0, 0);
            for seed in 0..20 {
                let (bad, mut splits) = (bad_of(seed), Splits::default());
                let check = |says: &dyn Fn(&[Item]) -> String, splits: &mut Splits<Item>| {
                    let mut found = collect(splits, (2_000, most), |number| bad.contains(&number), says);
                    found.answered.sort_unstable();
                    assert!(found.answered.iter().copied().eq((0..2_000).filter(|number| !bad.contains(number))));
                    assert_eq!((found.blamed.len(), found.blamed.iter().copied().collect()), (40, bad.clone()));
                    found.calls
                };
                unnamed += check(&silent, &mut splits);
                again += check(&silent, &mut splits);
                let says = |items: &[Item]| {
                    let first = items.iter().find(|item| bad.contains(&item.number)).unwrap();
                    format!("invalid item id: {}", first.id)
                };
                named += check(&says, &mut Splits::default());
            }
            let (mean, named, again) = (unnamed / 20, named / 20, again / 20);
            println!("{most} a call: {mean} calls, {named} if the words name one, {again} the next time");
            assert!(mean * 100 < 115 * bound, "{most}: {mean}");
            assert!(named <= 2_000 / most + 2 * 40 + 4, "{most}: {named}");
            assert!(again <= 2_000 / most + 40, "{most}: {again}");
        }
    }

    #[test]
    fn the_words_name_an_item_only_as_a_whole_and_only_one() {
        let items: Vec<Item> = (0..4).map(item).collect();
        let table = [
            ("invalid item id: 610000002", Some(2)),
            ("商品610000003不存在", None),
            ("商品(610000003)不存在", Some(3)),
            ("610000001,610000002", None),
            ("id 6100000021", None),
            ("", None),
        ];
        for (words, named) in table {
            assert_eq!(only_named(&items, words), named, "{words}");
        }
        let short = [Item { id: "4003".to_owned(), ..item(0) }];
        assert_eq!(only_named(&short, "error 4003"), None);
    }

    #[test]
    fn what_a_call_under_way_is_of_is_known_while_nobody_calls() {
        let mut splits = Splits::default();
        splits.refused(None, (0..2).map(item).collect(), ("15/-1", ""));
        splits.refused(None, (2..4).map(item).collect(), ("15/-1", ""));
        let (group, first) = splits.take(|_| true).unwrap();
        assert_eq!((first[0].number, splits.free_waiting().len()), (0, 3));
        assert_eq!((splits.calls(), splits.counts.len()), (0, 0));
        splits.note(true);
        assert!(splits.is_to_blame(group, "15/-1"));
        assert!(splits.put_back(group, first).is_empty() && splits.calls() == 1, "it is still to be called for alone");
        assert_eq!(splits.clear().len(), 1);
    }

    #[test]
    fn an_item_refused_alone_is_to_blame_only_if_others_were_answered_since() {
        let mut splits = Splits::default();
        splits.refused(None, (0..2).map(item).collect(), ("15/-1", ""));
        let (group, first) = splits.take(|_| true).unwrap();
        assert_eq!((first[0].number, splits.is_to_blame(group, "15/-1")), (0, false), "all may be refused");
        splits.note(true);
        assert!(splits.is_to_blame(group, "15/-1"));
        assert!(!splits.is_to_blame(group, "15/-2"), "for another reason");
        assert_eq!(splits.ended(group).len(), 1, "nothing is known of the other one");
    }

    #[test]
    fn so_many_refusals_without_an_answer_are_the_sources() {
        let mut splits = Splits::<Item>::default();
        (0..19).for_each(|_| splits.note(false));
        assert!(!splits.blames_source());
        splits.note(false);
        assert!(splits.blames_source());
        splits.note(true);
        assert!(!splits.blames_source());
    }

    #[test]
    fn split_items_take_turns_with_express_requests() {
        let mut splits = Splits::<Item>::default();
        splits.refused(None, vec![item(0), item(1)], ("15/-1", "no"));
        let turns: Vec<bool> =
            [true, true, true, true, false, false].map(|waits| splits.is_turn(|_| true, waits, true)).to_vec();
        assert_eq!(turns, [false, true, false, true, true, true]);
    }

    #[test]
    fn items_that_travel_alone_take_turns_with_all_that_waits_and_come_after_what_a_refused_call_has_left() {
        let mut splits = Splits::<Item>::default();
        (0..3).for_each(|number| splits.push_alone(item(number)));
        let mut turns = |bulk_waits: [bool; 5]| bulk_waits.map(|waits| splits.is_turn(|_| true, false, waits));
        assert_eq!(turns([true, true, true, false, false]), [false, true, false, true, true]);
        splits.refused(None, vec![item(8), item(9)], ("15/-1", "no"));
        assert!((0..3).all(|_| splits.is_turn(|_| true, false, true)));
        let next = |splits: &mut Splits<Item>| splits.take(|_| true).unwrap().1[0].number;
        assert_eq!([0; 3].map(|_: i32| next(&mut splits)), [8, 0, 1]);
    }

    proptest! {
        #[test]
        fn whatever_is_bad_each_item_has_one_end_and_exactly_the_bad_are_blamed(
            bad in prop::collection::hash_set(0..60_usize, 0..60), count in 0..60_usize, most in 1..25_usize,
        ) {
            let mut found = collect(&mut Splits::default(), (count, most), |number| bad.contains(&number), silent);
            found.answered.sort_unstable();
            found.blamed.sort_unstable();
            let (blamed, answered): (Vec<_>, Vec<_>) = (0..count).partition(|number| bad.contains(number));
            prop_assert_eq!((found.answered, found.blamed), (answered, blamed));
        }

        #[test]
        fn whatever_is_taken_out_meanwhile_nothing_is_lost_or_doubled(
            steps in prop::collection::vec((0..6u8, 0..3i32), 0..60),
        ) {
            let mut splits = Splits::default();
            let (mut there, mut out) = (HashSet::new(), Vec::new());
            let mut under_way: Vec<(GroupId, Vec<Item>)> = Vec::new();
            for (number, (step, partition)) in steps.into_iter().enumerate() {
                match step {
                    0 => {
                        let items: Vec<Item> = (number * 10..number * 10 + 7).map(item).collect();
                        there.extend(items.iter().map(|item| item.number));
                        prop_assert!(splits.refused(None, items, ("c", "")).is_empty());
                    }
                    1 => under_way.extend(splits.take(|_| true)),
                    2 => if let Some((id, items)) = under_way.pop() {
                        if items.len() == 1 {
                            out.extend(items.into_iter().chain(splits.ended(id)));
                        } else {
                            out.extend(splits.refused(Some(id), items, ("c", "")));
                        }
                    },
                    3 => if let Some((id, items)) = under_way.pop() {
                        if number % 2 == 0 {
                            out.extend(items);
                            splits.answered(id);
                        } else {
                            out.extend(splits.put_back(id, items));
                        }
                    },
                    4 => out.extend(splits.free_waiting()),
                    _ => {
                        let mut gone = Vec::new();
                        let is_kept = |item: &Item| item.partition.number != partition;
                        let free = splits.sift(|item| if is_kept(&item) { Some(item) } else { gone.push(item); None });
                        out.extend(gone.into_iter().chain(free));
                        let left = Partition { topic: "t".into(), number: partition };
                        prop_assert_eq!(splits.waiting_in(&left), 0);
                    }
                }
            }
            let waiting: usize = (0..3).map(|number| splits.waiting_in(&Partition { topic: "t".into(), number })).sum();
            let left = splits.clear();
            prop_assert_eq!(waiting, left.len());
            let all = out.into_iter().chain(left).chain(under_way.into_iter().flat_map(|(_, items)| items));
            let all: Vec<usize> = all.map(|item| item.number).collect();
            let unique: HashSet<usize> = all.iter().copied().collect();
            prop_assert_eq!((all.len(), unique), (there.len(), there));
        }
    }
}
