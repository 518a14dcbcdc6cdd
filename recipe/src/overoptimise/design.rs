//! Which reward models are trained, and which policies against them.

use serde::Serialize;

use super::config::OveroptimiseConfig;

/// A reward model, up to its seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Judge {
    /// Number of its parameters, rounded; `None` is the policy's own size.
    pub size: Option<String>,
    /// Preference pairs that it is trained on; `None` is all.
    pub pairs: Option<usize>,
    /// Share of wrong labels among them.
    pub wrong_labels: f64,
}

impl Judge {
    /// The directory of the reward models, less the seed.
    pub(crate) fn name(&self) -> String {
        let pairs = self.pairs.map_or("all".to_owned(), |pairs| pairs.to_string());
        format!("{}-{pairs}-{}", self.size.as_deref().unwrap_or("own"), per_cent(self.wrong_labels))
    }

    /// In words.
    pub(crate) fn title(&self) -> String {
        let pairs = self.pairs.map_or("all pairs".to_owned(), |pairs| format!("{pairs} pairs"));
        let size = self.size.as_ref().map_or(String::new(), |size| format!("{size}, "));
        format!("{size}{pairs}, {} % wrong", per_cent(self.wrong_labels))
    }
}

/// `0.125` as `12.5`.
pub(crate) fn per_cent(share: f64) -> String {
    ((share * 1000.0).round() / 10.0).to_string()
}

/// A policy that is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Policy {
    /// PPO with this KL coefficient.
    Ppo(f64),
    /// RLOO with this KL coefficient.
    Rloo(f64),
    /// DPO with this β.
    Dpo(f64),
}

impl Policy {
    /// The directory of the policies, less judge and seed.
    pub(crate) fn name(self) -> String {
        let (method, value) = match self {
            Self::Ppo(kl_coef) => ("ppo", kl_coef),
            Self::Rloo(kl_coef) => ("rloo", kl_coef),
            Self::Dpo(beta) => ("dpo", beta),
        };
        format!("{method}-{value}")
    }
}

/// What differs among the reward models of one figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    /// The number of pairs.
    Pairs,
    /// The share of wrong labels.
    WrongLabels,
    /// The size.
    Size,
}

/// The experiment.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Design {
    /// The policy's own size, all pairs.
    pub centre: Judge,
    /// Further reward models, each differing from the centre in one thing, smaller numbers first.
    pub others: Vec<(Axis, Judge)>,
    /// Policies against the centre, or from its pairs.
    pub policies: Vec<Policy>,
    /// Policies against each of the others.
    pub against_others: Vec<Policy>,
    /// How many of the sizes are smaller than the policy's own.
    n_smaller: usize,
}

/// A size of reward models besides the policy's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Its number of parameters, rounded: `140k`.
    pub name: String,
    /// What `pretrain.toml` is overridden by.
    pub overrides: Vec<String>,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// From small to large.
    pub all: Vec<Size>,
    /// How many of them are smaller than the policy's own.
    pub n_smaller: usize,
}

impl Sizes {
    /// In order of their numbers of parameters, which stand beside their overrides.
    pub(crate) fn new(mut sizes: Vec<(usize, Vec<String>)>, own: usize) -> Self {
        sizes.sort();
        let n_smaller = sizes.iter().filter(|(n, _)| *n < own).count();
        Self { all: sizes.into_iter().map(|(n, overrides)| Size { name: rounded(n), overrides }).collect(), n_smaller }
    }
}

/// A number of parameters as `950`, `140k` or `2.7M`.
fn rounded(n: usize) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{}k", (n + 500) / 1_000),
        _ => format!("{:.1}M", n as f64 / 1e6),
    }
}

