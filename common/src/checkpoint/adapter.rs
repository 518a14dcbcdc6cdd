//! Checkpoints that are adapters beside the weights of a base.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, bf16};

use super::init::add_tokens;
use super::{Checkpoint, CheckpointError, Manifest, Opening, Parent, VALUE_DIR, Weights};
use crate::hf::{self, AdapterFiles, Head, HostAdapter, HostModel};
use crate::model::params::{Output, Role, path_of, score_head};
use crate::model::{Gpt, GptConfig, HostTensor, LoraConfig, NamedError, NamedTensors, ScalarGpt};
use crate::rng::Streams;

/// An adapter and the base that it stands on.
#[derive(Debug)]
pub(super) struct Adapted {
    pub(super) adapter: HostAdapter,
    base: Parent,
}

/// Whether `dir` holds an adapter.
pub fn is_in(dir: &Path) -> bool {
    dir.join(hf::ADAPTER_CONFIG_FILE).is_file()
}

/// What an adapter's directory says without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPreview {
    /// Rank, scale, dropout and targets.
    pub lora: LoraConfig,
    /// Whether the base that it names is there.
    pub has_base: bool,
}

impl AdapterPreview {
    /// Reads the files of `dir` that are small; `None` if it holds no adapter.
    ///
    /// # Errors
    /// If a file is damaged, or the adapter is of a kind that computes something else.
    pub fn open(dir: &Path) -> Result<Option<Self>, CheckpointError> {
        if !is_in(dir) {
            return Ok(None);
        }
        let AdapterFiles { base, lora, .. } = AdapterFiles::read(dir)?;
        Ok(Some(Self { lora, has_base: base.path.is_some_and(|base| Path::new(&base).is_dir()) }))
    }

    /// Whether `dir` holds an adapter whose base is not where it says.
    pub fn lacks_base(dir: &Path) -> bool {
        Self::open(dir).is_ok_and(|found| found.is_some_and(|found| !found.has_base))
    }
}

/// A setting in which adapters differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraDifference {
    /// The key in `[lora]`.
    pub key: &'static str,
    /// Its value in what is asked for.
    pub asked: String,
    /// Its value in the adapter that is there.
    pub found: String,
}

impl LoraDifference {
    /// What keeps adapters as `asked` describes from going on with one as `found` describes in a model of architecture
    /// `config`; dropout may differ.
    ///
    /// # Errors
    /// If a target is the name of no linear layer.
    pub fn of(config: &GptConfig, asked: &LoraConfig, found: &LoraConfig) -> Result<Option<Self>, CheckpointError> {
        let differs = |key, asked: String, found: String| Ok(Some(Self { key, asked, found }));
        if asked.rank != found.rank {
            return differs("rank", asked.rank.to_string(), found.rank.to_string());
        }
        if asked.alpha != found.alpha {
            return differs("alpha", asked.alpha.to_string(), found.alpha.to_string());
        }
        if asked.rslora != found.rslora {
            return differs("rslora", asked.rslora.to_string(), found.rslora.to_string());
        }
        if hf::adapters_of(config, asked)?.parts != hf::adapters_of(config, found)?.parts {
            return differs("targets", format!("{:?}", asked.targets), format!("{:?}", found.targets));
        }
        Ok(None)
    }
}

impl Checkpoint {
    /// The adapter in `dir` with its base, which lies where `opening` or the adapter says.
    ///
    /// A tokenizer in `dir` that has more tokens than the base's was given them when training began: their embeddings
    /// begin here as they did there, see [`init_from`](super::init_from).
    pub(super) fn open_adapter(dir: &Path, opening: Opening<'_>) -> Result<Self, CheckpointError> {
        let base = opening.base;
        let files = AdapterFiles::read(dir)?;
        let named = files.base.path.clone();
        let base_dir = base.map(Path::to_owned).or_else(|| named.as_ref().map(PathBuf::from));
        let Some(base_dir) = base_dir.filter(|base_dir| base.is_some() || base_dir.is_dir()) else {
            return Err(CheckpointError::NoBase { dir: dir.to_owned(), named });
        };
        let base = Self::open_with(&base_dir, Opening { base: None, ..opening })?;
        if base.adapter.is_some() {
            return Err(CheckpointError::BaseIsAdapter { dir: dir.to_owned(), base: base_dir });
        }
        if let Some(recorded) = files.base.sha256.clone()
            && recorded != base.weights_sha256
        {
            let (dir, found) = (dir.to_owned(), base.weights_sha256);
            return Err(CheckpointError::OtherBase { dir, base: base_dir, found, recorded });
        }
        let as_parent = base.as_parent();
        let mut model = base.model;
        let own_tokenizer = Self::read_tokenizer(dir, files.tokens.eos.clone())?;
        if let (Some(own), Some(of_base)) = (&own_tokenizer, &base.tokenizer) {
            let (n_old, n_new) = (of_base.vocab_size(), own.vocab_size());
            if n_new > n_old {
                add_tokens(&mut model, n_old, n_new);
            }
        }
        if let Some(config) = &files.config {
            // What only the weights tell is not compared.
            let GptConfig { dropout, tie_embeddings, positions, .. } = *config;
            if *config != (GptConfig { dropout, tie_embeddings, positions, ..model.config.clone() }) {
                return Err(CheckpointError::OtherArchitecture { dir: dir.to_owned(), base: base_dir });
            }
            model.config.dropout = dropout;
        }
        let (adapter, weights_sha256) = hf::read_adapter(dir, &files, &model.config)?;
        if let Head::Score { bias } = adapter.head {
            model = scored(model, bias, &adapter);
        } else if model.head != Head::Lm {
            return Err(CheckpointError::NotAnLm { dir: base_dir });
        }
        let checkpoint = Self {
            dir: dir.to_owned(),
            manifest: Manifest::read(dir)?,
            model,
            adapter: Some(Adapted { adapter, base: as_parent }),
            weights_sha256,
            tokenizer: own_tokenizer.or(base.tokenizer),
        };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The weights that adapters on this checkpoint stand beside: its base, or itself.
    pub fn base(&self) -> Parent {
        self.adapter.as_ref().map_or_else(|| self.as_parent(), |adapted| adapted.base.clone())
    }

    /// The padding id in the configuration of the base, by which PEFT goes; `None` where it has none.
    pub fn pad_of_base(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.base().path.join(hf::CONFIG_FILE)).ok()?;
        let config: serde_json::Value = serde_json::from_str(&text).ok()?;
        u32::try_from(config["pad_token_id"].as_u64()?).ok()
    }

