//! How well the implicit reward agrees with held-out preferences.

use anyhow::{Context, ensure};
use burn::tensor::{Device, Tensor};
use common::checkpoint::{self, Checkpoint, Stage};
use common::cli::print_json;
use common::config;
use common::data::records::OnBadRecord;
use common::group::Group;
use common::interrupt::Interrupt;
use common::pace::Pace;
use common::score::EncodedPair;
use common::stats::win;
use serde::Serialize;

use crate::cli::EvalArgs;
use crate::config::{DpoConfig, DpoSection, Objective, TooLong};
use crate::data::{self, PairLogProbs};
use crate::loss::{difference, ipo_loss, sigmoid_loss};
use crate::reference::pair_log_probs;

/// A policy's implicit reward on labelled pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Fraction of pairs whose chosen answer has the higher implicit reward; equal rewards count half.
    pub accuracy: f64,
    /// Mean of the chosen less the rejected answer's implicit reward, `β·(log π − log π_ref)` summed over its tokens.
    pub margin_mean: f64,
    /// Mean loss of a pair.
    pub loss: f64,
    /// Number of pairs.
    pub pairs: usize,
}

/// Carries out `dpo eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    args.runtime.check_base([&*args.checkpoint, &*args.reference])?;
    // Nothing is to be saved: a signal ends the program at once.
    print_json(&evaluate(args, Interrupt::never())?)
}

/// Measures a checkpoint against its reference on a file of pairs.
///
/// # Errors
/// If a checkpoint or the file cannot be used, the two do not share a tokenizer, a log-probability is not finite, or
/// `interrupt` ends it.
pub fn evaluate(args: &EvalArgs, interrupt: Interrupt) -> anyhow::Result<Evaluation> {
    let open = |dir| checkpoint::init_from(dir, args.runtime.opening())?.of_stage(&Stage::LANGUAGE_MODELS);
    let policy = open(&args.checkpoint).context("failed to load the policy")?;
    let reference = open(&args.reference).context("failed to load the reference policy")?;
    checkpoint::ensure_same_tokenizer(&policy, &reference)?;
    let tokenizer = policy.require_tokenizer()?;
    let max_seq_len = policy.model_config().max_seq_len.min(reference.model_config().max_seq_len);
    let files = std::slice::from_ref(&args.data);
    let pairs = data::read(files, tokenizer, max_seq_len, OnBadRecord::Fail.into(), TooLong::default())?;
    let runtime = args.runtime.open()?;
    let of = |checkpoint, what| {
        let gpt = runtime.gpt(checkpoint)?;
        let pace = Pace::new(what, 2 * pairs.encoded.len(), "answers", interrupt);
        pair_log_probs(&Group::alone(), &gpt, &pairs.encoded, args.batch_size.get(), &|n| pace.done(n))
    };
    let (of_policy, of_reference) = (of(&policy, "policy")?, of(&reference, "reference")?);
    Evaluation::of(&of_policy, &of_reference, &pairs.encoded, &dpo_section(&policy)?, &runtime.device)
}

/// How a checkpoint of this stage was trained; the defaults for another.
fn dpo_section(checkpoint: &Checkpoint) -> anyhow::Result<DpoSection> {
    if checkpoint.stage() != Some(Stage::Dpo) {
        return Ok(DpoSection::default());
    }
    let path = checkpoint.dir().join(checkpoint::CONFIG_FILE);
    let config: DpoConfig = config::load(&path, &[]).context("failed to read how the policy was trained")?;
    Ok(config.dpo)
}

impl Evaluation {
    /// Compares the log-probabilities of policy and reference, pair by pair; losses are computed on `device`.
    ///
    /// # Errors
    /// If one is not finite, or the device cannot be read.
    ///
    /// # Panics
    /// If the lengths differ, or there is no pair.
    pub(crate) fn of(
        policy: &[PairLogProbs],
        reference: &[PairLogProbs],
        pairs: &[EncodedPair],
        dpo: &DpoSection,
        device: &Device,
    ) -> anyhow::Result<Self> {
        assert!(
            !pairs.is_empty() && policy.len() == pairs.len() && reference.len() == pairs.len(),
            "each of every pair"
        );
        let log_ratios = |side: usize| policy.iter().zip(reference).map(move |(of, from)| of[side] - from[side]);
        let n_tokens = |side: usize| pairs.iter().map(move |pair| data::answers(pair)[side].1.len());
        let all: Vec<f32> = log_ratios(0).chain(log_ratios(1)).collect();
        ensure!(
            all.iter().all(|ratio| ratio.is_finite()),
            "a log-probability is not finite: the weights have diverged"
        );
        let lengths: Vec<usize> = n_tokens(0).chain(n_tokens(1)).collect();
        let losses = losses(Tensor::from_floats(all.as_slice(), device), &lengths, dpo);
        let losses = losses.try_into_vec_as::<f32>().context("failed to read the losses")?;
        let margins = || log_ratios(0).zip(log_ratios(1)).map(|(c, r)| dpo.beta * (f64::from(c) - f64::from(r)));
        let n = pairs.len() as f64;
        Ok(Self {
            accuracy: margins().map(|margin| win(margin, 0.0)).sum::<f64>() / n,
            margin_mean: margins().sum::<f64>() / n,
            loss: losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / n,
            pairs: pairs.len(),
        })
    }
}

/// The loss of each pair as `[dpo]` asks for it.
///
/// # Shapes
/// - `log_ratios`, `n_tokens`: as [`difference`] has them, `[2 · n_pairs]`
/// - returns `[n_pairs]`
pub(crate) fn losses(log_ratios: Tensor<1>, n_tokens: &[usize], dpo: &DpoSection) -> Tensor<1> {
    let difference = difference(log_ratios, dpo.averages().then_some(n_tokens)); // [n_pairs]
    match dpo.loss {
        Objective::Sigmoid => sigmoid_loss(difference, dpo.beta, dpo.label_smoothing),
        Objective::Ipo => ipo_loss(difference, dpo.beta),
    }
}
