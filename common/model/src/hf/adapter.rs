//! Low-rank adapters in PEFT's layout, both ways.
//!
//! `adapter_config.json` has the settings and where the base lies, `adapter_model.safetensors` the matrices
//! `base_model.model.<module of the base>.lora_A.weight`, `[rank, d_in]`, and `…lora_B.weight`, `[d_out, rank]`, and for a
//! reward model the head, `base_model.model.score.weight`. What PEFT has no place for is in a `config.json` beside
//! them, which PEFT does not read: the architecture, a reward model's constant, the base's hash, the ids of special
//! tokens. A directory that PEFT wrote has none.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use base::files::FileError;
use serde_json::{Map, Value, json};

use super::config::{CONFIG_FILE, GENERATION_FILE, Parsed, read_json};
use super::tensors::Weights;
use super::{Class, Head, HfError, TokenIds, names, render, write_file};
use crate::params::{Output, Parameter, Role, Span, parameters, path_of};
use crate::{ALL_LINEAR, AdapterPlace, Adapters, GptConfig, HostTensor, LoraConfig, NamedTensors};

/// The settings of an adapter.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// Its tensors.
pub const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Before the name of a module of the base.
const PREFIX: &str = "base_model.model.";

/// The key of config.json for the hash of the base's weights.
const BASE_SHA256: &str = "base_weights_sha256";

/// Settings that change what an adapter computes, or what it is added to, and the one value of each that is read. Other
/// keys are of training alone, or have no effect without one of these.
const REFUSED: [(&str, &str); 21] = [
    ("use_dora", "`false`"),
    ("use_qalora", "`false`"),
    ("use_bdlora", "`null`"),
    ("lora_bias", "`false`"),
    ("rank_pattern", "none: one rank for all layers"),
    ("alpha_pattern", "none: one `lora_alpha` for all layers"),
    ("layer_replication", "`null`: the layers of the base"),
    ("layers_to_transform", "`null`: all layers"),
    ("layers_pattern", "`null`"),
    ("exclude_modules", "`null`"),
    ("target_parameters", "`null`"),
    ("trainable_token_indices", "`null`: the embeddings of the base"),
    ("alora_invocation_tokens", "`null`: an adapter that is always on"),
    ("arrow_config", "`null`"),
    ("corda_config", "`null`"),
    ("kasa_config", "`null`"),
    ("lora_ga_config", "`null`"),
    ("monteclora_config", "`null`"),
    ("velora_config", "`null`"),
    ("loftq_config", "none: weights of the base as they are"),
    ("megatron_config", "`null`"),
];

/// How the matrices may have begun for the base to be what its directory holds; other ways change the base's weights.
const INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// The base of an adapter, as its files name it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Base {
    /// The directory, or a name on the hub; `None` where nothing is said.
    pub path: Option<String>,
    /// SHA-256 of its weights, where it was recorded.
    pub sha256: Option<String>,
}

/// What the JSON files of an adapter's directory say.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFiles {
    /// Its base.
    pub base: Base,
    /// Rank, scale, dropout and targets.
    pub lora: LoraConfig,
    /// The head of the adapted model.
    pub head: Head,
    /// The architecture it was trained in, where it was recorded.
    pub config: Option<GptConfig>,
    /// The ids of special tokens, where they were recorded.
    pub tokens: TokenIds,
}

/// An adapter on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostAdapter {
    /// Its settings and places.
    pub adapters: Adapters,
    /// The head of the adapted model.
    pub head: Head,
    /// Its tensors under our own paths, those of [`Gpt::to_trained`](crate::Gpt::to_trained) or
    /// [`ScalarGpt::to_trained`](crate::ScalarGpt::to_trained).
    pub tensors: NamedTensors,
}

/// A module of the base that has an adapter of its own: one linear layer there, a range of output channels of one of ours.
struct Target {
    /// Its name in the base.
    name: String,
    /// The spans of our matrix that it holds.
    spans: Vec<Span>,
}

