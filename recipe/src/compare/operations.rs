//! The operations of a model one by one, each on the activations that the model itself gives it.

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::kernels::{self, Activation, Kernels};
use common::model::{GptConfig, HostTensor, NamedTensors, NormPlacement, Positions, sinusoid_table};
use common::rng::Streams;

/// One use of an operation.
pub struct Operation {
    /// The operation and where in the model it stands.
    pub name: String,
    kind: Kind,
    /// What it is computed from and differentiated by.
    pub inputs: Vec<HostTensor>,
}

enum Kind {
    Embedding { ids: Ids },
    Linear,
    BiasActivation(Activation),
    LayerNorm { eps: f64 },
    AddLayerNorm { eps: f64 },
    Attention { n_heads: usize, packed: bool },
    Logits,
    TokenLogProbs { targets: Vec<i64>, temperature: f64 },
    CrossEntropy { targets: Vec<i64> },
}

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
}

/// Output and gradients of an operation.
pub struct Outcome {
    /// What the operation gives.
    pub output: HostTensor,
    /// By each input, where it has one.
    pub gradients: Vec<(usize, HostTensor)>,
}

impl Operation {
    /// Computes the operation and its gradients for a random gradient of the output, the same everywhere.
    ///
    /// # Panics
    /// If the device cannot be read.
    pub fn run(&self, kernels: Kernels, device: &Device) -> Outcome {
        let device = device.clone().autodiff();
        let i = |at: usize| &self.inputs[at];
        match &self.kind {
            Kind::Embedding { ids } => {
                let (tokens, places) = (leaf::<2>(i(0), &device), leaf::<2>(i(1), &device));
                let out = kernels::embed(kernels, tokens.clone(), places.clone(), ids.tensor(&device), None, 0);
                self.finish(out, &device, |g| vec![(0, grad(&tokens, g)), (1, grad(&places, g))])
            }
            Kind::Linear => {
                let (x, w, b) = (leaf::<3>(i(0), &device), leaf::<2>(i(1), &device), leaf::<1>(i(2), &device));
                let out = kernels::linear(kernels, x.clone(), w.clone(), Some(b.clone()));
                self.finish(out, &device, |g| vec![(0, grad(&x, g)), (1, grad(&w, g)), (2, grad(&b, g))])
            }
            Kind::BiasActivation(activation) => {
                let (x, b) = (leaf::<3>(i(0), &device), leaf::<1>(i(1), &device));
                let out = kernels::bias_activation(kernels, x.clone(), b.clone(), *activation);
                self.finish(out, &device, |g| vec![(0, grad(&x, g)), (1, grad(&b, g))])
            }
            Kind::LayerNorm { eps } => {
                let (x, gamma, beta) = (leaf::<3>(i(0), &device), leaf::<1>(i(1), &device), leaf::<1>(i(2), &device));
                let out = kernels::layer_norm(kernels, x.clone(), gamma.clone(), beta.clone(), *eps);
                self.finish(out, &device, |g| vec![(0, grad(&x, g)), (1, grad(&gamma, g)), (2, grad(&beta, g))])
            }
            Kind::AddLayerNorm { eps } => {
                let (x, y) = (leaf::<3>(i(0), &device), leaf::<3>(i(1), &device));
                let (gamma, beta) = (leaf::<1>(i(2), &device), leaf::<1>(i(3), &device));
                let (out, _) =
                    kernels::add_layer_norm(kernels, x.clone(), y.clone(), gamma.clone(), beta.clone(), *eps);
                self.finish(out, &device, |g| {
                    vec![(0, grad(&x, g)), (1, grad(&y, g)), (2, grad(&gamma, g)), (3, grad(&beta, g))]
                })
            }
            Kind::Attention { n_heads, packed } => {
                let qkv = leaf::<3>(i(0), &device);
                let [batch, seq, _] = qkv.dims();
                // Two documents of unequal length in every row.
                let first = (0..batch * seq).map(|at| if at % seq >= seq / 3 { (seq / 3) as i64 } else { 0 });
                let first_key = packed
                    .then(|| Tensor::<2, Int>::from_data(TensorData::new(first.collect(), [batch, seq]), &device));
                let out = kernels::attention(kernels, qkv.clone(), first_key, *n_heads, None);
                self.finish(out, &device, |g| vec![(0, grad(&qkv, g))])
            }
            Kind::Logits => {
                let (hidden, head) = (leaf::<2>(i(0), &device), leaf::<2>(i(1), &device));
                let out = kernels::logits(kernels, hidden.clone(), head.clone());
                self.finish(out, &device, |g| vec![(0, grad(&hidden, g)), (1, grad(&head, g))])
            }
            Kind::TokenLogProbs { targets, temperature } => {
                let (hidden, head) = (leaf::<2>(i(0), &device), leaf::<2>(i(1), &device));
                let targets = Tensor::from_data(TensorData::new(targets.clone(), [targets.len()]), &device);
                let (out, _) = kernels::token_log_probs(kernels, hidden.clone(), head.clone(), targets, *temperature);
                self.finish(out, &device, |g| vec![(0, grad(&hidden, g)), (1, grad(&head, g))])
            }
            Kind::CrossEntropy { targets } => {
                let (hidden, head) = (leaf::<2>(i(0), &device), leaf::<2>(i(1), &device));
                let n = targets.len();
                let targets = Tensor::from_data(TensorData::new(targets.clone(), [n]), &device);
                let out = kernels::cross_entropy(kernels, hidden.clone(), head.clone(), targets, n as f64);
                self.finish(out, &device, |g| vec![(0, grad(&hidden, g)), (1, grad(&head, g))])
            }
        }
    }

