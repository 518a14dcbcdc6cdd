//! Tensors in safetensors files: one file or several with an index, f32, f16 or bf16 in, f32 out.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, TensorInfo, View, serialize_to_file};
use sha2::{Digest, Sha256};

use super::HfError;
use super::config::read_json;
use crate::{HostTensor, NamedTensors};
use base::files::FileError;
use base::hash::hex;
use base::once::is_new;

/// The weights in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// Which of several files holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The longest header that the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes that are read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Reads every tensor of the file at `path` for which `wanted` holds, as f32, with the file's SHA-256.
///
/// # Errors
/// If the file cannot be read, is cut short or damaged, or a wanted tensor has another type than f32, f16 or bf16 or
/// holds a number that is not finite.
pub fn read_file(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(NamedTensors, String), HfError> {
    let mut tensors = Tensors::default();
    let key = |name: &str| wanted(name).then(|| name.to_owned());
    let sha256 = TensorFile::open(path)?.read(&key, &BTreeSet::new(), &mut tensors)?;
    Ok((tensors.wide, sha256))
}

/// Opens a file that may come from anyone, and its length in bytes: a pipe or a device would block or never end.
pub(super) fn open(path: &Path) -> Result<(File, u64), HfError> {
    let metadata = std::fs::metadata(path).map_err(FileError::read(path))?;
    if !metadata.is_file() {
        return Err(FileError::read(path)(io::Error::other("it is not a regular file")).into());
    }
    Ok((File::open(path).map_err(FileError::read(path))?, metadata.len()))
}

/// A safetensors file of which the header is read and found to fit the file's length.
#[derive(Debug)]
struct TensorFile {
    path: PathBuf,
    file: File,
    /// The file's first bytes, up to the tensors.
    head: Vec<u8>,
    header: Metadata,
}

impl TensorFile {
    fn open(path: &Path) -> Result<Self, HfError> {
        let damaged = |reason: String| HfError::Damaged { path: path.to_owned(), reason };
        let (mut file, n_bytes) = open(path)?;
        if n_bytes < 8 {
            return Err(damaged(format!("it has {n_bytes} bytes, expected a header")));
        }
        let mut head = vec![0; 8];
        file.read_exact(&mut head).map_err(FileError::read(path))?;
        let n_header = u64::from_le_bytes(head[..].try_into().expect("eight bytes"));
        if n_header > MAX_HEADER_BYTES.min(n_bytes - 8) {
            return Err(damaged(format!("its header has {n_header} bytes, the file {n_bytes}")));
        }
        head.resize(8 + n_header as usize, 0);
        file.read_exact(&mut head[8..]).map_err(FileError::read(path))?;
        // Checks that the tensors follow each other without gap or overlap and that each is as long as its shape says.
        let header: Metadata = serde_json::from_slice(&head[8..]).map_err(|error| damaged(error.to_string()))?;
        let n_needed = head.len() + header.data_len();
        if n_needed as u64 != n_bytes {
            return Err(damaged(format!("its header describes {n_needed} bytes, the file has {n_bytes}")));
        }
        Ok(Self { path: path.to_owned(), file, head, header })
    }

    /// Adds the tensors to which `key` gives a name to `tensors`, under that name, those of `narrow` in bf16; the result is
    /// the SHA-256 of the file.
    fn read(
        self,
        key: &impl Fn(&str) -> Option<String>,
        narrow: &BTreeSet<String>,
        tensors: &mut Tensors,
    ) -> Result<String, HfError> {
        let Self { path, file, head, header } = self;
        let mut chunks = Chunks { path, file, sha256: Sha256::new(), buffer: vec![0; CHUNK_BYTES] };
        chunks.sha256.update(&head);
        for name in header.offset_keys() {
            let TensorInfo { dtype, shape, data_offsets: (start, end) } = header.info(&name).expect("its own name");
            let (shape, n_bytes) = (shape.clone(), end - start);
            let Some(key) = key(&name) else {
                chunks.each(n_bytes, |_| {})?;
                continue;
            };
            if narrow.contains(&key) {
                let data = chunks.numbers(&name, *dtype, n_bytes, bf16::from_f32)?;
                tensors.narrow.insert(key, HostTensor { shape, data });
            } else {
                let data = chunks.numbers(&name, *dtype, n_bytes, |x| x)?;
                tensors.wide.insert(key, HostTensor { shape, data });
            }
        }
        Ok(hex(&chunks.sha256.finalize()))
    }
}

/// Tensors of files by the names they are wanted under.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    /// In f32.
    pub wide: NamedTensors,
    /// In bf16: rounded to the nearest, and of two as near to the even one.
    pub narrow: NamedTensors<bf16>,
}