impl Target {
    /// The modules that hold the matrix `linear` in `class`, in the order of our output channels.
    fn all(class: Class, linear: &Parameter<'_>) -> Vec<Self> {
        let mut targets: Vec<Self> = Vec::new();
        for (tensor, span) in names::spans(class, linear) {
            let name = tensor.strip_suffix(".weight").unwrap_or(&tensor);
            match targets.iter_mut().find(|target| target.name == name) {
                Some(target) => target.spans.push(span),
                None => targets.push(Self { name: name.to_owned(), spans: vec![span] }),
            }
        }
        targets
    }

    /// Our output channels.
    fn part(&self) -> Range<usize> {
        let start = self.spans.iter().map(|span| span.ours.start).min().unwrap_or(0);
        start..self.spans.iter().map(|span| span.ours.end).max().unwrap_or(0)
    }

    /// Whether PEFT adapts it for the target `name`.
    fn is_called(&self, name: &str) -> bool {
        self.name == name || self.name.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
    }

    /// The last part of its name.
    fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }

    /// PEFT's names of its two matrices.
    fn tensors(&self) -> [String; 2] {
        ["lora_A", "lora_B"].map(|matrix| format!("{PREFIX}{}.{matrix}.weight", self.name))
    }
}

/// Where adapters with the settings `lora` stand in the model that `config` describes.
///
/// # Errors
/// If a target is the name of no linear layer.
pub fn adapters_of(config: &GptConfig, lora: &LoraConfig) -> Result<Adapters, HfError> {
    let class = Class::of(config);
    let (mut parts, mut known, mut met) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    for linear in parameters(config, Output::Logits).filter(|parameter| parameter.role().takes_adapter()) {
        let mut of_layer = Vec::new();
        for target in Target::all(class, &linear) {
            let called: Vec<&String> =
                lora.targets.iter().filter(|name| *name == ALL_LINEAR || target.is_called(name)).collect();
            if !called.is_empty() {
                of_layer.push(target.part());
            }
            met.extend(called);
            known.insert(target.short_name().to_owned());
        }
        if !of_layer.is_empty() {
            parts.insert(linear.path(), of_layer);
        }
    }
    match lora.targets.iter().find(|name| !met.contains(name)) {
        Some(target) => Err(HfError::UnknownTarget { target: target.clone(), known: known.into_iter().collect() }),
        None => Ok(Adapters { lora: lora.clone(), parts }),
    }
}

impl AdapterFiles {
    /// Reads `adapter_config.json` in `dir`, and the `config.json` beside it if there is one.
    ///
    /// # Errors
    /// If a file is damaged, or the adapter is of a kind that computes something else.
    pub fn read(dir: &Path) -> Result<Self, HfError> {
        let path = dir.join(ADAPTER_CONFIG_FILE);
        let json: Map<String, Value> = read_json(&path)?;
        let file = File { path: &path, json: &json };
        file.refuse_other_kinds()?;
        let lora = file.lora()?;
        let mut head = file.head()?;
        let own = dir.join(CONFIG_FILE);
        let (mut config, mut tokens, mut sha256) = (None, TokenIds::default(), None);
        if own.is_file() {
            let parsed = Parsed::read(dir)?;
            if let (Head::Score { .. }, Some(Head::Score { bias })) = (head, parsed.head) {
                head = Head::Score { bias };
            }
            (config, tokens) = (Some(parsed.config), parsed.tokens);
            let json: Value = read_json(&own)?;
            sha256 = json[BASE_SHA256].as_str().map(str::to_owned);
        }
        let base = json.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { base: Base { path: base, sha256 }, lora, head, config, tokens })
    }
}

/// `adapter_config.json`.
struct File<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
}

