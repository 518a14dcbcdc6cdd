//! Which item comes when: a new order every epoch, known by the position alone.

use base::rng::Streams;

/// Neighbouring items that stay together when the blocks are put in order.
const BLOCK: usize = 256;

/// Blocks whose items are mixed.
const POOL: usize = 256;

/// A seeded order of `0..n_items` that goes on for ever, a fresh permutation each epoch.
///
/// Position `p` is item `p mod n` of epoch `p / n`. To resume, ask for the position where the run stopped.
#[derive(Debug, Clone)]
pub struct Order {
    n_items: usize,
    streams: Streams,
    name: String,
    /// Of the epoch asked for last: positions come mostly one after another.
    current: Option<EpochOrder>,
    pools: Option<Pools>,
}

/// The order of one epoch.
#[derive(Debug, Clone)]
struct EpochOrder {
    epoch: u64,
    /// Of the items, or where there are pools, of the blocks of items.
    permutation: Vec<usize>,
    /// Where the last of them came, which is the one block that can be short.
    short: usize,
}

/// An order in two levels, which takes little memory however many items there are.
///
/// Blocks of neighbouring items are put in a random order; then each pool of blocks that follow one another in that order
/// is mixed item by item. An item can come anywhere in an epoch, and its neighbours of one block come within a pool of it.
#[derive(Debug, Clone)]
struct Pools {
    /// Items of a block; the last block of all may have fewer.
    block: usize,
    /// Blocks of a pool.
    pool: usize,
    /// The pool asked for last, and its items in their order.
    current: Option<(u64, usize, Vec<usize>)>,
}

impl Order {
    /// The order of `n_items` that belongs to the random streams called `name`: one permutation of all, which is kept in
    /// memory.
    ///
    /// # Panics
    /// If there is no item.
    pub fn new(n_items: usize, streams: Streams, name: &str) -> Self {
        assert!(n_items > 0, "there is no item to order");
        Self { n_items, streams, name: name.to_owned(), current: None, pools: None }
    }

    /// An order of `n_items` in two levels: blocks of 256 neighbours in a random order, then mixed within 256 blocks. Memory
    /// is half a megabyte and eight bytes a block.
    ///
    /// # Panics
    /// If there is no item.
    pub fn in_blocks(n_items: usize, streams: Streams, name: &str) -> Self {
        Self::in_blocks_of(n_items, streams, name, BLOCK, POOL)
    }

    fn in_blocks_of(n_items: usize, streams: Streams, name: &str, block: usize, pool: usize) -> Self {
        let pools = Pools { block, pool, current: None };
        Self { pools: Some(pools), ..Self::new(n_items, streams, name) }
    }

    /// The item at `position`, counted from 0 over all epochs.
    pub fn item(&mut self, position: u64) -> usize {
        let (epoch, i) = (self.epoch(position), (position % self.n_items as u64) as usize);
        let epoch_order = match self.current.take() {
            Some(current) if current.epoch == epoch => current,
            _ => self.shuffled(epoch),
        };
        let EpochOrder { permutation, short, .. } = self.current.insert(epoch_order);
        let Some(pools) = &mut self.pools else { return permutation[i] };
        let (pool, start) = pools.at(i, self.n_items, permutation.len(), *short);
        let mixed = match pools.current.take() {
            Some(current) if (current.0, current.1) == (epoch, pool) => current,
            _ => {
                let mut items = pools.items(pool, self.n_items, permutation);
                let n_pools = permutation.len().div_ceil(pools.pool) as u64;
                let stream = epoch * n_pools + pool as u64;
                self.streams.get(&format!("{}/pool", self.name), stream).shuffle(&mut items);
                (epoch, pool, items)
            }
        };
        let (.., items) = pools.current.insert(mixed);
        items[i - start]
    }

