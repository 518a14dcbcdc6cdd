//! The table of parameters: one row each, and the only place that knows what a parameter's path means.
//!
//! Paths and shapes, initial values, decay groups, adapters, the growth of a vocabulary and the layouts of other libraries
//! are all read from here. A switch of the architecture that brings a parameter brings a row.

use std::ops::Range;

use crate::{GptConfig, NormKind, NormPlacement, Positions};
use base::rng::Streams;

/// Role of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A vector per token, the output layer too where tied.
    TokenEmbedding,
    /// A vector per position.
    PositionEmbedding,
    /// The output layer where it has weights of its own: a vector per token.
    OutputHead,
    /// From a hidden state to one number.
    ScoreHead,
    /// The matrix `[d_in, d_out]` of a linear layer.
    Linear {
        /// Square matrices that lie side by side in it: 3 for queries, keys and values.
        packed: usize,
        /// Whether it projects into the residual stream.
        residual: bool,
    },
    /// The offset of a linear layer.
    Bias,
    /// The factor of a norm.
    NormGain,
    /// The offset of a norm.
    NormOffset,
    /// One of the two thin matrices of an adapter; see [`Adapters`](crate::Adapters), which has their shapes.
    Adapter,
}

impl Role {
    /// Whether weight decay acts on it: on matrices, not on biases, norms and embeddings (a tied output layer with them).
    pub const fn decays(self) -> bool {
        matches!(self, Self::Linear { .. } | Self::OutputHead | Self::ScoreHead | Self::Adapter)
    }

    /// Whether a low-rank adapter may stand beside it.
    pub const fn takes_adapter(self) -> bool {
        matches!(self, Self::Linear { .. })
    }

    /// Whether it lies in bf16 where the trunk does: matrices do, and not vectors, tables of positions and heads of scores,
    /// which are small.
    pub const fn may_be_narrow(self) -> bool {
        matches!(self, Self::TokenEmbedding | Self::OutputHead | Self::Linear { .. })
    }

    /// Whether it is trained where the trunk is frozen: the adapters, and a reward model's head, which no base has.
    pub const fn trains_beside_trunk(self) -> bool {
        matches!(self, Self::Adapter | Self::ScoreHead)
    }

    /// Whether it has a row per token, and so grows with the vocabulary.
    pub const fn is_per_token(self) -> bool {
        matches!(self, Self::TokenEmbedding | Self::OutputHead)
    }
}

/// The distribution of a parameter's initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// One value throughout.
    Constant(f32),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in `[−bound, bound)`.
    Uniform {
        /// The largest magnitude.
        bound: f64,
    },
}

/// The output that a model's hidden states are turned into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Logits over the vocabulary: a [`Gpt`](crate::Gpt).
    Logits,
    /// One number a position: a [`ScalarGpt`](crate::ScalarGpt).
    Score,
}

/// One parameter of one model: a row of the table with its sizes filled in.
#[derive(Debug, Clone, Copy)]
pub struct Parameter<'a> {
    row: &'static Row,
    /// The block's index, for a parameter of a block.
    block: Option<usize>,
    config: &'a GptConfig,
    output: Output,
}

/// Every parameter of the model that `config` and `output` describe, layer by layer and no faster than asked for.
pub fn parameters(config: &GptConfig, output: Output) -> impl Iterator<Item = Parameter<'_>> {
    let with = move |block| move |row| Parameter { row, block, config, output };
    let head = match output {
        Output::Logits => &HEADS[..1],
        Output::Score => &HEADS[1..],
    };
    let blocks = (0..config.n_layers).flat_map(move |i| BLOCK.iter().map(with(Some(i))));
    let all = TRUNK.iter().map(with(None)).chain(blocks).chain(head.iter().map(with(None)));
    all.filter(|parameter| (parameter.row.when)(config))
}

/// The output layer of the scalar model that `config` describes.
pub fn score_head(config: &GptConfig) -> Parameter<'_> {
    Parameter { row: &HEADS[1], block: None, config, output: Output::Score }
}

/// The role of the parameter at `path` in any model; `None` if no model has it.
pub fn role_of(path: &str) -> Option<Role> {
    let path = path.strip_prefix(SCALAR_TRUNK).unwrap_or(path);
    if let Some(linear) = ADAPTER_SUFFIXES.iter().find_map(|suffix| path.strip_suffix(suffix)) {
        return role_of(&format!("{linear}.weight")).filter(|role| role.takes_adapter()).map(|_| Role::Adapter);
    }
    let find = |rows: &[Row], path: &str| rows.iter().find(|row| row.path == path).map(|row| row.role);
    match path.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        Some((block, path)) => block.parse::<usize>().ok().and_then(|_| find(&BLOCK, path)),
        None => find(&TRUNK, path).or_else(|| find(&HEADS, path)),
    }
}

