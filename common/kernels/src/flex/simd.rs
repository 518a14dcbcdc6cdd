//! Functions compiled for the vector instructions of the processor at hand, and what they are made of.
//!
//! [`simd!`] defines functions whose bodies exist for AVX-512, for AVX2 and for the baseline of the target (which on
//! Arm has NEON); the best one is taken at run time. Everything a body calls must be `#[inline(always)]`, or it is
//! compiled for the baseline alone: closures passed to iterators of the standard library are inlined, larger ones must
//! be functions. Sums keep [`LANES`] running totals whatever the width of a register, and multiplications are fused
//! with additions exactly where [`fma`] says so, so that all versions give the same bits.

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction sets that bodies are compiled for, beside the target's baseline.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// Nothing but the baseline.
    Baseline = 1,
    /// x86-64-v3: AVX2 and FMA.
    V3 = 2,
    /// x86-64-v4: AVX-512.
    V4 = 3,
}

/// The level in use; 0 before the processor was asked.
static LEVEL: AtomicU8 = AtomicU8::new(0);

/// Uses no more than `level` from now on, and no more than the processor has.
pub fn limit(level: Level) {
    LEVEL.store((level as u8).min(detect() as u8), Ordering::Relaxed);
}

/// The instructions in use: those of this processor, unless they were limited.
#[inline]
pub fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        0 => {
            let level = limited(detect());
            LEVEL.store(level as u8, Ordering::Relaxed);
            level
        }
        2 => Level::V3,
        3 => Level::V4,
        _ => Level::Baseline,
    }
}

/// A test process can be told to use less than the processor has.
#[cfg(test)]
fn limited(level: Level) -> Level {
    match std::env::var(tests::LIMIT).as_deref() {
        Ok("v3") if level == Level::V4 => Level::V3,
        Ok("baseline") => Level::Baseline,
        _ => level,
    }
}

#[cfg(not(test))]
fn limited(level: Level) -> Level {
    level
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2");
    let v4 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (v3, v4) {
        (true, true) => Level::V4,
        (true, false) => Level::V3,
        _ => Level::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Baseline
}

/// Defines functions with a body for each instruction set.
///
/// Not a function that takes a closure: closures cannot be marked `#[inline(always)]`, and one that is not inlined into
/// the function that has the instruction set is compiled without it.
macro_rules! simd {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$kind:ident: $bound:ident>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)?
            $body:block
    )*) => {$(
        $(#[$meta])*
        $vis fn $name$(<$kind: $bound>)?($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body$(<$kind: $bound>)?($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn v4$(<$kind: $bound>)?($($arg: $type),*) $(-> $result)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn v3$(<$kind: $bound>)?($($arg: $type),*) $(-> $result)? {
                    body($($arg),*)
                }
                use $crate::flex::simd::{Level, level};
                match level() {
                    // SAFETY: the processor has the instructions, or it would not be of this level.
                    Level::V4 => return unsafe { v4($($arg),*) },
                    // SAFETY: as above.
                    Level::V3 => return unsafe { v3($($arg),*) },
                    Level::Baseline => {}
                }
            }
            body($($arg),*)
        }
    )*};
}
pub(crate) use simd;

/// Running totals of a reduction: two AVX-512 registers.
pub const LANES: usize = 32;

/// `a · b + c`, rounded once.
///
/// One instruction wherever there are vector instructions to speak of; a slow call on x86-64 processors from before
/// 2013, where plain kernels are the better choice.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

/// Below this, [`exp`] gives 0 (the true value is below 2⁻¹²⁵).
const EXP_MIN: f32 = -86.9;

/// `e^x` for `x ≤ 88`, to 2 units in the last place; 0 below −86.9, NaN for NaN, meaningless above 88.
///
/// A softmax subtracts the largest number first, so that nothing here is above 0 but for rounding.
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
    // A comparison, not `max`: that would lose a NaN.
    let clamped = if x < EXP_MIN { EXP_MIN } else { x };
    let shifted = fma(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(n, -LN2_HIGH, clamped);
    let r = fma(n, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    p = fma(p, r, 1.398_2e-3);
    p = fma(p, r, 8.333_452e-3);
    p = fma(p, r, 4.166_579_6e-2);
    p = fma(p, r, 0.166_666_65);
    p = fma(p, r, 0.5);
    let p = fma(p, r * r, r) + 1.0;
    // The low bits of `shifted` are n, those of ROUND are 0: this is 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let y = p * scale;
    if x < EXP_MIN { 0.0 } else { y }
}

/// `1 / (1 + e^−x)` to 4 units in the last place.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let s = 1.0 / (1.0 + e);
    if x < 0.0 { e * s } else { s }
}

/// `Σ x_i`.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let mut totals = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            totals[lane] += chunk[lane];
        }
    }
    for (total, &x) in totals.iter_mut().zip(rest) {
        *total += x;
    }
    add_up(totals)
}

/// `Σ (x_i − mean)²`.
#[inline(always)]
pub fn sum_of_squares_around(x: &[f32], mean: f32) -> f32 {
    let mut totals = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let centred = chunk[lane] - mean;
            totals[lane] = fma(centred, centred, totals[lane]);
        }
    }
    for (total, &x) in totals.iter_mut().zip(rest) {
        *total = fma(x - mean, x - mean, *total);
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
            totals[lane] = fma(x[lane], y[lane], totals[lane]);
        }
    }
    for (total, (x, y)) in totals.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *total = fma(*x, *y, *total);
    }
    add_up(totals)
}

/// Adds the lanes pairwise, in one fixed order.
#[inline(always)]
pub fn add_up<const N: usize>(mut totals: [f32; N]) -> f32 {
    let mut n = N;
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

    /// The variable that tells a test process to use no more than `v3` or `baseline`.
    pub(super) const LIMIT: &str = "KINDLING_TEST_LEVEL";

    /// Runs all other tests of this crate in a process of lesser instructions.
    #[track_caller]
    fn kernels_hold_with(limit: &str) {
        let output = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--skip", "instructions_too"])
            .env(LIMIT, limit)
            .output()
            .expect("this program can be started");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "with {limit}: {said}");
    }

    #[test]
    fn a_limit_is_kept() {
        let most = match std::env::var(LIMIT).as_deref() {
            Ok("baseline") => Level::Baseline,
            Ok("v3") => Level::V3,
            _ => Level::V4,
        };
        assert!(level() as u8 <= most as u8);
    }

    #[test]
    fn kernels_hold_with_avx2_instructions_too() {
        kernels_hold_with("v3");
    }

    #[test]
    fn kernels_hold_with_baseline_instructions_too() {
        kernels_hold_with("baseline");
    }

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
        for i in -869_000..=880_000 {
            let x = i as f32 * 1e-4;
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst <= 2.0, "{worst} ulps");
    }

    #[test]
    fn exp_has_the_right_ends() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
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
        assert!(sigmoid(f32::NAN).is_nan());
    }

    #[inline(always)]
    fn numbers_of(x: &[f32], y: &[f32]) -> Vec<f32> {
        let exps = x.iter().map(|&x| exp(x));
        exps.chain(x.iter().map(|&x| sigmoid(x))).chain([sum(x), dot(x, y), sum_of_squares_around(x, 0.25)]).collect()
    }

    simd! {
        fn fast_numbers_of(x: &[f32], y: &[f32]) -> Vec<f32> {
            numbers_of(x, y)
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        let y: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.71).cos()).collect();
        let bits = |numbers: Vec<f32>| numbers.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(numbers_of(&x, &y)), bits(fast_numbers_of(&x, &y)));
    }
}
