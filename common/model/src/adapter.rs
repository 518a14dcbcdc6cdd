//! Low-rank adapters: a frozen trunk, and the little that is trained beside it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use crate::block::Blank;
use crate::params::{Output, Parameter, Role, parameters, role_of};
use crate::{GptConfig, HostTensor, NamedTensors};
use base::rng::Streams;
use kernels::{LowRank, Precision};

/// The target that stands for every linear layer but the output layer.
pub const ALL_LINEAR: &str = "all-linear";

/// The `[lora]` section: train low-rank adapters beside frozen weights. Without it all weights are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the adapters: width of the layer between their two matrices.
    #[schemars(range(min = 1, max = 100_000))]
    pub rank: usize,
    /// Numerator of the factor on what the adapters add, `alpha / rank`.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub alpha: f64,
    /// Probability with which dropout zeroes an input of the adapters in training.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: f64,
    /// Linear layers that have an adapter, by their names in transformers, such as `["q_proj", "v_proj"]`, or `"all-linear"`.
    #[serde(deserialize_with = "one_or_many")]
    pub targets: Vec<String>,
    /// Whether the factor is `alpha / √rank`, which keeps the size of what high ranks add (rsLoRA).
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, dropout: 0.0, targets: vec![ALL_LINEAR.to_owned()], rslora: false }
    }
}

impl LoraConfig {
    /// Factor on what the adapters add: `alpha / rank`, with `rslora` `alpha / √rank`.
    ///
    /// # Source
    /// Hu et al., arXiv:2106.09685, section 4.1; Kalajdzievski, arXiv:2312.03732.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Checks the constraints that the types do not express.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> Result<(), LoraConfigError> {
        let wrong =
            |key, found: &dyn fmt::Display, expected| Err(LoraConfigError { key, found: found.to_string(), expected });
        if !(1..=GptConfig::LARGEST_SIZE).contains(&self.rank) {
            return wrong("rank", &self.rank, "at least 1");
        }
        if !(self.alpha > 0.0 && (self.scale() as f32).is_finite()) {
            return wrong("alpha", &self.alpha, "a number above 0");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("dropout", &self.dropout, "in [0, 1)");
        }
        if self.targets.is_empty() {
            return wrong("targets", &"[]", "`\"all-linear\"` or at least one name");
        }
        Ok(())
    }
}

/// A value of `[lora]` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`lora.{key}` must be {expected}, found {found}")]
pub struct LoraConfigError {
    key: &'static str,
    found: String,
    expected: &'static str,
}

/// One name or a list of them.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Names;

    impl<'de> Visitor<'de> for Names {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a name or a list of names")
        }

        fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
            Ok(vec![name.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut names = Vec::new();
            while let Some(name) = items.next_element()? {
                names.push(name);
            }
            Ok(names)
        }
    }

    deserializer.deserialize_any(Names)
}

/// The adapters of a model: their settings, and where they stand.
///
/// A linear layer computes `x·W + b`, and with an adapter `x·W + b + scale·dropout(x)·A·B`, where `A` is `[d_in, rank]`
/// and `B` `[rank, d_out]`. Of the packed matrix of queries, keys and values each part may have an adapter of its own:
/// the `A` of all parts lie side by side, `[d_in, n_parts·rank]`, and so do the `B`, `[rank, Σ widths]`. They share one
/// dropout mask, where PEFT draws one for each.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapters {
    /// Rank, scale and dropout.
    pub lora: LoraConfig,
    /// Of each linear layer that is adapted, by the path of its matrix in a [`Gpt`](crate::Gpt): the ranges of output
    /// channels, in order, that have an adapter.
    pub parts: BTreeMap<String, Vec<Range<usize>>>,
}

/// The adapter of one linear layer, not yet filled with numbers.
#[derive(Debug, Clone)]
pub struct AdapterPlace<'a> {
    /// The matrix it stands beside.
    pub linear: Parameter<'a>,
    /// The output channels of each part.
    pub parts: &'a [Range<usize>],
    /// Paths of its two matrices.
    pub paths: [String; 2],
    /// Their shapes: `[d_in, n_parts·rank]` and `[rank, Σ widths]`.
    pub shapes: [[usize; 2]; 2],
}

impl Adapters {
    /// The adapter of every linear layer that has one, in the model of `config` and `output`.
    pub fn places<'a>(&'a self, config: &'a GptConfig, output: Output) -> impl Iterator<Item = AdapterPlace<'a>> {
        let linear = |output| parameters(config, output).filter(|parameter| parameter.role().takes_adapter());
        linear(Output::Logits).zip(linear(output)).filter_map(|(in_gpt, linear)| {
            let parts = self.parts.get(&in_gpt.path())?;
            let shapes = shapes(linear.shape()[0], parts, self.lora.rank);
            Some(AdapterPlace { paths: linear.adapter_paths(), linear, parts, shapes })
        })
    }