    /// The adapter, where the checkpoint is one.
    pub fn adapter(&self) -> Option<&HostAdapter> {
        self.adapter.as_ref().map(|adapted| &adapted.adapter)
    }

    /// The constant added to every score; 0 for a language model.
    pub const fn score_bias(&self) -> f64 {
        self.model.head.bias()
    }

    /// Copies of the weights.
    pub(super) fn weights(&self) -> HostWeights {
        HostWeights { wide: self.model.tensors.clone(), narrow: self.model.narrow.clone() }
    }

    /// The weights, which [`release`](Self::release) leaves nothing of.
    pub(super) fn take_weights(&mut self) -> HostWeights {
        HostWeights { wide: std::mem::take(&mut self.model.tensors), narrow: std::mem::take(&mut self.model.narrow) }
    }

    /// The adapter that stands beside `weights`, where they are not such that it could be added into them.
    pub(super) fn adapter_beside(&self, weights: &HostWeights) -> Option<&HostAdapter> {
        self.adapter().filter(|_| !weights.narrow.is_empty())
    }

    /// `weights` in f32 with the adapter added into them, where there is one.
    pub(super) fn merged_tensors(&self, mut weights: NamedTensors) -> NamedTensors {
        if let Some(HostAdapter { adapters, tensors: of_adapter, .. }) = self.adapter() {
            adapters.merge(&self.model.config, self.model.head.output(), &mut weights, of_adapter);
        }
        weights
    }

    /// The model as one of weights of its own: for [`save`](super::save). The checkpoint's are taken for it, as
    /// [`release`](Self::release) leaves it.
    ///
    /// # Errors
    /// If it is no adapter.
    pub fn take_merged(&mut self) -> Result<Weights, CheckpointError> {
        if self.adapter.is_none() {
            return Err(CheckpointError::NoAdapter { dir: self.dir.clone() });
        }
        let weights = self.take_weights();
        let (named, config) = (self.merged_tensors(weights.wide), self.model.config.clone());
        Ok(match self.model.head {
            Head::Lm => Weights::Lm { named, config },
            Head::Score { bias } => Weights::Scalar { named, config, score_bias: bias },
        })
    }

    /// The weights that adapters stand beside, on `device`, without an adapter and without a reward model's head.
    ///
    /// They are moved there, as [`release`](Self::release) leaves the checkpoint, so that no second copy stays in memory.
    ///
    /// # Errors
    /// If they do not fit the architecture, or were taken before.
    pub fn take_trunk(&mut self, device: &Device) -> Result<Gpt, CheckpointError> {
        let weights = self.take_weights();
        self.build(|| self.trunk_of(weights, device))
    }

    /// The model of `weights` without an adapter and without a reward model's head.
    pub(super) fn trunk_of(&self, weights: HostWeights, device: &Device) -> Result<Gpt, NamedError> {
        let (HostWeights { wide, narrow }, HostModel { config, head, .. }) = (weights, &self.model);
        match head {
            Head::Lm => Gpt::from_both(config, wide, narrow, device),
            Head::Score { .. } => Ok(ScalarGpt::from_both(config, wide, narrow, 0.0, device)?.into_trunk()),
        }
    }

    /// Frees the weights, once the models that need them are on their device; of an adapter those of its base.
    pub fn release(&mut self) {
        (self.model.tensors, self.model.narrow) = (NamedTensors::new(), NamedTensors::new());
    }

