//! Which tensors of a class hold a parameter, and the numbers moved between the two.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::Class;
use super::tensors::Source;
use crate::params::{Foreign, Output, Parameter, Role, Span, parameters};
use crate::{GptConfig, HostTensor, NamedTensors};

/// Buffers that old versions of transformers wrote among the weights; `#` stands for a block's index.
const BUFFERS: [&str; 8] = [
    "h.#.attn.bias",
    "h.#.attn.masked_bias",
    "position_ids",
    "rotary_emb.inv_freq",
    "layers.#.self_attn.rotary_emb.inv_freq",
    "layers.#.attention.rotary_emb.inv_freq",
    "layers.#.attention.bias",
    "layers.#.attention.masked_bias",
];

/// The name under which a tensor of a file in `class`'s layout is known, or `None` for a buffer: `transformer.` is put
/// before names that lack it, as those of a model without a head do.
pub(super) fn known_as(class: Class, name: &str) -> Option<String> {
    if class == Class::Kindling || ["lm_head.", "embed_out.", "score."].iter().any(|head| name.starts_with(head)) {
        return Some(name.to_owned());
    }
    let name = name.strip_prefix(class.prefix()).unwrap_or(name);
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let pattern: Vec<&str> = name.split('.').map(|part| if is_number(part) { "#" } else { part }).collect();
    let is_buffer = BUFFERS.contains(&pattern.join(".").as_str());
    (!is_buffer).then(|| format!("{}{name}", class.prefix()))
}

/// The tensors of `class` that hold `parameter`: for each span of it the tensor's full name.
pub(super) fn spans(class: Class, parameter: &Parameter<'_>) -> Vec<(String, Span)> {
    let foreign = match class {
        Class::Gpt2 => parameter.gpt2(),
        Class::OpenAiGpt => parameter.openai_gpt(),
        Class::Llama | Class::Mistral | Class::Qwen2 | Class::Qwen3 => parameter.llama(),
        Class::GptNeox => parameter.gpt_neox(),
        Class::Kindling => Foreign::same(&[""]),
    };
    let name = |span: &Span| match (class, parameter.block()) {
        (Class::Kindling, _) => parameter.path(),
        _ if parameter.is_head() => span.name.to_owned(),
        (_, Some(i)) => format!("{}{}.{i}.{}", class.prefix(), class.blocks(), span.name),
        (_, None) => format!("{}{}", class.prefix(), span.name),
    };
    parameter.spans(foreign).into_iter().map(|span| (name(&span), span)).collect()
}

/// The full name of the tensor of `class` for the one parameter of this role.
pub(super) fn name_of(class: Class, config: &GptConfig, output: Output, role: Role) -> Option<String> {
    let parameter = parameters(config, output).find(|parameter| parameter.role() == role)?;
    spans(class, &parameter).into_iter().next().map(|(name, _)| name)
}

/// Some of our parameters out of the tensors of `class`, of which every one that is needed is there in its shape.
pub(super) fn import<'a, T: Copy + Default>(
    class: Class,
    parameters: impl Iterator<Item = Parameter<'a>>,
    mut theirs: NamedTensors<T>,
) -> NamedTensors<T> {
    let mut ours = NamedTensors::new();
    for parameter in parameters {
        let (shape, spans) = (parameter.shape(), spans(class, &parameter));
        if let [(name, span)] = &spans[..]
            && is_whole(span, &shape)
        {
            ours.insert(parameter.path(), theirs.remove(name).expect("checked to be there"));
            continue;
        }
        let mut data = vec![T::default(); shape.iter().product()];
        for (name, span) in &spans {
            let their_data = &theirs[name].data;
            span.for_each_pair(&shape, |our_index, their_index| data[our_index] = their_data[their_index]);
        }
        for (name, _) in &spans {
            if is_read_by(&spans, name) {
                theirs.remove(name); // lest the model be in memory twice
            }
        }
        ours.insert(parameter.path(), HostTensor { shape, data });
    }
    ours
}

/// A tensor of a class, made of our parameters when it is asked for: a second copy of a model is never in memory.
pub(super) enum Assembled<'a> {
    /// Its parts, and which numbers of each are whose.
    Parts { shape: Vec<usize>, parts: Vec<(&'a HostTensor, Span)> },
    /// Of no parameter of ours.
    Own(HostTensor),
}

impl Source for Assembled<'_> {
    fn shape(&self) -> &[usize] {
        match self {
            Self::Parts { shape, .. } => shape,
            Self::Own(tensor) => &tensor.shape,
        }
    }

    fn numbers(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Own(tensor) => Cow::Borrowed(&tensor.data),
            Self::Parts { parts, .. }
                if let [(ours, span)] = &parts[..]
                    && is_whole(span, &ours.shape) =>
            {
                Cow::Borrowed(&ours.data)
            }
            Self::Parts { shape, parts } => {
                let mut numbers = vec![0.0; shape.iter().product()];
                for (ours, span) in parts {
                    span.for_each_pair(&ours.shape, |our_index, their_index| {
                        numbers[their_index] = ours.data[our_index];
                    });
                }
                Cow::Owned(numbers)
            }
        }
    }

    fn not_finite(&self) -> Option<f32> {
        match self {
            Self::Own(tensor) => tensor.not_finite(),
            Self::Parts { parts, .. } => parts.iter().find_map(|(ours, _)| ours.not_finite()),
        }
    }
}

/// The tensors of `class` that hold our parameters.
///
/// # Panics
/// If `ours` are not the parameters of the model.
pub(super) fn export<'a>(
    class: Class,
    config: &GptConfig,
    output: Output,
    ours: &'a NamedTensors,
) -> BTreeMap<String, Assembled<'a>> {
    let mut theirs: BTreeMap<String, Assembled<'a>> = BTreeMap::new();
    let mut n_parameters = 0;
    for parameter in parameters(config, output) {
        let (path, spans) = (parameter.path(), spans(class, &parameter));
        let Some(tensor) = ours.get(&path) else { panic!("tensor `{path}` is missing") };
        assert_eq!(tensor.shape, parameter.shape(), "tensor `{path}` has another shape");
        n_parameters += 1;
        for (name, span) in spans {
            let shape = span.shape.clone();
            let empty = Assembled::Parts { shape, parts: Vec::new() };
            if let Assembled::Parts { parts, .. } = theirs.entry(name).or_insert(empty) {
                parts.push((tensor, span));
            }
        }
    }
    assert_eq!(n_parameters, ours.len(), "the tensors are not those of {config:?}");
    theirs
}

/// Whether `spans` hold the whole tensor `name`, so that no other parameter is in it.
fn is_read_by(spans: &[(String, Span)], name: &str) -> bool {
    let of_tensor = || spans.iter().filter(|(of, _)| of == name).map(|(_, span)| span);
    let n_read: usize = of_tensor().map(|span| span.theirs.len()).sum();
    let d_out = |span: &Span| if span.transposed { span.shape.first() } else { span.shape.last() }.copied();
    of_tensor().next().and_then(d_out) == Some(n_read)
}

/// Whether a parameter and the tensor are the same numbers in the same order.
fn is_whole(span: &Span, shape: &[usize]) -> bool {
    !span.transposed && span.shape == shape
}
