//! Each fused operation beside its plain version, forward alone and with its gradients, at size a of `recipe bench`; and
//! decoding.
//!
//! `cargo bench -p common --bench kernels`, with `-- attention` for a part. Results of one run are kept, and the next
//! run is compared with them.

use std::hint::black_box;

use burn::tensor::{Device, Int, Tensor, TensorData};
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::kernels::{self, Activation, AdamWParam, AdamWStep, Kernels};
use common::model::{Gpt, GptConfig};
use common::rng::Streams;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion};

const BATCH: usize = 16;
const SEQ: usize = 256;
const D_MODEL: usize = 128;
const N_HEADS: usize = 4;
const VOCAB: usize = 4096;
const ROWS: usize = BATCH * SEQ;

const BOTH: [(Kernels, &str); 2] = [(Kernels::Fused, "fused"), (Kernels::Plain, "plain")];

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let plain = common::backend::open(common::backend::DEFAULT).expect("the default backend is compiled in");
    differentiated(&mut criterion, &plain);
    losses(&mut criterion, &plain);
    optimiser(&mut criterion, &plain);
    decoding(&mut criterion, &plain);
    criterion.final_summary();
}

/// Random numbers, one stream a tensor.
fn random<const D: usize>(stream: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut rng = Streams::new(0).get("benches", stream);
    let n = shape.iter().product::<usize>();
    let data: Vec<f32> = (0..n).map(|_| rng.normal() as f32).collect();
    Tensor::from_data(TensorData::new(data, shape), device)
}

fn targets(device: &Device) -> Tensor<1, Int> {
    let mut rng = Streams::new(0).get("benches/targets", 0);
    let ids: Vec<i64> = (0..ROWS).map(|_| rng.below(VOCAB) as i64).collect();
    Tensor::from_data(TensorData::new(ids, [ROWS]), device)
}

/// Measures `op` on `inputs` forward, and with the gradients of the sum of its results.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    version: &str,
    device: &Device,
    inputs: &dyn Fn(&Device) -> Inputs,
    op: &dyn Fn(&Inputs) -> Tensor<1>,
) {
    let plain = inputs(device);
    group.bench_function(format!("{version}/forward"), |bencher| {
        bencher.iter(|| black_box(op(&plain).into_data()));
    });
    let tracked = inputs(&device.clone().autodiff()).tracked();
    group.bench_function(format!("{version}/forward and backward"), |bencher| {
        bencher.iter(|| black_box(op(&tracked).backward()));
    });
}

/// Operands of the operations.
struct Inputs {
    /// `[BATCH, SEQ, width]`
    x: Tensor<3>,
    /// A second tensor of that shape.
    other: Tensor<3>,
    /// `[width, d_out]`
    weight: Tensor<2>,
    /// `[d_out]`
    bias: Tensor<1>,
    /// `[d_out]`
    gain: Tensor<1>,
}

impl Inputs {
    fn new(width: usize, d_out: usize, device: &Device) -> Self {
        Self {
            x: random(0, [BATCH, SEQ, width], device),
            other: random(1, [BATCH, SEQ, width], device),
            weight: random(2, [width, d_out], device),
            bias: random(3, [d_out], device),
            gain: random(4, [d_out], device),
        }
    }

    fn tracked(self) -> Self {
        Self {
            x: self.x.require_grad(),
            other: self.other.require_grad(),
            weight: self.weight.require_grad(),
            bias: self.bias.require_grad(),
            gain: self.gain.require_grad(),
        }
    }
}

/// The operations of a block.
fn differentiated(criterion: &mut Criterion, device: &Device) {
    for (d_in, d_out) in [(D_MODEL, 3 * D_MODEL), (D_MODEL, D_MODEL), (4 * D_MODEL, D_MODEL)] {
        let mut group = criterion.benchmark_group(format!("linear {d_in} to {d_out}"));
        for (version, name) in BOTH {
            measure(&mut group, name, device, &|device| Inputs::new(d_in, d_out, device), &|i| {
                kernels::linear(version, i.x.clone(), i.weight.clone(), Some(i.bias.clone())).sum()
            });
        }
    }
    for (activation, what) in [(Activation::GeluTanh, "bias and gelu"), (Activation::Relu, "bias and relu")] {
        let mut group = criterion.benchmark_group(what);
        for (version, name) in BOTH {
            measure(&mut group, name, device, &|device| Inputs::new(4 * D_MODEL, 4 * D_MODEL, device), &|i| {
                kernels::bias_activation(version, i.x.clone(), i.bias.clone(), activation).sum()
            });
        }
    }
    let mut group = criterion.benchmark_group("add and layer norm");
    for (version, name) in BOTH {
        measure(&mut group, name, device, &|device| Inputs::new(D_MODEL, D_MODEL, device), &|i| {
            let (x, other) = (i.x.clone(), i.other.clone());
            let (normed, sum) = kernels::add_layer_norm(version, x, other, i.gain.clone(), i.bias.clone(), 1e-5);
            (normed + sum).sum()
        });
    }
    drop(group);
    let mut group = criterion.benchmark_group("layer norm");
    for (version, name) in BOTH {
        measure(&mut group, name, device, &|device| Inputs::new(D_MODEL, D_MODEL, device), &|i| {
            kernels::layer_norm(version, i.x.clone(), i.gain.clone(), i.bias.clone(), 1e-5).sum()
        });
    }
    drop(group);
    let mut group = criterion.benchmark_group("attention");
    for (version, name) in BOTH {
        measure(&mut group, name, device, &|device| Inputs::new(3 * D_MODEL, 1, device), &|i| {
            kernels::attention(version, i.x.clone(), None, N_HEADS, None).sum()
        });
    }
}

