//! Ours and theirs, equation by equation: the functions here are those that training calls.

use anyhow::{Context, ensure};
use burn::tensor::{Device, Tensor};
use common::kernels::{self, AdamWParam, AdamWStep, Kernels};
use common::optim::AdamStyle;
use common::score::{EncodedPrompt, Response, Rollout};

use super::vectors::{Case, LossAndGradient, Rows, Theirs, Vectors, ragged};
use super::{Comparison, HOST, TENSORS};
use crate::config::PpoSection;
use crate::dialect::{Dialect, Estimator, KlEstimator, LossMean, ScorePosition, Switches};
use crate::kl;
use crate::loss::{Clips, MinibatchSize, Weights, clipped_policy_loss, kl_loss, weighted_value_loss};
use crate::targets::{Experience, places_after};

/// An equation of a case.
struct Equation {
    name: &'static str,
    tolerance: f64,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

/// One dialect with its recorded numbers.
pub(super) struct Comparing<'a> {
    pub vectors: &'a Vectors,
    pub dialect: Dialect,
    /// With autodiff.
    pub device: &'a Device,
}

impl Comparing<'_> {
    /// All comparisons of the dialect.
    ///
    /// # Errors
    /// If numbers are missing, or of another length than ours.
    pub(super) fn all(&self) -> anyhow::Result<Vec<Comparison>> {
        let name = self.dialect.name();
        let recorded = self.vectors.dialects.get(&self.dialect);
        let recorded = recorded.with_context(|| format!("dialect `{name}` is not among the recorded numbers"))?;
        let mut all = Vec::new();
        for case in &self.vectors.cases {
            let theirs = recorded.cases.get(&case.name);
            let theirs = theirs.with_context(|| format!("dialect `{name}` has no case `{}`", case.name))?;
            for Equation { name, tolerance, ours, theirs } in self.of_case(case, theirs)? {
                all.push(self.compared(&recorded.how, &case.name, name, tolerance, &ours, &theirs)?);
            }
        }
        let (ours, theirs, how) = self.adam()?;
        all.push(self.compared(how, "steps", "adam", TENSORS, &ours, &theirs)?);
        match self.dialect {
            Dialect::Trl => all.extend(self.estimators()?),
            Dialect::Verl => all.extend(self.loss_means()?),
            _ => {}
        }
        Ok(all)
    }

    fn config(&self) -> PpoSection {
        let Vectors { gamma, lambda, kl_coef, clip_range, missing_eos_score, response_length, .. } = *self.vectors;
        let own = PpoSection {
            response_length,
            missing_eos_score,
            kl_coef,
            gamma,
            lambda,
            clip_range,
            ..PpoSection::default()
        };
        PpoSection { dialect: self.dialect, ..own }
    }

    /// Every equation of a case.
    fn of_case(&self, case: &Case, theirs: &Theirs) -> anyhow::Result<Vec<Equation>> {
        let config = self.config();
        let switches = config.switches();
        let rollouts = rollouts(case, switches.score_position);
        let after = places_after(&rollouts, &config);
        let kl = rollouts.iter().flat_map(|rollout| {
            let Rollout { response, ref_log_probs, .. } = rollout;
            kl::estimate(switches.kl_estimator, &response.log_probs, ref_log_probs, switches.kl_clip as f32)
        });
        let kl = wide(kl);
        let n_values: Vec<usize> = rollouts
            .iter()
            .zip(&after)
            .map(|(rollout, &after)| rollout.response.ids.len() + usize::from(after))
            .collect();
        let values = n_values.iter().zip(&case.values).map(|(&n, row)| narrow(&row[..n])).collect();
        let batch = Experience::of_batch(rollouts, Some(values), config.kl_coef as f32, &config);
        let all: Vec<&Experience> = batch.iter().collect();
        let own = Experience::of_minibatch(&all, &config);
        let learned: Vec<&Experience> = own.as_ref().map_or(all, |own| own.iter().collect());
        let flat = |of: &dyn Fn(&Experience) -> Vec<f32>| wide(learned.iter().flat_map(|experience| of(experience)));
        let returns = |e: &Experience| e.critic.as_ref().map_or_else(Vec::new, |critic| critic.returns.clone());
        let equation = |name, tolerance, ours, theirs| Equation { name, tolerance, ours, theirs };
        let mut equations = vec![
            equation("kl", HOST, kl, theirs.kl.concat()),
            equation("score", HOST, flat(&|e| vec![e.score]), theirs.scores.clone()),
            equation("rewards", HOST, flat(&|e| e.rewards.clone()), theirs.rewards.concat()),
            equation("returns", HOST, flat(&returns), theirs.returns.concat()),
            equation("advantages", HOST, flat(&|e| e.advantages.clone()), theirs.advantages.concat()),
        ];
        let lengths: Vec<usize> = learned.iter().map(|experience| experience.n_tokens()).collect();
        ensure!(
            ragged(&theirs.advantages) == lengths && ragged(&theirs.returns) == n_values,
            "the rows of dialect `{}`, case `{}` have other lengths than ours",
            self.dialect.name(),
            case.name
        );
        let (loss, gradient) = self.policy(case, &lengths, &theirs.advantages, &switches)?;
        equations.push(equation("policy loss", TENSORS, vec![loss], vec![theirs.policy_loss]));
        equations.push(equation("policy gradient", TENSORS, gradient, theirs.policy_gradient.concat()));
        let (loss, gradient) = self.value(case, &n_values, &theirs.returns, &switches)?;
        equations.push(equation("value loss", TENSORS, vec![loss], vec![theirs.value_loss]));
        equations.push(equation("value gradient", TENSORS, gradient, theirs.value_gradient.concat()));
        Ok(equations)
    }

    /// Policy loss and gradient with their advantages.
    fn policy(
        &self,
        case: &Case,
        lengths: &[usize],
        advantages: &Rows,
        switches: &Switches,
    ) -> anyhow::Result<(f64, Vec<f64>)> {
        let (weights, n) = self.weights(switches.loss_mean, lengths);
        let new = self.tensor(&cut(&case.new_log_probs, lengths)).require_grad();
        let loss = clipped_policy_loss(
            new.clone(),
            self.tensor(&cut(&case.log_probs, lengths)),
            self.tensor(&advantages.concat()),
            Clips::of(self.vectors.clip_range, switches),
            &weights,
            n,
        );
        loss_and_gradient(&loss.loss, &loss.loss, &new)
    }

    /// Value loss and its gradient, which has the coefficient, with their returns.
    fn value(
        &self,
        case: &Case,
        n_values: &[usize],
        returns: &Rows,
        switches: &Switches,
    ) -> anyhow::Result<(f64, Vec<f64>)> {
        let (weights, n) = self.weights(switches.loss_mean, n_values);
        let new = self.tensor(&cut(&case.new_values, n_values)).require_grad();
        let loss = weighted_value_loss(
            new.clone(),
            self.tensor(&cut(&case.values, n_values)),
            self.tensor(&returns.concat()),
            switches.value_clip_range as f32,
            &weights,
            n,
        );
        loss_and_gradient(&loss.loss, &loss.priced(switches.value_loss_coef), &new)
    }

    fn weights(&self, loss_mean: LossMean, lengths: &[usize]) -> (Weights, usize) {
        let numbers = lengths.iter().sum();
        let size = MinibatchSize { responses: lengths.len(), numbers, response_length: self.vectors.response_length };
        (Weights::of_responses(loss_mean, lengths, size, self.device), numbers)
    }

    /// The parameter after every step of Adam, ours and theirs, and how theirs were made: `torch.optim.AdamW` was run,
    /// `TensorFlow`'s formula computed.
    fn adam(&self) -> anyhow::Result<(Vec<f64>, Vec<f64>, &'static str)> {
        let adam = &self.vectors.adam;
        let style = self.config().switches().adam_style;
        let device = self.device.clone().inner();
        let tensor = |numbers: &[f64]| Tensor::<1>::from_floats(narrow(numbers).as_slice(), &device);
        let mut param = tensor(&adam.param);
        let mut moments = [Tensor::zeros_like(&param), Tensor::zeros_like(&param)];
        let mut ours = Vec::new();
        for (step, grad) in (1..).zip(&adam.grads) {
            let eps = style.eps_at(adam.eps, adam.betas[1], step);
            let step = AdamWStep {
                lr: adam.lr,
                beta_1: adam.betas[0],
                beta_2: adam.betas[1],
                eps,
                weight_decay: adam.weight_decay,
                step,
                grad_scale: 1.0,
            };
            let [m, v] = moments;
            let moved =
                kernels::adamw_update(Kernels::Fused, vec![AdamWParam { param, grad: tensor(grad), m, v, step }]);
            let [new, m, v] = moved.into_iter().next().context("a parameter comes back")?;
            ours.extend(host(&new)?);
            (param, moments) = (new, [m, v]);
        }
        let (theirs, how) = match style {
            AdamStyle::Torch => (&adam.torch, "run"),
            AdamStyle::Tf => (&adam.tf, "float64 formulas"),
        };
        Ok((ours, theirs.concat(), how))
    }

    /// RLOO and GRPO, whose prompts have several responses.
    fn estimators(&self) -> anyhow::Result<Vec<Comparison>> {
        let Some(case) = self.vectors.cases.first() else { return Ok(Vec::new()) };
        let recorded = &self.vectors.estimators;
        let of = |estimator, equation, theirs: &[f64]| {
            let config = PpoSection { estimator, samples_per_prompt: recorded.samples_per_prompt, ..self.config() };
            // TRL's estimators replace no score; the recorded ones were given `missing_eos_score` where an answer was cut off.
            let config = PpoSection { dialect: Dialect::Kindling, ..config };
            let rollouts = rollouts(case, ScorePosition::LastToken);
            let batch = Experience::of_batch(rollouts, None, config.kl_coef as f32, &config);
            let ours = wide(batch.iter().map(|experience| experience.advantages[0]));
            self.compared("run", &case.name, equation, HOST, &ours, theirs)
        };
        Ok(vec![
            of(Estimator::Rloo, "rloo advantages", &recorded.rloo)?,
            of(Estimator::Grpo, "grpo advantages", &recorded.grpo)?,
        ])
    }

    /// Means over tokens, responses and fixed lengths, with k2 and k3 in the loss.
    fn loss_means(&self) -> anyhow::Result<Vec<Comparison>> {
        let Some(case) = self.vectors.cases.first() else { return Ok(Vec::new()) };
        let recorded = &self.vectors.loss_means;
        let mut all = Vec::new();
        for (name, LossAndGradient { loss: their_loss, gradient }) in &recorded.of {
            let (mean, estimator) =
                name.split_once('/').with_context(|| format!("`{name}` names no mean and estimator"))?;
            let mean: LossMean = serde_json::from_value(mean.into())?;
            let estimator: KlEstimator = serde_json::from_value(estimator.into())?;
            let (weights, n) = self.weights(mean, &case.lengths);
            let new = self.tensor(&cut(&case.new_log_probs, &case.lengths)).require_grad();
            let clips = Clips { ratio: self.vectors.clip_range as f32, log_ratio: 0.0, dual: 0.0 };
            let old = self.tensor(&cut(&case.log_probs, &case.lengths));
            let advantages = self.tensor(&recorded.advantages.concat());
            let loss = clipped_policy_loss(new.clone(), old, advantages, clips, &weights, n).loss;
            let reference = self.tensor(&cut(&case.ref_log_probs, &case.lengths));
            let loss = loss + kl_loss(new.clone(), reference, estimator, 0.0, &weights) * self.vectors.kl_coef;
            let (ours, our_gradient) = loss_and_gradient(&loss, &loss, &new)?;
            all.push(self.compared("run", &case.name, &format!("{name} loss"), TENSORS, &[ours], &[*their_loss])?);
            let equation = format!("{name} gradient");
            all.push(self.compared("run", &case.name, &equation, TENSORS, &our_gradient, &gradient.concat())?);
        }
        Ok(all)
    }

    fn tensor(&self, numbers: &[f64]) -> Tensor<1> {
        Tensor::from_floats(narrow(numbers).as_slice(), self.device)
    }

    fn compared(
        &self,
        how: &str,
        case: &str,
        equation: &str,
        tolerance: f64,
        ours: &[f64],
        theirs: &[f64],
    ) -> anyhow::Result<Comparison> {
        let dialect = self.dialect.name();
        ensure!(
            ours.len() == theirs.len() && !ours.is_empty(),
            "`{equation}` of dialect `{dialect}`, case `{case}` has {} numbers here and {} in the recorded ones",
            ours.len(),
            theirs.len()
        );
        let mut sizes: Vec<f64> = theirs.iter().map(|x| x.abs()).filter(|&x| x > 0.0).collect();
        sizes.sort_by(f64::total_cmp);
        let median = sizes.get(sizes.len() / 2).map_or(1.0, |&median| median.min(1.0));
        let difference = |&(ours, theirs): &(f64, f64)| (ours - theirs).abs() / theirs.abs().max(median);
        let pairs = ours.iter().copied().zip(theirs.iter().copied());
        let worst = pairs.max_by(|a, b| difference(a).total_cmp(&difference(b)));
        let numbers = ours.len();
        let (ours, theirs) = worst.context("there is a number")?;
        let largest_difference = difference(&(ours, theirs));
        Ok(Comparison {
            dialect,
            how: how.to_owned(),
            case: case.to_owned(),
            equation: equation.to_owned(),
            ours,
            theirs,
            largest_difference,
            numbers,
            tolerance,
            passed: largest_difference <= tolerance,
        })
    }
}

