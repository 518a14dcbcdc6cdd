//! A forward pass taken apart.

use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::{Int, Tensor, TensorData};
use common::kernels::Kernels;
use common::kernels::tap::{self, Call, Operation};
use common::model::params::{Output, Role, parameters as all_parameters};
use common::model::{Gpt, GptConfig, Layout, ModelSection, Preset};
use common::tokenizer::Tokenizer;

use crate::decoding::open;

/// Every operation of a forward pass over one text.
pub(crate) struct Traced {
    pub(crate) calls: Vec<Call>,
    pub(crate) ids: Vec<u32>,
    tokenizer: Tokenizer,
}

impl Traced {
    /// Runs the model in `checkpoint` on `text`, after `<|bos|>`.
    pub(crate) fn of(checkpoint: &Path, text: &str) -> Result<Self> {
        let (model, tokenizer) = open(checkpoint)?;
        let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
        ids.extend(tokenizer.encode(text)?);
        let (_, calls) = tap::record(|| model.hidden(batch_of_one(&model, &ids), &Layout::right_padded()));
        Ok(Self { calls, ids, tokenizer })
    }

    /// The positions with the largest of `weights`, largest first, with their tokens.
    pub(crate) fn largest(&self, weights: &[f32], n: usize) -> String {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        let token =
            |&i: &usize| format!("{i} {:?} {:.2}", self.tokenizer.decode_with_specials(&[self.ids[i]]), weights[i]);
        order.iter().take(n).map(token).collect::<Vec<_>>().join(", ")
    }
}

/// `ids` as a batch of one row.
pub(crate) fn batch_of_one(model: &Gpt, ids: &[u32]) -> Tensor<2, Int> {
    let numbers: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    Tensor::from_data(TensorData::new(numbers, [1, ids.len()]), &model.device())
}

/// The numbers of a tensor.
pub(crate) fn host(tensor: &Tensor<1>) -> Result<Vec<f32>> {
    tensor.try_to_vec_as::<f32>().context("failed to read a tensor")
}

/// The root mean square of what each branch adds, of what it is added to, and of the norm of both.
pub(crate) fn residual(checkpoint: &Path, text: &str) -> Result<String> {
    let traced = Traced::of(checkpoint, text)?;
    let mut printed = String::from("branch                   adds     to  norm of the sum\n");
    let sums = traced.calls.iter().filter(|call| matches!(call.operation, Operation::AddLayerNorm { .. }));
    for (i, call) in sums.enumerate() {
        let [branch, stream] = [0, 1].map(|operand| host(&call.operands[operand].flat));
        let normed = host(&call.operation.apply(Kernels::Plain, &call.operands)[0].flat)?;
        let name = if i % 2 == 0 { "attention" } else { "feed-forward" };
        let name = format!("layer {}, {name}", i / 2);
        printed += &format!("{name:<22} {:>6.2} {:>6.2} {:>6.2}\n", rms(&branch?), rms(&stream?), rms(&normed));
    }
    Ok(printed)
}

fn rms(numbers: &[f32]) -> f64 {
    (numbers.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / numbers.len() as f64).sqrt()
}

/// Where the parameters are: the book's model in four architectures, and GPT-2.
pub(crate) fn parameters() -> Result<String> {
    let small = |preset| ModelSection {
        preset,
        d_model: Some(64),
        n_layers: Some(2),
        tie_embeddings: Some(false),
        ..ModelSection::default()
    };
    let gpt2 = ModelSection {
        preset: Preset::Gpt2,
        d_model: Some(768),
        n_layers: Some(12),
        n_heads: Some(12),
        max_seq_len: Some(1024),
        ..ModelSection::default()
    };
    let rows = [
        ("book, transformer", small(Preset::Transformer).resolve(1024)?),
        ("book, gpt2", small(Preset::Gpt2).resolve(1024)?),
        ("book, llama", small(Preset::Llama).resolve(1024)?),
        ("book, qwen3", small(Preset::Qwen3).resolve(1024)?),
        ("GPT-2, 12 layers", gpt2.resolve(50_257)?),
    ];
    let mut printed =
        String::from("model              embeddings  attention  feed-forward  norms    output        all\n");
    for (name, config) in rows {
        let [embeddings, attention, feed_forward, norms, output] = places(&config);
        let all = embeddings + attention + feed_forward + norms + output;
        printed += &format!(
            "{name:<18} {embeddings:>10} {attention:>10} {feed_forward:>13} {norms:>6} {output:>9} {all:>10}\n"
        );
    }
    Ok(printed)
}

/// Parameters of embeddings, attention, feed-forward layers, norms and the output layer.
fn places(config: &GptConfig) -> [usize; 5] {
    let mut counts = [0; 5];
    for parameter in all_parameters(config, Output::Logits) {
        let place = match parameter.role() {
            Role::TokenEmbedding | Role::PositionEmbedding => 0,
            Role::NormGain | Role::NormOffset => 3,
            Role::OutputHead | Role::ScoreHead => 4,
            _ if parameter.path().contains("attention") => 1,
            _ => 2,
        };
        counts[place] += parameter.shape().iter().product::<usize>();
    }
    counts
}
