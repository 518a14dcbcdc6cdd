//! Files of text to files of tokens, by all processes together.
//!
//! A file that makes up much of the work is divided into its parts, of which each rank makes some; any other file is one
//! rank's. Ranks share the work with those that see the same cache folder: where machines have caches of their own, each
//! machine makes all parts.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;

use super::TextConfig;
use crate::data::shards::{Cache, Making, Part, ShardSource};
use crate::data::{DataError, Stamp, file_sha256};
use crate::group::{Group, GroupError};
use crate::interrupt::Interrupt;
use crate::logging::Progress;
use crate::tokenizer::Tokenizer;

/// A file with more than a rank's share of the work, divided by this, is made by all ranks.
const DIVIDED: u64 = 4;

/// Text of which it is worth saying how long it took, in bytes.
const LONG: u64 = 256 << 20;

/// How text is tokenised: into which cache, by whom, until when.
#[derive(Debug)]
pub struct Tokenising<'a> {
    cache: Cache,
    group: &'a Group,
    interrupt: Interrupt,
    /// Whether no progress is shown.
    quiet: bool,
    /// The section of the configuration that names the text.
    section: &'static str,
}

/// The ranks that see one cache folder, from the point of view of one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Peers {
    /// The number of this rank among them.
    index: u64,
    size: u64,
    /// The first of them, by its number in the group.
    first: usize,
}

impl<'a> Tokenising<'a> {
    /// Into the usual cache by `group`.
    pub fn new(group: &'a Group, interrupt: Interrupt, quiet: bool) -> Self {
        Self { cache: Cache::usual(), group, interrupt, quiet, section: "data" }
    }

    /// Of the text that another section than `data` of the configuration names, for what errors say.
    #[must_use]
    pub fn of_section(self, section: &'static str) -> Self {
        Self { section, ..self }
    }

    /// By this process alone, which nobody stops but by killing it.
    pub fn alone(group: &'a Group, quiet: bool) -> Self {
        Self::new(group, Interrupt::never(), quiet)
    }

    /// The tokens of each file, those that are missing in the cache made first. Every rank calls it.
    ///
    /// # Errors
    /// If a file cannot be read or the cache not be written, and with [`crate::interrupt::Stopped`] on every rank once one
    /// was asked to stop; parts that were finished are kept.
    pub fn parts(&self, files: &[PathBuf], data: &TextConfig, tokenizer: &Tokenizer) -> anyhow::Result<Vec<Vec<Part>>> {
        let sha256 = tokenizer.sha256();
        let sources: Vec<ShardSource<'_>> = files
            .iter()
            .map(|file| source_of(file, data, self.section, tokenizer, &sha256))
            .collect::<Result<_, _>>()?;
        let peers = self.peers()?;
        // One of them looks, and the others take its word: a network file system may go on denying a file for a while that
        // was looked for before it was there.
        let found: Vec<Option<Vec<Part>>> = if peers.index == 0 {
            sources.iter().map(|source| self.cache.find(source)).collect::<Result<_, _>>()?
        } else {
            vec![None; sources.len()]
        };
        let is_there =
            self.group.gather(found.iter().map(Option::is_some).collect::<Vec<_>>())?.swap_remove(peers.first);
        // Ranks whose lists of files differ go on to where the session says so.
        let is_there = is_there.into_iter().chain(std::iter::repeat(false));
        let missing = sources.iter().zip(is_there).filter(|(_, is_there)| !is_there).map(|(source, _)| source);
        self.make(Work::new(&self.cache, peers, missing.collect()), tokenizer)?;
        let found_now = found.into_iter().zip(&sources).map(|(found, source)| match found {
            Some(parts) => Ok(parts),
            None => match self.cache.find(source)? {
                Some(parts) => Ok(parts),
                None => self.make_alone(source, tokenizer),
            },
        });
        found_now.collect()
    }

