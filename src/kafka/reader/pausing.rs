//! Wanted and actual pauses of partitions, kept as two sets that are reconciled, so that no request is lost.
//! Pure.

use std::collections::{BTreeMap, HashSet};

use crate::kafka::Partition;

/// What the stage wants to be paused, as of now.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    paused: HashSet<Partition>,
    /// Whether there may be something to do: it has changed, or what is assigned has.
    pub(super) is_new: bool,
}

impl Wanted {
    pub(super) fn pause(&mut self, partition: &Partition) {
        self.is_new |= self.paused.insert(partition.clone());
    }

    /// It is not to be paused.
    pub(super) fn flow(&mut self, partition: &Partition) {
        self.is_new |= self.paused.remove(partition);
    }
}

/// What to ask of one member's client.
#[derive(Debug)]
pub(super) struct Step {
    /// The number of the member.
    pub(super) member: usize,
    /// Else to resume.
    pub(super) pause: bool,
    pub(super) partitions: Vec<Partition>,
}

/// What is paused in the clients.
#[derive(Debug, Default)]
pub(super) struct Pauses(HashSet<Partition>);

impl Pauses {
    /// What makes the clients as `wanted`. `member` says who has a partition: what nobody has is left alone, since to
    /// pause what is not assigned can wedge a consumer (micronaut-kafka#610).
    pub(super) fn steps(&self, wanted: &Wanted, member: impl Fn(&Partition) -> Option<usize>) -> Vec<Step> {
        let mut steps: BTreeMap<(usize, bool), Vec<Partition>> = BTreeMap::new();
        for partition in wanted.paused.symmetric_difference(&self.0) {
            if let Some(member) = member(partition) {
                steps.entry((member, !self.0.contains(partition))).or_default().push(partition.clone());
            }
        }
        steps.into_iter().map(|((member, pause), partitions)| Step { member, pause, partitions }).collect()
    }

    /// The client has done it.
    pub(super) fn done(&mut self, step: Step) {
        for partition in step.partitions {
            if step.pause {
                self.0.insert(partition);
            } else {
                self.0.remove(&partition);
            }
        }
    }

    /// These are about to flow, whatever they were; answers with those that were paused.
    pub(super) fn forget<'p>(&mut self, partitions: impl Iterator<Item = &'p Partition>) -> Vec<Partition> {
        partitions.filter_map(|partition| self.0.take(partition)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Act {
        Pause(i32),
        Flow(i32),
        Assign(i32),
        Revoke(i32),
        /// The thread has a moment; the client may refuse.
        Look(bool),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (0..6).prop_map(Act::Pause),
            4 => (0..6).prop_map(Act::Flow),
            2 => (0..6).prop_map(Act::Assign),
            2 => (0..6).prop_map(Act::Revoke),
            2 => any::<bool>().prop_map(Act::Look),
        ]
    }

    fn partition(number: i32) -> Partition {
        Partition { topic: "t".into(), number }
    }

    /// A reader whose partitions belong to two members by turns, and what their client has paused.
    #[derive(Default)]
    struct Model {
        wanted: Wanted,
        pauses: Pauses,
        owned: HashSet<i32>,
        client: HashSet<i32>,
    }

    impl Model {
        fn look(&mut self, is_taken: bool) {
            if !std::mem::take(&mut self.wanted.is_new) {
                return;
            }
            let owned = &self.owned;
            let member = |partition: &Partition| {
                owned.contains(&partition.number).then_some(usize::from(partition.number % 2 == 1))
            };
            for step in self.pauses.steps(&self.wanted, member) {
                for partition in &step.partitions {
                    assert!(owned.contains(&partition.number), "{partition} is not assigned");
                    assert_eq!(member(partition), Some(step.member));
                }
                if !is_taken {
                    self.wanted.is_new = true;
                    continue;
                }
                for partition in &step.partitions {
                    let changed = if step.pause {
                        self.client.insert(partition.number)
                    } else {
                        self.client.remove(&partition.number)
                    };
                    assert!(changed, "asked for twice: {step:?}");
                }
                self.pauses.done(step);
            }
        }

        fn act(&mut self, act: &Act) {
            match *act {
                Act::Pause(number) => self.wanted.pause(&partition(number)),
                Act::Flow(number) => self.wanted.flow(&partition(number)),
                Act::Assign(number) => {
                    for resumed in self.pauses.forget(std::iter::once(&partition(number))) {
                        self.client.remove(&resumed.number);
                    }
                    self.owned.insert(number);
                    self.wanted.is_new = true;
                }
                Act::Revoke(number) => {
                    self.owned.remove(&number);
                }
                Act::Look(is_taken) => self.look(is_taken),
            }
        }
    }

    proptest! {
        #[test]
        fn after_a_look_exactly_what_is_wanted_is_paused(acts in prop::collection::vec(act(), 0..100)) {
            let mut model = Model::default();
            for act in &acts {
                model.act(act);
            }
            model.look(true);
            for number in model.owned.clone() {
                let wanted = model.wanted.paused.contains(&partition(number));
                prop_assert_eq!(model.client.contains(&number), wanted, "{}", number);
            }
        }
    }
}