/// The path of the first parameter of this role, if the model has one.
pub fn path_of(config: &GptConfig, output: Output, role: Role) -> Option<String> {
    parameters(config, output).find(|parameter| parameter.role() == role).map(|parameter| parameter.path())
}

impl Parameter<'_> {
    /// The path in the module, such as `blocks.0.mlp.up.weight`.
    pub fn path(&self) -> String {
        let trunk = if self.output == Output::Score && !self.is_head() { SCALAR_TRUNK } else { "" };
        match self.block {
            Some(i) => format!("{trunk}blocks.{i}.{}", self.row.path),
            None => format!("{trunk}{}", self.row.path),
        }
    }

    /// The paths of the two matrices of an adapter beside it, from `d_in` to the rank and from there to `d_out`.
    ///
    /// # Panics
    /// If it takes none, see [`Role::takes_adapter`].
    pub fn adapter_paths(&self) -> [String; 2] {
        assert!(self.role().takes_adapter(), "`{}` takes no adapter", self.path());
        let path = self.path();
        let linear = path.strip_suffix(".weight").expect("a linear layer's matrix is its weight");
        ADAPTER_SUFFIXES.map(|suffix| format!("{linear}{suffix}"))
    }

    /// Size of each axis.
    pub fn shape(&self) -> Vec<usize> {
        self.row.shape.iter().map(|size| size.of(self.config)).collect()
    }

    /// Its role.
    pub const fn role(&self) -> Role {
        self.row.role
    }

    /// The index of its block, if it is in one.
    pub const fn block(&self) -> Option<usize> {
        self.block
    }

    /// Whether it belongs to the output and not to the trunk.
    pub const fn is_head(&self) -> bool {
        matches!(self.row.role, Role::OutputHead | Role::ScoreHead)
    }

    /// The distribution of its initial values; see [`Gpt::new`](crate::Gpt::new) and
    /// [`ScalarGpt::new`](crate::ScalarGpt::new) for the sources.
    pub fn init(&self) -> Init {
        let GptConfig { d_model, n_layers, norm, tie_embeddings, .. } = *self.config;
        match (self.role(), norm) {
            (Role::NormGain, _) => Init::Constant(1.0),
            (Role::NormOffset | Role::Bias, _) => Init::Constant(0.0),
            (Role::Adapter, _) => unreachable!("an adapter is no row of the table"),
            (Role::ScoreHead, _) => Init::Normal { std: 1.0 / ((d_model + 1) as f64).sqrt() },
            (Role::Linear { residual: true, .. }, NormPlacement::Pre) => {
                Init::Normal { std: 0.02 / ((2 * n_layers) as f64).sqrt() }
            }
            (_, NormPlacement::Pre) => Init::Normal { std: 0.02 },
            (Role::Linear { packed, .. }, NormPlacement::Post) => {
                let [d_in, d_out] = [0, 1].map(|axis| self.row.shape[axis].of(self.config));
                // Packed matrices are initialised each as one of its own.
                Init::Uniform { bound: (6.0 / (d_in + d_out / packed) as f64).sqrt() }
            }
            (role, NormPlacement::Post) => {
                let unit_logits = 1.0 / (d_model as f64).sqrt();
                Init::Normal { std: if tie_embeddings || role == Role::OutputHead { unit_logits } else { 1.0 } }
            }
        }
    }

    /// Its initial values, drawn from the stream that bears its path.
    pub fn initial_values(&self, streams: &Streams) -> Vec<f32> {
        let n = self.shape().iter().product();
        let mut rng = streams.get(&format!("init/{}", self.path()), 0);
        match self.init() {
            Init::Constant(value) => vec![value; n],
            Init::Normal { std } => (0..n).map(|_| (std * rng.normal()) as f32).collect(),
            Init::Uniform { bound } => (0..n).map(|_| (bound * (2.0 * rng.uniform() - 1.0)) as f32).collect(),
        }
    }

    /// Where GPT-2's class keeps it.
    pub const fn gpt2(&self) -> Foreign {
        self.row.gpt2
    }

    /// Where GPT-1's class keeps it.
    pub const fn openai_gpt(&self) -> Foreign {
        self.row.openai_gpt
    }

    /// Where the classes of Llama, Mistral and Qwen keep it.
    pub const fn llama(&self) -> Foreign {
        self.row.llama
    }

    /// Where GPT-NeoX's class keeps it.
    pub const fn gpt_neox(&self) -> Foreign {
        self.row.gpt_neox
    }

    /// The tensors of another library that hold the parameter, and which of its output channels lie where.
    ///
    /// # Panics
    /// If `foreign` divides the parameter into parts that its sizes do not allow.
    pub fn spans(&self, foreign: Foreign) -> Vec<Span> {
        let shape = self.shape();
        let d_out = shape[shape.len() - 1];
        let span = |name: &'static str, width: usize, ours: Range<usize>, theirs: Range<usize>| {
            let mut shape = shape.clone();
            shape[self.row.shape.len() - 1] = width;
            if foreign.transposed {
                shape.reverse();
            }
            Span { name, shape, transposed: foreign.transposed, ours, theirs }
        };
        match foreign.order {
            Order::InTurn => {
                let widths = match (foreign.names.len(), self.row.shape.last()) {
                    (QKV, Some(Size::Qkv)) => self.config.qkv_widths().to_vec(),
                    (n, _) => vec![exact(d_out, n); n],
                };
                let mut start = 0;
                let next = |(name, width): (&&'static str, usize)| {
                    let ours = start..start + width;
                    start += width;
                    span(name, width, ours, 0..width)
                };
                foreign.names.iter().zip(widths).map(next).collect()
            }
            Order::HeadByHead => {
                let width = exact(d_out, QKV * self.config.n_heads);
                let at = |i: usize| i * width..(i + 1) * width;
                let n_heads = self.config.n_heads;
                let pairs =
                    (0..n_heads).flat_map(|head| (0..QKV).map(move |part| (part * n_heads + head, head * QKV + part)));
                pairs.map(|(ours, theirs)| span(foreign.names[0], d_out, at(ours), at(theirs))).collect()
            }
            Order::Shared { nth, of } => {
                vec![span(foreign.names[0], of * d_out, 0..d_out, nth * d_out..(nth + 1) * d_out)]
            }
        }
    }
}

