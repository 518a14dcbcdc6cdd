//! Flags only.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use common::cli::ProcessArgs;

/// Small experiments beside the chapters of docs/book
#[derive(Debug, Parser)]
#[command(
    name = "book",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        book tokens runs/book/tokenizer 'Tell me a story about a fox.'\n  \
        book attention runs/book/sft 'The fox was hungry. The'"
)]
pub struct Cli {
    /// The command
    #[command(subcommand)]
    pub command: Command,

    /// Threads and verbosity
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// The commands of `book`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the tokens of a text
    Tokens {
        /// Directory of a tokenizer or a checkpoint
        dir: PathBuf,
        /// The text
        text: String,
    },
    /// Print a request and its answer as a model reads them, and which tokens are trained on
    Conversation {
        /// Directory of a tokenizer or a checkpoint
        dir: PathBuf,
        /// What the user says
        prompt: String,
        /// What the assistant answers
        response: String,
    },
    /// Print how much the vectors of two positions have in common, by their distance
    Positions,
    /// Print the tokens whose embeddings point the most nearly in the same direction
    Neighbours {
        /// Checkpoint of a language model
        checkpoint: PathBuf,
        /// Words of one token each
        #[arg(required = true)]
        words: Vec<String>,
    },
    /// Print where each attention head looks from the last token of a text
    Attention {
        /// Checkpoint of a language model
        checkpoint: PathBuf,
        /// The text
        text: String,
    },
    /// Print what every branch adds to the residual stream
    Residual {
        /// Checkpoint of a language model
        checkpoint: PathBuf,
        /// The text
        text: String,
    },
    /// Print where the parameters of models are
    Parameters,
    /// Print the likeliest first tokens of an answer at several temperatures
    Next {
        /// Checkpoint of a language model
        checkpoint: PathBuf,
        /// The user's message
        prompt: String,
    },
    /// Print probability, loss and gradient of a preference by the difference of the scores
    Preferences,
    /// Print the rewards of a made-up response, and three estimates of its divergence
    Rewards,
    /// Print advantages and returns of a made-up response
    Advantages,
    /// Print PPO's clipped objective and its slope by the ratio
    Clip,
    /// Draw the book's figures
    Figures {
        /// Output directory of the book's run
        run: PathBuf,
        /// Directory for the figures
        out: PathBuf,
    },
}
