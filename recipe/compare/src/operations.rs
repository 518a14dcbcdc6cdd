//! The operations of a model one by one, each on the operands that the model itself gives it.

use std::collections::BTreeSet;

use burn::tensor::{Device, Int, Tensor, TensorData};
use common::kernels::Kernels;
use common::kernels::tap::{self, Call, Operand, Operation};
use common::loss;
use common::model::{Gpt, HostTensor, Layout, NamedTensors};
use common::rng::Streams;

/// Temperature at which log-probabilities are compared; 1 would leave the scaling out.
const TEMPERATURE: f64 = 0.7;

/// Token ids, `[batch, seq]`.
#[derive(Clone)]
pub struct Ids {
    /// Row after row.
    pub flat: Vec<i64>,
    /// Rows.
    pub batch: usize,
    /// Tokens in each.
    pub seq: usize,
}

impl Ids {
    /// On the device.
    pub fn tensor(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.flat.clone(), [self.batch, self.seq]), device)
    }

    /// Two documents of unequal length in every row.
    fn two_documents(&self) -> Layout {
        let first = (self.seq / 3) as u32;
        let first_key = (0..self.batch * self.seq).map(|at| if at % self.seq >= first as usize { first } else { 0 });
        Layout::packed(first_key.collect(), self.seq)
    }
}

/// One use of an operation.
pub struct Use {
    /// The operation and where in the model it stands.
    pub name: String,
    operation: Operation,
    /// Its operands, by which it is differentiated.
    pub inputs: Vec<HostTensor>,
}

/// Output and gradients of an operation.
pub struct Computed {
    /// The operation's output.
    pub outputs: Vec<HostTensor>,
    /// By each input.
    pub gradients: Vec<HostTensor>,
}

/// Every operation of a language model, from the embedding to the losses, on the batch `ids` whose next tokens are
/// `targets`. `gpt` must be off the graph.
pub fn operations(gpt: &Gpt, ids: &Ids, targets: &[i64]) -> Vec<Use> {
    let device = gpt.device();
    let input = || ids.tensor(&device);
    let (_, packed) = tap::record(|| gpt.hidden(input(), &ids.two_documents()));
    let ((), calls) = tap::record(|| {
        let hidden = gpt.hidden(input(), &Layout::right_padded());
        let [batch, seq, d_model] = hidden.dims();
        let targets = || Tensor::from_data(TensorData::new(targets.to_vec(), [batch * seq]), &device);
        let rows = hidden.clone().reshape([batch * seq, d_model]);
        gpt.logits(hidden);
        loss::token_log_probs(gpt, rows.clone(), targets(), TEMPERATURE);
        loss::cross_entropy(gpt, rows, targets(), batch * seq);
    });
    let is_attention = |call: &Call| matches!(call.operation, Operation::Attention { .. });
    let packed = packed.into_iter().filter(is_attention).map(|call| (" over two documents", call));
    let weights = gpt.to_named();
    let mut names = BTreeSet::new();
    packed
        .chain(calls.into_iter().map(|call| ("", call)))
        .map(|(layout, call)| {
            let inputs: Vec<HostTensor> = call.operands.iter().map(on_host).collect();
            let place = inputs
                .iter()
                .find_map(|input| path_of(&weights, input))
                .map_or(String::new(), |path| format!(" `{path}`"));
            let name = format!("{}{layout}{place}", call.operation.name());
            // Without weights of its own an operation is known by its number.
            let numbered = (1..).map(|n| if n == 1 { name.clone() } else { format!("{name} {n}") });
            let name = numbered.into_iter().find(|name| !names.contains(name)).unwrap_or(name);
            names.insert(name.clone());
            Use { name, operation: call.operation, inputs }
        })
        .collect()
}