impl File<'_> {
    fn optional(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn refuse(&self, key: &str, found: &Value, expected: &str) -> HfError {
        let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
        HfError::Key { path: self.path.to_owned(), key: key.to_owned(), found, expected: expected.to_owned() }
    }

    fn refuse_other_kinds(&self) -> Result<(), HfError> {
        let kind = self.json.get("peft_type").unwrap_or(&Value::Null);
        if kind != "LORA" {
            return Err(self.refuse("peft_type", kind, "`LORA`"));
        }
        for (key, expected) in REFUSED {
            let Some(found) = self.optional(key) else { continue };
            let is_off = match found {
                Value::Bool(on) => !on,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            };
            if !is_off {
                return Err(self.refuse(key, found, expected));
            }
        }
        if let Some(bias) = self.optional("bias").filter(|bias| *bias != "none") {
            return Err(self.refuse("bias", bias, "`none`: the biases of the base"));
        }
        match self.optional("init_lora_weights") {
            Some(Value::String(init)) if !INITS.contains(&init.as_str()) => {
                let expected = "`true`, or a way to begin that leaves the weights of the base as they are";
                Err(self.refuse("init_lora_weights", &json!(init), expected))
            }
            _ => Ok(()),
        }
    }

    fn lora(&self) -> Result<LoraConfig, HfError> {
        let needed = |key: &'static str| {
            self.optional(key).ok_or_else(|| HfError::MissingKey { path: self.path.to_owned(), key })
        };
        let number =
            |key: &'static str, value: &Value| value.as_f64().ok_or_else(|| self.refuse(key, value, "a number"));
        let rank = needed("r")?;
        let targets = match needed("target_modules")? {
            Value::String(name) if name == ALL_LINEAR => vec![name.clone()],
            Value::Array(names) if !names.is_empty() => {
                let name = |name: &Value| name.as_str().map(str::to_owned);
                let names = names.iter().map(name).collect::<Option<BTreeSet<String>>>();
                let names =
                    names.ok_or_else(|| self.refuse("target_modules", &self.json["target_modules"], "names"))?;
                names.into_iter().collect()
            }
            other => return Err(self.refuse("target_modules", other, "a list of names, or `all-linear`")),
        };
        let lora = LoraConfig {
            rank: rank.as_u64().ok_or_else(|| self.refuse("r", rank, "a whole number of at least 1"))? as usize,
            alpha: number("lora_alpha", needed("lora_alpha")?)?,
            dropout: self.optional("lora_dropout").map_or(Ok(0.0), |value| number("lora_dropout", value))?,
            targets,
            rslora: self.optional("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        };
        match lora.validate() {
            Ok(()) => Ok(lora),
            Err(error) => Err(HfError::Damaged { path: self.path.to_owned(), reason: error.to_string() }),
        }
    }

    /// The head that the adapter is for; its constant is 0 in PEFT.
    fn head(&self) -> Result<Head, HfError> {
        let saved: Vec<&str> = match self.optional("modules_to_save") {
            None => Vec::new(),
            Some(Value::Array(names)) => names.iter().map(|name| name.as_str().unwrap_or("?")).collect(),
            Some(other) => return Err(self.refuse("modules_to_save", other, "a list of names")),
        };
        let task = self.json.get("task_type").unwrap_or(&Value::Null);
        let scores = match task.as_str() {
            Some("CAUSAL_LM") => false,
            Some("SEQ_CLS") => true,
            None if task.is_null() => saved.contains(&"score"),
            _ => return Err(self.refuse("task_type", task, "`CAUSAL_LM` or `SEQ_CLS`")),
        };
        // PEFT names the heads of all its classifiers; of ours one is there.
        let heads: &[&str] = if scores { &["score", "classifier"] } else { &[] };
        match saved.iter().find(|name| !heads.contains(name)) {
            Some(_) => Err(self.refuse(
                "modules_to_save",
                &self.json["modules_to_save"],
                if scores { "no more than the head, `score`" } else { "none: weights of the base as they are" },
            )),
            None if scores => Ok(Head::Score { bias: 0.0 }),
            None => Ok(Head::Lm),
        }
    }
}

/// Reads the tensors of the adapter in `dir`, of which [`AdapterFiles::read`] gave `files`, for a base of the architecture
/// `config`. Returns the adapter and the SHA-256 of its file.
///
/// # Errors
/// If the file is missing or damaged, a target is unknown, a tensor is missing, has no place, has another shape or holds a
/// number that is not finite.
pub fn read_adapter(dir: &Path, files: &AdapterFiles, config: &GptConfig) -> Result<(HostAdapter, String), HfError> {
    let path = dir.join(ADAPTER_WEIGHTS_FILE);
    if !path.is_file() {
        let pickled = dir.join("adapter_model.bin").is_file();
        return Err(HfError::NoAdapterWeights { dir: dir.to_owned(), pickled });
    }
    let adapters = adapters_of(config, &files.lora)?;
    let output = files.head.output();
    let weights = Weights::of_file(&path)?;
    let mut expected = BTreeMap::new();
    for place in adapters.places(config, output) {
        for (target, [a, b]) in targets(config, &place) {
            let d_out: usize = target.spans.iter().map(|span| span.theirs.len()).sum();
            expected.insert(a, vec![adapters.lora.rank, place.shapes[0][0]]);
            expected.insert(b, vec![d_out, adapters.lora.rank]);
        }
    }
    if output == Output::Score {
        let name = head_name();
        if !weights.tensors.contains_key(&name) {
            return Err(HfError::NoHead { path, name });
        }
        expected.insert(name, vec![1, config.d_model]);
    }
    for (name, expected) in &expected {
        match weights.tensors.get(name) {
            None => return Err(HfError::AdapterTensor { path, name: name.clone(), is_missing: true }),
            Some((_, found)) if found != expected => {
                let (name, found, expected) = (name.clone(), found.clone(), expected.clone());
                return Err(HfError::AdapterShape { path, name, found, expected, rank: adapters.lora.rank });
            }
            Some(_) => {}
        }
    }
    if let Some(name) = weights.tensors.keys().find(|name| !expected.contains_key(*name)) {
        return Err(HfError::AdapterTensor { path, name: name.clone(), is_missing: false });
    }
    let (theirs, sha256) = weights.read(|name| Some(name.to_owned()), &BTreeSet::new())?;
    let tensors = import(&adapters, config, output, theirs.wide);
    Ok((HostAdapter { adapters, head: files.head, tensors }, sha256))
}

/// The modules of the base that have the parts of an adapter, with PEFT's names of their matrices.
fn targets(config: &GptConfig, place: &AdapterPlace<'_>) -> Vec<(Target, [String; 2])> {
    let all = Target::all(Class::of(config), &place.linear).into_iter();
    let adapted = all.filter(|target| place.parts.contains(&target.part()));
    adapted
        .map(|target| {
            let names = target.tensors();
            (target, names)
        })
        .collect()
}

/// PEFT's name of a reward model's head.
fn head_name() -> String {
    format!("{PREFIX}score.weight")
}

/// The path of the head in a [`ScalarGpt`](crate::ScalarGpt).
fn head_path(config: &GptConfig) -> String {
    path_of(config, Output::Score, Role::ScoreHead).expect("every scalar model has a head")
}

/// Calls `pair` with each number of one part's matrices: which of the two, its index in ours and in theirs.
fn for_each_pair(
    place: &AdapterPlace<'_>,
    rank: usize,
    nth: usize,
    target: &Target,
    mut pair: impl FnMut(usize, usize, usize),
) {
    let [[d_in, a_width], [_, b_width]] = place.shapes;
    for i in 0..d_in {
        for j in 0..rank {
            pair(0, i * a_width + nth * rank + j, j * d_in + i);
        }
    }
    let first: usize = place.parts[..nth].iter().map(Range::len).sum();
    for span in &target.spans {
        for (ours, theirs) in span.ours.clone().zip(span.theirs.clone()) {
            for j in 0..rank {
                pair(1, j * b_width + first + ours - place.parts[nth].start, theirs * rank + j);
            }
        }
    }
}

/// Our tensors out of PEFT's, which are all there in their shapes.
fn import(adapters: &Adapters, config: &GptConfig, output: Output, mut theirs: NamedTensors) -> NamedTensors {
    let mut ours = NamedTensors::new();
    if output == Output::Score {
        ours.insert(head_path(config), theirs.remove(&head_name()).expect("checked to be there"));
    }
    for place in adapters.places(config, output) {
        let mut data = place.shapes.map(|shape| vec![0.0; shape.iter().product()]);
        for (nth, (target, names)) in targets(config, &place).into_iter().enumerate() {
            let from = names.map(|name| theirs.remove(&name).expect("checked to be there").data);
            for_each_pair(&place, adapters.lora.rank, nth, &target, |m, at, other| data[m][at] = from[m][other]);
        }
        for ((path, shape), data) in place.paths.into_iter().zip(place.shapes).zip(data) {
            ours.insert(path, HostTensor { shape: shape.to_vec(), data });
        }
    }
    ours
}

/// PEFT's tensors out of ours.
fn export(adapters: &Adapters, config: &GptConfig, output: Output, ours: &NamedTensors) -> NamedTensors {
    let mut theirs = NamedTensors::new();
    let of = |path: &String| ours.get(path).unwrap_or_else(|| panic!("tensor `{path}` is missing"));
    if output == Output::Score {
        theirs.insert(head_name(), of(&head_path(config)).clone());
    }
    let rank = adapters.lora.rank;
    for place in adapters.places(config, output) {
        let from = place.paths.each_ref().map(of);
        for (tensor, shape) in from.iter().zip(place.shapes) {
            assert_eq!(tensor.shape, shape, "a tensor of `{}` has another shape", place.linear.path());
        }
        for (nth, (target, names)) in targets(config, &place).into_iter().enumerate() {
            let shapes = [[rank, place.shapes[0][0]], [place.parts[nth].len(), rank]];
            let mut data = shapes.map(|shape| vec![0.0; shape.iter().product()]);
            for_each_pair(&place, rank, nth, &target, |m, at, other| data[m][other] = from[m].data[at]);
            for ((name, shape), data) in names.into_iter().zip(shapes).zip(data) {
                theirs.insert(name, HostTensor { shape: shape.to_vec(), data });
            }
        }
    }
    theirs
}

/// Writes an adapter to `dir` as PEFT does, with a `config.json` of the adapted model beside it. `tensors` have our own
/// paths, as in [`HostAdapter`].
///
/// # Errors
/// If a file cannot be written or a number is not finite.
///
/// # Panics
/// If the tensors are not those of the adapter.
pub fn write_adapter(
    dir: &Path,
    config: &GptConfig,
    adapter: &HostAdapter,
    base: &Base,
    tokens: &TokenIds,
) -> Result<Class, HfError> {
    let HostAdapter { adapters, head, tensors } = adapter;
    let class = Class::of(config);
    let (mut description, generation) = render::render(class, config, *head, tokens);
    description[BASE_SHA256] = json!(base.sha256);
    let settings = settings(class, config, adapters, *head, base);
    for (file, content) in [(ADAPTER_CONFIG_FILE, settings), (CONFIG_FILE, description), (GENERATION_FILE, generation)]
    {
        let path = dir.join(file);
        std::fs::write(&path, format!("{content:#}\n")).map_err(FileError::write(&path))?;
    }
    let theirs = export(adapters, config, head.output(), tensors);
    write_file(&dir.join(ADAPTER_WEIGHTS_FILE), theirs.iter().map(|(name, tensor)| (name.clone(), tensor)))?;
    Ok(class)
}

/// `adapter_config.json`.
fn settings(class: Class, config: &GptConfig, adapters: &Adapters, head: Head, base: &Base) -> Value {
    let lora = &adapters.lora;
    let scores = matches!(head, Head::Score { .. });
    let targets: BTreeSet<String> = if lora.targets.iter().any(|name| name == ALL_LINEAR) {
        let places = adapters.places(config, head.output());
        places.flat_map(|place| targets(config, &place)).map(|(target, _)| target.short_name().to_owned()).collect()
    } else {
        lora.targets.iter().cloned().collect()
    };
    // PEFT's type is a whole number, though any is read.
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as u64) } else { json!(lora.alpha) };
    json!({
        "peft_type": "LORA",
        "task_type": if scores { "SEQ_CLS" } else { "CAUSAL_LM" },
        "base_model_name_or_path": base.path,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "use_rslora": lora.rslora,
        "use_dora": false,
        "bias": "none",
        // Its Conv1D layers hold their matrices transposed.
        "fan_in_fan_out": matches!(class, Class::Gpt2 | Class::OpenAiGpt),
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": scores.then_some(["classifier", "score"]),
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": null,
        "layers_pattern": null,
    })
}
