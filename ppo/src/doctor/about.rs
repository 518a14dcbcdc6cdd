//! Every check before a run: its name, whose fault it finds, its limit, and where that comes from.

use std::fmt;

use serde::Serialize;

/// The stage to mend where a check does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blame {
    /// Prompts or preference pairs.
    Data,
    /// The tokenizer or its chat template.
    Tokenizer,
    /// The SFT model.
    Sft,
    /// The reward model.
    RewardModel,
    /// PPO itself: its configuration, its models together, its numbers.
    Ppo,
}

impl Blame {
    /// Name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Tokenizer => "tokenizer",
            Self::Sft => "sft",
            Self::RewardModel => "reward-model",
            Self::Ppo => "ppo",
        }
    }
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Facts about a check that no run changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    /// Its name.
    pub id: &'static str,
    /// The stage to mend where it does not pass.
    pub stage: Blame,
    /// The number and its limit, for the documentation.
    pub limit: &'static str,
    /// What a wrong number means.
    pub meaning: &'static str,
    /// What to do about it.
    pub hint: &'static str,
    /// Where the check and its limit come from.
    pub source: &'static str,
}

/// Declares each check as a constant, and `ALL` of them in order.
macro_rules! checks {
    ($($name:ident = $id:literal, $stage:ident, $limit:literal, $meaning:literal, $hint:literal, $source:literal;)+) => {
        $(pub(crate) const $name: $crate::doctor::About = $crate::doctor::About {
            id: $id,
            stage: $crate::doctor::Blame::$stage,
            limit: $limit,
            meaning: $meaning,
            hint: $hint,
            source: $source,
        };)+

        /// Every check, in the order of the reports.
        pub const ALL: &[$crate::doctor::About] = &[$($name),+];
    };
}
pub(crate) use checks;