    /// The permutation of `epoch`.
    fn shuffled(&self, epoch: u64) -> EpochOrder {
        let (n, mut stream) = match &self.pools {
            None => (self.n_items, self.streams.get(&self.name, epoch)),
            Some(pools) => {
                (self.n_items.div_ceil(pools.block), self.streams.get(&format!("{}/blocks", self.name), epoch))
            }
        };
        let permutation = stream.permutation(n);
        let short = permutation.iter().position(|&last| last + 1 == n).expect("the last one is one of them");
        EpochOrder { epoch, permutation, short }
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

impl Pools {
    /// The pool that holds the `i`th item of an epoch of `n_blocks`, of which the one at `short` may have fewer items, and
    /// the number of items before that pool.
    fn at(&self, i: usize, n_items: usize, n_blocks: usize, short: usize) -> (usize, usize) {
        let missing = n_blocks * self.block - n_items;
        // Pools after the short block begin that much earlier.
        let start = |pool: usize| {
            let n_before = (pool * self.pool).min(n_blocks);
            n_before * self.block - if short < n_before { missing } else { 0 }
        };
        let pool = i / (self.block * self.pool);
        let pool = if start(pool + 1) <= i { pool + 1 } else { pool };
        (pool, start(pool))
    }

    /// The items of a pool, block after block.
    fn items(&self, pool: usize, n_items: usize, blocks: &[usize]) -> Vec<usize> {
        let blocks = &blocks[pool * self.pool..blocks.len().min((pool + 1) * self.pool)];
        blocks.iter().flat_map(|block| block * self.block..n_items.min((block + 1) * self.block)).collect()
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

    #[test]
    fn blocks_of_any_number_of_items_give_each_once_an_epoch() {
        for (n, block, pool) in
            [(1, 4, 3), (4, 4, 3), (12, 4, 3), (13, 4, 3), (24, 4, 3), (47, 4, 3), (100, 7, 5), (9, 1, 1)]
        {
            let mut order = Order::in_blocks_of(n, Streams::new(5), "order", block, pool);
            let mut epochs =
                [0, 1].map(|epoch| (epoch * n..epoch * n + n).map(|p| order.item(p as u64)).collect::<Vec<_>>());
            assert!(n < 12 || epochs[0] != epochs[1], "{n} items");
            for epoch in &mut epochs {
                epoch.sort_unstable();
                assert_eq!(*epoch, (0..n).collect::<Vec<_>>(), "{n} items in blocks of {block}");
            }
        }
        // Two epochs of the usual sizes, with a short block.
        let n = 3 * BLOCK * POOL + 100;
        let mut order = Order::in_blocks(n, Streams::new(6), "order");
        for epoch in 0..2 {
            let mut is_there = vec![false; n];
            (0..n).for_each(|i| is_there[order.item((epoch * n + i) as u64)] = true);
            assert!(is_there.iter().all(|there| *there));
        }
    }

    #[test]
    fn blocks_come_at_the_same_position_whenever_asked_for_and_spread_over_the_text() {
        let order = |seed| Order::in_blocks_of(5_000, Streams::new(seed), "order", 8, 16);
        let mut forwards = order(3);
        let items: Vec<_> = (0..10_000).map(|p| forwards.item(p)).collect();
        // As a run that was resumed, or another rank, asks.
        for p in [9_999, 5_000, 4_999, 0, 7_777, 128, 127] {
            assert_eq!(order(3).item(p), items[p as usize], "position {p}");
            assert_eq!(forwards.item(p), items[p as usize], "position {p}");
        }
        assert_ne!(items, (0..10_000).map(|p| order(4).item(p)).collect::<Vec<_>>());
        // A batch of 16 comes from many places: neighbours would be 1 apart.
        let apart: Vec<_> = items[..2000].windows(2).map(|pair| pair[0].abs_diff(pair[1])).collect();
        let mean = apart.iter().sum::<usize>() / apart.len();
        assert!((1_300..2_000).contains(&mean), "two random items of 5,000 lie 1,667 apart, these {mean}");
    }
}