/// The responses of a case: whole rows where sampling goes on after the end.
fn rollouts(case: &Case, position: ScorePosition) -> Vec<Rollout> {
    let of = |i: usize| {
        let length = case.lengths[i];
        let n = if position == ScorePosition::FixedEnd { case.log_probs[i].len() } else { length };
        let response = Response {
            ids: vec![0; n],
            log_probs: narrow(&case.log_probs[i][..n]),
            ended: case.ended[i],
            n_after_end: n - length,
            ..Response::default()
        };
        Rollout {
            prompt: EncodedPrompt { ids: vec![0], text: String::new() },
            response,
            ref_log_probs: narrow(&case.ref_log_probs[i][..n]),
            score: case.scores[i] as f32,
            member_scores: Vec::new(),
            gold: None,
        }
    };
    (0..case.lengths.len()).map(of).collect()
}

/// The first `lengths` numbers of every row.
fn cut(rows: &Rows, lengths: &[usize]) -> Vec<f64> {
    rows.iter().zip(lengths).flat_map(|(row, &length)| row[..length].to_vec()).collect()
}

fn narrow(numbers: &[f64]) -> Vec<f32> {
    numbers.iter().map(|&number| number as f32).collect()
}

fn wide(numbers: impl Iterator<Item = f32>) -> Vec<f64> {
    numbers.map(f64::from).collect()
}

fn host(tensor: &Tensor<1>) -> anyhow::Result<Vec<f64>> {
    let numbers = tensor.clone().try_into_vec_as::<f32>().context("failed to read the device")?;
    Ok(wide(numbers.into_iter()))
}

/// A loss, and the gradient of what is minimised.
fn loss_and_gradient(loss: &Tensor<1>, minimised: &Tensor<1>, of: &Tensor<1>) -> anyhow::Result<(f64, Vec<f64>)> {
    let gradient = of.grad(&minimised.backward()).context("the loss has a gradient")?;
    Ok((host(loss)?[0], host(&gradient)?))
}