impl Design {
    /// That of `config`, where `n_pairs` were collected.
    pub(crate) fn new(config: &OveroptimiseConfig, sizes: &Sizes, n_pairs: usize, quick: bool) -> Self {
        let centre = Judge { size: None, pairs: None, wrong_labels: config.wrong_labels };
        let mut pairs: Vec<usize> = config.pairs.iter().copied().filter(|&pairs| pairs < n_pairs).collect();
        pairs.sort_unstable();
        pairs.dedup();
        let mut wrong = config.other_wrong_labels.clone();
        wrong.retain(|share| *share != config.wrong_labels);
        wrong.sort_by(f64::total_cmp);
        wrong.dedup();
        let of_pairs = pairs.into_iter().map(|pairs| (Axis::Pairs, Judge { pairs: Some(pairs), ..centre.clone() }));
        let of_wrong =
            wrong.into_iter().map(|wrong_labels| (Axis::WrongLabels, Judge { wrong_labels, ..centre.clone() }));
        let of_sizes =
            sizes.all.iter().map(|size| (Axis::Size, Judge { size: Some(size.name.clone()), ..centre.clone() }));
        let others = of_pairs.chain(of_wrong).chain(of_sizes).collect();
        let ppo = config.kl_coefs.iter().map(|&kl_coef| Policy::Ppo(kl_coef));
        let rloo = config.kl_coefs.first().filter(|_| config.rloo_samples > 0).map(|&kl_coef| Policy::Rloo(kl_coef));
        let dpo = config.betas.iter().map(|&beta| Policy::Dpo(beta));
        let against_others = if quick { Vec::new() } else { ppo.clone().take(1).collect() };
        let policies = ppo.chain(rloo).chain(dpo).collect();
        Self { centre, others, policies, against_others, n_smaller: sizes.n_smaller }
    }

    /// Every reward model, the centre first.
    pub(crate) fn judges(&self) -> impl Iterator<Item = &Judge> {
        std::iter::once(&self.centre).chain(self.others.iter().map(|(_, judge)| judge))
    }

    /// Each reward model with the policies against it.
    pub(crate) fn policies(&self) -> impl Iterator<Item = (&Judge, Policy)> {
        let others =
            self.others.iter().flat_map(|(_, judge)| self.against_others.iter().map(move |&policy| (judge, policy)));
        self.policies.iter().map(|&policy| (&self.centre, policy)).chain(others)
    }

    /// The reward models of a figure: those that differ along `axis`, and the centre at its place among them.
    pub(crate) fn along(&self, axis: Axis) -> Vec<&Judge> {
        let mut judges: Vec<&Judge> = self.others.iter().filter(|(a, _)| *a == axis).map(|(_, judge)| judge).collect();
        if judges.is_empty() {
            return judges;
        }
        let place = match axis {
            Axis::WrongLabels => judges.iter().filter(|judge| judge.wrong_labels < self.centre.wrong_labels).count(),
            Axis::Pairs => judges.len(),
            Axis::Size => self.n_smaller,
        };
        judges.insert(place, &self.centre);
        judges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reward_model_differs_from_the_centre_in_one_thing() {
        let sizes = Sizes::new(vec![(2_720_000, vec![]), (140_499, vec![])], 1_000_000);
        let config = OveroptimiseConfig {
            pairs: vec![1000, 250, 9000],
            other_wrong_labels: vec![0.25, 0.0, 0.1],
            ..OveroptimiseConfig::default()
        };
        let design = Design::new(&config, &sizes, 5000, false);
        let names = |judges: Vec<&Judge>| judges.into_iter().map(Judge::name).collect::<Vec<_>>();
        assert_eq!(names(design.along(Axis::Pairs)), ["own-250-10", "own-1000-10", "own-all-10"]);
        assert_eq!(names(design.along(Axis::WrongLabels)), ["own-all-0", "own-all-10", "own-all-25"]);
        assert_eq!(names(design.along(Axis::Size)), ["140k-all-10", "own-all-10", "2.7M-all-10"]);
        let policies: Vec<String> =
            design.policies().map(|(judge, policy)| format!("{} {}", judge.name(), policy.name())).collect();
        assert_eq!(policies.len(), 3 + 1 + 3 + 6);
        assert!(
            policies.contains(&"own-all-10 rloo-0".to_owned()) && policies.contains(&"140k-all-10 ppo-0".to_owned())
        );
        assert_eq!(Design::new(&config.quick(), &Sizes::default(), 5000, true).policies().count(), 3);
    }
}
