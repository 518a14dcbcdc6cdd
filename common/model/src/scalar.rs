//! A GPT that gives one number a position: reward models and value models.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, bf16};

use super::adapter::{Adapters, trains_beside_trunk};
use super::params::score_head;
use super::{Gpt, GptConfig, Layout, NamedError, NamedTensors};
use base::rng::{Rng, Streams};
use kernels::{Kernels, Precision};

/// The trunk of a [`Gpt`] and a linear layer from its hidden states to one number.
///
/// `score_t = w · h_t + b`, where `b` is a constant of the checkpoint (the reward normalisation's bias), not trained.
#[derive(Module, Debug)]
pub struct ScalarGpt {
    trunk: Gpt,
    score: ScoreHead,
    score_bias: f64,
}

#[derive(Module, Debug)]
struct ScoreHead {
    weight: Param<Tensor<2>>,
}

impl ScalarGpt {
    /// Puts a fresh head on `trunk`, whose output weights are dropped.
    ///
    /// The head's weights are drawn from `N(0, 1/√(d_model + 1))`, standard deviation.
    ///
    /// # Source
    /// lm-human-preferences, `fc_layer`; Stiennon et al. 2020 print `1/(d + 1)`, their code has the square root.
    pub fn new(trunk: Gpt, streams: &Streams) -> Self {
        let head = score_head(trunk.config());
        let weight = Param::from_data(TensorData::new(head.initial_values(streams), head.shape()), &trunk.device());
        Self { trunk: trunk.without_head(), score: ScoreHead { weight }, score_bias: 0.0 }
    }

    /// One number for every position.
    ///
    /// # Shapes
    /// - `ids`: `[batch, seq]`
    /// - returns `[batch, seq]`
    pub fn forward(&self, ids: Tensor<2, Int>, layout: &Layout) -> Tensor<2> {
        self.forward_with_dropout(ids, layout, None)
    }

    /// [`forward`](Self::forward) with dropout drawn from `rng`.
    pub fn forward_with_dropout(&self, ids: Tensor<2, Int>, layout: &Layout, rng: Option<&mut Rng>) -> Tensor<2> {
        let hidden = self.trunk.hidden_with_dropout(ids, layout, rng);
        let [batch, seq, d_model] = hidden.dims();
        self.score_rows(hidden.reshape([batch * seq, d_model])).reshape([batch, seq])
    }

    /// [`forward_with_dropout`](Self::forward_with_dropout) at chosen positions only.
    ///
    /// # Shapes
    /// - `ids`: `[batch, seq]`
    /// - `positions`: `[n]`, indices into `[batch · seq]`
    /// - returns `[n]`
    pub fn forward_at(
        &self,
        ids: Tensor<2, Int>,
        layout: &Layout,
        positions: Tensor<1, Int>,
        rng: Option<&mut Rng>,
    ) -> Tensor<1> {
        let hidden = self.trunk.hidden_with_dropout(ids, layout, rng);
        let [batch, seq, d_model] = hidden.dims();
        self.score_rows(hidden.reshape([batch * seq, d_model]).select(0, positions))
    }

    /// The numbers of hidden states.
    ///
    /// # Shapes
    /// - `hidden`: `[n, d_model]`
    /// - returns `[n]`
    fn score_rows(&self, hidden: Tensor<2>) -> Tensor<1> {
        let [n, _] = hidden.dims();
        hidden.matmul(self.score.weight.val().transpose()).reshape([n]) + self.score_bias
    }

    /// The architecture of the trunk.
    pub fn config(&self) -> &GptConfig {
        self.trunk.config()
    }

    /// The device the weights are on.
    pub fn device(&self) -> Device {
        self.trunk.device()
    }

    /// The constant added to every score.
    pub const fn score_bias(&self) -> f64 {
        self.score_bias
    }

    /// The same model with another constant.
    #[must_use]
    pub fn with_score_bias(mut self, score_bias: f64) -> Self {
        self.score_bias = score_bias;
        self
    }

