//! Which requests belong to which file: no two groups share one.

use std::collections::BTreeMap;

use common::rng::{Rng, Streams};

use super::request::Request;
use super::words::{CHARACTERS, COLOURS, Mood, OBJECTS, PLACES};

/// Who may ask for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Pretraining and fine-tuning.
    Train,
    /// Their validation.
    Val,
    /// Pairs made by the generator.
    Prefs,
    /// Their test.
    PrefsTest,
    /// Requests for pairs of the SFT model's own answers.
    Pairs,
    /// Their test.
    PairsTest,
    /// PPO.
    Ppo,
    /// The gold evaluation.
    Test,
}

/// The share of each group in the requests of a kind, in per cent; together 100.
const SHARES: [(Group, usize); 8] = [
    (Group::Train, 50),
    (Group::Ppo, 13),
    (Group::Pairs, 17),
    (Group::Prefs, 8),
    (Group::Test, 3),
    (Group::PairsTest, 3),
    (Group::Val, 3),
    (Group::PrefsTest, 3),
];

/// How often a request has one, two or three constraints, in per cent.
const N_CONSTRAINTS: [usize; 3] = [15, 45, 40];

/// The kind of the request: which constraints it names, and whether there is a colour among them.
type Kind = [bool; 5];

fn kind_of(request: &Request) -> Kind {
    [
        request.character.is_some(),
        request.object.is_some(),
        request.place.is_some(),
        request.mood.is_some(),
        matches!(request.object, Some((_, Some(_)))),
    ]
}

/// Every request there is: each set of one to three constraints.
pub fn all_requests() -> Vec<Request> {
    let options = |n: usize| (0..n).map(Some).chain([None]);
    let objects = || {
        (0..OBJECTS.len())
            .flat_map(|object| options(COLOURS.len()).map(move |colour| Some((object, colour))))
            .chain([None])
    };
    let mut all = Vec::new();
    for character in options(CHARACTERS.len()) {
        for object in objects() {
            for place in options(PLACES.len()) {
                for mood in [Some(Mood::Happy), Some(Mood::Sad), None] {
                    let request = Request { character, object, place, mood };
                    if (1..=3).contains(&request.n_constraints()) {
                        all.push(request);
                    }
                }
            }
        }
    }
    all
}

/// The requests of every group.
#[derive(Debug)]
pub struct Splits {
    /// Non-empty lists only.
    groups: BTreeMap<Group, BTreeMap<Kind, Vec<Request>>>,
}

impl Splits {
    /// Deals out all requests, kind by kind, in a random order that belongs to the seed.
    ///
    /// A kind of few requests (there are two moods) goes to the groups that come first in the order of their shares.
    pub fn deal(streams: &Streams) -> Self {
        let mut kinds: BTreeMap<Kind, Vec<Request>> = BTreeMap::new();
        for request in all_requests() {
            kinds.entry(kind_of(&request)).or_default().push(request);
        }
        let mut rng = streams.get("world/splits", 0);
        let mut groups: BTreeMap<Group, BTreeMap<Kind, Vec<Request>>> = BTreeMap::new();
        for (kind, mut requests) in kinds {
            rng.shuffle(&mut requests);
            let n_requests = requests.len();
            let (mut share, mut start) = (0, 0);
            for (group, percent) in SHARES {
                share += percent;
                let end = (n_requests * share).div_ceil(100);
                if end > start {
                    groups.entry(group).or_default().insert(kind, requests[start..end].to_vec());
                }
                start = end;
            }
        }
        Self { groups }
    }

    /// Draws a request of `group`: first how many constraints, then which, then what.
    pub fn draw(&self, group: Group, rng: &mut Rng) -> Request {
        let kinds = &self.groups[&group];
        loop {
            let roll = rng.below(100);
            let n = if roll < N_CONSTRAINTS[0] {
                1
            } else if roll < N_CONSTRAINTS[0] + N_CONSTRAINTS[1] {
                2
            } else {
                3
            };
            let fitting: Vec<&Vec<Request>> = kinds
                .iter()
                .filter(|(kind, _)| kind[..4].iter().filter(|&&named| named).count() == n)
                .map(|(_, requests)| requests)
                .collect();
            if !fitting.is_empty() {
                let requests = fitting[rng.below(fitting.len())];
                return requests[rng.below(requests.len())];
            }
        }
    }

    /// Every request of `group`.
    pub fn requests(&self, group: Group) -> impl Iterator<Item = Request> + '_ {
        self.groups[&group].values().flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_request_belongs_to_one_group() {
        let splits = Splits::deal(&Streams::new(3));
        let mut seen = HashSet::new();
        for (group, percent) in SHARES {
            let requests: Vec<Request> = splits.requests(group).collect();
            let expected = all_requests().len() * percent / 100;
            assert!(requests.len().abs_diff(expected) < 25, "{group:?}: {}", requests.len());
            for request in requests {
                assert!(seen.insert(request), "{request:?} twice");
            }
        }
        assert_eq!(seen.len(), all_requests().len());
        // 20·98·10 + 20·98·2 + 20·10·2 + 98·10·2 of three, 3,396 of two, 130 of one.
        assert_eq!(seen.len(), 25_880 + 3_396 + 130);
        assert_eq!(SHARES.iter().map(|(_, percent)| percent).sum::<usize>(), 100);
    }

    #[test]
    fn draws_have_one_to_three_constraints_as_stated() {
        let splits = Splits::deal(&Streams::new(3));
        for (group, _) in SHARES {
            let mut rng = Streams::new(3).get("draws", 0);
            let mut counts = [0usize; 3];
            for _ in 0..5_000 {
                counts[splits.draw(group, &mut rng).n_constraints() - 1] += 1;
            }
            for (count, percent) in counts.iter().zip(N_CONSTRAINTS) {
                // Standard deviation at most 35.
                assert!(count.abs_diff(percent * 50) < 175, "{group:?}: {counts:?}");
            }
        }
    }
}