/// The tensors of a file, in the order in which they lie in it.
struct Chunks {
    path: PathBuf,
    file: File,
    /// Of what was read.
    sha256: Sha256,
    buffer: Vec<u8>,
}

impl Chunks {
    /// Calls `at` with the next `n_left` bytes, a part at a time.
    fn each(&mut self, mut n_left: usize, mut at: impl FnMut(&[u8])) -> Result<(), HfError> {
        while n_left > 0 {
            let chunk = &mut self.buffer[..n_left.min(CHUNK_BYTES)];
            n_left -= chunk.len();
            self.file.read_exact(chunk).map_err(FileError::read(&self.path))?;
            self.sha256.update(&*chunk);
            at(chunk);
        }
        Ok(())
    }

    /// The numbers of tensor `name`, which has the next `n_bytes`.
    fn numbers<T: Copy + Into<f32>>(
        &mut self,
        name: &str,
        dtype: Dtype,
        n_bytes: usize,
        of: impl Fn(f32) -> T,
    ) -> Result<Vec<T>, HfError> {
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(HfError::Dtype { path, name, dtype: format!("{dtype:?}") });
        }
        let mut data = Vec::with_capacity(n_bytes * 8 / dtype.bitsize());
        self.each(n_bytes, |chunk| match dtype {
            Dtype::F32 => data.extend(chunk.as_chunks().0.iter().map(|b| of(f32::from_le_bytes(*b)))),
            Dtype::F16 => data.extend(chunk.as_chunks().0.iter().map(|b| of(f16::from_le_bytes(*b).to_f32()))),
            _ => data.extend(chunk.as_chunks().0.iter().map(|b| of(bf16::from_le_bytes(*b).to_f32()))),
        })?;
        check_finite(&self.path, name, &data)?;
        Ok(data)
    }
}

/// The weights in a directory, in one file or the shards of an index; headers are read, tensors are not.
#[derive(Debug)]
pub(super) struct Weights {
    files: Vec<TensorFile>,
    /// The path of its file and the shape of every tensor, by the name it is wanted under.
    pub tensors: BTreeMap<String, (PathBuf, Vec<usize>)>,
}

impl Weights {
    /// Looks into the files in `dir`. Tensors are known by the name that `key` gives them; `None` leaves one out.
    pub fn open(dir: &Path, key: impl Fn(&str) -> Option<String>) -> Result<Self, HfError> {
        let (single, index) = (dir.join(WEIGHTS_FILE), dir.join(INDEX_FILE));
        let files = match (single.is_file(), index.is_file()) {
            (true, _) => vec![TensorFile::open(&single)?],
            (false, true) => Self::shards(dir, &index, &key)?,
            (false, false) => {
                let pickled = dir.join("pytorch_model.bin").is_file();
                return Err(HfError::NoWeights { dir: dir.to_owned(), pickled });
            }
        };
        let mut tensors = BTreeMap::new();
        for file in &files {
            for (name, info) in file.header.tensors() {
                let Some(key) = key(&name) else { continue };
                if tensors.insert(key, (file.path.clone(), info.shape.clone())).is_some() {
                    return Err(HfError::Unused { path: file.path.clone(), name });
                }
            }
        }
        Ok(Self { files, tensors })
    }

    /// Looks into the one file at `path`.
    pub fn of_file(path: &Path) -> Result<Self, HfError> {
        let file = TensorFile::open(path)?;
        let of = |(name, info): (String, &TensorInfo)| (name, (path.to_owned(), info.shape.clone()));
        let tensors = file.header.tensors().into_iter().map(of).collect();
        Ok(Self { files: vec![file], tensors })
    }

