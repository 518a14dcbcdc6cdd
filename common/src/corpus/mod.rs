//! Text to train language models on: files to tokens, tokens to windows, and the cross-entropy of windows.
//!
//! In reading order: [`TextConfig`] names the files and says how they are cut, [`Tokenising`] makes files of tokens of them,
//! [`Corpus`] holds the training text and the held-out text, each a [`TokenSet`] that is read as [`Windows`]; [`loss`] is
//! their cross-entropy with gradient, and [`evaluate_windows`] that of held-out text. Pretraining learns from nothing else;
//! PPO may learn from it beside its scores.

mod config;
mod loss;
mod tokenise;
mod windows;

pub use config::{Shuffle, TextConfig};
pub use loss::{Evaluation, evaluate_batch, evaluate_windows, loss};
pub use tokenise::Tokenising;
pub use windows::{Corpus, TokenSet, Windows};
