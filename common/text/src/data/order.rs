//! Which item comes when: a new order every epoch, known by the position alone.

use base::rng::Streams;

/// A seeded order of `0..n_items` that goes on for ever, a fresh permutation each epoch.
///
/// Position `p` is item `p mod n` of epoch `p / n`. To resume, ask for the position where the run stopped.
#[derive(Debug, Clone)]
pub struct Order {
    n_items: usize,
    streams: Streams,
    name: String,
    /// The epoch asked for last, and its permutation: positions come mostly one after another.
    current: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order of `n_items` that belongs to the random streams called `name`.
    ///
    /// # Panics
    /// If there is no item.
    pub fn new(n_items: usize, streams: Streams, name: &str) -> Self {
        assert!(n_items > 0, "there is no item to order");
        Self { n_items, streams, name: name.to_owned(), current: None }
    }

    /// The item at `position`, counted from 0 over all epochs.
    pub fn item(&mut self, position: u64) -> usize {
        let (epoch, i) = (self.epoch(position), (position % self.n_items as u64) as usize);
        let (_, permutation) = match self.current.take() {
            Some(current) if current.0 == epoch => self.current.insert(current),
            _ => self.current.insert((epoch, self.streams.get(&self.name, epoch).permutation(self.n_items))),
        };
        permutation[i]
    }

    /// The epoch that `position` lies in, from 0.
    pub fn epoch(&self, position: u64) -> u64 {
        position / self.n_items as u64
    }

    /// Number of items in an epoch.
    pub fn n_items(&self) -> usize {
        self.n_items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_each_item_once_and_the_next_another_order() {
        let mut order = Order::new(50, Streams::new(1), "order");
        let mut epochs = [0, 1].map(|epoch| (epoch * 50..epoch * 50 + 50).map(|p| order.item(p)).collect::<Vec<_>>());
        assert_ne!(epochs[0], epochs[1]);
        for epoch in &mut epochs {
            epoch.sort_unstable();
            assert_eq!(*epoch, (0..50).collect::<Vec<_>>());
        }
        assert_eq!((order.epoch(49), order.epoch(50)), (0, 1));
    }

    #[test]
    fn a_position_is_the_same_item_whenever_it_is_asked_for() {
        let mut forwards = Order::new(7, Streams::new(3), "order");
        let items: Vec<_> = (0..40).map(|p| forwards.item(p)).collect();
        let mut backwards = Order::new(7, Streams::new(3), "order");
        for p in (0..40).rev() {
            assert_eq!(backwards.item(p), items[p as usize]);
        }
        let mut other = Order::new(7, Streams::new(4), "order");
        assert_ne!(items, (0..40).map(|p| other.item(p)).collect::<Vec<_>>());
    }
}