fn exact(total: usize, parts: usize) -> usize {
    assert!(total.is_multiple_of(parts), "{total} channels cannot be divided by {parts}");
    total / parts
}

/// Where another library keeps a parameter: the names of its tensors within the block or the trunk, and their layout.
/// Several tensors hold equal shares, or the queries, the keys and the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign {
    /// The tensors' names; several hold equal shares of the output channels.
    pub names: &'static [&'static str],
    /// In which order the output channels lie.
    pub order: Order,
    /// Whether a matrix is `[d_out, d_in]`, as `torch.nn.Linear` has it; ours and those of GPT-2's `Conv1D` are not.
    pub transposed: bool,
}

/// The order of a parameter's output channels in the tensors of another library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As ours: the first share in the first tensor, and so on.
    InTurn,
    /// Queries, keys and values of the first head, then of the second, in one tensor (GPT-NeoX).
    HeadByHead,
    /// Behind `nth` other parameters of the same size in a tensor that holds `of` of them (gate and up in one).
    Shared {
        /// How many come before.
        nth: usize,
        /// How many there are.
        of: usize,
    },
}

impl Foreign {
    /// One tensor of the same shape.
    pub const fn same(name: &'static [&'static str; 1]) -> Self {
        Self { names: name, order: Order::InTurn, transposed: false }
    }
}

/// A range of a parameter's output channels and its place in a tensor of another library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The tensor's name within its block or the trunk.
    pub name: &'static str,
    /// The shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Whether the tensor is `[d_out, d_in]`.
    pub transposed: bool,
    /// Along the last axis of the parameter.
    pub ours: Range<usize>,
    /// Along the axis of output channels of the tensor.
    pub theirs: Range<usize>,
}

impl Span {
    /// Calls `pair` with the index of each number in our parameter, which has `shape`, and in their tensor.
    pub fn for_each_pair(&self, shape: &[usize], mut pair: impl FnMut(usize, usize)) {
        let d_out = shape[shape.len() - 1];
        let d_in = shape.iter().product::<usize>() / d_out;
        let width = if self.transposed { d_in } else { self.shape[self.shape.len() - 1] };
        for row in 0..d_in {
            for (ours, theirs) in self.ours.clone().zip(self.theirs.clone()) {
                pair(row * d_out + ours, if self.transposed { theirs * width + row } else { row * width + theirs });
            }
        }
    }
}

