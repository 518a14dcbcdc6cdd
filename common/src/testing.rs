//! What the tests of several crates share (feature `testing`).

/// Panics unless the slices are as long and each pair of numbers is at most `tolerance` apart.
///
/// The tolerance is absolute. NaN is close to nothing.
///
/// # Panics
/// With the first pair that differs, its index and both numbers.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "lengths of {actual:?} and {expected:?}");
    for (idx, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (a - e).abs() <= tolerance,
            "element {idx}: {a} is not within {tolerance} of {e}\n actual: {actual:?}\n expected: {expected:?}"
        );
    }
}
