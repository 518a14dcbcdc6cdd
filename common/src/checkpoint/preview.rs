//! What can be known of a checkpoint without its weights.

use std::path::{Path, PathBuf};

use super::init::prepared;
use super::{CheckpointError, adapter};
use crate::hf::{self, AdapterFiles};
use crate::model::GptConfig;
use crate::tokenizer::Tokenizer;

/// Architecture and tokenizer of a checkpoint, as [`init_from`](super::init_from) would give them.
#[derive(Debug, Clone)]
pub struct Preview {
    /// The architecture.
    pub config: GptConfig,
    /// The tokenizer, if there is one.
    pub tokenizer: Option<Tokenizer>,
    /// Where its weights lie: for an adapter, those of the base.
    pub weights_dir: PathBuf,
}

impl Preview {
    /// Reads the files of `dir` that are small, for an adapter those of its base, which lies in `base` or where it says.
    ///
    /// # Errors
    /// If one is missing, damaged or describes what this program cannot compute.
    pub fn open(dir: &Path, base: Option<&Path>) -> Result<Self, CheckpointError> {
        let weights_dir = if adapter::is_in(dir) {
            let named = AdapterFiles::read(dir)?.base.path;
            let base_dir = base.map(Path::to_owned).or_else(|| named.as_ref().map(PathBuf::from));
            base_dir.ok_or_else(|| CheckpointError::NoBase { dir: dir.to_owned(), named })?
        } else {
            dir.to_owned()
        };
        let mut config = hf::read_config(&weights_dir)?;
        let tokenizer = Tokenizer::load(dir).or_else(|_| Tokenizer::load(&weights_dir)).ok();
        let tokenizer = tokenizer.map(prepared).transpose()?.map(|(tokenizer, _)| tokenizer);
        if let Some(tokenizer) = &tokenizer {
            config.vocab_size = config.vocab_size.max(tokenizer.vocab_size());
        }
        Ok(Self { config, tokenizer, weights_dir })
    }
}
