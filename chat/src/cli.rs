//! Flags only.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use common::cli::{ProcessArgs, RuntimeArgs};
use common::exit::UsageError;
use common::generate::{BeamConfig, GenerateError, SamplingConfig, TEMPERATURE_EPS};
use common::score::Ensemble;

/// Talk to a model
///
/// Without a command it holds a conversation. In a terminal, /help lists the commands; from a pipe, every line is a
/// message or such a command, and only the answers are printed; a message that is too long gets an empty line.
#[derive(Debug, Parser)]
#[command(
    name = "chat",
    version,
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Example:\n  \
        chat --checkpoint runs/tiny/ppo\n  \
        chat generate --checkpoint runs/tiny/ppo --prompt 'Tell me a story about a fox.' --temperature 0"
)]
pub struct Cli {
    /// The command, instead of a conversation
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Flags of a conversation
    #[command(flatten)]
    pub conversation: ConversationArgs,
}

/// The commands of `chat`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer one prompt
    Generate(Box<GenerateArgs>),
    /// Add an adapter into the weights of its base
    Merge(MergeArgs),
    /// Answer requests over HTTP, as OpenAI's API does
    Serve(Box<ServeArgs>),
}

/// Flags of `chat serve`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  chat serve --checkpoint sft=runs/tiny/sft --checkpoint ppo=runs/tiny/ppo --port 8080\n\n\
        docs/serve.md says what is answered, and how."
)]
pub struct ServeArgs {
    /// Checkpoint of a language model, and the name that requests choose it by; by default that of its directory
    /// (repeatable)
    #[arg(long, value_name = "[NAME=]DIR", required = true, value_parser = named_checkpoint)]
    pub checkpoint: Vec<NamedCheckpoint>,

    /// Reward model that scores conversations
    #[arg(long, value_name = "DIR")]
    pub reward_model: Option<PathBuf>,

    /// File that the judgements made on the page are appended to, as preference records (.jsonl)
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,

    /// Pairs of answers that people judge on the page besides those they ask for, such as a recipe's questions (.jsonl)
    #[arg(long, value_name = "FILE", requires = "labels")]
    pub questions: Option<PathBuf>,

    /// Folder of training runs that the page shows as they go on
    #[arg(long, value_name = "DIR")]
    pub runs: Option<PathBuf>,

    /// Name or address to listen on; by default this machine alone can connect
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8080)]
    pub port: u16,

    /// File with the key that every client has to send
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Origin whose pages may send requests from a browser, such as <https://chat.example> (repeatable)
    #[arg(long, value_name = "ORIGIN")]
    pub allow_origin: Vec<String>,

    /// Also log the texts of requests and answers
    #[arg(long)]
    pub log_text: bool,

    /// Limits of the server
    #[command(flatten)]
    pub limits: ServeLimits,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// What `chat serve` takes at most.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct ServeLimits {
    /// Answers that each model decodes together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub slots: u64,

    /// Answers that wait for each model; what comes beyond is refused with 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(0..=100_000))]
    pub queue: u64,

    /// Tokens of an answer; also where a conversation does not say how many
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub max_tokens: u64,

    /// Tokens of a prompt and its answer together, where the model's context is longer
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u64).range(2..=1_000_000_000))]
    pub max_context: u64,

    /// Bytes of a request
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub max_body: u64,

    /// Seconds from a request to the end of its answer
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,

    /// Seconds that running requests have left after Ctrl-C or SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub grace: u64,
}

/// A checkpoint with the name that requests choose it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedCheckpoint {
    /// The name.
    pub name: String,
    /// The checkpoint's directory.
    pub dir: PathBuf,
}

/// Parses `[NAME=]DIR`. The name goes into the log, so it is plain.
fn named_checkpoint(text: &str) -> Result<NamedCheckpoint, String> {
    let (name, dir) = match text.split_once('=') {
        Some((name, dir)) if !name.contains('/') => (name.to_owned(), PathBuf::from(dir)),
        _ => {
            let dir = PathBuf::from(text);
            // `.` has no name, but its directory has.
            let whole = dir.canonicalize().unwrap_or_else(|_| dir.clone());
            (whole.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(), dir)
        }
    };
    let is_plain = |c: char| c.is_alphanumeric() || "-_.:@+".contains(c);
    if name.is_empty() || !name.chars().all(is_plain) {
        return Err("expected NAME=DIR with a name of letters, digits and any of `-_.:@+`".to_owned());
    }
    Ok(NamedCheckpoint { name, dir })
}

/// Flags of `chat merge`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  chat merge --checkpoint runs/sft-lora --out runs/sft")]
pub struct MergeArgs {
    /// Checkpoint with an adapter, of a language model or a reward model, as a stage or PEFT writes it
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Directory for the merged checkpoint
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Base of the adapter, in place of the one that it names
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,

    /// Replace an earlier checkpoint in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Threads and verbosity
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// Flags of a conversation.
#[derive(Debug, Args)]
pub struct ConversationArgs {
    /// Checkpoint of a language model; never absent where there is no command
    #[arg(long, value_name = "DIR", required = true, help = "Checkpoint of a language model")]
    pub checkpoint: Option<PathBuf>,

