//! Writing a checkpoint so that it is whole or absent.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;

use super::{
    CONFIG_FILE, CheckpointError, MANIFEST_FILE, Manifest, Parent, STATE_DIR, STATE_FILE, Snapshot, State, VALUE_DIR,
    Weights,
};
use crate::files::FileError;
use crate::hash::{sha256_of, sha256_of_file};
use crate::hf::{self, Base, Class, Head, TokenIds};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Makes `out` the checkpoint that `snapshot` describes.
///
/// Everything is written to a directory beside `out` and flushed to the disk, then the two change places in one step:
/// whenever the process or the machine stops, `out` is the checkpoint before or the one after. Files of `out` that a
/// snapshot does not replace (metrics, samples, rollouts) come along, as links to the same data where the file system
/// can. What an earlier process left beside `out` is removed.
///
/// Where directories cannot change places in one step (neither Linux nor macOS, some network file systems), the old
/// one steps aside first: a process killed in between leaves it whole, as `.NAME.tmp-PID-old`, with `out` absent.
///
/// # Errors
/// If a number is not finite or something cannot be written; `out` is then as before.
pub fn save(out: &Path, snapshot: &Snapshot<'_>) -> Result<(), CheckpointError> {
    save_with(out, snapshot, &mut |_| Ok(()))
}

/// [`save`], with `before` called with the path of each file and rename about to be made: tests make it fail.
pub(super) fn save_with(
    out: &Path,
    snapshot: &Snapshot<'_>,
    before: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    // A link is followed, so that what it points to is exchanged and not the link.
    let target = if out.exists() { out.canonicalize() } else { std::path::absolute(out) }.map_err(write_error(out))?;
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(write_error(&target)(io::ErrorKind::InvalidInput.into()));
    };
    fs::create_dir_all(parent).map_err(write_error(parent))?;
    remove_leftovers(parent, name);
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".tmp-{}", std::process::id()));
    let temporary = parent.join(temporary);
    let written = write_all(&temporary, &target, snapshot, before)
        .and_then(|()| before(&target).and_then(|()| exchange(&temporary, &target)).map_err(write_error(&target)));
    // After the exchange the old checkpoint is there, after a failure the unfinished one. What cannot be removed now
    // is removed by the next save.
    let _ = fs::remove_dir_all(&temporary);
    written.map_err(|error| as_of(error, &temporary, &target))?;
    let _ = sync(parent);
    Ok(())
}

/// For `map_err` where `path` is written.
fn write_error(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    move |source| CheckpointError::Write { path: path.to_owned(), source }
}

/// `error` in terms of the checkpoint: the directory beside it is gone when the user reads this.
fn as_of(error: CheckpointError, temporary: &Path, target: &Path) -> CheckpointError {
    match error {
        CheckpointError::Write { path, source } => {
            let path = path.strip_prefix(temporary).map_or_else(|_| path.clone(), |file| target.join(file));
            CheckpointError::Write { path, source }
        }
        other => other,
    }
}

fn write_all(
    dir: &Path,
    live: &Path,
    snapshot: &Snapshot<'_>,
    before: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    before(dir).and_then(|()| fs::create_dir(dir)).map_err(write_error(dir))?;
    let tokens = snapshot.tokenizer.map(token_ids).unwrap_or_default();
    let mut manifest = snapshot.manifest.clone();
    manifest.files_sha256.clear();
    manifest.weights_sha256 = write_model(dir, &snapshot.weights, &tokens, before)?;
    if let Some(value) = &snapshot.value {
        let value_dir = dir.join(VALUE_DIR);
        fs::create_dir(&value_dir).map_err(write_error(&value_dir))?;
        let sha256 = write_model(&value_dir, value, &tokens, before)?;
        manifest.files_sha256.insert(format!("{VALUE_DIR}/{}", value.file()), sha256);
    }
    if let Some(state) = &snapshot.state {
        write_state(&dir.join(STATE_DIR), state, &mut manifest, before)?;
    }
    if let Some(tokenizer) = snapshot.tokenizer {
        before(&dir.join("tokenizer.json")).map_err(write_error(dir))?;
        tokenizer.save(dir).map_err(|error| match error {
            TokenizerError::File(FileError::Write { path, source }) => CheckpointError::Write { path, source },
            other => other.into(),
        })?;
    }
    manifest.tokenizer_sha256 = snapshot.tokenizer.map(Tokenizer::sha256);
    manifest.chat_template_sha256 = snapshot.tokenizer.map(Tokenizer::chat_template_sha256);
    let path = dir.join(CONFIG_FILE);
    before(&path).and_then(|()| fs::write(&path, snapshot.config_toml)).map_err(write_error(&path))?;
    let path = dir.join(MANIFEST_FILE);
    let text = serde_json::to_string_pretty(&manifest)
        .map_err(|error| CheckpointError::Json { path: path.clone(), reason: error.to_string() })?;
    before(&path).and_then(|()| fs::write(&path, text + "\n")).map_err(write_error(&path))?;
    if live.is_dir() {
        bring_along(live, dir, before).map_err(write_error(dir))?;
    }
    sync_tree(dir).map_err(write_error(dir))
}

impl Weights {
    /// The file that they are in.
    const fn file(&self) -> &'static str {
        match self {
            Self::Lm { .. } | Self::Scalar { .. } => hf::WEIGHTS_FILE,
            Self::Adapter { .. } => hf::ADAPTER_WEIGHTS_FILE,
        }
    }
}

