//! One seed, many independent streams of random numbers, all on the host.
//!
//! A stream is named by what it decides (`"init/blocks.0.mlp.up.weight"`, `"order"`, `"sampling"`) and by an index
//! (an epoch, a row). Nothing has to be saved to resume: the name and the index give the stream again,
//! and no stream depends on how much of another was used. Where two parts of a recipe draw streams of the same names
//! from one seed, each has streams of its own purpose ([`Streams::of`]).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng};
use sha2::{Digest, Sha256};

/// Gives out the random streams that belong to one seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    seed: u64,
}

impl Streams {
    /// The streams of `seed`.
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The stream `name`, `index`, from its beginning.
    ///
    /// The key is `SHA-256(seed ‖ name)`, the ChaCha stream number is `index`.
    pub fn get(&self, name: &str, index: u64) -> Rng {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        hash.update(name.as_bytes());
        let mut inner = ChaCha8Rng::from_seed(hash.finalize().into());
        inner.set_stream(index);
        Rng { inner }
    }

    /// The streams of one purpose, which share no number with these nor with those of another purpose.
    ///
    /// Who draws the same names, such as `"sampling"` and a row, for another purpose than training draws them from
    /// here. The seed is the beginning of `SHA-256(seed ‖ "purpose" ‖ purpose)`.
    #[must_use]
    pub fn of(&self, purpose: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        hash.update("purpose");
        hash.update(purpose.as_bytes());
        let digest: [u8; 32] = hash.finalize().into();
        let [a, b, c, d, e, f, g, h, ..] = digest;
        Self { seed: u64::from_le_bytes([a, b, c, d, e, f, g, h]) }
    }
}

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Rng {
    inner: ChaCha8Rng,
}

impl Rng {
    /// 64 uniform random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.inner.next_u64()
    }

    /// A uniform number in `[0, 1)` with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// The next numbers of [`next_u64`](Self::next_u64), all at once.
    pub fn fill_u64(&mut self, numbers: &mut [u64]) {
        let mut bytes = [0; 4096];
        for part in numbers.chunks_mut(bytes.len() / 8) {
            let bytes = &mut bytes[..8 * part.len()];
            self.inner.fill_bytes(bytes);
            for (number, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                *number = u64::from_le_bytes(*bytes);
            }
        }
    }

    /// Leaves out the next `n` numbers of [`next_u64`](Self::next_u64), in no time.
    pub fn skip_u64(&mut self, n: usize) {
        self.inner.set_word_pos(self.inner.get_word_pos() + 2 * n as u128);
    }

    /// A uniform integer in `0..n`, without modulo bias.
    ///
    /// # Panics
    /// If `n` is 0.
    ///
    /// # Source
    /// Lemire, "Fast random integer generation in an interval", arXiv:1805.10941.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no integer lies below 0");
        let n = n as u64;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            let low = product as u64;
            if low >= n || low >= n.wrapping_neg() % n {
                return (product >> 64) as usize;
            }
        }
    }

    /// A standard normal number (Box–Muller, the cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Puts `items` in a uniformly random order (Fisher–Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// The numbers `0..n` in a uniformly random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_fixed_by_seed_name_and_index() {
        let streams = Streams::new(7);
        let first = streams.get("order", 3).next_u64();
        assert_eq!(first, Streams::new(7).get("order", 3).next_u64());
        assert_ne!(first, Streams::new(8).get("order", 3).next_u64());
        assert_ne!(first, streams.get("sampling", 3).next_u64());
        assert_ne!(first, streams.get("order", 4).next_u64());
    }

    #[test]
    fn numbers_at_once_are_those_drawn_one_by_one() {
        for (n_before, n_skipped, n) in [(0, 0, 1300), (3, 0, 5), (1, 7, 513), (40, 100, 600)] {
            let mut one_by_one = Streams::new(1).get("test", 3);
            let mut at_once = one_by_one.clone();
            (0..n_before).for_each(|_| assert_eq!(one_by_one.next_u64(), at_once.next_u64()));
            for _ in 0..n_skipped {
                one_by_one.next_u64();
            }
            at_once.skip_u64(n_skipped);
            let mut numbers = vec![0; n];
            at_once.fill_u64(&mut numbers);
            let expected: Vec<u64> = (0..n).map(|_| one_by_one.next_u64()).collect();
            assert_eq!(numbers, expected);
            assert_eq!(at_once.next_u64(), one_by_one.next_u64());
        }
    }

    #[test]
    fn purposes_share_no_stream() {
        let streams = Streams::new(7);
        let first = |streams: Streams| streams.get("sampling", 0).next_u64();
        assert_eq!(first(streams.of("held-out")), first(Streams::new(7).of("held-out")));
        assert_ne!(first(streams.of("held-out")), first(streams));
        assert_ne!(first(streams.of("held-out")), first(streams.of("evaluation")));
        assert_ne!(first(streams.of("held-out")), first(Streams::new(8).of("held-out")));
    }

    #[test]
    fn below_is_uniform() {
        let mut rng = Streams::new(0).get("test", 0);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        // 10,000 expected in each, standard deviation 93: five of them.
        assert!(counts.iter().all(|&c| c.abs_diff(10_000) < 465), "{counts:?}");
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut rng = Streams::new(0).get("test", 1);
        let draws: Vec<f64> = (0..100_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / 1e5;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 1e5;
        // Standard errors 0.0032 and 0.0045: five of each.
        assert!(mean.abs() < 0.016 && (variance - 1.0).abs() < 0.023, "{mean} {variance}");
    }

    #[test]
    fn a_permutation_holds_each_number_once() {
        let mut order = Streams::new(0).get("test", 2).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
