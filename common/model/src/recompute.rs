//! Blocks whose activations are computed again in the backward pass.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::block::{Dropout, Pass};
use super::named::{self, ParamMapper};
use kernels::Leaves;

/// The results of `run` on `part`, of which only `state` is kept until the backward pass runs it again.
///
/// Dropout draws the same masks the second time, from a copy of the stream as it stands now.
pub(super) fn recomputed<M, const N: usize>(
    part: M,
    state: [Tensor<3>; N],
    pass: &mut Pass<'_>,
    run: impl Fn(&M, [Tensor<3>; N], &mut Pass<'_>) -> [Tensor<3>; N] + Send + Sync + 'static,
) -> [Tensor<3>; N]
where
    M: Module + Send + Sync + 'static,
{
    let Pass { kernels, precision, eps, in_blocks, .. } = *pass;
    let (first_key, rotary) = (pass.first_key.clone(), pass.rotary.clone());
    let dropout = pass.dropout.as_ref().map(|dropout| (dropout.probability, dropout.rng.clone()));
    let (state, rng) = kernels::checkpointed(state, move |leaves, state| {
        let part = named::map(part.clone(), &mut OnTape(leaves));
        let (first_key, rotary, mut dropout) = (first_key.clone(), rotary.clone(), dropout.clone());
        let drawn = dropout.as_mut().map(|(probability, rng)| Dropout { probability: *probability, rng });
        let mut pass = Pass { kernels, precision, eps, in_blocks, first_key, rotary, dropout: drawn };
        let state = run(&part, state, &mut pass);
        (state, dropout.map(|(_, rng)| rng))
    });
    if let Some((dropout, rng)) = pass.dropout.as_mut().zip(rng) {
        *dropout.rng = rng;
    }
    state
}

/// Replaces parameters by those on the tape of a part.
struct OnTape<'a>(&'a mut Leaves);

impl ParamMapper for OnTape<'_> {
    fn map<const D: usize>(&mut self, _path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        Param::from_mapped_value(id, self.0.leaf(value), mapper)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::loss::cross_entropy;
    use crate::optim::Grads;
    use crate::{Gpt, GptConfig, Layout, ModelSection, NamedTensors, Preset};
    use base::rng::Streams;
    use kernels::Kernels;

    const BATCH: usize = 3;
    const SEQ: usize = 10;

    fn config(preset: Preset, dropout: f64) -> GptConfig {
        let section = ModelSection {
            preset,
            d_model: Some(32),
            n_layers: Some(3),
            n_heads: Some(4),
            max_seq_len: Some(SEQ),
            dropout: Some(dropout),
            ..ModelSection::default()
        };
        section.resolve(19).expect("valid")
    }

    /// As with adapters on a trunk that is not trained: nothing before the blocks has a gradient.
    #[test]
    fn frozen_embeddings_and_weights_have_no_gradient_and_change_no_other() {
        struct Freeze;
        impl ParamMapper for Freeze {
            fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let is_trained = path.starts_with("blocks.") && path.ends_with("attention.qkv.weight");
                param.set_require_grad(is_trained)
            }
        }
        let gpt = Gpt::new(&config(Preset::Llama, 0.1), &Streams::new(3), &Device::flex().autodiff());
        let gpt = named::map(gpt, &mut Freeze);
        let (loss, grads, _) = loss_and_gradients(&gpt);
        assert_eq!(grads.len(), 3, "{:?}", grads.keys());
        let again = loss_and_gradients(&gpt.with_checkpoints(true));
        assert_eq!((again.0, again.1), (loss, grads));
    }

    fn loss_and_gradients(gpt: &Gpt) -> (Vec<f32>, NamedTensors, u64) {
        let device = gpt.device();
        let mut rng = Streams::new(1).get("ids", 0);
        let ids: Vec<i64> = (0..2 * BATCH * SEQ).map(|_| rng.below(19) as i64).collect();
        let (inputs, targets) = ids.split_at(BATCH * SEQ);
        let inputs = Tensor::from_data(TensorData::new(inputs.to_vec(), [BATCH, SEQ]), &device);
        let targets = Tensor::from_data(TensorData::new(targets.to_vec(), [BATCH * SEQ]), &device);
        let packed = Layout::packed([vec![0; SEQ], [vec![0; 4], vec![4; 6]].concat(), vec![0; SEQ]].concat(), SEQ);
        let mut dropout = Streams::new(2).get("dropout", 0);
        let hidden = gpt.hidden_with_dropout(inputs, &packed, Some(&mut dropout));
        let loss = cross_entropy(gpt, hidden.reshape([BATCH * SEQ, 32]), targets, BATCH * SEQ);
        let value = loss.clone().inner().try_into_vec_as::<f32>().expect("the device can be read");
        (value, Grads::take(gpt, loss.backward()).to_named(), dropout.next_u64())
    }

    #[test]
    #[allow(deprecated, reason = "Burn deprecates ndarray; users still compare against it")]
    fn losses_and_gradients_have_the_same_bits() {
        use Preset::{Gpt2, GptNeox, Llama, Qwen2, Qwen3, Transformer};
        for preset in [Transformer, Gpt2, Llama, Qwen2, Qwen3, GptNeox] {
            for dropout in [0.0, 0.2] {
                let config = config(preset, dropout);
                for device in [Device::flex(), Device::ndarray()].map(Device::autodiff) {
                    for kernels in [Kernels::Fused, Kernels::Plain] {
                        let gpt = Gpt::new(&config, &Streams::new(3), &device).with_kernels(kernels);
                        let (loss, grads, next) = loss_and_gradients(&gpt);
                        let again = loss_and_gradients(&gpt.with_checkpoints(true));
                        let case = format!("{preset:?}, dropout {dropout}, {device:?}, {kernels:?}");
                        assert_eq!((&again.0, again.2), (&loss, next), "{case}");
                        assert!(grads.keys().eq(again.1.keys()), "{case}");
                        for (path, grad) in &grads {
                            assert_eq!(again.1[path].data, grad.data, "{case}: {path}");
                        }
                    }
                }
            }
        }
    }
}
