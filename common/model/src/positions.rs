//! The sinusoidal position table.

/// The table of fixed positions, row-major `[max_seq_len, d_model]`.
///
/// `PE(pos, 2i) = sin(pos / 10000^(2i/d))`, `PE(pos, 2i + 1) = cos(pos / 10000^(2i/d))`, computed in double precision.
///
/// # Panics
/// If `d_model` is odd.
///
/// # Source
/// Vaswani et al., arXiv:1706.03762, section 3.5.
pub fn sinusoid_table(max_seq_len: usize, d_model: usize) -> Vec<f32> {
    assert_eq!(d_model % 2, 0, "sinusoidal positions need an even width, found {d_model}");
    let channel = |position: usize, i: usize| {
        let angle = position as f64 / 10_000f64.powf((i / 2 * 2) as f64 / d_model as f64);
        (if i.is_multiple_of(2) { angle.sin() } else { angle.cos() }) as f32
    };
    (0..max_seq_len).flat_map(|position| (0..d_model).map(move |i| channel(position, i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rows_are_the_papers_formula() {
        let table = sinusoid_table(2, 4);
        // Second row: sin 1, cos 1, sin 0.01, cos 0.01.
        let expected = [0.0, 1.0, 0.0, 1.0, 0.841_470_96, 0.540_302_3, 0.009_999_833, 0.999_95];
        assert!(table.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-7), "{table:?}");
    }
}