    /// The adapter that PPO's value model is, on a trunk of the architecture `config`.
    ///
    /// # Errors
    /// If there is none, or it is damaged or does not fit.
    pub fn value_adapter(&self, config: &GptConfig) -> Result<HostAdapter, CheckpointError> {
        let dir = self.dir.join(VALUE_DIR);
        let (adapter, sha256) = hf::read_adapter(&dir, &AdapterFiles::read(&dir)?, config)?;
        self.check_hash(&format!("{VALUE_DIR}/{}", hf::ADAPTER_WEIGHTS_FILE), &sha256)?;
        Ok(adapter)
    }

    /// Checks that adapters as `lora` describes can be trained beside the checkpoint's weights, or further where it is one.
    ///
    /// # Errors
    /// If a target is unknown, or the checkpoint's adapter has other settings.
    pub fn check_lora(&self, lora: Option<&LoraConfig>) -> Result<(), CheckpointError> {
        match (lora, self.adapter()) {
            (None, _) => Ok(()),
            (Some(lora), Some(own)) => self.check_settings(lora, own),
            (Some(lora), None) => Ok(hf::adapters_of(&self.model.config, lora).map(drop)?),
        }
    }

    /// The adapter that training beside frozen weights begins with: that of the checkpoint if it is one, else one that
    /// adds nothing yet. The head of a reward model is the checkpoint's, or drawn anew where that has none.
    ///
    /// # Errors
    /// If a target of `lora` is unknown, or the checkpoint's adapter has other settings.
    pub fn adapter_to_train(
        &self,
        lora: &LoraConfig,
        output: Output,
        streams: &Streams,
    ) -> Result<HostAdapter, CheckpointError> {
        let config = &self.model.config;
        let adapters = hf::adapters_of(config, lora)?;
        let head = match output {
            Output::Logits => Head::Lm,
            Output::Score => Head::Score { bias: 0.0 },
        };
        let mut tensors = match self.adapter() {
            None => adapters.initial(config, output, streams),
            Some(own) => {
                self.check_settings(lora, own)?;
                let path = |place: [String; 2]| place.into_iter();
                let ours = own.adapters.places(config, own.head.output()).flat_map(|place| path(place.paths));
                let theirs = adapters.places(config, output).flat_map(|place| path(place.paths));
                ours.zip(theirs).map(|(ours, theirs)| (theirs, own.tensors[&ours].clone())).collect()
            }
        };
        if output == Output::Score {
            let head = score_head(config);
            let drawn = || HostTensor { shape: head.shape(), data: head.initial_values(streams) };
            let path = path_of(config, output, Role::ScoreHead).unwrap_or_default();
            let own = self.model.tensors.get(&path).cloned();
            tensors.insert(path, own.unwrap_or_else(drawn));
        }
        Ok(HostAdapter { adapters, head, tensors })
    }

    /// Checks that `own`, the checkpoint's adapter, is one as `lora` describes; dropout may differ.
    fn check_settings(&self, lora: &LoraConfig, own: &HostAdapter) -> Result<(), CheckpointError> {
        match LoraDifference::of(&self.model.config, lora, &own.adapters.lora)? {
            Some(LoraDifference { key, asked, found }) => {
                Err(CheckpointError::OtherAdapter { dir: self.dir.clone(), key, asked, found })
            }
            None => Ok(()),
        }
    }
}

/// A model's weights on the host: those in f32, and those that stay in bf16.
#[derive(Debug)]
pub(super) struct HostWeights {
    pub wide: NamedTensors,
    pub narrow: NamedTensors<bf16>,
}

/// The base of a reward model's adapter as a reward model: its trunk, under the paths of one, and the adapter's head.
fn scored(base: HostModel, bias: f64, adapter: &HostAdapter) -> HostModel {
    let HostModel { config, head, mut tensors, mut narrow } = base;
    let to_scalar = path_of(&config, Output::Score, Role::TokenEmbedding).unwrap_or_default();
    let to_gpt = path_of(&config, Output::Logits, Role::TokenEmbedding).unwrap_or_default();
    let prefix = to_scalar.strip_suffix(&to_gpt).unwrap_or_default();
    let output_head = path_of(&config, Output::Logits, Role::OutputHead);
    if head == Head::Lm {
        tensors = of_scalar(tensors, prefix, output_head.as_deref());
        narrow = of_scalar(narrow, prefix, output_head.as_deref());
    }
    if let Some(path) = path_of(&config, Output::Score, Role::ScoreHead) {
        tensors.insert(path.clone(), adapter.tensors[&path].clone());
    }
    HostModel { config, head: Head::Score { bias }, tensors, narrow }
}

/// Tensors of a language model under the paths of a scalar model's trunk, which has no output head.
fn of_scalar<T>(tensors: NamedTensors<T>, prefix: &str, output_head: Option<&str>) -> NamedTensors<T> {
    let of_trunk = tensors.into_iter().filter(|(path, _)| Some(&**path) != output_head);
    of_trunk.map(|(path, tensor)| (format!("{prefix}{path}"), tensor)).collect()
}
