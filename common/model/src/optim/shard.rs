//! An optimiser of which each rank of a group keeps a part.
//!
//! All trained numbers stand one behind the other, parameter by parameter. Of this list a rank has its [`Share`]: the moments
//! of these numbers, their gradients, and the step that moves them. Then the ranks give each other the new weights.
//!
//! # Source
//! Rajbhandari et al., arXiv:1910.02054 (`ZeRO`), section 5.1: the states of the optimiser are partitioned (`P_os`). There a
//! partition has whole parameters or pads; here it may end within a parameter, so that all are equal but for one number.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use group::{Group, GroupError, Pieces, Share};

use super::AdamW;
use crate::named::{self, ParamMapper, ParamVisitor};
use crate::{HostTensor, NamedTensors};

/// The trained parameters in the order in which their numbers stand one behind the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Places {
    /// Path and number of numbers.
    sizes: Vec<(String, usize)>,
}

/// The numbers of a parameter that lie in some range of all.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece<'a> {
    path: &'a str,
    /// Which of the parameter's own they are.
    range: Range<usize>,
    /// How many the parameter has.
    size: usize,
    /// Where the parameter begins among all numbers.
    start: usize,
}

impl Piece<'_> {
    /// Whether it is the whole parameter.
    const fn is_whole(&self) -> bool {
        self.range.end - self.range.start == self.size
    }

    /// The numbers among all.
    fn among_all(&self) -> Range<usize> {
        self.start + self.range.start..self.start + self.range.end
    }
}

impl Places {
    pub(crate) const fn of(sizes: Vec<(String, usize)>) -> Self {
        Self { sizes }
    }

    /// How many numbers there are.
    pub(crate) fn n(&self) -> usize {
        self.sizes.iter().map(|(_, size)| size).sum()
    }

    const fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    /// The pieces of parameters in a range of all numbers, in order.
    fn within(&self, wanted: Range<usize>) -> Vec<Piece<'_>> {
        let mut start = 0;
        let mut pieces = Vec::new();
        for (path, size) in &self.sizes {
            let range = wanted.start.clamp(start, start + size) - start..wanted.end.clamp(start, start + size) - start;
            if !range.is_empty() {
                pieces.push(Piece { path, range, size: *size, start });
            }
            start += size;
        }
        pieces
    }

    /// A tensor for each parameter, of the piece in its place.
    pub(crate) fn of_pieces(&self, pieces: Pieces, device: &Device) -> BTreeMap<String, Tensor<1>> {
        let tensor = |((path, size), numbers): (&(String, usize), Vec<f32>)| {
            (path.clone(), Tensor::from_data(TensorData::new(numbers, [*size]), device))
        };
        self.sizes.iter().zip(pieces.into_vecs()).map(tensor).collect()
    }

    /// `numbers`, those in `range` of all, as a tensor for each parameter or piece of one.
    pub(crate) fn tensors(&self, range: Range<usize>, numbers: &[f32], device: &Device) -> BTreeMap<String, Tensor<1>> {
        let first = range.start;
        let of_piece = |piece: Piece<'_>| {
            let among = piece.among_all();
            let own = numbers[among.start - first..among.end - first].to_vec();
            let n = own.len();
            (piece.path.to_owned(), Tensor::from_data(TensorData::new(own, [n]), device))
        };
        self.within(range).into_iter().map(of_piece).collect()
    }
}

impl AdamW {
    /// The same optimiser, which keeps and moves only a share of the numbers. Whoever has the others gives them to
    /// [`share_weights`](Self::share_weights).
    #[must_use]
    pub fn with_share(mut self, share: Share) -> Self {
        self.share = share;
        if share.is_whole() {
            return self;
        }
        let sizes = self.moments.iter().map(|(path, [m, _])| (path.clone(), m.dims()[0])).collect();
        self.places = Places::of(sizes);
        let mut whole = std::mem::take(&mut self.moments);
        for piece in self.places.within(share.of(self.places.n())) {
            let Some(moments) = whole.remove(piece.path) else { continue };
            // A copy, so that the rest is freed.
            let own = moments.map(|moment| {
                let numbers = HostTensor::of(&moment.clone().narrow(0, piece.range.start, piece.range.len())).data;
                let n = numbers.len();
                Tensor::from_data(TensorData::new(numbers, [n]), &moment.device())
            });
            self.moments.insert(piece.path.to_owned(), own);
        }
        self
    }

    /// Whether other ranks have a part of it.
    pub(crate) const fn is_shared(&self) -> bool {
        !self.share.is_whole()
    }

    /// Notes where the numbers of a step's gradients stand.
    ///
    /// # Panics
    /// If others had gradients in an earlier step.
    pub(super) fn note_places(&mut self, places: Option<Places>) {
        let Some(places) = places else { return };
        assert!(self.places.is_empty() || self.places == places, "the same parameters have gradients in every step");
        self.places = places;
    }