/// One parameter of every model that has it.
#[derive(Debug)]
struct Row {
    /// The path; within a block without the block's own.
    path: &'static str,
    role: Role,
    shape: &'static [Size],
    /// Which models have it.
    when: fn(&GptConfig) -> bool,
    gpt2: Foreign,
    openai_gpt: Foreign,
    llama: Foreign,
    gpt_neox: Foreign,
}

/// A size by its meaning.
#[derive(Debug, Clone, Copy)]
enum Size {
    One,
    Vocab,
    Context,
    Model,
    Qkv,
    Heads,
    Head,
    FeedForward,
}

impl Size {
    const fn of(self, config: &GptConfig) -> usize {
        match self {
            Self::One => 1,
            Self::Vocab => config.vocab_size,
            Self::Context => config.max_seq_len,
            Self::Model => config.d_model,
            Self::Qkv => {
                let [queries, keys, values] = config.qkv_widths();
                queries + keys + values
            }
            Self::Heads => config.n_heads * config.d_head(),
            Self::Head => config.d_head(),
            Self::FeedForward => config.d_ff,
        }
    }
}

/// Queries, keys and values.
const QKV: usize = 3;

/// Where the trunk of a [`ScalarGpt`](crate::ScalarGpt) lies in it.
const SCALAR_TRUNK: &str = "trunk.";

/// Behind the path of a linear layer: the matrices of its adapter.
const ADAPTER_SUFFIXES: [&str; 2] = [".adapter.a", ".adapter.b"];

const MATRIX: Role = Role::Linear { packed: 1, residual: false };
const PACKED: Role = Role::Linear { packed: QKV, residual: false };
const RESIDUAL: Role = Role::Linear { packed: 1, residual: true };

/// A parameter that every model has, and that GPT-1's and GPT-2's classes keep under one name in our shape.
const fn row(path: &'static str, role: Role, shape: &'static [Size], theirs: &'static [&'static str; 1]) -> Row {
    const fn always(_: &GptConfig) -> bool {
        true
    }
    let theirs = Foreign::same(theirs);
    Row { path, role, shape, when: always, gpt2: theirs, openai_gpt: theirs, llama: NOWHERE, gpt_neox: NOWHERE }
}

/// Of a class whose models have no such parameter.
const NOWHERE: Foreign = Foreign::same(&[""]);

fn has_layer_norms(config: &GptConfig) -> bool {
    config.norm_kind == NormKind::LayerNorm
}

impl Row {
    const fn when(self, when: fn(&GptConfig) -> bool) -> Self {
        Self { when, ..self }
    }

    const fn openai_gpt(self, name: &'static [&'static str; 1]) -> Self {
        Self { openai_gpt: Foreign::same(name), ..self }
    }

    /// In the classes of Llama, Mistral and Qwen.
    const fn llama(self, names: &'static [&'static str]) -> Self {
        Self { llama: Foreign { names, order: Order::InTurn, transposed: self.is_linear() }, ..self }
    }

    const fn gpt_neox(self, names: &'static [&'static str]) -> Self {
        let order =
            if matches!(self.shape[self.shape.len() - 1], Size::Qkv) { Order::HeadByHead } else { Order::InTurn };
        Self { gpt_neox: Foreign { names, order, transposed: self.is_linear() }, ..self }
    }

    const fn is_linear(&self) -> bool {
        matches!(self.role, Role::Linear { .. })
    }
}

#[rustfmt::skip]
static TRUNK: [Row; 4] = [
    row("token_embedding", Role::TokenEmbedding, &[Size::Vocab, Size::Model], &["wte.weight"])
        .openai_gpt(&["tokens_embed.weight"]).llama(&["embed_tokens.weight"]).gpt_neox(&["embed_in.weight"]),
    row("position_embedding", Role::PositionEmbedding, &[Size::Context, Size::Model], &["wpe.weight"])
        .openai_gpt(&["positions_embed.weight"]).when(|config| matches!(config.positions, Positions::Learned)),
    row("final_norm.gamma", Role::NormGain, &[Size::Model], &["ln_f.weight"])
        .llama(&["norm.weight"]).gpt_neox(&["final_layer_norm.weight"])
        .when(|config| matches!(config.norm, NormPlacement::Pre)),
    row("final_norm.beta", Role::NormOffset, &[Size::Model], &["ln_f.bias"])
        .gpt_neox(&["final_layer_norm.bias"])
        .when(|config| matches!(config.norm, NormPlacement::Pre) && has_layer_norms(config)),
];

