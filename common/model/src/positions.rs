//! Positions that are not learned: the sinusoidal table and the angles of rotary positions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

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

/// The angles of rotary positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rotary {
    /// The base of the wavelengths: pair `i` of `d` rotated channels turns by `θ^(−2i/d)` a position.
    pub theta: f64,
    /// Share of a head's channels that are rotated, the first ones.
    pub fraction: f64,
    /// How a context longer than that of pretraining is fitted in.
    pub scaling: RopeScaling,
}

/// A change of the rotary angles for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum RopeScaling {
    /// None.
    #[default]
    Default,
    /// Every angle divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Long wavelengths divided by the factor, short ones kept, those between blended.
    ///
    /// # Source
    /// Llama 3.1's `apply_scaling`; transformers' `_compute_llama3_parameters`.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// The context of pretraining in tokens.
        original: usize,
    },
}

/// `[model.rope_scaling]`: rotary angles for contexts longer than those of pretraining, with transformers' keys.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RopeScalingSection {
    /// Kind of the scaling.
    pub rope_type: RopeType,
    /// Divisor of the angles; for `linear` and `llama3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub factor: Option<f64>,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are long; for `llama3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub low_freq_factor: Option<f64>,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are short; for `llama3`, and above
    /// `low_freq_factor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub high_freq_factor: Option<f64>,
    /// Context of pretraining in tokens; for `llama3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub original_max_position_embeddings: Option<usize>,
}

/// Kind of a change of rotary angles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RopeType {
    /// The angles are as they are.
    #[default]
    Default,
    /// Every angle is divided by `factor`.
    Linear,
    /// As Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.
    Llama3,
}

/// A key of `[model.rope_scaling]` that its kind needs, or has no use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("model: `rope_scaling` with `rope_type` \"{}\" {} `{key}`", match kind {
    RopeType::Default => "default",
    RopeType::Linear => "linear",
    RopeType::Llama3 => "llama3",
}, if *is_needed { "needs" } else { "has no use for" })]
pub struct RopeScalingError {
    kind: RopeType,
    key: &'static str,
    is_needed: bool,
}

impl RopeScalingSection {
    /// The scaling that the section describes.
    ///
    /// # Errors
    /// If a key is missing or has no use.
    pub fn resolve(&self) -> Result<RopeScaling, RopeScalingError> {
        let Self { rope_type: kind, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
            *self;
        let original = original_max_position_embeddings.map(|tokens| tokens as f64);
        let of_llama3 = [
            ("low_freq_factor", low_freq_factor),
            ("high_freq_factor", high_freq_factor),
            ("original_max_position_embeddings", original),
        ];
        let keys = std::iter::once((("factor", factor), kind != RopeType::Default))
            .chain(of_llama3.map(|key| (key, kind == RopeType::Llama3)));
        let mut values = Vec::new();
        for ((key, value), is_needed) in keys {
            if value.is_some() != is_needed {
                return Err(RopeScalingError { kind, key, is_needed });
            }
            values.extend(value);
        }
        Ok(match (kind, values[..].first_chunk()) {
            (RopeType::Llama3, Some(&[factor, low_freq_factor, high_freq_factor, _])) => RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original: original_max_position_embeddings.unwrap_or_default(),
            },
            _ => factor.map_or(RopeScaling::Default, |factor| RopeScaling::Linear { factor }),
        })
    }
}

impl Default for Rotary {
    fn default() -> Self {
        Self { theta: 10_000.0, fraction: 1.0, scaling: RopeScaling::Default }
    }
}

impl Rotary {
    /// The angle a position of each pair of channels, for `n_rotated` channels.
    pub fn frequencies(&self, n_rotated: usize) -> Vec<f64> {
        let scaled = |frequency: f64| match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let turns = original as f64 * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        };
        (0..n_rotated / 2).map(|i| scaled(self.theta.powf(-((2 * i) as f64) / n_rotated as f64))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_scaled_by_their_wavelength() {
        let plain = Rotary { theta: 10_000.0, fraction: 1.0, scaling: RopeScaling::Default };
        let close =
            |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12 * b) && a.len() == b.len();
        // 10,000^(−2i/4)
        assert!(close(&plain.frequencies(4), &[1.0, 0.01]));
        let linear = Rotary { scaling: RopeScaling::Linear { factor: 4.0 }, ..plain };
        assert!(close(&linear.frequencies(4), &[0.25, 0.0025]));
        // In 64 positions the first pair turns 64/2π = 10.2 times, which is kept; the second 0.1 times, which is divided.
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 64 };
        assert!(close(&Rotary { scaling: llama3, ..plain }.frequencies(4), &[1.0, 0.00125]));
        // Wavelengths between: θ = 100 gives the second pair 0.1, 64 · 0.1/2π = 1.0186 turns, blended by a third of 0.0186.
        let kept = (6.4 / std::f64::consts::TAU - 1.0) / 3.0;
        let blended = 0.1 * (kept + (1.0 - kept) / 8.0);
        assert!(close(&Rotary { theta: 100.0, scaling: llama3, ..plain }.frequencies(4), &[1.0, blended]));
    }

    #[test]
    fn a_section_has_the_keys_that_its_kind_needs_and_no_others() {
        let (kind, factor) = (RopeType::Linear, Some(4.0));
        let linear = RopeScalingSection { rope_type: kind, factor, ..RopeScalingSection::default() };
        assert_eq!(linear.resolve(), Ok(RopeScaling::Linear { factor: 4.0 }));
        let llama3 = RopeScalingSection {
            rope_type: RopeType::Llama3,
            low_freq_factor: Some(1.0),
            high_freq_factor: Some(4.0),
            original_max_position_embeddings: Some(64),
            ..linear
        };
        let expected = RopeScaling::Llama3 { factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 64 };
        assert_eq!(llama3.resolve(), Ok(expected));
        assert_eq!(RopeScalingSection::default().resolve(), Ok(RopeScaling::Default));
        let error = |section: RopeScalingSection| section.resolve().expect_err("wrong keys").to_string();
        let missing = RopeScalingSection { high_freq_factor: None, ..llama3 };
        assert_eq!(error(missing), "model: `rope_scaling` with `rope_type` \"llama3\" needs `high_freq_factor`");
        let useless = RopeScalingSection { low_freq_factor: Some(1.0), ..linear };
        assert_eq!(
            error(useless),
            "model: `rope_scaling` with `rope_type` \"linear\" has no use for `low_freq_factor`"
        );
        let unnamed = RopeScalingSection { factor, ..RopeScalingSection::default() };
        assert_eq!(error(unnamed), "model: `rope_scaling` with `rope_type` \"default\" has no use for `factor`");
    }

    #[test]
    fn the_first_rows_are_the_papers_formula() {
        let table = sinusoid_table(2, 4);
        // Second row: sin 1, cos 1, sin 0.01, cos 0.01.
        let expected = [0.0, 1.0, 0.0, 1.0, 0.841_470_96, 0.540_302_3, 0.009_999_833, 0.999_95];
        assert!(table.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-7), "{table:?}");
    }
}
