//! Who is still there: ranks that say so every second, whatever else they do, and how long one has been silent.
//!
//! A process that computes, writes or waits still answers; one that is stopped, or behind a network that is gone, does not.
//! Every rank answers rank 0, and rank 0 answers every rank.

use std::time::{Duration, Instant};

/// Time between two signs of life.
pub(super) const EVERY: Duration = Duration::from_secs(1);

/// How long another rank may be silent, unless it is set.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A rank whose own clock jumped so far was stopped itself, and knows nothing of the others.
const JUMP: Duration = Duration::from_secs(5);

/// A rank that should answer.
struct Partner {
    rank: usize,
    last_heard: Instant,
    /// It has said that it ends.
    has_left: bool,
}

/// What one rank knows of those it hears from.
pub(super) struct Beats {
    partners: Vec<Partner>,
    last_look: Instant,
}

impl Beats {
    pub(super) fn new(rank: usize, size: usize, now: Instant) -> Self {
        let partners = if rank == 0 { 1..size } else { 0..1 };
        let partners = partners.map(|rank| Partner { rank, last_heard: now, has_left: false }).collect();
        Self { partners, last_look: now }
    }

    /// The ranks that this one answers.
    pub(super) fn partners(&self) -> impl Iterator<Item = usize> {
        self.partners.iter().map(|partner| partner.rank)
    }

    /// Notes that `rank` answered, for the last time if it `leaves`.
    pub(super) fn note(&mut self, rank: usize, leaves: bool, now: Instant) {
        if let Some(partner) = self.partners.iter_mut().find(|partner| partner.rank == rank) {
            partner.last_heard = now;
            partner.has_left |= leaves;
        }
    }

    /// The rank that has been silent for longest, and for how long, where that is longer than `patience`. Asked often.
    pub(super) fn silent(&mut self, patience: Option<Duration>, now: Instant) -> Option<(usize, Duration)> {
        if now.duration_since(self.last_look) > JUMP {
            // Messages of the others are still on their way.
            self.partners.iter_mut().for_each(|partner| partner.last_heard = now);
        }
        self.last_look = now;
        let waiting = self.partners.iter().filter(|partner| !partner.has_left);
        let longest = waiting.map(|partner| (partner.rank, now.duration_since(partner.last_heard)));
        let longest = longest.max_by_key(|(_, silence)| *silence)?;
        (longest.1 > patience?).then_some(longest)
    }

    /// Whether all have said that they end.
    pub(super) fn all_have_left(&self) -> bool {
        self.partners.iter().all(|partner| partner.has_left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every second up to `until`, and gives what was seen first.
    fn watch(beats: &mut Beats, start: Instant, from: u64, until: u64, heard: &[usize]) -> Option<(u64, usize)> {
        (from..=until).find_map(|second| {
            let now = start + Duration::from_secs(second);
            for &rank in heard {
                beats.note(rank, false, now);
            }
            beats.silent(Some(PATIENCE), now).map(|(rank, _)| (second, rank))
        })
    }

    #[test]
    fn a_silent_rank_is_named_when_patience_ends_and_not_before() {
        let start = Instant::now();
        let mut beats = Beats::new(0, 4, start);
        assert_eq!(watch(&mut beats, start, 1, 60, &[1, 3]), Some((21, 2)));
        assert_eq!(watch(&mut Beats::new(0, 4, start), start, 1, 60, &[1, 2, 3]), None);
    }

    #[test]
    fn the_others_watch_the_first_alone() {
        let start = Instant::now();
        assert_eq!(watch(&mut Beats::new(2, 4, start), start, 1, 60, &[1, 3]), Some((21, 0)));
        assert_eq!(watch(&mut Beats::new(2, 4, start), start, 1, 60, &[0]), None);
        assert!(Beats::new(2, 4, start).partners().eq([0]) && Beats::new(0, 3, start).partners().eq([1, 2]));
    }

    #[test]
    fn who_was_stopped_itself_gives_the_others_time_again() {
        let start = Instant::now();
        let mut beats = Beats::new(0, 2, start);
        assert_eq!(watch(&mut beats, start, 1, 10, &[]), None);
        assert_eq!(watch(&mut beats, start, 1000, 1100, &[]), Some((1021, 1)));
    }

    #[test]
    fn who_has_left_need_not_answer_and_patience_may_be_endless() {
        let start = Instant::now();
        let mut beats = Beats::new(0, 2, start);
        assert_eq!(beats.silent(None, start + Duration::from_secs(4)), None);
        beats.note(1, true, start + Duration::from_secs(4));
        assert!(beats.all_have_left());
        assert_eq!(watch(&mut beats, start, 5, 60, &[]), None);
    }
}
