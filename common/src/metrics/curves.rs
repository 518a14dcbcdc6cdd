//! Which metrics belong into one plot.

use std::collections::BTreeSet;

use super::names;

/// What one plot shows: a metric of training, the same of held-out data, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Curves {
    /// What is measured, such as `loss`.
    pub title: String,
    /// Name of the metric in training.
    pub train: Option<String>,
    /// Name of the metric on held-out data.
    pub held_out: Option<String>,
}

/// What a reader looks at first: title, in training, on held-out data.
const FIRST: [(&str, &str, &str); 16] = [
    ("loss", names::TRAIN_LOSS, names::VAL_LOSS),
    ("accuracy", names::TRAIN_ACCURACY, names::VAL_ACCURACY),
    ("margin", names::TRAIN_MARGIN, names::VAL_MARGIN),
    ("accuracy", names::REWARDS_ACCURACIES, names::VAL_ACCURACY),
    ("margin", names::REWARDS_MARGINS, names::VAL_MARGIN),
    ("reward model's score", names::OBJECTIVE_SCORE, names::VAL_SCORE),
    ("disagreement of the reward models", names::OBJECTIVE_SCORE_STD_MEMBERS, names::VAL_SCORE_STD_MEMBERS),
    ("gold score", names::GOLD_SCORE, names::GOLD_VAL_SCORE),
    ("KL from the reference, nats", names::OBJECTIVE_KL, names::VAL_KL),
    ("entropy, nats", names::POLICY_ENTROPY, ""),
    ("tokens in a response", names::ROLLOUT_RESPONSE_LENGTH, names::VAL_RESPONSE_LENGTH),
    ("responses that end", names::ROLLOUT_EOS_RATE, names::VAL_EOS_RATE),
    ("loss on pretraining text", names::TRAIN_PTX_LOSS, names::VAL_PTX_LOSS),
    ("bits per byte", "", names::VAL_BITS_PER_BYTE),
    ("learning rate", names::TRAIN_LR, ""),
    ("norm of the gradient", names::TRAIN_GRAD_NORM, ""),
];

/// The plots of a run that has the metrics `names`: what a reader looks at first, then each other metric by itself. Each
/// metric is in one of them.
pub fn curves<'a>(names: impl Iterator<Item = &'a str>) -> Vec<Curves> {
    let mut left: BTreeSet<&str> = names.collect();
    // What two plots could have goes to the one whose other curve is there.
    let (paired, single): (Vec<_>, Vec<_>) = FIRST.into_iter().partition(|(_, train, _)| left.contains(train));
    let mut plots = Vec::new();
    for (title, train, held_out) in paired.into_iter().chain(single) {
        let mut take = |name: &str| left.remove(name).then(|| name.to_owned());
        let curves = Curves { title: title.to_owned(), train: take(train), held_out: take(held_out) };
        if curves.train.is_some() || curves.held_out.is_some() {
            plots.push((FIRST.iter().position(|first| *first == (title, train, held_out)), curves));
        }
    }
    plots.sort_by_key(|(place, _)| *place);
    let others =
        left.into_iter().map(|name| Curves { title: name.to_owned(), train: Some(name.to_owned()), held_out: None });
    plots.into_iter().map(|(_, curves)| curves).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_metric_is_in_one_plot_and_the_loss_comes_first() {
        let titles = |names: &[&str]| -> Vec<(String, Option<String>, Option<String>)> {
            let plots = curves(names.iter().copied());
            plots.into_iter().map(|plot| (plot.title, plot.train, plot.held_out)).collect()
        };
        let plot = |title: &str, train: &str, held_out: &str| {
            let name = |name: &str| (!name.is_empty()).then(|| name.to_owned());
            (title.to_owned(), name(train), name(held_out))
        };
        assert_eq!(
            titles(&["train/lr", "val/accuracy", "rewards/accuracies", "val/loss", "train/loss", "rewards/chosen"]),
            [
                plot("loss", "train/loss", "val/loss"),
                plot("accuracy", "rewards/accuracies", "val/accuracy"),
                plot("learning rate", "train/lr", ""),
                plot("rewards/chosen", "rewards/chosen", ""),
            ]
        );
        assert_eq!(titles(&["val/accuracy"]), [plot("accuracy", "", "val/accuracy")]);
        assert_eq!(titles(&[]), []);
    }
}