/// The layer whose weights `tensor` is: the path of a parameter without its last part.
fn path_of<'w>(weights: &'w NamedTensors, tensor: &HostTensor) -> Option<&'w str> {
    let (path, _) = weights.iter().find(|(_, weight)| weight.shape == tensor.shape && weight.data == tensor.data)?;
    Some(path.rsplit_once('.').map_or(path.as_str(), |(layer, _)| layer))
}

fn on_host(operand: &Operand) -> HostTensor {
    HostTensor { shape: operand.shape.clone(), data: HostTensor::of(&operand.flat).data }
}

impl Use {
    /// Computes the operation and its gradients for a random gradient of the output, the same everywhere.
    ///
    /// # Panics
    /// If the device cannot be read.
    pub fn run(&self, kernels: Kernels, device: &Device) -> Computed {
        let device = device.clone().autodiff();
        let leaf = |input: &HostTensor| {
            let flat = TensorData::new(input.data.clone(), [input.data.len()]);
            Operand { flat: Tensor::from_data(flat, &device).require_grad(), shape: input.shape.clone() }
        };
        let operands: Vec<Operand> = self.inputs.iter().map(leaf).collect();
        let outputs = self.operation.apply(kernels, &operands);
        let mut rng = Streams::new(0).get(&format!("compare/{}", self.name), 0);
        let mut product: Option<Tensor<1>> = None;
        let mut found = Vec::new();
        for output in outputs {
            let host = HostTensor { shape: output.shape, data: HostTensor::of(&output.flat.clone().inner()).data };
            let upstream: Vec<f32> = host.data.iter().map(|_| rng.normal() as f32).collect();
            let upstream = Tensor::from_data(TensorData::new(upstream, [host.data.len()]), &device);
            let term = (output.flat * upstream).sum();
            product = Some(product.map_or(term.clone(), |sum| sum + term));
            found.push(host);
        }
        let gradients = product.expect("every operation has an output").backward();
        let gradient = |operand: &Operand| {
            let gradient = operand.flat.grad(&gradients).expect("every input of an operation has a gradient");
            HostTensor { shape: operand.shape.clone(), data: HostTensor::of(&gradient).data }
        };
        Computed { outputs: found, gradients: operands.iter().map(gradient).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::model::GptConfig;

    fn uses(config: &GptConfig) -> Vec<Use> {
        let gpt = Gpt::new(config, &Streams::new(1), &Device::flex());
        operations(&gpt, &Ids { flat: vec![1, 2, 3, 4, 5, 6], batch: 1, seq: 6 }, &[2, 3, 4, 5, 6, 7])
    }

    #[test]
    fn a_forward_pass_is_taken_apart_into_named_operations() {
        let small =
            |base: GptConfig| GptConfig { d_model: 8, d_ff: 16, n_heads: 2, n_layers: 2, max_seq_len: 8, ..base };
        for config in [small(GptConfig::transformer(11)), small(GptConfig::gpt2(11))] {
            let uses = uses(&config);
            let names: BTreeSet<&str> = uses.iter().map(|used| used.name.as_str()).collect();
            assert_eq!(names.len(), uses.len(), "{names:?}");
            for name in [
                "attention over two documents 2",
                "embedding",
                "attention 2",
                "linear `blocks.0.attention.qkv`",
                "activation",
                "feed-forward, addition and layer norm `blocks.1.mlp.up`",
                "token log-probabilities",
                "cross-entropy",
            ] {
                assert!(names.iter().any(|found| found.starts_with(name)), "no {name} in {names:?}");
            }
            let of = |kernels| uses.iter().map(|used| used.run(kernels, &Device::flex())).collect::<Vec<_>>();
            for ((used, fused), plain) in uses.iter().zip(of(Kernels::Fused)).zip(of(Kernels::Plain)) {
                assert_eq!(fused.gradients.len(), used.inputs.len(), "{}", used.name);
                for (a, b) in fused.outputs.iter().zip(&plain.outputs) {
                    let worst = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(a.shape == b.shape && worst < 1e-4, "{}: {worst}", used.name);
                }
            }
        }
    }
}