/// The parameters of each block, below its path.
#[rustfmt::skip]
static BLOCK: [Row; 18] = [
    row("norm_1.gamma",            Role::NormGain,   &[Size::Model],                    &["ln_1.weight"])
        .llama(&["input_layernorm.weight"]).gpt_neox(&["input_layernorm.weight"]),
    row("norm_1.beta",             Role::NormOffset, &[Size::Model],                    &["ln_1.bias"])
        .gpt_neox(&["input_layernorm.bias"]).when(has_layer_norms),
    row("attention.qkv.weight",    PACKED,           &[Size::Model, Size::Qkv],         &["attn.c_attn.weight"])
        .llama(&["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"])
        .gpt_neox(&["attention.query_key_value.weight"]),
    row("attention.qkv.bias",      Role::Bias,       &[Size::Qkv],                      &["attn.c_attn.bias"])
        .llama(&["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"])
        .gpt_neox(&["attention.query_key_value.bias"]).when(|config| config.qkv_bias),
    row("attention.q_norm.gamma",  Role::NormGain,   &[Size::Head],                     &[""])
        .llama(&["self_attn.q_norm.weight"]).when(|config| config.qk_norm),
    row("attention.q_norm.beta",   Role::NormOffset, &[Size::Head],                     &[""])
        .when(|config| config.qk_norm && has_layer_norms(config)),
    row("attention.k_norm.gamma",  Role::NormGain,   &[Size::Head],                     &[""])
        .llama(&["self_attn.k_norm.weight"]).when(|config| config.qk_norm),
    row("attention.k_norm.beta",   Role::NormOffset, &[Size::Head],                     &[""])
        .when(|config| config.qk_norm && has_layer_norms(config)),
    row("attention.proj.weight",   RESIDUAL,         &[Size::Heads, Size::Model],       &["attn.c_proj.weight"])
        .llama(&["self_attn.o_proj.weight"]).gpt_neox(&["attention.dense.weight"]),
    row("attention.proj.bias",     Role::Bias,       &[Size::Model],                    &["attn.c_proj.bias"])
        .llama(&["self_attn.o_proj.bias"]).gpt_neox(&["attention.dense.bias"]).when(|config| config.proj_bias),
    row("norm_2.gamma",            Role::NormGain,   &[Size::Model],                    &["ln_2.weight"])
        .llama(&["post_attention_layernorm.weight"]).gpt_neox(&["post_attention_layernorm.weight"]),
    row("norm_2.beta",             Role::NormOffset, &[Size::Model],                    &["ln_2.bias"])
        .gpt_neox(&["post_attention_layernorm.bias"]).when(has_layer_norms),
    row("mlp.gate.weight",         MATRIX,           &[Size::Model, Size::FeedForward], &[""])
        .llama(&["mlp.gate_proj.weight"]).when(|config| config.gated),
    row("mlp.gate.bias",           Role::Bias,       &[Size::FeedForward],              &[""])
        .llama(&["mlp.gate_proj.bias"]).when(|config| config.gated && config.mlp_bias),
    row("mlp.up.weight",           MATRIX,           &[Size::Model, Size::FeedForward], &["mlp.c_fc.weight"])
        .llama(&["mlp.up_proj.weight"]).gpt_neox(&["mlp.dense_h_to_4h.weight"]),
    row("mlp.up.bias",             Role::Bias,       &[Size::FeedForward],              &["mlp.c_fc.bias"])
        .llama(&["mlp.up_proj.bias"]).gpt_neox(&["mlp.dense_h_to_4h.bias"]).when(|config| config.mlp_bias),
    row("mlp.down.weight",         RESIDUAL,         &[Size::FeedForward, Size::Model], &["mlp.c_proj.weight"])
        .llama(&["mlp.down_proj.weight"]).gpt_neox(&["mlp.dense_4h_to_h.weight"]),
    row("mlp.down.bias",           Role::Bias,       &[Size::Model],                    &["mlp.c_proj.bias"])
        .llama(&["mlp.down_proj.bias"]).gpt_neox(&["mlp.dense_4h_to_h.bias"]).when(|config| config.mlp_bias),
];

/// The output layer of a [`Gpt`](crate::Gpt), then that of a [`ScalarGpt`](crate::ScalarGpt).
#[rustfmt::skip]
static HEADS: [Row; 2] = [
    row("head", Role::OutputHead, &[Size::Vocab, Size::Model], &["lm_head.weight"])
        .llama(&["lm_head.weight"]).gpt_neox(&["embed_out.weight"]).when(|config| !config.tie_embeddings),
    row("score.weight", Role::ScoreHead, &[Size::One, Size::Model], &["score.weight"])
        .llama(&["score.weight"]).gpt_neox(&["score.weight"]),
];

#[cfg(test)]
mod tests;
