//! The configurations of a lab.

/// Small, but nothing is left out: dropout, accumulation, evaluation, samples and saves along the way.
pub(crate) const ALL: [(&str, &str); 5] = [
    ("pretrain", PRETRAIN_CONFIG),
    ("sft", SFT_CONFIG),
    ("reward-model", REWARD_MODEL_CONFIG),
    ("ppo", PPO_CONFIG),
    ("dpo", DPO_CONFIG),
];

const PRETRAIN_CONFIG: &str = r#"seed = 3

[data]
train = ["../data/train.txt"]
val = ["../data/val.txt"]

[tokenizer]
kind = "bpe"
vocab_size = 320

[model]
preset = "gpt2"
d_model = 32
n_layers = 2
n_heads = 2
max_seq_len = 64

[optimizer]
lr = 3e-3
warmup_steps = 2

[train]
steps = 12
batch_size = 4
seq_len = 32
eval_windows = 8
sample_prompts = ["the fox"]
sample_tokens = 8

[run]
log_every = 1
eval_every = 4
save_every = 0
"#;

const SFT_CONFIG: &str = r#"seed = 5

[data]
train = ["../data/sft.train.jsonl"]
val = ["../data/sft.val.jsonl"]

[optimizer]
lr = 1e-3

[train]
steps = 12
batch_size = 4
n_samples = 1
sample_tokens = 8

[run]
log_every = 1
eval_every = 4
save_every = 0
"#;

const REWARD_MODEL_CONFIG: &str = r#"seed = 7

[data]
train = ["../data/pairs.train.jsonl"]
val = ["../data/pairs.val.jsonl"]

[optimizer]
lr = 1e-3

[train]
steps = 12
batch_size = 4

[normalisation]
samples = 8
max_tokens = 8

[run]
log_every = 1
eval_every = 4
save_every = 0
"#;

const PPO_CONFIG: &str = r#"seed = 9

[data]
train = ["../data/prompts.train.jsonl"]
val = ["../data/prompts.val.jsonl"]

[optimizer]
lr = 3e-4

[value_optimizer]
lr = 3e-4

[train]
steps = 8
batch_size = 4
n_samples = 1

[ppo]
response_length = 8
kl_target = 2.0
kl_horizon = 100.0
epochs = 2
minibatches = 2

[run]
log_every = 1
eval_every = 4
save_every = 0
"#;

const DPO_CONFIG: &str = r#"seed = 11

[data]
train = ["../data/pairs.train.jsonl"]
val = ["../data/pairs.val.jsonl"]

[optimizer]
lr = 1e-3

[train]
steps = 12
batch_size = 4

[run]
log_every = 1
eval_every = 4
save_every = 0
"#;
