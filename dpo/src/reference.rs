//! What the reference says of every pair: computed once, before the first step, and kept in the run's directory.
//!
//! The reference is the model that a run begins from, so it need not stay in memory beside the policy: its
//! log-probabilities of the pairs are all that the objective asks of it. A resumed run reads them, so that it goes on
//! with the same numbers to the last bit, whatever it runs on.

use std::path::Path;

use anyhow::Context;
use common::checkpoint::Checkpoint;
use common::files::{read_if_there, write_whole};
use common::group::Group;
use common::hash::sha256_of;
use common::interrupt::Interrupt;
use common::model::Gpt;
use common::pace::Pace;
use common::score::{EncodedPair, Pairs, Watch, log_probs, of_share_of_responses};
use serde::{Deserialize, Serialize};

use crate::data::{PairLogProbs, answers};

/// In the output directory.
const FILE: &str = "reference.json";

/// Pairs after which the processes agree whether the user asked to stop.
const N_AT_A_TIME: usize = 256;

/// Log-probabilities of the pairs under the reference, in the order of the files.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reference {
    /// Of the reference's weights and the pairs' tokens.
    fingerprint: String,
    pub(crate) train: Vec<PairLogProbs>,
    pub(crate) val: Vec<PairLogProbs>,
}

impl Reference {
    /// Reads what an earlier call of this run left in `out` if it is of this model and these pairs, or else computes and
    /// writes it with the model that `load` gives; `None` if the user asked to stop.
    ///
    /// # Errors
    /// If the model cannot be loaded, or a file not be read or written.
    pub(crate) fn read_or_compute(
        group: &Group,
        out: &Path,
        init: &Checkpoint,
        [train, val]: [&Pairs; 2],
        batch_size: usize,
        interrupt: Interrupt,
        load: impl FnOnce() -> anyhow::Result<Gpt>,
    ) -> anyhow::Result<Option<Self>> {
        let fingerprint = fingerprint(init, [train, val]);
        let path = out.join(FILE);
        if let Some(text) = read_if_there(&path)? {
            let kept: Self = serde_json::from_str(&text).with_context(|| format!("`{}` is damaged", path.display()))?;
            if kept.fingerprint == fingerprint {
                return Ok(Some(kept));
            }
            tracing::warn!("`{}` is of another model or other pairs: computed anew", path.display());
        }
        tracing::info!("log-probabilities of {} pairs under the reference", train.encoded.len() + val.encoded.len());
        let gpt = load()?;
        let n_answers = group.share().of(2 * (train.encoded.len() + val.encoded.len())).len();
        // Of several processes none may break off alone.
        let watched = if group.is_alone() { interrupt } else { Interrupt::never() };
        let pace = Pace::new("reference", n_answers, "answers", watched);
        let of = |pairs: &Pairs| -> anyhow::Result<Option<Vec<PairLogProbs>>> {
            let mut all = Vec::with_capacity(pairs.encoded.len());
            for some in pairs.encoded.chunks(N_AT_A_TIME) {
                let computed = pair_log_probs(group, &gpt, some, batch_size, &|n| pace.done(n));
                if interrupt.requested_in(group)? {
                    return Ok(None);
                }
                all.extend(computed?);
            }
            Ok(Some(all))
        };
        let Some(of_train) = of(train)? else { return Ok(None) };
        let Some(of_val) = of(val)? else { return Ok(None) };
        let computed = Self { fingerprint, train: of_train, val: of_val };
        if group.is_first() {
            write_whole(&path, serde_json::to_string(&computed)?)?;
        }
        Ok(Some(computed))
    }
}

