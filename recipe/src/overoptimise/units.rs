//! What has been done already: every part of the laboratory's work by name, with everything that its result depends on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use common::files::{read_if_there, write_whole};
use common::out_dir::{self, OutLock};
use common::session::Outcome;
use serde::{Deserialize, Serialize};

use crate::inputs::Inputs;
use crate::report::duration;

/// One part of the work: a training, or a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    inputs: Inputs,
    finished: bool,
    seconds: f64,
}

/// `units.json`: the parts of the work that were begun.
#[derive(Debug)]
pub(crate) struct Units {
    dir: PathBuf,
    records: BTreeMap<String, Record>,
    /// Whether finished parts whose inputs changed may be done again.
    overwrite: bool,
    /// Parts of this command, and how many of them are behind.
    n_all: usize,
    n_behind: usize,
}

impl Units {
    /// Those in `dir`, of which this command needs `n_all`.
    ///
    /// # Errors
    /// If the record is there but not one.
    pub(crate) fn open(dir: &Path, overwrite: bool, n_all: usize) -> Result<Self> {
        let path = dir.join("units.json");
        let records = match read_if_there(&path)? {
            Some(text) => serde_json::from_str(&text)
                .with_context(|| format!("`{}` is not the record of `recipe overoptimise`", path.display()))?,
            None => BTreeMap::new(),
        };
        Ok(Self { dir: dir.to_owned(), records, overwrite, n_all, n_behind: 0 })
    }

    /// The place of a part's result.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Wall seconds of a part, over all sittings.
    fn seconds(&self, name: &str) -> f64 {
        self.records.get(name).map_or(0.0, |record| record.seconds)
    }

    /// Wall seconds of all parts.
    pub(crate) fn seconds_of_all(&self) -> f64 {
        self.records.values().map(|record| record.seconds).sum()
    }

    /// Carries out the part `name` unless it is done. `work` is told whether to go on from a checkpoint in the part's directory.
    ///
    /// # Errors
    /// As `work`; if the part was finished with other inputs, which then have to be given up with `--overwrite`.
    pub(crate) fn run(
        &mut self,
        name: &str,
        inputs: Inputs,
        work: impl FnOnce(bool) -> Result<Outcome>,
    ) -> Result<Outcome> {
        self.n_behind += 1;
        let path = self.path(name);
        let has_checkpoint = path.join("manifest.json").is_file();
        let old = self.records.get(name);
        let is_same = old.is_some_and(|old| old.inputs == inputs);
        if is_same && old.is_some_and(|old| old.finished) && (path.is_file() || has_checkpoint) {
            return Ok(Outcome::Finished);
        }
        let goes_on = is_same && has_checkpoint;
        if let Some(old) = old.filter(|old| !is_same && (old.finished || has_checkpoint)) {
            self.confirm(name, old, &inputs)?;
        }
        let seconds = if goes_on { self.seconds(name) } else { 0.0 };
        if !goes_on && path.is_dir() {
            let _lock = OutLock::take(&path)?;
            out_dir::prepare(&path, false, true, &[])?;
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("failed to make `{}`", parent.display()))?;
        }
        self.save(name, Record { inputs: inputs.clone(), finished: false, seconds })?;
        tracing::info!("[{}/{}] {name}{}", self.n_behind, self.n_all, if goes_on { ": resuming" } else { "" });
        let began = Instant::now();
        let outcome = work(goes_on).with_context(|| format!("`{name}` failed"))?;
        let seconds = seconds + began.elapsed().as_secs_f64();
        self.save(name, Record { inputs, finished: outcome == Outcome::Finished, seconds })?;
        Ok(outcome)
    }

    fn save(&mut self, name: &str, record: Record) -> Result<()> {
        self.records.insert(name.to_owned(), record);
        Ok(write_whole(&self.dir.join("units.json"), serde_json::to_string_pretty(&self.records)?)?)
    }

    /// Refuses to give up work that nobody offered up.
    fn confirm(&self, name: &str, old: &Record, now: &Inputs) -> Result<()> {
        let mut reasons = String::new();
        for change in old.inputs.changes(now, &Inputs::default()) {
            let _ = write!(reasons, "{}{change}", if reasons.is_empty() { "" } else { "; " });
        }
        let text = format!("`{name}`, {}: {reasons}", duration(old.seconds));
        if self.overwrite {
            tracing::info!("running again, as `--overwrite` says: {text}");
            return Ok(());
        }
        bail!(
            "this command would discard work in `{}`: {text}\nhint: pass `--overwrite` to do it and what rests on it again, give \
             the settings it was made with, or pass another `--out`",
            self.dir.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(value: &str) -> Inputs {
        let mut inputs = Inputs::default();
        inputs.set("pool", value);
        inputs
    }

    #[test]
    fn what_is_done_is_not_done_again_and_not_given_up_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let open = |overwrite| Units::open(dir.path(), overwrite, 1).unwrap();
        let write = |text: &'static str| {
            let path = dir.path().join("scores/a.json");
            move |_| write_whole(&path, text).map(|()| Outcome::Finished).map_err(Into::into)
        };
        let read = || std::fs::read_to_string(dir.path().join("scores/a.json")).unwrap();
        open(false).run("scores/a.json", inputs("5"), write("one")).unwrap();
        open(false).run("scores/a.json", inputs("5"), write("two")).unwrap();
        assert_eq!(read(), "one");
        let error = open(false).run("scores/a.json", inputs("6"), write("three")).unwrap_err().to_string();
        assert!(error.contains("`pool` changed from 5 to 6") && error.contains("hint: "), "{error}");
        open(true).run("scores/a.json", inputs("6"), write("four")).unwrap();
        assert_eq!(read(), "four");
        std::fs::remove_file(dir.path().join("scores/a.json")).unwrap();
        open(false).run("scores/a.json", inputs("6"), write("five")).unwrap();
        assert_eq!(read(), "five");
    }

    #[test]
    fn what_was_interrupted_is_not_taken_as_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.jsonl");
        std::fs::write(&path, "left by chance").unwrap();
        let mut units = Units::open(dir.path(), false, 1).unwrap();
        assert_eq!(units.run("pool.jsonl", inputs("1"), |_| Ok(Outcome::Interrupted)).unwrap(), Outcome::Interrupted);
        let mut is_run = false;
        units
            .run("pool.jsonl", inputs("1"), |goes_on| {
                assert!(!goes_on);
                is_run = true;
                Ok(Outcome::Finished)
            })
            .unwrap();
        assert!(is_run);
    }
}
