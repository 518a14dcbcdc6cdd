//! Which text, and how it is cut into documents and windows.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::Sources;
use crate::data::files::one_or_many;
use crate::data::records::{OnBadRecord, ReadOptions, RecordLimit, Separator};

/// Files of text, as `[data]` of `pretrain.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TextConfig {
    /// Training files: `.txt`, `.jsonl` or `.json` with `{"text"}`, all also `.gz`, or `.parquet` with a column `text`; a path, a
    /// list of paths, or patterns such as `data/*.txt`. Required.
    #[serde(deserialize_with = "one_or_many")]
    pub train: Vec<PathBuf>,
    /// Validation files of the same formats; if empty, the end of the training text is held out instead.
    #[serde(deserialize_with = "one_or_many")]
    pub val: Vec<PathBuf>,
    /// Fraction of the training text that is held out if there are no `val` files.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub val_fraction: f64,
    /// Separator of the documents in a `.txt` file: `"blank-line"`, `"line"` (each line is a document), `"none"` (each file is
    /// a document), or any other string, such as `"<|endoftext|>"`.
    pub separator: Separator,
    /// Treatment of a malformed record.
    pub on_bad_record: OnBadRecord,
    /// Largest size of a record or document in bytes; a longer one is malformed.
    pub max_record_bytes: RecordLimit,
    /// How the windows of an epoch are put in a random order.
    pub shuffle: Shuffle,
    /// Whether every document begins with `<|bos|>`; if not, the text is one continuous stream.
    pub document_bos: bool,
    /// Whether a token may attend to earlier documents in the same window.
    pub attend_across_documents: bool,
}

/// How the windows of an epoch are put in a random order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Shuffle {
    /// `windows` up to 1,048,576 windows an epoch, `blocks` beyond.
    #[default]
    Auto,
    /// One random order of all windows; takes eight bytes of memory for each.
    Windows,
    /// Blocks of 256 neighbouring windows in a random order, then mixed within every 256 blocks: in little memory, from few
    /// places of the disk at a time.
    Blocks,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            val: Vec::new(),
            val_fraction: 0.1,
            separator: Separator::default(),
            on_bad_record: OnBadRecord::default(),
            max_record_bytes: RecordLimit::default(),
            shuffle: Shuffle::default(),
            document_bos: true,
            attend_across_documents: false,
        }
    }
}

impl TextConfig {
    /// The files by their key in the configuration.
    pub fn sources(&self) -> Vec<(&'static str, &[PathBuf])> {
        vec![("data.train", &self.train), ("data.val", &self.val)]
    }

    /// [`sources`](Self::sources), to be resolved.
    pub fn sources_mut(&mut self) -> Sources<'_> {
        vec![("data.train", &mut self.train), ("data.val", &mut self.val)]
    }

    /// How the documents of the files are read; `section` is where this stands in the configuration.
    pub fn read_options(&self, section: &'static str) -> ReadOptions {
        let Self { on_bad_record, max_record_bytes, .. } = *self;
        ReadOptions { on_bad_record, max_record_bytes, section: Some(section) }
    }
}
