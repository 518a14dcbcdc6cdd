//! Starting from a directory that transformers wrote.

use std::path::Path;

use super::{Checkpoint, CheckpointError, Opening};
use burn::tensor::Element;

use crate::hf::HostModel;
use crate::model::NamedTensors;
use crate::model::params::{Role, role_of};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Opens the directory of `--init`: a checkpoint of ours, or one in Hugging Face layout.
///
/// A tokenizer with a chat template of its own keeps it, with its tokens; where rows would be padded with a token that
/// ends answers, another is found ([`with_pad_token`](crate::tokenizer::Tokenizer::with_pad_token)). One without a
/// template gets the special tokens of [`conversation`](crate::conversation). The rows of new tokens in the embedding
/// (and in an output layer of its own) start at the mean of the old ones: at the mean no new token is likely at first,
/// and none is impossible.
///
/// # Errors
/// As [`Checkpoint::open_with`].
pub fn init_from(dir: &Path, opening: Opening<'_>) -> Result<Checkpoint, CheckpointError> {
    let mut checkpoint = Checkpoint::open_with(dir, opening)?;
    let Some(tokenizer) = checkpoint.tokenizer.take() else { return Ok(checkpoint) };
    let n_old = tokenizer.vocab_size();
    let (tokenizer, n_added) = prepared(tokenizer)?;
    if n_added > 0 {
        add_tokens(&mut checkpoint.model, n_old, tokenizer.vocab_size());
        tracing::info!(
            "`{}`: special tokens added to the tokenizer, with embeddings at the mean: {n_added}",
            dir.display()
        );
    }
    checkpoint.tokenizer = Some(tokenizer);
    Ok(checkpoint)
}

/// `tokenizer` with the special tokens that training needs, and how many were added.
pub(super) fn prepared(tokenizer: Tokenizer) -> Result<(Tokenizer, usize), TokenizerError> {
    if tokenizer.writes_by_template() { tokenizer.with_pad_token() } else { tokenizer.with_special_tokens_added() }
}

/// Gives `model` the tokens `n_old..n_new`, as [`grow_vocab`] does.
pub(super) fn add_tokens(model: &mut HostModel, n_old: usize, n_new: usize) {
    let n_rows = model.config.vocab_size.max(n_new);
    grow_vocab(&mut model.tensors, n_old, n_new, n_rows);
    grow_vocab(&mut model.narrow, n_old, n_new, n_rows);
    model.config.vocab_size = n_rows;
}

/// Gives the vocabulary `n_rows` rows, of which `n_old..n_new` are new tokens that start at the mean of rows
/// `0..n_old`.
///
/// Rows from `n_old` on that are there already (some models round their vocabulary up) are used for the new tokens;
/// further ones keep what they hold.
///
/// # Panics
/// If `n_old` is 0, more than the rows there are, or `n_rows` less than `n_new`.
pub fn grow_vocab<T: Element>(named: &mut NamedTensors<T>, n_old: usize, n_new: usize, n_rows: usize) {
    for (path, tensor) in named {
        if !role_of(path).is_some_and(Role::is_per_token) {
            continue;
        }
        let [n_present, d_model] = tensor.shape[..] else { panic!("`{path}` has shape {:?}", tensor.shape) };
        assert!(n_old > 0 && n_old <= n_present && n_new <= n_rows, "{n_old}, {n_new}, {n_rows} and {n_present} rows");
        let mut mean = vec![0.0; d_model];
        for row in tensor.data.chunks_exact(d_model).take(n_old) {
            for (sum, x) in mean.iter_mut().zip(row) {
                *sum += x.to_f64() / n_old as f64;
            }
        }
        let mean: Vec<T> = mean.into_iter().map(|x| T::from_elem(x as f32)).collect();
        tensor.data.resize(n_rows.max(n_present) * d_model, T::from_elem(0.0_f32));
        for row in tensor.data.chunks_exact_mut(d_model).take(n_new).skip(n_old) {
            row.copy_from_slice(&mean);
        }
        tensor.shape[0] = n_rows.max(n_present);
    }
}
