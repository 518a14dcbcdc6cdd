//! Steps of decoding in one call of the kernels, where they have a body for the model.

use kernels::{Precision, Stepper};

use crate::{Cache, Gpt, Positions};

/// A model made ready for steps of one token a row.
#[derive(Debug)]
pub(crate) struct Decoder {
    stepper: Stepper,
    /// Of rotary positions: the angle a position of each pair of channels.
    frequencies: Option<Vec<f64>>,
}

impl Gpt {
    /// `None` where the kernels take a step operation by operation: see [`Stepper::new`].
    ///
    /// It shares the model's weights: while it is there, a model that is trained further would copy them.
    pub(crate) fn decoder(&self) -> Option<Decoder> {
        if self.precision() != Precision::F32 {
            return None;
        }
        let config = self.config();
        let frequencies =
            (config.positions == Positions::Rotary).then(|| config.rotary.frequencies(config.n_rotated()));
        Some(Decoder { stepper: Stepper::new(self.kernels(), self.step_weights())?, frequencies })
    }
}

impl Decoder {
    /// The most rows of a step.
    pub(crate) const MAX_ROWS: usize = Stepper::MAX_ROWS;

    /// Logits after one more token in each row of the cache, row after row: the bits of [`Gpt::logits`] of [`Gpt::decode`].
    ///
    /// # Panics
    /// If the cache is another model's, has no room left, or not a row for each token and at most
    /// [`MAX_ROWS`](Self::MAX_ROWS).
    pub(crate) fn logits(&mut self, ids: &[u32], cache: &mut Cache) -> Vec<f32> {
        let angles = self.frequencies.as_ref().map(|frequencies| {
            let angles = |of: fn(f64) -> f64| -> Vec<f32> {
                let of_position = |&position: &usize| frequencies.iter().map(move |f| of(position as f64 * f) as f32);
                cache.lens.iter().flat_map(of_position).collect()
            };
            [angles(f64::cos), angles(f64::sin)]
        });
        let angles = angles.as_ref().map(|angles| angles.each_ref().map(Vec::as_slice));
        let kept = cache.layers.iter_mut().map(|layer| layer.keys_values.take().expect("put back after use")).collect();
        let (logits, kept) = self.stepper.step(ids, &cache.lens, angles, kept);
        for (layer, kept) in cache.layers.iter_mut().zip(kept) {
            layer.keys_values = Some(kept);
        }
        cache.lens.iter_mut().for_each(|len| *len += 1);
        logits
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Int, Tensor, TensorData};

    use super::super::tests::{adapted, random_model};
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::{Activation, GptConfig, NormPlacement, Rotary};
    use kernels::Kernels;

    const VOCAB: usize = 37;

    /// Every layer that a step has a body for, in some model.
    fn configs() -> Vec<GptConfig> {
        let small = |base: GptConfig| GptConfig { d_model: 24, n_layers: 3, d_ff: 40, max_seq_len: 20, ..base };
        let [gpt2, llama] = [GptConfig::gpt2(VOCAB), GptConfig::llama(VOCAB)];
        let neox = GptConfig { activation: Activation::GeluTanh, ..GptConfig::gpt_neox(VOCAB) };
        [
            GptConfig { norm: NormPlacement::Pre, ..GptConfig::transformer(VOCAB) },
            GptConfig { tie_embeddings: false, ..GptConfig::transformer(VOCAB) },
            GptConfig { qkv_bias: true, head_dim: Some(10), ..llama.clone() },
            GptConfig { qk_norm: true, ..llama.clone() },
            GptConfig { rotary: Rotary { fraction: 0.5, ..Rotary::default() }, head_dim: Some(8), ..neox },
            gpt2,
            llama,
        ]
        .map(small)
        .to_vec()
    }

    /// A cache whose rows hold from 1 to 6 positions.
    fn filled(gpt: &Gpt, n_rows: usize) -> Cache {
        let mut cache = Cache::new(gpt, n_rows, gpt.config().max_seq_len);
        let ids: Vec<i32> = (0..n_rows * 6).map(|i| (i * 11 % VOCAB) as i32).collect();
        let _ = gpt.decode(Tensor::<2, Int>::from_data(TensorData::new(ids, [n_rows, 6]), &gpt.device()), &mut cache);
        (0..n_rows).for_each(|row| cache.truncate(row, 1 + row * 5 % 6));
        cache
    }

    /// The logits of four steps, one by one and by a decoder.
    fn both(gpt: &Gpt, n_rows: usize) -> [Vec<u32>; 2] {
        let mut decoder = gpt.decoder().expect("a body for this model");
        let mut caches = [filled(gpt, n_rows), filled(gpt, n_rows)];
        let mut logits = [Vec::new(), Vec::new()];
        for step in 0..4 {
            let ids: Vec<u32> = (0..n_rows).map(|row| ((row * 7 + step * 3) % VOCAB) as u32).collect();
            let tensor = TensorData::new(ids.iter().map(|&id| id as i32).collect(), [n_rows, 1]);
            let hidden = gpt.decode(Tensor::<2, Int>::from_data(tensor, &gpt.device()), &mut caches[0]);
            logits[0]
                .extend(gpt.logits(hidden).try_into_vec_as::<f32>().expect("on the host").iter().map(|x| x.to_bits()));
            logits[1].extend(decoder.logits(&ids, &mut caches[1]).iter().map(|x| x.to_bits()));
        }
        assert_eq!(caches[0].lens(), caches[1].lens());
        logits
    }

    #[test]
    fn a_step_in_one_call_has_the_bits_of_its_operations() {
        for config in configs() {
            let gpt = random_model(&config, &Device::flex());
            for gpt in [gpt.clone(), gpt.narrowed()] {
                for n_rows in [1, 3, 4, 9, Decoder::MAX_ROWS] {
                    let [one_by_one, together] = both(&gpt, n_rows);
                    assert!(one_by_one == together, "{n_rows} rows, narrow: {}, {config:?}", gpt.is_narrow());
                }
            }
        }
    }

    #[test]
    fn adapters_are_part_of_a_step() {
        let config = GptConfig { qkv_bias: true, ..configs().pop().expect("a configuration") };
        let lora = LoraConfig {
            rank: 3,
            targets: vec!["q_proj".into(), "v_proj".into(), "down_proj".into()],
            ..Default::default()
        };
        let trunk = random_model(&config, &Device::flex());
        let adapted = adapted(trunk.clone(), &lora).expect("known targets");
        for n_rows in [1, 5] {
            let [one_by_one, together] = both(&adapted, n_rows);
            assert!(one_by_one == together, "{n_rows} rows");
            assert!(together != both(&trunk, n_rows)[1], "the adapters change nothing");
        }
    }

    #[test]
    #[allow(deprecated)] // Burn calls ndarray superseded by flex.
    fn models_without_a_body_have_no_decoder() {
        let config = configs().pop().expect("a configuration");
        let gpt = random_model(&config, &Device::flex());
        assert!(gpt.decoder().is_some());
        assert!(gpt.clone().with_kernels(Kernels::Plain).decoder().is_none());
        assert!(gpt.with_precision(Precision::Bf16).decoder().is_none());
        assert!(random_model(&config, &Device::ndarray()).decoder().is_none());
        assert!(random_model(&config, &Device::flex().autodiff()).decoder().is_none());
        let exact = GptConfig { activation: Activation::Gelu, gated: false, mlp_bias: true, ..config };
        assert!(random_model(&exact, &Device::flex()).decoder().is_none());
    }
}
