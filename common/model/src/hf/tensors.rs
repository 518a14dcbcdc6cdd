//! Tensors in safetensors files: one file or several with an index, f32, f16 or bf16 in, f32 out.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView, View, serialize_to_file};
use sha2::{Digest, Sha256};

use super::HfError;
use crate::{HostTensor, NamedTensors};
use base::hash::hex;

/// The weights in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// Which of several files holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Reads every tensor of the file at `path` for which `wanted` holds, as f32, with the file's SHA-256.
///
/// # Errors
/// If the file cannot be read, is cut short or damaged, or a wanted tensor has another type than f32, f16 or bf16 or
/// holds a number that is not finite.
pub fn read_file(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(NamedTensors, String), HfError> {
    let bytes = std::fs::read(path).map_err(|source| HfError::Read { path: path.to_owned(), source })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| HfError::Damaged { path: path.to_owned(), reason: error.to_string() })?;
    let mut tensors = NamedTensors::new();
    for (name, view) in file.iter().filter(|(name, _)| wanted(name)) {
        tensors.insert(name.to_owned(), to_host(path, name, &view)?);
    }
    Ok((tensors, hex(&Sha256::digest(&bytes))))
}

/// Reads the weights in `dir`, from one file or the shards of an index; the second value is the SHA-256 of the one
/// file, or that of the shards' hashes in the order of their names.
pub(super) fn read_weights(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<(NamedTensors, String), HfError> {
    let single = dir.join(WEIGHTS_FILE);
    let index = dir.join(INDEX_FILE);
    if single.is_file() || !index.is_file() {
        if !single.is_file() {
            return Err(HfError::NoWeights { dir: dir.to_owned(), pickled: dir.join("pytorch_model.bin").is_file() });
        }
        return read_file(&single, wanted);
    }
    let bytes = std::fs::read(&index).map_err(|source| HfError::Read { path: index.clone(), source })?;
    let damaged = |reason: String| HfError::Damaged { path: index.clone(), reason };
    let content: Index = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let mut names_of_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, shard) in &content.weight_map {
        if Path::new(shard).file_name().is_none_or(|file| file != shard.as_str()) {
            return Err(damaged(format!("`{shard}` is not a file name")));
        }
        names_of_shard.entry(shard).or_default().push(name);
    }
    let mut tensors = NamedTensors::new();
    let mut hashes = Sha256::new();
    for (shard, names) in names_of_shard {
        let path = dir.join(shard);
        let (mut found, hash) = read_file(&path, &wanted)?;
        hashes.update(hash);
        for name in names.into_iter().filter(|name| wanted(name)) {
            let tensor =
                found.remove(name).ok_or_else(|| HfError::Missing { path: path.clone(), name: name.to_owned() })?;
            tensors.insert(name.to_owned(), tensor);
        }
        if let Some(name) = found.into_keys().next() {
            return Err(HfError::Unused { path, name });
        }
    }
    Ok((tensors, hex(&hashes.finalize())))
}

/// Writes `tensors` to the file at `path` as f32, under the names given.
///
/// # Errors
/// If a number is not finite or the file cannot be written.
pub fn write_file<'a>(path: &Path, tensors: impl IntoIterator<Item = (String, &'a HostTensor)>) -> Result<(), HfError> {
    let tensors: Vec<(String, Bytes<'a>)> = tensors.into_iter().map(|(name, tensor)| (name, Bytes(tensor))).collect();
    for (name, Bytes(tensor)) in &tensors {
        check_finite(path, name, &tensor.data)?;
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let write_error = |source| HfError::Write { path: path.to_owned(), source };
    // The library writes a temporary file that only its owner may read; others may read what `File::create` allows.
    let permissions = std::fs::File::create(path).and_then(|file| file.metadata()).map_err(write_error)?.permissions();
    serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => write_error(source),
        other => write_error(std::io::Error::other(other)),
    })?;
    std::fs::set_permissions(path, permissions).map_err(write_error)
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn to_host(path: &Path, name: &str, view: &TensorView<'_>) -> Result<HostTensor, HfError> {
    let bytes = view.data();
    let data: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => {
            return Err(HfError::Dtype { path: path.to_owned(), name: name.to_owned(), dtype: format!("{other:?}") });
        }
    };
    check_finite(path, name, &data)?;
    Ok(HostTensor { shape: view.shape().to_vec(), data })
}

fn check_finite(path: &Path, name: &str, data: &[f32]) -> Result<(), HfError> {
    match data.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(index) => Err(HfError::NotFinite { path: PathBuf::from(path), name: name.to_owned(), value: data[index] }),
    }
}

/// A tensor as little-endian f32.
struct Bytes<'a>(&'a HostTensor);

impl View for Bytes<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        for (bytes, number) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(&self.0.data) {
            *bytes = number.to_le_bytes();
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.0.data.len()
    }
}