    /// The same model with the head's weights multiplied by `gain`.
    #[must_use]
    pub fn with_gain(mut self, gain: f64) -> Self {
        self.score.weight = self.score.weight.map(|w| {
            // Off the graph and back: `map` makes the result a parameter again, which only a leaf can be.
            let (tracked, learns) = (w.is_autodiff(), w.is_require_grad());
            let scaled = w.inner() * gain;
            if tracked { Tensor::from_inner(scaled).set_require_grad(learns) } else { scaled }
        });
        self
    }

    /// The same model with the head's weights and constant set to zero.
    #[must_use]
    pub fn with_zero_head(self) -> Self {
        self.with_gain(0.0).with_score_bias(0.0)
    }

    /// The same model computing with `kernels`.
    #[must_use]
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.trunk = self.trunk.with_kernels(kernels);
        self
    }

    /// The same model with its trunk computing in `precision`; see [`Gpt::with_precision`].
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.trunk = self.trunk.with_precision(precision);
        self
    }

    /// The same model with the activations of its trunk computed twice; see [`Gpt::with_checkpoints`].
    #[must_use]
    pub fn with_checkpoints(mut self, checkpoint_activations: bool) -> Self {
        self.trunk = self.trunk.with_checkpoints(checkpoint_activations);
        self
    }

    /// The adapters beside frozen weights of the trunk; see [`Gpt::adapters`].
    pub const fn adapters(&self) -> Option<&Adapters> {
        self.trunk.adapters()
    }

    /// The weights that training changes, by path, on the host: the head and the adapters where there are any, else all.
    pub fn to_trained(&self) -> NamedTensors {
        match self.adapters() {
            Some(_) => super::named::collect_where(self, trains_beside_trunk),
            None => self.to_named(),
        }
    }

    /// A head and `adapters` on the frozen weights of `trunk`, which are shared and not copied, on `device`.
    ///
    /// # Errors
    /// If `named` are not the tensors of the head and the adapters in their shapes.
    pub fn with_adapters(
        trunk: Gpt,
        adapters: &Adapters,
        named: NamedTensors,
        score_bias: f64,
        device: &Device,
    ) -> Result<Self, NamedError> {
        let trunk = trunk.without_head().blank_adapters(adapters, device);
        super::named::load_where(Self::blank(trunk, score_bias, device), named, trains_beside_trunk)
    }

    /// The same model with other values of the weights that training changes, see [`to_trained`](Self::to_trained).
    ///
    /// # Errors
    /// If a tensor is missing, unused or has another shape.
    pub fn with_trained(self, named: NamedTensors) -> Result<Self, NamedError> {
        let wanted: fn(&str) -> bool = if self.adapters().is_some() { trains_beside_trunk } else { |_| true };
        super::named::load_where(self, named, wanted)
    }

    /// The model without its head.
    pub fn into_trunk(self) -> Gpt {
        self.trunk
    }

    /// A head, to be loaded, on `trunk`.
    fn blank(trunk: Gpt, score_bias: f64, device: &Device) -> Self {
        let weight = Param::from_tensor(Tensor::zeros([1, trunk.config().d_model], device));
        Self { trunk, score: ScoreHead { weight }, score_bias }
    }

    /// All weights by path, on the host.
    pub fn to_named(&self) -> NamedTensors {
        super::named::collect(self)
    }

    /// A model with the given weights.
    ///
    /// # Errors
    /// If a tensor is missing, unused or has another shape than `config` asks for.
    pub fn from_named(
        config: &GptConfig,
        named: NamedTensors,
        score_bias: f64,
        device: &Device,
    ) -> Result<Self, NamedError> {
        Self::from_both(config, named, NamedTensors::new(), score_bias, device)
    }

    /// [`from_named`](Self::from_named) with weights in bf16 among the others, see [`Gpt::from_both`].
    ///
    /// # Errors
    /// As `from_named`.
    pub fn from_both(
        config: &GptConfig,
        named: NamedTensors,
        narrow: NamedTensors<bf16>,
        score_bias: f64,
        device: &Device,
    ) -> Result<Self, NamedError> {
        let trunk = Gpt::blank(config, device).without_head();
        super::named::load_both(Self::blank(trunk, score_bias, device), named, narrow, |_| true)
    }
}
