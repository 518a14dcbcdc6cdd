//! Why a checkpoint cannot be read, used or written.

use std::path::{Path, PathBuf};

use super::{FORMAT_VERSION, Stage};
use crate::files::FileError;
use crate::hf::{self, HfError};
use crate::model::NamedError;
use crate::tokenizer::TokenizerError;

/// Why a checkpoint cannot be read, used or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No such directory.
    #[error("no checkpoint at `{}`: there is no such directory\nhint: pass the directory that a training command wrote: its `--out`{}", dir.display(), of_the_hub(dir))]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// A directory of something else.
    #[error(
        "`{}` is not a checkpoint: it has no `config.json`\nhint: {}",
        dir.display(),
        if dir.join("tokenizer.json").is_file() {
            "it holds a tokenizer; name the directory of a model".to_owned()
        } else if inside.is_empty() {
            "a run writes its first checkpoint when it first saves".to_owned()
        } else {
            format!("pass one of the checkpoints in it: {}", inside.join(", "))
        }
    )]
    NotACheckpoint {
        /// The directory.
        dir: PathBuf,
        /// The checkpoints in it, as a recipe leaves them.
        inside: Vec<String>,
    },
    /// The wrong stage's.
    #[error(
        "checkpoint `{}` was written by stage `{found}`, expected {}\nhint: pass the directory that {} wrote",
        dir.display(),
        .expected.iter().map(|stage| format!("`{stage}`")).collect::<Vec<_>>().join(" or "),
        .expected.iter().map(|stage| format!("`{stage} train`")).collect::<Vec<_>>().join(" or ")
    )]
    Stage {
        /// The directory.
        dir: PathBuf,
        /// Who wrote it.
        found: Stage,
        /// Who should have.
        expected: Vec<Stage>,
    },
    /// A score where logits are needed.
    #[error("`{}` holds a reward or value model, expected a language model", dir.display())]
    NotAnLm {
        /// The directory.
        dir: PathBuf,
    },
    /// Logits where a score is needed.
    #[error("`{}` holds a language model, expected a reward model\nhint: pass the directory that `reward-model train` wrote", dir.display())]
    NotAScore {
        /// The directory.
        dir: PathBuf,
    },
    /// No tokenizer.
    #[error("`{}` has no tokenizer\nhint: put `tokenizer.json` and `tokenizer_config.json` into it", dir.display())]
    NoTokenizer {
        /// The directory.
        dir: PathBuf,
    },
    /// The tokenizer is another model's.
    #[error(
        "`{}`: the tokenizer has {tokenizer} tokens, the model {model}\n\
         hint: it is another model's, or tokens were added and the embedding was not resized",
        dir.display()
    )]
    Vocabulary {
        /// The directory.
        dir: PathBuf,
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// The reward model lacks embeddings of tokens that the policy can sample.
    #[error(
        "the policy `{}` can sample {sampled} tokens, the reward model `{}` knows {known}",
        policy.display(),
        dir.display()
    )]
    SmallerVocabulary {
        /// The reward model's directory.
        dir: PathBuf,
        /// Rows of its embedding.
        known: usize,
        /// The policy's directory.
        policy: PathBuf,
        /// Rows of the policy's embedding.
        sampled: usize,
    },
    /// Two checkpoints that do not fit together.
    #[error(
        "`{}` and `{}` have different {what}, so one cannot read what the other writes\nhint: train both from the same `pretrain` checkpoint",
        a.display(),
        b.display()
    )]
    Partners {
        /// The difference.
        what: &'static str,
        /// One directory.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// Nothing to resume from.
    #[error("checkpoint `{}` holds no state to resume from\nhint: `--init` starts a new run from its weights", dir.display())]
    NoState {
        /// The directory.
        dir: PathBuf,
    },
    /// Not what was saved.
    #[error("`{}` is not the file that the manifest names: its SHA-256 differs\nhint: it was changed after the save; copy the whole directory again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Another layout.
    #[error("`{}` has format {found}, this program reads {FORMAT_VERSION}", path.display())]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Not JSON, or not the right JSON.
    #[error("`{}` is damaged: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// An adapter whose base is not there.
    #[error(
        "the base of the adapter `{}` is not there: {}\nhint: `--base DIR` says where it lies",
        dir.display(),
        match named {
            Some(named) => format!("`{named}` is no directory"),
            None => format!("`{}` names none", hf::ADAPTER_CONFIG_FILE),
        }
    )]
    NoBase {
        /// The adapter's directory.
        dir: PathBuf,
        /// What it says of its base.
        named: Option<String>,
    },
    /// An adapter on an adapter.
    #[error("the base of the adapter `{}` is an adapter itself, `{}`\nhint: add that one into its weights first: `chat merge`", dir.display(), base.display())]
    BaseIsAdapter {
        /// The adapter's directory.
        dir: PathBuf,
        /// Its base.
        base: PathBuf,
    },
    /// An adapter of another base.
    #[error(
        "the adapter `{}` was trained on other weights than those of `{}`: their SHA-256 is {found}, recorded is {recorded}\nhint: pass the base that it \
         was trained on with `--base DIR`",
        dir.display(),
        base.display()
    )]
    OtherBase {
        /// The adapter's directory.
        dir: PathBuf,
        /// The base that was found.
        base: PathBuf,
        /// The hash of its weights.
        found: String,
        /// The hash that the adapter was saved with.
        recorded: String,
    },
    /// An adapter of another architecture.
    #[error(
        "the adapter `{}` was trained in another architecture than that of `{}`\nhint: pass the base that it was trained on with `--base DIR`",
        dir.display(),
        base.display()
    )]
    OtherArchitecture {
        /// The adapter's directory.
        dir: PathBuf,
        /// The base that was found.
        base: PathBuf,
    },
    /// Settings that are not those of the adapter to go on with.
    #[error(
        "`lora.{key}` is {asked}, but the adapter in `{}` has {found}\nhint: set it to that to train the adapter further, or add the adapter \
         into the weights first, with `chat merge`, and train another",
        dir.display()
    )]
    OtherAdapter {
        /// The adapter's directory.
        dir: PathBuf,
        /// The setting.
        key: &'static str,
        /// Its value in the configuration.
        asked: String,
        /// Its value in the adapter.
        found: String,
    },
    /// There is nothing to merge.
    #[error("`{}` holds no adapter: all of its weights are its own", dir.display())]
    NoAdapter {
        /// The directory.
        dir: PathBuf,
    },
    /// Not to be saved.
    #[error("not saved: tensor `{name}` of `{}` holds {value}; any checkpoint saved before is kept", file.display())]
    NotFinite {
        /// The file it was to go to.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// The first number that is not finite.
        value: f32,
    },
    /// Not readable.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not writable.
    #[error("failed to write `{}`; any checkpoint saved before is kept: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model's files.
    #[error(transparent)]
    Hf(#[from] HfError),
    /// The tokenizer's files.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The weights do not fit the architecture.
    #[error("`{}`: {source}", dir.display())]
    Named {
        /// The directory.
        dir: PathBuf,
        /// Which tensor.
        source: NamedError,
    },
}

/// A hint where `dir` looks like the name of a model on the hub, `OWNER/NAME`.
fn of_the_hub(dir: &Path) -> String {
    let is_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    match dir.to_str().map(|name| name.split('/').collect::<Vec<_>>()).as_deref() {
        Some(&[owner, name]) if is_name(owner) && is_name(name) && !Path::new(owner).exists() => format!(
            "\nhint: a model of the hub is downloaded first: `hf download {owner}/{name} --local-dir models/{name}`; then pass \
             `models/{name}`"
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_model_on_the_hub_is_told_from_a_directory() {
        let hints = |name: &str| CheckpointError::NoDirectory { dir: name.into() }.to_string();
        let hint = "`hf download nobody/Tiny-1.5B --local-dir models/Tiny-1.5B`; then pass `models/Tiny-1.5B`";
        assert!(hints("nobody/Tiny-1.5B").contains(hint), "{}", hints("nobody/Tiny-1.5B"));
        // `src` is there: the path of a directory was meant.
        for path in ["nowhere", "src/nowhere", "/nobody/tiny", "../nobody", "a/b/c", "nobody/"] {
            assert!(!hints(path).contains("hf download"), "{}", hints(path));
        }
    }
}