    /// System message that the conversation begins with
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Whether the model reasons before it answers, if its chat template has the switch `enable_thinking`
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub thinking: Option<Switch>,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,

    /// Sampling or beam search
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Flags of `chat generate`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  chat generate --checkpoint runs/tiny/pretrain --raw --prompt 'Once upon a time' --seed 7"
)]
pub struct GenerateArgs {
    /// Checkpoint of a language model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Prompt to answer; `-` reads it from standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: String,

    /// Continue the prompt as plain text after <|bos|>, instead of answering it as a user's message
    #[arg(long)]
    pub raw: bool,

    /// System message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,

    /// Whether the model reasons before it answers, if its chat template has the switch `enable_thinking`
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true, conflicts_with = "raw")]
    pub thinking: Option<Switch>,

    /// Print one JSON object for each answer: text, token ids, their log-probabilities and the finish reason
    #[arg(long)]
    pub json: bool,

    /// Sample N answers, separated by lines of `---`; answer I of a seed is the same for every N
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=MAX_SAMPLES))]
    pub num_samples: u64,

    /// Sample N answers and print the one that --reward-model scores highest
    #[arg(
        long,
        value_name = "N",
        requires = "reward_model",
        conflicts_with_all = ["num_samples", "raw"],
        value_parser = clap::value_parser!(u64).range(1..=MAX_SAMPLES)
    )]
    pub best_of: Option<u64>,

    /// Checkpoint of the reward model that chooses with --best-of; repeated, --ensemble says how the scores of all become one
    #[arg(long, value_name = "DIR", requires = "best_of")]
    pub reward_model: Vec<PathBuf>,

    /// How the scores of several reward models become one: mean, worst or mean-less-variance [default: mean]
    #[arg(long, value_name = "NAME", requires = "reward_model")]
    pub ensemble: Option<Ensemble>,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,

    /// Sampling or beam search
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Parses a seed. A negative one stands for the number with the same bits, here as in requests to `chat serve`.
fn seed(text: &str) -> Result<u64, String> {
    let found = text.parse::<u64>().or_else(|_| text.parse::<i64>().map(i64::cast_unsigned));
    found.map_err(|_| format!("expected a whole number of 64 bits, from {} to {}", i64::MIN, u64::MAX))
}

/// A choice of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// Most answers to one prompt.
const MAX_SAMPLES: u64 = 100_000;

/// How answers are chosen.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Maximum tokens per answer
    #[arg(long, value_name = "N", default_value_t = 256, allow_negative_numbers = true)]
    pub max_tokens: usize,

    /// Sampling temperature; 0 always takes the most likely token [default: 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,

    /// Sample from the K most likely tokens; 0 for all [default: 0]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,

    /// Sample from the most likely tokens with a total probability of P [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,

    /// Divides positive and multiplies negative logits of tokens seen before; 1 disables it
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f64,

    /// Search for the most likely answer with N beams instead of sampling; 1 disables it
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub beams: usize,

    /// With --beams: divide an answer's log-probability by its length to this power [default: 1]
    #[arg(long, value_name = "L", allow_negative_numbers = true)]
    pub length_penalty: Option<f64>,

    /// Random seed, any whole number of 64 bits: the same seed gives the same answers
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = seed)]
    pub seed: u64,

    /// Text at which the answer ends, itself left out (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}

/// How to look for an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Strategy {
    /// Token by token.
    Sample(SamplingConfig),
    /// The best of several.
    Search(BeamConfig),
}

impl SamplingArgs {
    /// Whether answers are drawn, so that two can differ.
    pub(crate) fn is_random(&self) -> bool {
        self.beams == 1 && self.temperature.is_none_or(|temperature| temperature >= TEMPERATURE_EPS)
    }

    /// The strategy that the flags ask for; answers end at the tokens `stop`.
    ///
    /// # Errors
    /// [`UsageError`] for a value outside its range and for flags that exclude each other.
    pub(crate) fn strategy(&self, stop: Vec<u32>) -> Result<Strategy, UsageError> {
        if self.stop.iter().any(String::is_empty) {
            return Err(UsageError("invalid `--stop`: expected a text, found ``".to_owned()));
        }
        let (max_tokens, repetition_penalty) = (self.max_tokens, self.repetition_penalty);
        if self.beams == 1 {
            let sampling = SamplingConfig {
                temperature: self.temperature.unwrap_or(0.8),
                top_k: self.top_k.unwrap_or(0),
                top_p: self.top_p.unwrap_or(0.95),
                repetition_penalty,
                max_tokens,
                stop,
                ..SamplingConfig::default()
            };
            sampling.validate().map_err(|error| usage_error(&error))?;
            if self.length_penalty.is_some() {
                return Err(UsageError("`--length-penalty` needs `--beams` of at least 2".to_owned()));
            }
            return Ok(Strategy::Sample(sampling));
        }
        let length_penalty = self.length_penalty.unwrap_or(1.0);
        let search = BeamConfig { n_beams: self.beams, length_penalty, repetition_penalty, max_tokens, stop };
        search.validate().map_err(|error| usage_error(&error))?;
        let sampling = [
            ("temperature", self.temperature.is_some_and(|temperature| temperature != 0.0)),
            ("top-k", self.top_k.is_some()),
            ("top-p", self.top_p.is_some()),
        ];
        if let Some((flag, _)) = sampling.iter().find(|(_, given)| *given) {
            return Err(UsageError(format!(
                "`--beams {}` cannot be used with `--{flag}`: beam search does not sample",
                self.beams
            )));
        }
        Ok(Strategy::Search(search))
    }
}

