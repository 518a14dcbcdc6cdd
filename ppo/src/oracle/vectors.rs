//! The recorded numbers, as `tests/oracles/dialects.py` writes them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use crate::dialect::Dialect;

/// Those that are part of the program.
const RECORDED: &str = include_str!("../../../tests/fixtures/dialects.json");

/// One row a response, as long as the response.
pub(super) type Rows = Vec<Vec<f64>>;

/// The file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Vectors {
    /// Versions of what was run.
    pub made_with: BTreeMap<String, String>,
    /// γ.
    pub gamma: f64,
    /// λ.
    pub lambda: f64,
    /// β.
    pub kl_coef: f64,
    /// ε of the policy.
    pub clip_range: f64,
    /// What a response without an end token is given, or less.
    pub missing_eos_score: f64,
    /// The longest that a response may be.
    pub response_length: usize,
    /// What every dialect is given.
    pub cases: Vec<Case>,
    /// What each makes of it.
    pub dialects: BTreeMap<Dialect, Recorded>,
    /// Steps of Adam.
    pub adam: Adam,
    /// Advantages without a value model, of the first case.
    pub estimators: Estimators,
    /// Losses with the divergence in them, of the first case.
    pub loss_means: LossMeans,
}

/// A batch of responses; every row has `response_length` numbers, tokens after the end among them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Case {
    pub name: String,
    /// Tokens of each response, its end token among them.
    pub lengths: Vec<usize>,
    /// Whether it has an end token.
    pub ended: Vec<bool>,
    pub scores: Vec<f64>,
    pub log_probs: Rows,
    pub ref_log_probs: Rows,
    pub values: Rows,
    /// Those of the policy in training.
    pub new_log_probs: Rows,
    /// Those of the value model in training.
    pub new_values: Rows,
}

/// A dialect's numbers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Recorded {
    /// Whether the original was run, or its formulas computed.
    pub how: String,
    /// By case.
    pub cases: BTreeMap<String, Theirs>,
}

/// A dialect's numbers of one case.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Theirs {
    pub kl: Rows,
    pub scores: Vec<f64>,
    pub rewards: Rows,
    pub returns: Rows,
    /// Whitened where the dialect whitens.
    pub advantages: Rows,
    pub policy_loss: f64,
    pub policy_gradient: Rows,
    /// Without the coefficient.
    pub value_loss: f64,
    /// With the coefficient.
    pub value_gradient: Rows,
}

/// Steps of both styles of Adam.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Adam {
    pub lr: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    pub param: Vec<f64>,
    /// One row a step.
    pub grads: Rows,
    /// The parameter after each step.
    pub torch: Rows,
    /// The same in TensorFlow's style.
    pub tf: Rows,
}

/// One advantage a response.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Estimators {
    pub samples_per_prompt: usize,
    pub rloo: Vec<f64>,
    pub grpo: Vec<f64>,
}

/// Losses of the same advantages by mean and estimator of the divergence, `sequence/k3` for instance.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct LossMeans {
    pub advantages: Rows,
    #[serde(flatten)]
    pub of: BTreeMap<String, LossAndGradient>,
}

/// A loss and its gradient with respect to the log-probabilities.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct LossAndGradient {
    pub loss: f64,
    pub gradient: Rows,
}

impl Vectors {
    /// Reads those of `file`, or else those in the program.
    ///
    /// # Errors
    /// If the file cannot be read or is of another form.
    pub(super) fn read(file: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = file else {
            return serde_json::from_str(RECORDED).context("the recorded numbers in the program are damaged");
        };
        let text = std::fs::read_to_string(path).with_context(|| format!("failed to read `{}`", path.display()))?;
        let vectors: Self = serde_json::from_str(&text).with_context(|| {
            format!("`{}` does not hold numbers as tests/oracles/dialects.py writes them", path.display())
        })?;
        vectors.check().with_context(|| format!("`{}` cannot be used", path.display()))?;
        Ok(vectors)
    }

    /// Checks that rows are as long as what they belong to.
    fn check(&self) -> anyhow::Result<()> {
        let first = self.cases.first().context("it has no case")?;
        for case in &self.cases {
            let n = case.lengths.len();
            let rows = [&case.log_probs, &case.ref_log_probs, &case.values, &case.new_log_probs, &case.new_values];
            let rectangular =
                rows.iter().all(|rows| rows.len() == n && rows.iter().all(|row| row.len() == self.response_length));
            let fits = case.lengths.iter().all(|&length| (1..=self.response_length).contains(&length));
            anyhow::ensure!(
                rectangular && fits && case.ended.len() == n && case.scores.len() == n,
                "the rows of case `{}` differ in length",
                case.name
            );
        }
        let k = self.estimators.samples_per_prompt;
        anyhow::ensure!(
            k > 1 && first.lengths.len().is_multiple_of(k),
            "its responses are no groups of `samples_per_prompt` {k}"
        );
        anyhow::ensure!(
            ragged(&self.loss_means.advantages) == first.lengths
                && self.adam.grads.iter().all(|grad| grad.len() == self.adam.param.len()),
            "the rows of `loss_means` or `adam` differ in length"
        );
        Ok(())
    }
}

/// The lengths of rows.
pub(super) fn ragged(rows: &Rows) -> Vec<usize> {
    rows.iter().map(Vec::len).collect()
}