checks! {
    POLICY_LOADS = "policy-loads", Sft,
        "none: it loads",
        "The policy cannot be used: its files are missing or damaged, hold numbers that are not finite, or come from another stage.",
        "Pass the directory that `sft train` wrote, and train it again if it is damaged.",
        "RLHF starts PPO from the SFT model: Ouyang et al., arXiv:2203.02155, section 3.1";
    REWARD_MODEL_LOADS = "reward-model-loads", RewardModel,
        "none: it loads",
        "The reward model cannot be used: its files are missing or damaged, hold numbers that are not finite, or come from another stage.",
        "Pass the directory that `reward-model train` wrote, and train it again if it is damaged.",
        "RLHF scores answers by a reward model: Ouyang et al., arXiv:2203.02155, section 3.5";
    SAME_TOKENIZER = "same-tokenizer", Tokenizer,
        "none: vocabulary, rules and chat template are the same",
        "The reward model reads the policy's token ids as other text than the policy meant.",
        "Train both from one base, or train the reward model again from this SFT model.",
        "Huang et al., arXiv:2403.17031: policy, reward model and value model share one tokenizer";
    ROUND_TRIP = "tokenizer-round-trip", Tokenizer,
        "share of texts that decode to themselves: 1; below 1 it warns, and it fails where letters are lost in more than half",
        "Text is not what comes back from its tokens, so the model neither reads nor writes it as people do.",
        "Learn the tokenizer from text like this, or take a byte-level one (`kind = \"bpe\"` or `\"byte\"`).",
        "Byte-level BPE loses nothing: Radford et al., \"Language Models are Unsupervised Multitask Learners\", 2019, section 2.2";
    TEMPLATE = "template-round-trip", Tokenizer,
        "share of conversations whose prompt and answer are encoded alike in SFT and in PPO, the end trained on: 1",
        "PPO's prompts do not end where SFT's answers begin, or SFT never trains on the token that ends an answer.",
        "Mend the chat template: what it adds to open an answer must be what stands before the answer in a whole conversation.",
        "transformers, \"Chat templates\", on `add_generation_prompt`: https://huggingface.co/docs/transformers/chat_templating";
    PAD_IS_NOT_END = "pad-is-not-end", Tokenizer,
        "none: the padding token ends no answer, in the tokenizers as they are read, and in config.json and tokenizer_config.json of the reward model; in those of the policy it warns",
        "Classes that look for the first padding token to find an answer's end read the score before the answer ends.",
        "Give the tokenizer a padding token of its own and train the reward model again with it.",
        "TRL issues 2758 and 5303; Huang et al., arXiv:2403.17031, on a padding token other than the end";
    PROMPTS_FIT = "prompts-fit", Data,
        "tokens of the longest prompt and `ppo.response_length`: the context of policy and reward model",
        "Some prompts leave no room for an answer: training stops at them, or skips them.",
        "Lower `ppo.response_length`, shorten these prompts, or set `data.on_too_long` to \"skip\".",
        "Huang et al., arXiv:2403.17031: queries and responses have lengths that fit the context together";
    MEMORY = "memory", Ppo,
        "GiB that the run needs: what is available",
        "The run would be ended by the system, perhaps hours in.",
        "Lower `train.micro_batch_size`, set `train.checkpoint_activations`, or train adapters (`[lora]`).",
        "The estimate that `ppo train` and `recipe plan` make";
    MODELS_LOAD = "models-load", Ppo,
        "none: policy, reference, reward model and value model load together",
        "The models of the run cannot be made from the two checkpoints.",
        "Read the reason: it names the checkpoint and the setting that do not fit.",
        "Huang et al., arXiv:2403.17031: the value model begins as the reward model";
    HELD_OUT_LOSS = "held-out-loss", Sft,
        "loss of preferred held-out answers, as a share of their loss by the token frequencies of the other answers: at most 0.9 passes, above 0.95 fails",
        "The policy knows little more of the answers that people prefer than which tokens are frequent: it was not trained on answers like these, or its training went wrong.",
        "Look at the held-out loss of `sft train`, train again with a lower `optimizer.lr`, or on answers like those of the pairs.",
        "Shannon, \"Prediction and Entropy of Printed English\", 1951: the entropy of single symbols bounds that of text from above; frequencies smoothed after Witten and Bell, IEEE Transactions on Information Theory 37 (4), 1991; the limits are ours";
    TEMPERATURE = "temperature", Ppo,
        "`ppo.temperature`: 0.5 to 1.5, or it warns; 0.1 to 2, or it fails",
        "Answers are drawn from another distribution than the SFT model learned: far below 1 there is little to explore, far above it they fall to pieces, and either shows in every number that is measured on them.",
        "Set `ppo.temperature` to 1 or a little below, and `normalisation.temperature` of the reward model to the same.",
        "Huang et al., arXiv:2403.17031: 0.7; Ziegler et al., arXiv:1909.08593: 0.7 and 1; the limits are ours";
    ANSWERS_END = "answers-end", Sft,
        "share of sampled answers that end: at least 0.8 passes; it fails where the 95 % interval lies below 0.5",
        "Answers that are cut off count `ppo.missing_eos_score`, whatever they say, so the reward model is hardly heard.",
        "Train SFT longer on answers with their end, or allow longer answers (`ppo.response_length`).",
        "Huang et al., arXiv:2403.17031, on the EOS trick: an answer without end scores −1; the limits are ours";
    ANSWERS_DIFFER = "answers-differ", Sft,
        "different answers among 16 to one prompt, on average: at least 4 pass, fewer than 2 fail",
        "The policy says the same again and again, so there is nothing to explore: SFT learned its answers by heart, or `ppo.temperature` is too low.",
        "Train SFT for fewer epochs, or on more different answers, unless `temperature` says more.",
        "Huang et al., arXiv:2403.17031: answers are sampled at temperature 0.7; the limits are ours";
    KL_ZERO = "kl-of-itself", Ppo,
        "mean k1 per token between the policy and its own reference, in nats: `ppo.ratio_tolerance`",
        "The policy diverges from itself: its reference is another model, or the two log-probabilities differ in temperature, positions or padding.",
        "Name one SFT checkpoint for both; if it is one, try `--kernels plain` and report the difference.",
        "TRL issues 235, 925, 204 and 1857: KL that is not zero at the start, or negative, is a mismatch of sampling and log-probabilities";
    CACHED = "cached-is-uncached", Ppo,
        "largest difference of a log-probability with and without the key/value cache, in nats: `ppo.ratio_tolerance`",
        "Sampling and training are not the same function: answers are drawn from another distribution than is learned from.",
        "Try `--kernels plain`; with adapters or another `--precision`, raise `ppo.ratio_tolerance` only if the difference is rounding.",
        "trlx issue 107, TRL issue 454: positions or masks that differ with the cache";
    RATIO = "ratio-is-one", Ppo,
        "largest distance of a probability ratio from 1 before the first update: `ppo.ratio_tolerance`",
        "PPO would begin to optimise a ratio of two different models: dropout is on, or a temperature, position or mask differs.",
        "Use one `ppo.temperature` everywhere and no dropout in PPO; `ppo train` stops at the same limit.",
        "Huang et al., \"The 37 Implementation Details of Proximal Policy Optimization\", 2022, on debugging: the ratio is 1 in the first minibatch";
    VALUES_FINITE = "values-finite", Ppo,
        "share of response tokens whose value is finite: 1",
        "The value model gives no number for some states, so there are no advantages.",
        "Train the reward model again, from which the value model begins, or set `ppo.value_init` to \"zero-head\".",
        "Huang et al., arXiv:2403.17031: the value model begins as the reward model, head included";
    SCORE_SCALE = "score-scale", RewardModel,
        "deviation of the scores of the policy's own answers: 0.5 to 2, and their mean within ±0.5, or it warns; deviation 0.1 to 10 and mean within ±5, or it fails (the number shown is the one that is out of bounds)",
        "`ppo.kl_coef`, `ppo.missing_eos_score` and the value clip are in units of a score with mean 0 and deviation 1.",
        "Let `reward-model train` finish with `normalisation.samples` above 0, from this SFT model.",
        "Ziegler et al., arXiv:1909.08593, section 2: mean 0 and variance 1 on samples of the initial policy; the limits are ours";
    MISSING_EOS = "missing-eos-score", Ppo,
        "mean score of ended answers: it passes where the 95 % interval lies above `ppo.missing_eos_score`, fails where it lies below",
        "Being cut off pays better than ending, so PPO learns never to end.",
        "Lower `ppo.missing_eos_score` below the scores of ended answers, or normalise the reward model.",
        "Huang et al., arXiv:2403.17031, on the EOS trick: −1 is below the mean of normalised scores";
    HEADROOM = "headroom", Sft,
        "gain of the best of 16 answers to a prompt over their mean, in deviations of all scores: at least 0.3 passes, below 0.15 fails; 1.77 for independent normal scores",
        "Answers to one prompt hardly differ in score, so PPO has nothing to prefer.",
        "Raise `ppo.temperature`, train SFT less, or look for prompts that allow more than one answer.",
        "Best-of-n: Nakano et al., arXiv:2112.09332; Gao et al., arXiv:2210.10760; the limits are ours";
    ORDER_EMPTY = "order-empty", RewardModel,
        "share of answers that score above an empty one: it passes where the 95 % interval lies above 0.5, fails where it lies below",
        "Saying nothing scores higher than an answer, so PPO learns to end at once.",
        "Add pairs with an empty rejected answer, or train the reward model longer.",
        "Directional expectation tests: Ribeiro et al., arXiv:2005.04118";
    ORDER_CUT = "order-cut", RewardModel,
        "share of answers that score above their first half: it passes where the 95 % interval lies above 0.5, fails where it lies below",
        "Half an answer scores higher than the whole, so PPO learns to break off.",
        "Add pairs with broken-off rejected answers, or train the reward model longer.",
        "Directional expectation tests: Ribeiro et al., arXiv:2005.04118";
    ORDER_REPEATED = "order-repeated", RewardModel,
        "share of answers that score above the same text said twice: it passes where the 95 % interval lies above 0.5, fails where it lies below",
        "Saying everything twice scores higher, so PPO learns to repeat.",
        "Add pairs with repetitive rejected answers, or train the reward model longer.",
        "Directional expectation tests: Ribeiro et al., arXiv:2005.04118";
    ORDER_OFF_PROMPT = "order-off-prompt", RewardModel,
        "share of answers that score above an answer to another prompt: it passes where the 95 % interval lies above 0.5, fails where it lies below",
        "The reward model does not look at the prompt, so PPO learns one answer to everything.",
        "Add pairs whose rejected answer belongs to another prompt, or train the reward model longer.",
        "Directional expectation tests: Ribeiro et al., arXiv:2005.04118";
    ACCURACY = "held-out-accuracy", RewardModel,
        "share of held-out pairs in the labelled order: it passes where the 95 % interval lies above 0.5, fails where it lies below, or holds 0.5 although there are 100 pairs or more",
        "At 0.5 the scores know nothing of the preferences; clearly below it, the labels are swapped.",
        "Train the reward model longer or on more pairs; below 0.5, look whether `chosen` and `rejected` are exchanged.",
        "Ouyang et al., arXiv:2203.02155, section 4.1: 0.724 for labellers it learned from, 0.696 for others, where 0.5 is chance";
    LONGER_WINS = "beats-longer-wins", RewardModel,
        "accuracy less that of the better of \"longer wins\" and \"shorter wins\", pair by pair: it passes where the 95 % interval lies above 0, fails where it lies below",
        "Counting tokens orders the pairs as well as the reward model does, so PPO may only learn a length.",
        "Balance the lengths of chosen and rejected answers, or train on more pairs.",
        "Singhal et al., arXiv:2310.03716";
    BAG_OF_WORDS = "beats-bag-of-words", RewardModel,
        "accuracy less that of a logistic regression on word counts of the same training pairs, pair by pair: it passes where the 95 % interval lies above 0, fails where it lies below",
        "Counting words orders the pairs as well as the reward model does, so PPO may only learn words.",
        "Train the reward model longer, on more pairs, or from a larger model.",
        "Gururangan et al., arXiv:1803.02324: labels that a model of words alone predicts are artifacts of the data";
    CALIBRATION = "calibration", RewardModel,
        "mean distance between σ(scale · difference) and accuracy over bins of equal size, after the best single scale: at most 0.1",
        "Confident differences are wrong more often than they say, so large rewards are not worth more than small ones.",
        "Train fewer epochs, or on more pairs; look at the pairs with the largest wrong difference.",
        "Guo et al., arXiv:1706.04599; Huang et al., arXiv:2403.17031, on calibration of the reward model; the limit is ours";
    BY_LENGTH = "accuracy-by-length", RewardModel,
        "accuracy where the shorter answer is preferred, or where the longer one is, whichever is lower: it fails where the 95 % interval lies below 0.5",
        "The scores follow length against the labels, so PPO changes the length and not the content.",
        "Balance the lengths of chosen and rejected answers.",
        "Singhal et al., arXiv:2310.03716";
    LEAKS = "pairs-leak", Data,
        "share of held-out pairs that are also training pairs, in either order: above 0 it warns, above 0.05 it fails",
        "The held-out accuracy measures memory, not what PPO's new answers will get.",
        "Split by prompt before anything else, and train the reward model again.",
        "Lee et al., arXiv:2107.06499: over 4 % of common validation sets overlap with training; the limits are ours";
    DUPLICATES = "pairs-duplicates", Data,
        "share of training pairs that repeat an earlier one, or of held-out pairs, whichever is higher: above 0.05 it warns, above 0.5 it fails",
        "Repeated pairs count several times: they are learned by heart, and held-out ones make an accuracy look surer than it is.",
        "Leave out repeated pairs.",
        "Lee et al., arXiv:2107.06499; the limits are ours";
    TIES = "pairs-ties", Data,
        "share of training pairs whose answers differ in case, punctuation or space alone, or whose margin is 0: above 0.05 it warns, above 0.5 it fails",
        "A label between equal answers is noise.",
        "Leave out pairs whose answers are equal.",
        "Stiennon et al., arXiv:2009.01325, section 3.4: the loss takes one answer to be better; the limits are ours";
    CONTRADICTIONS = "pairs-contradictions", Data,
        "share of training pairs whose reverse is among them: above 0.02 it warns, above 0.2 it fails",
        "The same two answers are preferred both ways, which no reward model can follow.",
        "Keep the label of the majority, or leave such pairs out.",
        "Ouyang et al., arXiv:2203.02155, section 3.4: labellers agree in 73 of 100 pairs; the limits are ours";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Write as _;
    use std::path::Path;

    use super::*;

    /// The rows of a table of checks.
    fn table(checks: &[About]) -> String {
        let mut table = String::from(
            "| check | stage | number and limit | what a wrong number means, and what to do | source |\n\
             | --- | --- | --- | --- | --- |\n",
        );
        for About { id, stage, limit, meaning, hint, source } in checks {
            let _ = writeln!(table, "| `{id}` | {stage} | {limit} | {meaning} {hint} | {source} |");
        }
        table
    }

    #[test]
    fn the_page_of_checks_lists_every_one() {
        let page = include_str!("page.md").replace("{before}\n", &table(ALL));
        let page = page.replace("{during}\n", &table(crate::doctor::ALARMS));
        common::testing::assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/doctor.md"), &page);
    }

    #[test]
    fn names_are_unique_and_every_sentence_ends() {
        let all = [ALL, crate::doctor::ALARMS].concat();
        let ids: BTreeSet<&str> = all.iter().map(|about| about.id).collect();
        assert_eq!(ids.len(), all.len());
        for about in all {
            assert!(about.meaning.ends_with('.') && about.hint.ends_with('.'), "{}", about.id);
        }
    }
}