/// A setting outside its range, by the name of its flag.
fn usage_error(error: &GenerateError) -> UsageError {
    UsageError(match error {
        GenerateError::InvalidOption { name, expected, found } => {
            let flag = name.trim_start_matches("n_").replace('_', "-");
            format!("invalid `--{flag}`: expected {expected}, found `{found}`")
        }
        other => other.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn sampling(flags: &[&str]) -> SamplingArgs {
        let base = ["chat", "--checkpoint", "c"];
        Cli::try_parse_from(base.iter().chain(flags)).unwrap().conversation.sampling
    }

    fn usage(flags: &[&str]) -> String {
        sampling(flags).strategy(vec![]).unwrap_err().to_string()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_conversation_is_what_happens_without_a_command() {
        let cli = Cli::try_parse_from(["chat", "--checkpoint", "c", "--seed", "3"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.conversation.sampling.seed, 3);
        let cli = Cli::try_parse_from(["chat", "generate", "--checkpoint", "c", "--prompt", "-x"]).unwrap();
        assert!(cli.conversation.checkpoint.is_none());
        assert!(matches!(cli.command, Some(Command::Generate(args)) if args.prompt == "-x"));
    }

    #[test]
    fn a_checkpoint_has_the_name_of_its_directory_unless_another_is_given() {
        let parse = |text: &str| named_checkpoint(text).map(|NamedCheckpoint { name, dir }| (name, dir));
        assert_eq!(parse("runs/tiny/ppo"), Ok(("ppo".to_owned(), PathBuf::from("runs/tiny/ppo"))));
        assert_eq!(parse("new=runs/a=b"), Ok(("new".to_owned(), PathBuf::from("runs/a=b"))));
        assert_eq!(parse("runs/a=b/sft"), Ok(("sft".to_owned(), PathBuf::from("runs/a=b/sft"))));
        for wrong in ["=runs/sft", "two words=runs/sft", "a\nb=runs/sft", ""] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_seed_is_any_whole_number_of_64_bits() {
        for (text, expected) in
            [("7", 7), ("-1", u64::MAX), ("-9223372036854775808", 1 << 63), ("18446744073709551615", u64::MAX)]
        {
            assert_eq!(sampling(&["--seed", text]).seed, expected);
        }
        for wrong in ["1.5", "18446744073709551616", "-9223372036854775809", "x", ""] {
            assert!(seed(wrong).is_err_and(|error| error.starts_with("expected a whole number of 64 bits")), "{wrong}");
        }
    }

    #[test]
    fn flags_become_a_strategy() {
        let expected = SamplingConfig {
            temperature: 0.8,
            top_p: 0.95,
            max_tokens: 256,
            stop: vec![5],
            ..SamplingConfig::default()
        };
        assert_eq!(sampling(&[]).strategy(vec![5]).unwrap(), Strategy::Sample(expected));
        let expected = BeamConfig { n_beams: 3, length_penalty: 0.5, max_tokens: 9, ..BeamConfig::default() };
        let args = sampling(&["--beams", "3", "--length-penalty", "0.5", "--max-tokens", "9", "--temperature", "0"]);
        assert_eq!(args.strategy(vec![]).unwrap(), Strategy::Search(expected));
    }

    #[test]
    fn values_out_of_range_are_wrong_usage() {
        for (flag, value) in [
            ("--temperature", "-0.5"),
            ("--temperature", "inf"),
            ("--temperature", "NaN"),
            ("--top-p", "0"),
            ("--top-p", "1.5"),
            ("--repetition-penalty", "0"),
            ("--repetition-penalty", "1e-300"),
            ("--max-tokens", "0"),
            ("--beams", "0"),
            ("--beams", "18446744073709551615"),
            ("--stop", ""),
        ] {
            let message = usage(&[flag, value]);
            assert!(message.starts_with(&format!("invalid `{flag}`: expected ")), "{message}");
        }
        assert!(usage(&["--beams", "2", "--temperature", "0.5"]).contains("`--temperature`"));
        assert!(usage(&["--beams", "2", "--top-k", "5"]).contains("`--top-k`"));
        let message = usage(&["--beams", "2", "--length-penalty", "1e6"]);
        assert!(message.starts_with("invalid `--length-penalty`: expected "), "{message}");
        assert!(usage(&["--length-penalty", "2"]).contains("`--beams`"));
    }
}
