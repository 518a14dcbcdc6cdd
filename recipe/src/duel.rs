//! `recipe duel`: how often one checkpoint's answers are better than another's.

use anyhow::{Context, Result};
use common::checkpoint::{self, Checkpoint, Stage};
use common::cli::print_json;
use common::conversation::Message;
use common::data::records::{OnBadRecord, read_prompts};
use common::generate::SamplingConfig;
use common::interrupt::Interrupt;
use common::rng::Streams;
use common::stats::{Interval, win};
use serde_json::json;

use crate::answers::{self, PromptSampler};
use crate::cli::DuelArgs;
use crate::config::BasePrompt;
use crate::gold::GoldScorer;

/// Carries out `recipe duel`: one JSON object on stdout.
///
/// Both checkpoints answer every prompt with the same random numbers; a prompt whose answers the judge cannot score is left out.
///
/// # Errors
/// If a checkpoint or the prompts cannot be used, the models do not share a tokenizer, or the judge understands no prompt.
pub fn duel(args: &DuelArgs) -> Result<()> {
    args.runtime.check_base([&*args.a, &*args.b].into_iter().chain(args.reward_model.as_deref()))?;
    let opening = args.runtime.opening();
    let open = |dir| checkpoint::init_from(dir, opening)?.of_stage(&Stage::LANGUAGE_MODELS);
    let players = [open(&args.a).context("failed to load A")?, open(&args.b).context("failed to load B")?];
    checkpoint::ensure_same_tokenizer(&players[0], &players[1])?;
    let judge = args.reward_model.as_ref().map(|dir| checkpoint::open_reward_model(dir, opening, &players[0]));
    let judge = judge.transpose().context("failed to load the reward model")?;
    let mut prompts = read_prompts(&args.prompts, OnBadRecord::Fail)?;
    if let Some(n) = args.n_prompts {
        prompts.truncate(n.get());
    }
    let messages: Vec<Vec<Message>> = prompts.iter().map(|prompt| prompt.messages.clone()).collect();
    let mut scores = Vec::new();
    for player in &players {
        scores.push(of_player(args, player, judge.as_ref(), &messages)?);
    }
    let pairs: Vec<(f64, f64)> = scores[0].iter().zip(&scores[1]).filter_map(|(&a, &b)| Some((a?, b?))).collect();
    let of = |value: fn(&(f64, f64)) -> f64| pairs.iter().map(value).collect::<Vec<f64>>();
    let no_prompt = if args.gold {
        "the gold score is defined for none of the prompts\nhint: it knows requests for stories of the generated world; judge by \
         `--reward-model` otherwise"
    } else {
        "no answer fits the reward model's context together with its prompt\nhint: lower `--max-tokens`"
    };
    let wins = Interval::of_rate(&of(|&(a, b)| win(a, b))).context(no_prompt)?;
    let [a, b, gain] = [of(|&(a, _)| a), of(|&(_, b)| b), of(|&(a, b)| a - b)].map(|values| Interval::of(&values));
    let (a, b, gain) = (a.context(no_prompt)?, b.context(no_prompt)?, gain.context(no_prompt)?);
    // One prompt says nothing of others; a rate's interval knows that by itself.
    let both = |interval: Interval| (interval.n > 1).then_some([interval.low, interval.high]);
    print_json(&json!({
        "win_rate": wins.mean, "win_rate_interval": [wins.low, wins.high],
        "wins": pairs.iter().filter(|(a, b)| a > b).count(),
        "ties": pairs.iter().filter(|(a, b)| a == b).count(),
        "score_a": a.mean, "score_a_interval": both(a),
        "score_b": b.mean, "score_b_interval": both(b),
        "difference": gain.mean, "difference_interval": both(gain),
        "prompts": pairs.len(),
    }))
}

/// The judge's scores of a player's answers.
fn of_player(
    args: &DuelArgs,
    player: &Checkpoint,
    judge: Option<&Checkpoint>,
    prompts: &[Vec<Message>],
) -> Result<Vec<Option<f64>>> {
    let runtime = args.runtime.open()?;
    let (gpt, tokenizer) = (runtime.gpt(player)?, player.require_tokenizer()?);
    let (form, batch_size) = (BasePrompt::Chat, args.batch_size.get());
    let sampling = SamplingConfig {
        temperature: args.temperature,
        max_tokens: args.max_tokens.get(),
        ..SamplingConfig::default()
    };
    let sampler = PromptSampler { gpt: &gpt, tokenizer, form, sampling, batch_size };
    let name = player.dir().display().to_string();
    let streams = Streams::new(args.seed).of("duel");
    let sampled = sampler.answer(prompts, streams, 0, &name, Interrupt::never())?.unwrap_or_default();
    if let Some(judge) = judge {
        let model = runtime.scalar(judge)?;
        return answers::scores(&model, tokenizer, prompts, &sampled, form, batch_size, Interrupt::never());
    }
    let asked = |messages: &[Message]| messages.last().map_or(String::new(), |message| message.content.clone());
    let gold = prompts
        .iter()
        .zip(&sampled)
        .map(|(prompt, answer)| GoldScorer::World.score(&asked(prompt), answer.text.trim()));
    Ok(gold.collect())
}