/// The log-probabilities of each pair's answers under `gpt`, `batch_size` answers at a time, which `group` shares,
/// with `watch` looking on: it is told of answers.
///
/// # Errors
/// If the device cannot be read, `watch` breaks it off, or a process of the group has ended.
pub(crate) fn pair_log_probs(
    group: &Group,
    gpt: &Gpt,
    pairs: &[EncodedPair],
    batch_size: usize,
    watch: Watch<'_>,
) -> anyhow::Result<Vec<PairLogProbs>> {
    let rows: Vec<_> = pairs.iter().flat_map(answers).collect();
    let own = of_share_of_responses(&rows, batch_size, group.share(), watch, |batch| log_probs(gpt, batch, 1.0))
        .context("failed to compute log-probabilities")?;
    let of_tokens = group.in_order(own)?;
    let sum = |of_answer: &[f32]| of_answer.iter().map(|&p| f64::from(p)).sum::<f64>() as f32;
    Ok(of_tokens.chunks_exact(2).map(|of_pair| [sum(&of_pair[0]), sum(&of_pair[1])]).collect())
}

/// One hash of the weights that log-probabilities are of and of the tokens that they are taken of.
fn fingerprint(init: &Checkpoint, pairs: [&Pairs; 2]) -> String {
    let mut hash = format!("{} {}", init.as_parent().weights_sha256, init.base().weights_sha256);
    for pair in pairs.into_iter().flat_map(|pairs| &pairs.encoded) {
        let lengths = [pair.n_prompt as u32, pair.chosen.len() as u32, pair.rejected.len() as u32];
        let ids = lengths.iter().chain(&pair.chosen).chain(&pair.rejected);
        let bytes: Vec<u8> = hash.bytes().chain(ids.flat_map(|id| id.to_le_bytes())).collect();
        hash = sha256_of(&bytes);
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use common::checkpoint::Stage;
    use common::rng::Streams;
    use common::testing::{byte_tokenizer, save_tiny, tiny_config};

    fn pairs(ids: &[u32]) -> Pairs {
        let pair =
            |&id: &u32| EncodedPair { chosen: vec![1, 2, id], rejected: vec![1, 2, 9], n_prompt: 2, margin: None };
        Pairs {
            encoded: ids.iter().map(pair).collect(),
            records: (0..ids.len()).map(|i| i..i + 1).collect(),
            annotators: vec![None; ids.len()],
        }
    }

    #[test]
    fn it_stops_when_asked_to_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
        let init = Checkpoint::open(&dir.path().join("sft")).unwrap();
        let (train, val) = (pairs(&[3, 4, 5]), pairs(&[6]));
        let interrupt = Interrupt::of_test();
        interrupt.request();
        let load = || Ok(Gpt::new(&tiny_config(20), &Streams::new(1), &Device::flex()));
        let of = Reference::read_or_compute(&Group::alone(), dir.path(), &init, [&train, &val], 2, interrupt, load);
        assert_eq!(of.unwrap(), None);
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn what_was_computed_is_read_again_unless_model_or_pairs_changed() {
        let dir = tempfile::tempdir().unwrap();
        let open = |seed| {
            save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), seed);
            Checkpoint::open(&dir.path().join("sft")).unwrap()
        };
        let init = open(3);
        let (train, val) = (pairs(&[3, 4, 5]), pairs(&[6]));
        let mut n_loads = 0;
        let mut read = |init: &Checkpoint, train: &Pairs| {
            let mut load = || {
                n_loads += 1;
                Ok(Gpt::new(&tiny_config(20), &Streams::new(n_loads), &Device::flex()))
            };
            let of = Reference::read_or_compute(
                &Group::alone(),
                dir.path(),
                init,
                [train, &val],
                2,
                Interrupt::never(),
                &mut load,
            );
            (of.unwrap().expect("nobody stops it"), n_loads)
        };
        let (first, _) = read(&init, &train);
        let (again, n) = read(&init, &train);
        assert_eq!((&again, n, first.train.len(), first.val.len()), (&first, 1, 3, 1));
        let (of_others, n) = read(&init, &pairs(&[3, 4, 7]));
        assert!(n == 2 && of_others != first);
        assert_eq!(read(&open(4), &pairs(&[3, 4, 7])).1, 3);
    }
}
