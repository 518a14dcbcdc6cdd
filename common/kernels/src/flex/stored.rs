//! Weights as they lie in memory: in f32, or frozen ones in bf16, which is the upper half of an f32.
//!
//! Whoever reads them widens them on the way into a register or into a rearranged operand, exactly; products are those of
//! the widened numbers, to the bit.

use burn::tensor::bf16;
use burn_flex::FlexTensor;

use super::simd::simd;
use super::transpose::{SIDE, transpose_square};
use super::with_scratch;

/// A number of a weight.
pub trait Stored: Copy + Send + Sync + 'static {
    /// Its value.
    fn widen(self) -> f32;

    /// The numbers as they lie, where they are in f32.
    fn as_f32(numbers: &[Self]) -> Option<&[f32]>;

    /// The numbers of a tensor of this type that [`contiguous`](super::contiguous) returned.
    fn of(tensor: &FlexTensor) -> &[Self];
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn as_f32(numbers: &[Self]) -> Option<&[f32]> {
        Some(numbers)
    }

    fn of(tensor: &FlexTensor) -> &[Self] {
        super::floats(tensor)
    }
}

impl Stored for bf16 {
    // Not its `to_f32`, which asks for NaN: a shift is one instruction for a whole register.
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn of(tensor: &FlexTensor) -> &[Self] {
        tensor.as_slice().expect("a bf16 tensor that was made contiguous")
    }
}

/// `$body` with the numbers of `$weight`, a tensor that [`contiguous`](super::contiguous) returned, in either type.
macro_rules! with_numbers {
    ($numbers:ident of $weight:expr => $body:expr) => {
        match burn::backend::TensorMetadata::dtype(&*$weight) {
            burn::tensor::DType::BF16 => {
                let $numbers = <burn::tensor::bf16 as $crate::flex::stored::Stored>::of(&$weight);
                $body
            }
            _ => {
                let $numbers = <f32 as $crate::flex::stored::Stored>::of(&$weight);
                $body
            }
        }
    };
}
pub(crate) use with_numbers;

/// Gives `body` the numbers in f32.
pub fn widened<T: Stored, R>(numbers: &[T], body: impl FnOnce(&[f32]) -> R) -> R {
    match T::as_f32(numbers) {
        Some(numbers) => body(numbers),
        None => with_scratch(numbers.len(), |buffer| {
            widen(buffer, numbers);
            body(buffer)
        }),
    }
}

simd! {
    /// `to_i = from_i`.
    pub fn widen<T: Stored>(to: &mut [f32], from: &[T]) {
        widen_here(to, from);
    }
}

/// [`widen`], for a body that is compiled for more than the baseline.
#[inline(always)]
pub fn widen_here<T: Stored>(to: &mut [f32], from: &[T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.widen();
    }
}

/// [`transpose_square`] of numbers of either type.
///
/// # Panics
/// If a square does not lie within its slice.
#[inline(always)]
pub fn transpose_stored<T: Stored>(to: &mut [f32], to_stride: usize, from: &[T], from_stride: usize) {
    if let Some(from) = T::as_f32(from) {
        return transpose_square(to, to_stride, from, from_stride);
    }
    let mut square = [0.0; SIDE * SIDE];
    for (row, square) in square.chunks_exact_mut(SIDE).enumerate() {
        widen_here(square, &from[row * from_stride..][..SIDE]);
    }
    transpose_square(to, to_stride, &square, SIDE);
}