/// The operations over the vocabulary.
fn losses(criterion: &mut Criterion, device: &Device) {
    let inputs =
        |device: &Device| Inputs { weight: random(5, [VOCAB, D_MODEL], device), ..Inputs::new(D_MODEL, 1, device) };
    let rows = |i: &Inputs| i.x.clone().reshape([ROWS, D_MODEL]);
    let mut group = criterion.benchmark_group("token log-probs and entropy");
    group.sample_size(20);
    for (version, name) in BOTH {
        measure(&mut group, name, device, &inputs, &|i| {
            let targets = targets(&i.x.device());
            kernels::token_log_probs_and_entropy(version, rows(i), i.weight.clone(), targets, 1.0).0.sum()
        });
    }
    drop(group);
    let mut group = criterion.benchmark_group("cross-entropy");
    group.sample_size(20);
    for (version, name) in BOTH {
        measure(&mut group, name, device, &inputs, &|i| {
            kernels::cross_entropy(version, rows(i), i.weight.clone(), targets(&i.x.device()), ROWS as f64)
        });
    }
}

/// One update of a million parameters, in one tensor or in many.
fn optimiser(criterion: &mut Criterion, device: &Device) {
    const N: usize = 1 << 20;
    let step =
        AdamWStep { lr: 1e-3, beta_1: 0.9, beta_2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 1.0 };
    let mut group = criterion.benchmark_group("adamw");
    for (version, name) in BOTH {
        for n_tensors in [1, 64] {
            let all = |stream: u64| (0..n_tensors).map(move |i| random(stream + i, [N / n_tensors as usize], device));
            let grads: Vec<Tensor<1>> = all(0).collect();
            let moments = all(100).zip(all(200).map(Tensor::abs));
            let mut state: Vec<[Tensor<1>; 3]> = all(300).zip(moments).map(|(param, (m, v))| [param, m, v]).collect();
            group.bench_function(format!("{name}/{n_tensors} tensors"), |bencher| {
                bencher.iter(|| {
                    let params = state.drain(..).zip(&grads);
                    let params =
                        params.map(|([param, m, v], grad)| AdamWParam { param, grad: grad.clone(), m, v, step });
                    state = kernels::adamw_update(version, params.collect());
                });
            });
            group.bench_function(format!("{name}/sum of squares of {n_tensors}"), |bencher| {
                bencher.iter(|| kernels::sum_of_squares(version, black_box(&grads)));
            });
        }
    }
}

/// Sixteen tokens for each of one or 32 prompts of 64.
fn decoding(criterion: &mut Criterion, device: &Device) {
    let config = GptConfig {
        d_model: D_MODEL,
        n_layers: 4,
        n_heads: N_HEADS,
        d_ff: 4 * D_MODEL,
        max_seq_len: SEQ,
        dropout: 0.0,
        ..GptConfig::gpt2(VOCAB)
    };
    let streams = Streams::new(0);
    let mut group = criterion.benchmark_group("generate");
    group.sample_size(20);
    for (version, name) in BOTH {
        let gpt = Gpt::new(&config, &streams, device).with_kernels(version);
        for batch in [1, 32] {
            let mut rng = streams.get("benches/prompts", batch as u64);
            let prompts: Vec<Vec<u32>> =
                (0..batch).map(|_| (0..64).map(|_| rng.below(VOCAB) as u32).collect()).collect();
            let sampling = SamplingConfig { max_tokens: 16, ..SamplingConfig::default() };
            group.bench_function(format!("{name}/batch {batch}"), |bencher| {
                bencher.iter(|| generate(&gpt, &prompts, &sampling, &streams, 0, GenerateOptions::default()));
            });
        }
    }
}
