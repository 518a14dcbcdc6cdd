//! Loops that the compiler vectorises for the processor at hand, and the functions inside them.
//!
//! A body given to [`vectorized`] is compiled once for each instruction set (AVX-512, AVX2, NEON, baseline) and the
//! best one is taken at run time. Everything it calls must be `#[inline(always)]`. Sums keep [`LANES`] running totals
//! whatever the width of a register and multiplications are not contracted, so that all of them give the same bits.

/// Running totals of a reduction: two AVX-512 registers.
pub const LANES: usize = 32;

/// Runs `body` compiled for this processor's instruction set.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Below this, [`exp`] gives 0 (the true value is below 2⁻¹²⁵).
const EXP_MIN: f32 = -86.9;
/// Above this, `e^x` exceeds the largest f32.
const EXP_MAX: f32 = 88.722_83;

/// `e^x` to 2 units in the last place; 0 below −86.9, infinite above 88.7228, NaN for NaN.
///
/// # Source
/// Cephes `expf` (Moshier): `e^x = 2^n · e^r` with `|r| ≤ ln 2 / 2` and a polynomial of degree 6 for `e^r`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// `1.5 · 2²³`: adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with so few bits that n · LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons, not `min` and `max`: those would lose a NaN.
    let clamped = if x > EXP_MAX { EXP_MAX } else { x };
    let clamped = if clamped < EXP_MIN { EXP_MIN } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_65;
    p = p * r + 0.5;
    let p = p * (r * r) + r + 1.0;
    // 2^(n − 1), so that n = 128 does not overflow; doubled in the end.
    let bits = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126)) << 23;
    let y = p * f32::from_bits(bits) * 2.0;
    let y = if x < EXP_MIN { 0.0 } else { y };
    if x > EXP_MAX { f32::INFINITY } else { y }
}

/// `1 / (1 + e^−x)` to 4 units in the last place.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `Σ f(x_i)`.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut totals = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            totals[lane] += f(chunk[lane]);
        }
    }
    for (total, &x) in totals.iter_mut().zip(rest) {
        *total += f(x);
    }
    add_up(totals)
}

/// `Σ x_i y_i`.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut totals = [0.0f32; LANES];
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (y_chunks, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for lane in 0..LANES {
            totals[lane] += x[lane] * y[lane];
        }
    }
    for (total, (x, y)) in totals.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *total += x * y;
    }
    add_up(totals)
}

/// Adds the lanes pairwise, in one fixed order.
#[inline(always)]
fn add_up(mut totals: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for lane in 0..n {
            totals[lane] += totals[lane + n];
        }
    }
    totals[0]
}

/// `to_i += from_i`.
#[inline(always)]
pub fn add_assign(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units in the last place between `x` and the correctly rounded value.
    fn ulps(x: f32, exact: f64) -> f64 {
        let rounded = exact as f32;
        let unit = f64::from(f32::from_bits(rounded.abs().to_bits() + 1)) - f64::from(rounded.abs());
        ((f64::from(x) - exact) / unit).abs()
    }

    #[test]
    fn exp_is_within_two_ulps_over_its_whole_range() {
        let mut worst: f64 = 0.0;
        // A step of 1e-4 does not hit the same reduced argument twice.
        for i in -869_000..=887_000 {
            let x = i as f32 * 1e-4;
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst <= 2.0, "{worst} ulps");
    }

    #[test]
    fn exp_has_the_right_ends() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(88.72).is_finite());
    }

    #[test]
    fn sigmoid_is_within_four_ulps() {
        let mut worst: f64 = 0.0;
        for i in -80_000..=80_000 {
            let x = i as f32 * 1e-3;
            worst = worst.max(ulps(sigmoid(x), 1.0 / (1.0 + (-f64::from(x)).exp())));
        }
        assert!(worst <= 4.0, "{worst} ulps");
        assert_eq!(sigmoid(-1000.0), 0.0);
        assert_eq!(sigmoid(1000.0), 1.0);
    }

    #[test]
    fn vectorized_and_plain_bodies_give_the_same_bits() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        let y: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.71).cos()).collect();
        let plain = (sum(&x, exp), dot(&x, &y));
        let fast = vectorized(|| (sum(&x, exp), dot(&x, &y)));
        assert_eq!(plain.0.to_bits(), fast.0.to_bits());
        assert_eq!(plain.1.to_bits(), fast.1.to_bits());
    }
}