    /// The files that the index names, each with the tensors that the index says and no others.
    fn shards(dir: &Path, index: &Path, key: impl Fn(&str) -> Option<String>) -> Result<Vec<TensorFile>, HfError> {
        let content: Index = read_json(index)?;
        let mut names_of_shard: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (name, shard) in &content.weight_map {
            if Path::new(shard).file_name().is_none_or(|file| file != shard.as_str()) {
                let reason = format!("`{shard}` is not a file name");
                return Err(HfError::Damaged { path: index.to_owned(), reason });
            }
            names_of_shard.entry(shard).or_default().insert(name);
        }
        let mut files = Vec::with_capacity(names_of_shard.len());
        for (shard, names) in names_of_shard {
            let file = TensorFile::open(&dir.join(shard))?;
            let is_wanted = |name: &&str| key(name).is_some();
            if let Some(name) = names.iter().find(|name| is_wanted(name) && file.header.info(name).is_none()) {
                return Err(HfError::Missing { path: file.path, name: (*name).to_owned() });
            }
            let mut found = file.header.offset_keys().into_iter();
            if let Some(name) = found.find(|name| is_wanted(&name.as_str()) && !names.contains(name.as_str())) {
                return Err(HfError::Unused { path: file.path, name });
            }
            files.push(file);
        }
        Ok(files)
    }

    /// The tensors to which `key` gives a name, those of `narrow` in bf16, and the SHA-256 of the one file, or that of the
    /// shards' hashes in the order of their names.
    pub fn read(
        self,
        key: impl Fn(&str) -> Option<String>,
        narrow: &BTreeSet<String>,
    ) -> Result<(Tensors, String), HfError> {
        let is_rounded = |(name, info): (String, &TensorInfo)| {
            info.dtype != Dtype::BF16 && key(&name).is_some_and(|key| narrow.contains(&key))
        };
        if let Some(file) = self.files.iter().find(|file| file.header.tensors().into_iter().any(is_rounded)) {
            let path = file.path.display();
            if is_new(&format!("rounded {path}")) {
                tracing::info!("`{path}`: matrices are rounded to bf16, to the nearest, ties to even");
            }
        }
        let mut tensors = Tensors::default();
        let read = |file: TensorFile| file.read(&key, narrow, &mut tensors);
        let hashes = self.files.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let sha256 = match &hashes[..] {
            [one] => one.clone(),
            shards => hex(&Sha256::digest(shards.concat())),
        };
        Ok((tensors, sha256))
    }
}

/// Numbers to write.
pub(super) trait Source {
    /// Size of each axis.
    fn shape(&self) -> &[usize];

    /// The numbers, row-major.
    fn numbers(&self) -> Cow<'_, [f32]>;

    /// A number that is not finite.
    fn not_finite(&self) -> Option<f32>;
}

impl Source for HostTensor {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn numbers(&self) -> Cow<'_, [f32]> {
        Cow::Borrowed(&self.data)
    }

    fn not_finite(&self) -> Option<f32> {
        self.data.iter().find(|x| !x.is_finite()).copied()
    }
}

/// Writes `tensors` to the file at `path` as f32, under the names given.
///
/// # Errors
/// If a number is not finite or the file cannot be written.
pub fn write_file<'a>(path: &Path, tensors: impl IntoIterator<Item = (String, &'a HostTensor)>) -> Result<(), HfError> {
    write_all(path, tensors)
}

/// [`write_file`] for tensors that are made one after the other, as they are written.
pub(super) fn write_all<'a, S: Source + 'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'a S)>,
) -> Result<(), HfError> {
    let tensors: Vec<(String, Bytes<'a, S>)> =
        tensors.into_iter().map(|(name, tensor)| (name, Bytes(tensor))).collect();
    for (name, Bytes(tensor)) in &tensors {
        if let Some(value) = tensor.not_finite() {
            return Err(HfError::NotFinite { path: path.to_owned(), name: name.clone(), value });
        }
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let failed = || FileError::write(path);
    // The library writes a temporary file that only its owner may read; others may read what `File::create` allows.
    let permissions = std::fs::File::create(path).and_then(|file| file.metadata()).map_err(failed())?.permissions();
    serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => failed()(source),
        other => failed()(io::Error::other(other)),
    })?;
    Ok(std::fs::set_permissions(path, permissions).map_err(failed())?)
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn check_finite<T: Copy + Into<f32>>(path: &Path, name: &str, data: &[T]) -> Result<(), HfError> {
    match data.iter().position(|&x| !x.into().is_finite()) {
        None => Ok(()),
        Some(index) => {
            Err(HfError::NotFinite { path: PathBuf::from(path), name: name.to_owned(), value: data[index].into() })
        }
    }
}

/// A tensor as little-endian f32.
struct Bytes<'a, S>(&'a S);

impl<S: Source> View for Bytes<'_, S> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        for (bytes, number) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(&*self.0.numbers()) {
            *bytes = number.to_le_bytes();
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.0.shape().iter().product::<usize>()
    }
}