    /// Makes this rank's share of what is missing, while the others make theirs.
    fn make(&self, mut work: Work<'_>, tokenizer: &Tokenizer) -> anyhow::Result<()> {
        let n_bytes = work.n_bytes;
        let mut is_done = work.sources.is_empty();
        if !is_done {
            self.cache.prepare()?;
        }
        let began = Instant::now();
        let mut progress = (!self.quiet && n_bytes > 0).then(|| Progress::of_bytes("tokenising", n_bytes));
        loop {
            if !is_done {
                let encode = |texts: &[String]| tokenizer.encode_batch(texts);
                is_done = match work.round(encode, &self.interrupt, progress.as_mut()) {
                    // No failure of this rank's own: all ranks stop.
                    Err(DataError::Stopped) => true,
                    round => round?,
                };
            }
            if self.interrupt.requested_in(self.group)? {
                drop(progress);
                tracing::info!("what is tokenised so far is kept: the same command goes on from there");
                return Err(self.interrupt.stopped().into());
            }
            if self.group.gather(is_done)?.into_iter().all(|is_done| is_done) {
                break;
            }
        }
        drop(progress);
        if n_bytes > LONG {
            let (seconds, mb) = (began.elapsed().as_secs_f64(), n_bytes as f64 / 1e6);
            tracing::info!("tokenised {mb:.0} MB of text in {seconds:.0} s");
        }
        Ok(())
    }

    /// Makes what is missing of one file, by this rank alone.
    fn make_alone(&self, source: &ShardSource<'_>, tokenizer: &Tokenizer) -> anyhow::Result<Vec<Part>> {
        let mut making = Making::new(&self.cache, source)?;
        while making.index().is_some() {
            making.make(|texts| tokenizer.encode_batch(texts), |_| Ok(()))?;
        }
        let parts = self.cache.find(source)?;
        parts.with_context(|| format!("the tokens of `{}` were removed in the meantime", source.path.display()))
    }

    /// Finds the ranks that see the same folder, by a file that each leaves there for a moment.
    fn peers(&self) -> anyhow::Result<Peers> {
        let (rank, size) = (self.group.rank(), self.group.size());
        if self.group.is_alone() {
            return Ok(Peers { index: 0, size: 1, first: 0 });
        }
        self.cache.prepare()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let run = self.group.gather(format!("{}-{now:x}", std::process::id()))?.swap_remove(0);
        let mark = |rank: usize| self.cache.dir().join(format!("rank-{run}-{rank}.tmp"));
        let own = mark(rank);
        std::fs::write(&own, "").map_err(|source| DataError::Cache { path: own.clone(), source })?;
        self.group.wait_for_all()?;
        let seen: Vec<usize> = (0..size).filter(|&other| mark(other).exists()).collect();
        let waited: Result<(), GroupError> = self.group.wait_for_all();
        // A file that stays is removed by a later run.
        let _ = std::fs::remove_file(own);
        waited?;
        let index = seen.iter().position(|&other| other == rank).context("a file just written is not there")?;
        Ok(Peers { index: index as u64, size: seen.len() as u64, first: seen[0] })
    }
}

/// A file and all that decides which tokens it becomes.
fn source_of<'a>(
    file: &'a Path,
    data: &'a TextConfig,
    section: &'static str,
    tokenizer: &Tokenizer,
    tokenizer_sha256: &'a str,
) -> Result<ShardSource<'a>, DataError> {
    Ok(ShardSource {
        path: file,
        stamp: Stamp::of(file)?,
        sha256: file_sha256(file)?,
        separator: &data.separator,
        options: data.read_options(section),
        begin: if data.document_bos { tokenizer.bos() } else { None },
        tokenizer_sha256,
        vocab_size: tokenizer.vocab_size(),
    })
}