    /// Multiplies the output with its gradient and goes back.
    fn finish<const D: usize>(
        &self,
        out: Tensor<D>,
        device: &Device,
        gradients: impl FnOnce(&burn::tensor::Gradients) -> Vec<(usize, HostTensor)>,
    ) -> Outcome {
        let output = HostTensor::of(&out.clone().inner());
        let mut rng = Streams::new(0).get(&format!("compare/{}", self.name), 0);
        let upstream: Vec<f32> = output.data.iter().map(|_| rng.normal() as f32).collect();
        let upstream = Tensor::<D>::from_data(TensorData::new(upstream, output.shape.clone()), device);
        Outcome { output, gradients: gradients(&(out * upstream).sum().backward()) }
    }
}

fn leaf<const D: usize>(tensor: &HostTensor, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(tensor.data.clone(), tensor.shape.clone()), device).require_grad()
}

fn grad<const D: usize>(x: &Tensor<D>, gradients: &burn::tensor::Gradients) -> HostTensor {
    HostTensor::of(&x.grad(gradients).expect("every input of an operation has a gradient"))
}

/// A model's forward pass as a list of operations.
pub struct Walk<'a> {
    config: &'a GptConfig,
    weights: &'a NamedTensors,
    kernels: Kernels,
    device: &'a Device,
    operations: Vec<Operation>,
}

impl<'a> Walk<'a> {
    /// Takes the forward pass of a model apart. `known` gives each operation's inputs where they were recorded before;
    /// without it they are computed, on the plain `device`, as the model would.
    ///
    /// Returns the operations and the last hidden states, `[batch, seq, d_model]`.
    ///
    /// # Errors
    /// If a weight is missing.
    pub fn operations(
        config: &'a GptConfig,
        weights: &'a NamedTensors,
        ids: &Ids,
        targets: &[i64],
        kernels: Kernels,
        device: &'a Device,
    ) -> Result<(Vec<Operation>, HostTensor)> {
        let mut walk = Self { config, weights, kernels, device, operations: Vec::new() };
        let hidden = walk.blocks(ids)?;
        let (n, d_model) = (ids.batch * ids.seq, config.d_model);
        let head = walk.weight(if config.tie_embeddings { "token_embedding" } else { "head" })?;
        let rows = || HostTensor { shape: vec![n, d_model], data: hidden.data.clone() };
        let targets = targets.to_vec();
        for (name, kind) in [
            ("logits", Kind::Logits),
            ("token log-probabilities", Kind::TokenLogProbs { targets: targets.clone(), temperature: 0.7 }),
            ("cross-entropy", Kind::CrossEntropy { targets }),
        ] {
            walk.operations.push(Operation { name: name.to_owned(), kind, inputs: vec![rows(), head.clone()] });
        }
        Ok((walk.operations, hidden))
    }

    fn weight(&self, path: &str) -> Result<HostTensor> {
        self.weights.get(path).cloned().with_context(|| format!("the model has no `{path}`"))
    }

    /// Notes an operation and computes it.
    fn step(&mut self, name: String, kind: Kind, inputs: Vec<HostTensor>) -> HostTensor {
        let operation = Operation { name, kind, inputs };
        let output = operation.run(self.kernels, self.device).output;
        self.operations.push(operation);
        output
    }

    fn norm(&mut self, at: &str, x: HostTensor, residual: Option<&HostTensor>) -> Result<HostTensor> {
        let (gamma, beta) = (self.weight(&format!("{at}.gamma"))?, self.weight(&format!("{at}.beta"))?);
        let eps = self.config.layer_norm_eps;
        Ok(match residual {
            None => self.step(format!("layer norm `{at}`"), Kind::LayerNorm { eps }, vec![x, gamma, beta]),
            Some(residual) => {
                let inputs = vec![x, residual.clone(), gamma, beta];
                self.step(format!("addition and layer norm `{at}`"), Kind::AddLayerNorm { eps }, inputs)
            }
        })
    }