fn write_model(
    dir: &Path,
    weights: &Weights,
    tokens: &TokenIds,
    before: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<String, CheckpointError> {
    static SAID: Once = Once::new();
    let path = dir.join(weights.file());
    before(&path).map_err(write_error(&path))?;
    let written = match weights {
        Weights::Lm { named, config } => hf::write(dir, config, Head::Lm, named, tokens),
        Weights::Scalar { named, config, score_bias } => {
            hf::write(dir, config, Head::Score { bias: *score_bias }, named, tokens)
        }
        Weights::Adapter { adapter, config, base: Parent { path, weights_sha256 } } => {
            let base = Base { path: Some(path.display().to_string()), sha256: Some(weights_sha256.clone()) };
            hf::write_adapter(dir, config, adapter, &base, tokens)
        }
    };
    let class = written.map_err(|error| without_temporary(error, dir))?;
    if class == Class::Kindling {
        SAID.call_once(|| {
            tracing::warn!(
                "no class of transformers has this mixture of switches (see `[model]` in config.toml): it is saved as \
                 `model_type: \"kindling\"`, which only this program reads"
            );
        });
    }
    sha256_of_file(&path).map_err(write_error(&path))
}

fn write_state(
    dir: &Path,
    state: &State,
    manifest: &mut Manifest,
    before: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    fs::create_dir(dir).map_err(write_error(dir))?;
    for (stem, tensors) in &state.tensors {
        let file = format!("{stem}.safetensors");
        let path = dir.join(&file);
        before(&path).map_err(write_error(&path))?;
        hf::write_file(&path, tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))
            .map_err(|error| without_temporary(error, dir))?;
        let sha256 = sha256_of_file(&path).map_err(write_error(&path))?;
        manifest.files_sha256.insert(format!("{STATE_DIR}/{file}"), sha256);
    }
    let path = dir.join(STATE_FILE);
    let text = format!("{:#}\n", state.json);
    let sha256 = sha256_of(text.as_bytes());
    before(&path).and_then(|()| fs::write(&path, text)).map_err(write_error(&path))?;
    manifest.files_sha256.insert(format!("{STATE_DIR}/{STATE_FILE}"), sha256);
    Ok(())
}

/// A number that is not finite is the model's fault, not the file's; that a file cannot be written is ours to say.
fn without_temporary(error: hf::HfError, dir: &Path) -> CheckpointError {
    match error {
        hf::HfError::NotFinite { path, name, value } => {
            let file = path.strip_prefix(dir).unwrap_or(&path).to_owned();
            CheckpointError::NotFinite { file, name, value }
        }
        hf::HfError::File(FileError::Write { path, source }) => CheckpointError::Write { path, source },
        other => CheckpointError::Hf(other),
    }
}

/// The ids that config.json names, from the tokenizer.
pub(super) fn token_ids(tokenizer: &Tokenizer) -> TokenIds {
    TokenIds { bos: tokenizer.bos(), eos: tokenizer.end_ids(), pad: tokenizer.pad() }
}

/// Puts every file of `live` that `dir` lacks into `dir`. `state` and `value` belong to their weights and stay.
fn bring_along(live: &Path, dir: &Path, before: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(live)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == STATE_DIR || name == VALUE_DIR || dir.join(&name).exists() {
            continue;
        }
        before(&dir.join(&name))?;
        link_tree(&entry.path(), &dir.join(&name))?;
    }
    Ok(())
}

/// A second name for the same file, or a copy where the file system has none; directories file by file.
fn link_tree(from: &Path, to: &Path) -> io::Result<()> {
    let kind = from.symlink_metadata()?.file_type();
    if kind.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            link_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to)?;
    }
    Ok(())
}

/// Makes `temporary` the directory `target`; what was `target` has the name `temporary` afterwards.
fn exchange(temporary: &Path, target: &Path) -> io::Result<()> {
    if !target.exists() {
        return fs::rename(temporary, target);
    }
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, temporary, CWD, target, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            // The file system cannot.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    exchange_in_steps(temporary, target)
}

/// [`exchange`] where the system has no such call.
pub(super) fn exchange_in_steps(temporary: &Path, target: &Path) -> io::Result<()> {
    let mut aside = temporary.as_os_str().to_owned();
    aside.push("-old");
    let aside = PathBuf::from(aside);
    fs::rename(target, &aside)?;
    if let Err(error) = fs::rename(temporary, target) {
        fs::rename(&aside, target)?;
        return Err(error);
    }
    fs::rename(&aside, temporary)
}

/// Removes the temporary directories that saves to `name` left in `parent` when they were killed.
fn remove_leftovers(parent: &Path, name: &std::ffi::OsStr) {
    let prefix = format!(".{}.tmp-", name.to_string_lossy());
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let Some(pid) = file.to_string_lossy().strip_prefix(&prefix).and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        // Our own is from a save that failed; another living process may be writing at this moment.
        if pid == std::process::id() || !is_running(pid) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(unix)]
fn is_running(pid: u32) -> bool {
    match rustix::process::Pid::from_raw(pid as i32) {
        // A process of another user answers that it may not be asked.
        Some(pid) => rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH),
        None => false,
    }
}

#[cfg(not(unix))]
fn is_running(_pid: u32) -> bool {
    true
}

/// Flushes every file below `dir`, then the directories.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync(dir)
}

#[cfg(unix)]
fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Windows has no handle of a directory to flush.
#[cfg(not(unix))]
fn sync(_dir: &Path) -> io::Result<()> {
    Ok(())
}