    /// The parameters of which this rank moves a piece alone, and which.
    pub(super) fn pieces(&self) -> BTreeMap<String, Range<usize>> {
        let own = self.places.within(self.share.of(self.places.n())).into_iter();
        own.filter(|piece| !piece.is_whole()).map(|piece| (piece.path.to_owned(), piece.range)).collect()
    }

    /// `module` with the numbers that other ranks have moved in the same step.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If the device cannot be read.
    pub fn share_weights<M: Module>(&self, group: &Group, module: M) -> Result<M, GroupError> {
        if !self.is_shared() || self.places.is_empty() {
            return Ok(module);
        }
        let mut numbers = vec![0.0; self.places.n()];
        let own = self.places.within(self.share.of(numbers.len()));
        let own: BTreeMap<&str, Piece<'_>> = own.into_iter().map(|piece| (piece.path, piece)).collect();
        named::for_each(&module, &mut Read { own: &own, numbers: &mut numbers });
        group.complete_from_parts(&mut numbers)?;
        let all = self.places.within(0..numbers.len()).into_iter();
        // What this rank moved is there.
        let others = all.filter(|piece| own.get(piece.path).is_none_or(|own| !own.is_whole()));
        let others = others.map(|piece| (piece.path, piece)).collect();
        Ok(named::map(module, &mut Write { others, numbers: &numbers }))
    }

    /// [`to_named`](Self::to_named) of the whole optimiser on rank 0, and nothing on the others; every rank asks.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn to_named_on_first(&self, group: &Group) -> Result<NamedTensors, GroupError> {
        if !self.is_shared() {
            return Ok(if group.is_first() { self.to_named() } else { NamedTensors::new() });
        }
        let n = self.places.n();
        let mut named = NamedTensors::new();
        for (i, prefix) in ["m", "v"].into_iter().enumerate() {
            for (rank, share) in group.shares().enumerate() {
                for piece in self.places.within(share.of(n)) {
                    let is_own = rank == group.rank();
                    let mut data = if is_own { HostTensor::of(&self.moments[piece.path][i]).data } else { Vec::new() };
                    if group.is_first() {
                        let size = piece.size;
                        let whole = named.entry(format!("{prefix}.{}", piece.path));
                        let whole = whole.or_insert_with(|| HostTensor { shape: vec![size], data: vec![0.0; size] });
                        let room = &mut whole.data[piece.range];
                        if is_own { room.copy_from_slice(&data) } else { group.to_first(rank, room)? }
                    } else if is_own {
                        group.to_first(rank, &mut data)?;
                    }
                }
            }
        }
        if group.is_first() {
            named.extend(self.other_named());
        }
        Ok(named)
    }
}

/// Copies this rank's pieces of a module's parameters to their places among all numbers.
struct Read<'a> {
    own: &'a BTreeMap<&'a str, Piece<'a>>,
    numbers: &'a mut [f32],
}

impl ParamVisitor for Read<'_> {
    fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        let Some(piece) = self.own.get(path.as_str()) else { return };
        let value = param.val().inner();
        let n = value.shape().num_elements();
        let value = HostTensor::of(&value.reshape([n]).narrow(0, piece.range.start, piece.range.len()));
        self.numbers[piece.among_all()].copy_from_slice(&value.data);
    }
}

/// Gives a module's parameters the numbers that others have moved.
struct Write<'a> {
    others: BTreeMap<&'a str, Piece<'a>>,
    numbers: &'a [f32],
}

impl ParamMapper for Write<'_> {
    fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(piece) = self.others.get(path.as_str()) else { return param };
        let (id, value, mapper) = param.consume();
        let (shape, device) = (value.dims(), value.inner().device());
        let data = TensorData::new(self.numbers[piece.among_all()].to_vec(), shape);
        Param::from_mapped_value(id, Tensor::from_inner(Tensor::from_data(data, &device)).require_grad(), mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_what_a_range_has_of_each_parameter() {
        let places = Places::of([("a", 3), ("b", 4), ("c", 2)].map(|(path, size)| (path.to_owned(), size)).to_vec());
        assert_eq!(places.n(), 9);
        let within = |range| -> Vec<_> {
            let pieces = places.within(range).into_iter();
            pieces.map(|piece| (piece.path, piece.range.clone(), piece.is_whole(), piece.among_all())).collect()
        };
        assert_eq!(within(0..3), [("a", 0..3, true, 0..3)]);
        assert_eq!(within(2..5), [("a", 2..3, false, 2..3), ("b", 0..2, false, 3..5)]);
        assert_eq!(within(3..9), [("b", 0..4, true, 3..7), ("c", 0..2, true, 7..9)]);
        assert_eq!(within(4..4), []);
    }
}
