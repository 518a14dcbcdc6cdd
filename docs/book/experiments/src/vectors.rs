//! The vectors of tokens and positions.

use std::path::Path;

use anyhow::{Result, ensure};
use common::checkpoint::Checkpoint;
use common::model::sinusoid_table;
use common::tokenizer::Tokenizer;

/// Width of the book's model.
const D_MODEL: usize = 64;
/// Neighbours printed of each word.
const N_NEIGHBOURS: usize = 5;

/// Cosine of the vectors of positions 100 and 100 + k.
pub(crate) fn positions() -> String {
    let table = sinusoid_table(256, D_MODEL);
    let at = |position: usize| &table[position * D_MODEL..(position + 1) * D_MODEL];
    let line = |k: &usize| {
        let (before, behind) = (cosine(at(100), at(100 - k)), cosine(at(100), at(100 + k)));
        format!("distance {k:>2}: {before:.3} before, {behind:.3} behind\n")
    };
    [0, 1, 2, 4, 8, 16, 32, 64].iter().map(line).collect()
}

/// The words whose vectors have the largest cosine with those of `words`: by the embeddings that the model reads tokens
/// with, and by the output weights that it predicts them with.
pub(crate) fn neighbours(checkpoint: &Path, words: &[String]) -> Result<String> {
    let checkpoint = Checkpoint::open(checkpoint)?;
    let tokenizer = checkpoint.require_tokenizer()?;
    let mut printed = String::new();
    for word in words {
        let ids = tokenizer.encode(&format!(" {word}"))?;
        ensure!(ids.len() == 1, "`{word}` has {} tokens, expected 1\nhint: try a word of the stories", ids.len());
        for (name, path) in [("read", "token_embedding"), ("predicted", "head")] {
            let Some(table) = checkpoint.named().get(path) else { continue };
            let near = nearest(&table.data, table.shape[1], ids[0], tokenizer);
            printed += &format!("{word:<6} {name:<10} {near}\n");
        }
    }
    Ok(printed)
}

/// The words nearest to the token `id` in a table of vectors, nearest first, with the cosine.
fn nearest(table: &[f32], d_model: usize, id: u32, tokenizer: &Tokenizer) -> String {
    let vector = |id: u32| &table[id as usize * d_model..(id as usize + 1) * d_model];
    let is_word = |text: &str| text.strip_prefix(' ').is_some_and(|word| word.chars().all(char::is_alphabetic));
    let others =
        (0..tokenizer.vocab_size() as u32).filter(|&other| other != id && is_word(&tokenizer.decode(&[other])));
    let mut near: Vec<(f64, u32)> = others.map(|other| (cosine(vector(id), vector(other)), other)).collect();
    near.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let near = near.iter().take(N_NEIGHBOURS).map(|&(x, id)| format!("{} {x:.2}", tokenizer.decode(&[id]).trim()));
    near.collect::<Vec<_>>().join(", ")
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