    fn linear(&mut self, at: &str, x: HostTensor) -> Result<HostTensor> {
        let (weight, bias) = (self.weight(&format!("{at}.weight"))?, self.weight(&format!("{at}.bias"))?);
        Ok(self.step(format!("linear `{at}`"), Kind::Linear, vec![x, weight, bias]))
    }

    fn attention(&mut self, block: &str, x: HostTensor) -> Result<HostTensor> {
        let qkv = self.linear(&format!("{block}.attention.qkv"), x)?;
        let n_heads = self.config.n_heads;
        let packed = Kind::Attention { n_heads, packed: true };
        self.operations.push(Operation {
            name: format!("attention over two documents `{block}`"),
            kind: packed,
            inputs: vec![qkv.clone()],
        });
        let plain = Kind::Attention { n_heads, packed: false };
        let mixed = self.step(format!("attention `{block}`"), plain, vec![qkv]);
        self.linear(&format!("{block}.attention.proj"), mixed)
    }

    fn mlp(&mut self, block: &str, x: HostTensor) -> Result<HostTensor> {
        let (weight, bias) =
            (self.weight(&format!("{block}.mlp.up.weight"))?, self.weight(&format!("{block}.mlp.up.bias"))?);
        let zeros = HostTensor { shape: bias.shape.clone(), data: vec![0.0; bias.data.len()] };
        let up = self.step(format!("linear `{block}.mlp.up`"), Kind::Linear, vec![x, weight, zeros]);
        let kind = Kind::BiasActivation(self.config.activation);
        let active = self.step(format!("activation `{block}.mlp`"), kind, vec![up, bias]);
        self.linear(&format!("{block}.mlp.down"), active)
    }

    /// Everything below the output layer.
    fn blocks(&mut self, ids: &Ids) -> Result<HostTensor> {
        let (d_model, max_seq_len) = (self.config.d_model, self.config.max_seq_len);
        let tokens = self.weight("token_embedding")?;
        let places = match self.config.positions {
            Positions::Learned => self.weight("position_embedding")?,
            Positions::Sinusoidal => {
                HostTensor { shape: vec![max_seq_len, d_model], data: sinusoid_table(max_seq_len, d_model) }
            }
        };
        let mut x = self.step("embedding".to_owned(), Kind::Embedding { ids: ids.clone() }, vec![tokens, places]);
        let names: Vec<String> = (0..self.config.n_layers).map(|i| format!("blocks.{i}")).collect();
        match self.config.norm {
            NormPlacement::Post => {
                for block in &names {
                    let attended = self.attention(block, x.clone())?;
                    x = self.norm(&format!("{block}.norm_1"), attended, Some(&x))?;
                    let fed = self.mlp(block, x.clone())?;
                    x = self.norm(&format!("{block}.norm_2"), fed, Some(&x))?;
                }
                Ok(x)
            }
            NormPlacement::Pre => {
                let mut normed = self.norm("blocks.0.norm_1", x.clone(), None)?;
                for (i, block) in names.iter().enumerate() {
                    let attended = self.attention(block, normed)?;
                    normed = self.norm(&format!("{block}.norm_2"), attended.clone(), Some(&x))?;
                    x = sum(&x, &attended);
                    let fed = self.mlp(block, normed)?;
                    let next = names.get(i + 1).map_or("final_norm".to_owned(), |next| format!("{next}.norm_1"));
                    normed = self.norm(&next, fed.clone(), Some(&x))?;
                    x = sum(&x, &fed);
                }
                Ok(normed)
            }
        }
    }
}

fn sum(a: &HostTensor, b: &HostTensor) -> HostTensor {
    HostTensor { shape: a.shape.clone(), data: a.data.iter().zip(&b.data).map(|(a, b)| a + b).collect() }
}

/// Checks that the list of operations is still the model: both give the same hidden states.
///
/// # Errors
/// If they do not.
pub fn check_walk(walked: &HostTensor, model: &HostTensor) -> Result<()> {
    /// Both are the same operations on the same device, added in f32.
    const ROUNDING: f32 = 1e-3;
    let worst = walked.data.iter().zip(&model.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    ensure!(
        walked.shape == model.shape && worst <= ROUNDING,
        "the operations taken one by one differ from the model by {worst}: the comparison does not know this model"
    );
    Ok(())
}