    /// Initial values, by path: with them the model computes what its trunk does.
    ///
    /// `A` is uniform in `±1/√d_in`, drawn from the stream that bears its path, and `B` is zero.
    ///
    /// # Source
    /// PEFT's `reset_lora_parameters`: Kaiming-uniform with `a = √5`, whose bound is `√(6 / ((1 + a²)·d_in))`.
    pub fn initial(&self, config: &GptConfig, output: Output, streams: &Streams) -> NamedTensors {
        let places: Vec<_> = self.places(config, output).collect();
        let values = places.into_par_iter().flat_map_iter(|AdapterPlace { paths: [a, b], shapes, .. }| {
            let bound = 1.0 / (shapes[0][0] as f64).sqrt();
            let mut rng = streams.get(&format!("init/{a}"), 0);
            let drawn = (0..shapes[0].iter().product()).map(|_| (bound * (2.0 * rng.uniform() - 1.0)) as f32).collect();
            let zeros = vec![0.0; shapes[1].iter().product()];
            [(a, shapes[0], drawn), (b, shapes[1], zeros)]
                .map(|(path, shape, data)| (path, HostTensor { shape: shape.to_vec(), data }))
        });
        values.collect()
    }

    /// Adds `scale·A·B` of every adapter to its matrix: `weights` are those of the trunk, `adapter` the adapters'.
    ///
    /// # Panics
    /// If a tensor is missing or has another shape than the places say.
    pub fn merge(&self, config: &GptConfig, output: Output, weights: &mut NamedTensors, adapter: &NamedTensors) {
        let (rank, scale) = (self.lora.rank, self.lora.scale() as f32);
        for AdapterPlace { linear, parts, paths: [a, b], .. } in self.places(config, output) {
            let weight = weights.get_mut(&linear.path()).expect("the trunk has the matrix of each adapter");
            let (a, b) = (&adapter[&a], &adapter[&b]);
            let (a_width, b_width, d_out) = (a.shape[1], b.shape[1], weight.shape[1]);
            weight.data.par_chunks_mut(d_out).zip(a.data.par_chunks(a_width)).for_each(|(row, a)| {
                let mut start = 0;
                for (part, a) in parts.iter().zip(a.chunks_exact(rank)) {
                    let columns = start..start + part.len();
                    start = columns.end;
                    for (&a, b) in a.iter().zip(b.data.chunks_exact(b_width)) {
                        let a = scale * a;
                        row[part.clone()].iter_mut().zip(&b[columns.clone()]).for_each(|(w, &b)| *w += a * b);
                    }
                }
            });
        }
    }
}

/// Of `A` and `B` of a layer with `d_in` inputs.
fn shapes(d_in: usize, parts: &[Range<usize>], rank: usize) -> [[usize; 2]; 2] {
    [[d_in, parts.len() * rank], [rank, parts.iter().map(Range::len).sum()]]
}

/// Whether the parameter at `path` is trained where the trunk is frozen.
pub(crate) fn trains_beside_trunk(path: &str) -> bool {
    role_of(path).is_some_and(Role::trains_beside_trunk)
}

/// The adapter of a linear layer; see [`Adapters`].
#[derive(Module, Debug)]
pub(crate) struct Adapter {
    /// `[d_in, n_parts·rank]`
    a: Param<Tensor<2>>,
    /// `[rank, Σ widths]`
    b: Param<Tensor<2>>,
    #[module(skip)]
    parts: Vec<Range<usize>>,
    scale: f64,
    dropout: f64,
}

impl Adapter {
    pub(crate) fn blank(d_in: usize, parts: &[Range<usize>], lora: &LoraConfig, blank: &Blank) -> Self {
        let [a, b] = shapes(d_in, parts, lora.rank);
        Self { a: blank.param(a), b: blank.param(b), parts: parts.to_vec(), scale: lora.scale(), dropout: lora.dropout }
    }

    /// The matrices as a layer computes with them.
    pub(crate) fn low_rank(&self, precision: Precision) -> LowRank {
        let [a, b] = [&self.a, &self.b].map(|matrix| precision.narrow(matrix.val()));
        LowRank { a, b, parts: self.parts.clone(), scale: self.scale }
    }

    /// Probability of dropping an input in training.
    pub(crate) const fn dropout(&self) -> f64 {
        self.dropout
    }
}

#[cfg(test)]
mod tests;