/// A rank's share of the parts to make.
struct Work<'a> {
    cache: &'a Cache,
    peers: Peers,
    sources: Vec<(&'a ShardSource<'a>, bool)>,
    /// The file to come.
    next: usize,
    /// The file at hand.
    current: Option<Making<'a>>,
    /// Bytes of text files that this rank is to tokenise, about.
    n_bytes: u64,
}

impl<'a> Work<'a> {
    fn new(cache: &'a Cache, peers: Peers, sources: Vec<&'a ShardSource<'a>>) -> Self {
        let all: u64 = sources.iter().map(|source| source.stamp.len()).sum();
        let size = peers.size;
        let is_divided = |len: u64| size > 1 && len > cache.part_bytes() && len > all / (size * DIVIDED);
        let sources: Vec<_> = sources.into_iter().map(|source| (source, is_divided(source.stamp.len()))).collect();
        let mut work = Self { cache, peers, sources, next: 0, current: None, n_bytes: 0 };
        let n_bytes = work.sources.iter().enumerate().map(|(i, (source, is_divided))| {
            let len = source.stamp.len();
            if *is_divided {
                len / size
            } else if work.is_own(i as u64) {
                len
            } else {
                0
            }
        });
        work.n_bytes = n_bytes.sum();
        work
    }

    /// Whether number `i` of any list is this rank's.
    const fn is_own(&self, i: u64) -> bool {
        i % self.peers.size == self.peers.index
    }

