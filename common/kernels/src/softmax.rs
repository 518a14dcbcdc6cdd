//! Sums and exponentials over a row of logits, for sampling: the same bits on every processor.

#[cfg(feature = "flex")]
use super::flex::simd::simd;

/// Without the flex backend, what the compiler makes of the target's baseline.
#[cfg(not(feature = "flex"))]
macro_rules! simd {
    ($($item:item)*) => { $($item)* };
}

/// Weights are summed in blocks of this many, so that a draw walks over blocks first.
pub const BLOCK: usize = 256;

simd! {
    /// `ln Σ exp(logits)`, summed in f64.
    pub fn log_sum_exp(logits: &[f32]) -> f64 {
        let max = max_of(logits);
        let mut total = 0.0;
        for block in logits.chunks(BLOCK) {
            total += sum_of(block, |&logit| exp_nonpositive(logit - max));
        }
        max as f64 + total.ln()
    }

    /// The first index that holds NaN or infinity.
    pub fn first_not_finite(logits: &[f32]) -> Option<usize> {
        let mut finite = true;
        for logit in logits {
            finite &= logit.is_finite();
        }
        if finite { None } else { logits.iter().position(|logit| !logit.is_finite()) }
    }

    /// Writes `exp((logit − max) · scale)` to `weights` and the sums of its blocks to `sums`; returns `max`.
    pub fn weigh(logits: &[f32], scale: f32, weights: &mut [f32], sums: &mut [f64]) -> f32 {
        let max = max_of(logits);
        let blocks = weights.chunks_mut(BLOCK).zip(sums).zip(logits.chunks(BLOCK));
        for ((weights, sum), logits) in blocks {
            for (weight, &logit) in weights.iter_mut().zip(logits) {
                *weight = exp_nonpositive((logit - max) * scale);
            }
            *sum = sum_of(weights, |&weight| weight);
        }
        max
    }

    /// The sums of the blocks of `weights`.
    pub fn sum_blocks(weights: &[f32], sums: &mut [f64]) {
        for (sum, block) in sums.iter_mut().zip(weights.chunks(BLOCK)) {
            *sum = sum_of(block, |&weight| weight);
        }
    }
}

/// The largest of finite numbers.
#[inline(always)]
pub fn max_of(logits: &[f32]) -> f32 {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &logit| max.max(logit))
}

/// The sum of `weight` over `values` in f64.
#[inline(always)]
fn sum_of(values: &[f32], weight: impl Fn(&f32) -> f32) -> f64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0f64; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += weight(value) as f64;
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|value| weight(value) as f64).sum::<f64>()
}

/// Independent partial results, so that the compiler can use vector registers.
const LANES: usize = 16;

/// The bits of a finite number as an integer of the same order; both zeros are equal.
pub fn ordered_bits(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// `exp(x)` for `x ≤ 0`, within 2e-7 of the value; 0 below −87, where f32 would go subnormal.
///
/// Without branches or calls, so it is vectorised, and the same on every processor and system.
///
/// # Source
/// Cephes `expf.c` (Moshier): `x = n·ln 2 + r`, a polynomial of degree 7 for `exp(r)`.
#[inline(always)]
pub fn exp_nonpositive(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it leaves the nearest integer in the low bits
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let value = p * f32::from_bits(exponent);
    if x > LOWEST { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_exponential_is_within_two_roundings() {
        let worst = (0..880_000).map(|step| step as f32 * -1e-4).filter(|&x| x > -87.0).fold(0f64, |worst, x| {
            let exact = f64::from(x).exp();
            worst.max((exp_nonpositive(x) as f64 / exact - 1.0).abs())
        });
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-100.0), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
    }

    proptest! {
        #[test]
        fn log_sum_exp_is_that_of_f64(logits in prop::collection::vec(-50f32..50.0, 1..900)) {
            let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            // The exponential's own error, and f32 differences of numbers up to 100.
            prop_assert!((log_sum_exp(&logits) - exact).abs() < 1e-5);
        }

        #[test]
        fn ordered_bits_keep_the_order(a in -1e3f32..1e3, b in -1e3f32..1e3) {
            prop_assert_eq!(a.partial_cmp(&b).unwrap(), ordered_bits(a).cmp(&ordered_bits(b)));
        }
    }
}