    /// Makes about as much as one part, so that ranks meet after equal work; says whether nothing is left to do.
    fn round<E>(
        &mut self,
        encode: impl Fn(&[String]) -> Result<Vec<Vec<u32>>, E>,
        interrupt: &Interrupt,
        mut progress: Option<&mut Progress>,
    ) -> Result<bool, DataError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let go_on = || if interrupt.requested() { Err(DataError::Stopped) } else { Ok(()) };
        let mut n_made = 0;
        while n_made < self.cache.part_bytes() {
            let Some(making) = &mut self.current else {
                let Some((source, is_divided)) = self.sources.get(self.next) else { return Ok(true) };
                if *is_divided || self.is_own(self.next as u64) {
                    self.current = Some(Making::new(self.cache, source)?);
                }
                self.next += 1;
                continue;
            };
            let Some(part) = making.index() else {
                self.current = None;
                continue;
            };
            let (start, file) = (making.position(), self.next - 1);
            let Peers { index, size, .. } = self.peers;
            if self.sources[file].1 && (file as u64 + part) % size != index {
                making.skip(|_| go_on())?;
            } else if making.is_there()? {
                making.skip(|_| go_on())?;
                if let Some(progress) = &mut progress {
                    progress.leave_out(making.position() - start);
                }
            } else {
                let mut shown = start;
                let mut show = |position: u64| {
                    if let Some(progress) = &mut progress {
                        progress.add((position - shown) as usize);
                    }
                    shown = position;
                };
                n_made += making.make(&encode, |making| {
                    show(making.position());
                    go_on()
                })?;
                show(making.position());
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::data::shards::Tokens;
    use crate::group::threads;
    use crate::testing::byte_tokenizer;

    /// Bytes of a part: the texts here are short.
    const PART_BYTES: u64 = 30;

    /// A folder with two short texts and two long ones, of different formats.
    fn texts() -> (TempDir, TextConfig) {
        let dir = tempfile::tempdir().unwrap();
        let document = |i: usize| format!("document {i}");
        let lines = |from: usize, to: usize| (from..to).map(|i| format!("{{\"text\": \"{}\"}}\n", document(i)));
        let write = |name: &str, text: String| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let train = vec![
            write("a.txt", document(0)),
            write("b.jsonl", lines(1, 40).collect()),
            write("c.jsonl", lines(40, 41).collect()),
            write("d.txt", (41..90).map(document).collect::<Vec<_>>().join("\n\n")),
        ];
        (dir, TextConfig { train, ..TextConfig::default() })
    }

    fn all(parts: &[Vec<Part>]) -> Vec<u32> {
        let tokens = Tokens::new(parts.concat());
        tokens.read(0..tokens.len()).unwrap()
    }

    /// The tokens that each of `n` ranks gets, with the cache folder that `cache` names for it.
    fn by_ranks(
        n: usize,
        dir: &TempDir,
        data: &TextConfig,
        cache: impl Fn(usize) -> &'static str + Sync,
    ) -> Vec<Vec<u32>> {
        threads(n, |group| {
            let cache = Cache::new(dir.path().join(cache(group.rank()))).with_part_bytes(PART_BYTES);
            let tokenising = Tokenising { cache, ..Tokenising::alone(&group, true) };
            all(&tokenising.parts(&data.train, data, &byte_tokenizer()).unwrap())
        })
    }

    fn names(dir: &TempDir, cache: &str) -> Vec<String> {
        let entries = fs::read_dir(dir.path().join(cache)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn any_number_of_ranks_with_any_caches_get_the_same_tokens() {
        let (dir, data) = texts();
        let one = by_ranks(1, &dir, &data, |_| "one").remove(0);
        let spelled: Vec<u8> = one.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
        let expected: String = (0..90).map(|i| format!("document {i}")).collect();
        assert_eq!(String::from_utf8(spelled).unwrap(), expected);
        let files = names(&dir, "one");
        assert!(files.len() > 20 && files.iter().all(|name| name.ends_with(".tokens")), "{files:?}");
        for (n, caches) in [(2, ["shared-2"; 3]), (3, ["shared-3"; 3]), (3, ["here", "there", "here"])] {
            assert!(by_ranks(n, &dir, &data, |rank| caches[rank]).iter().all(|tokens| *tokens == one), "{caches:?}");
            for cache in &caches[..n] {
                assert_eq!(names(&dir, cache), files, "the same files in `{cache}`, and nothing beside them");
            }
        }
    }

    #[test]
    fn ranks_make_each_part_once_and_a_long_file_together() {
        let (dir, data) = texts();
        let cache = Cache::new(dir.path().join("cache")).with_part_bytes(PART_BYTES);
        cache.prepare().unwrap();
        let tokenizer = byte_tokenizer();
        let sources: Vec<_> =
            data.train.iter().map(|file| source_of(file, &data, "data", &tokenizer, "t").unwrap()).collect();
        let mut n_made = Vec::new();
        for index in 0..2 {
            let mut work = Work::new(&cache, Peers { index, size: 2, first: 0 }, sources.iter().collect());
            assert_eq!(
                work.sources.iter().map(|(_, divided)| *divided).collect::<Vec<_>>(),
                [false, true, false, true]
            );
            let n = Cell::new(0);
            let encode = |texts: &[String]| {
                n.set(n.get() + texts.len());
                Ok::<_, Infallible>(texts.iter().map(|text| text.bytes().map(u32::from).collect()).collect())
            };
            while !work.round(encode, &Interrupt::never(), None).unwrap() {}
            n_made.push(n.get());
        }
        assert_eq!(n_made.iter().sum::<usize>(), 90, "{n_made:?}");
        assert!(n_made.iter().all(|n| (35..=55).contains(n)), "about half each: {n_made:?}");
    }

    #[test]
    fn ranks_find_those_that_see_their_cache() {
        let dir = tempfile::tempdir().unwrap();
        let peers = threads(4, |group| {
            let cache = Cache::new(dir.path().join(["a", "b", "b", "a"][group.rank()]));
            Tokenising { cache, ..Tokenising::alone(&group, true) }.peers().unwrap()
        });
        let expected = [(0, 2, 0), (0, 2, 1), (1, 2, 1), (1, 2, 0)];
        assert_eq!(peers, expected.map(|(index, size, first)| Peers { index, size, first }));
        assert_eq!(names(&dir, "a").len() + names(&dir, "b").len(), 0, "nothing is left");
    }
}
