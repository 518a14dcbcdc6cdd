use std::cell::Cell;
use std::convert::Infallible;

use super::*;
use crate::data::records::OnBadRecord;

/// A folder with the text of the tests and their tokens.
struct Scratch {
    dir: tempfile::TempDir,
    text: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        Self::with("{\"text\": \"abc\"}\n{}\n{\"text\": \"é\"}\n")
    }

    fn with(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        fs::write(&path, text).unwrap();
        Self { dir, text: path }
    }

    fn source(&self) -> ShardSource<'_> {
        ShardSource {
            path: &self.text,
            stamp: Stamp::of(&self.text).unwrap(),
            sha256: "of the file".to_owned(),
            separator: &Separator::BlankLine,
            options: OnBadRecord::Skip.into(),
            begin: Some(256),
            tokenizer_sha256: "t",
            vocab_size: 300,
        }
    }

    fn cache(&self) -> Cache {
        let cache = Cache::new(self.dir.path().join("cache"));
        fs::create_dir_all(cache.dir()).unwrap();
        cache
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(self.cache().dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the shape that `make` takes")]
fn bytes(documents: &[String]) -> Result<Vec<Vec<u32>>, Infallible> {
    Ok(documents.iter().map(|document| document.bytes().map(u32::from).collect()).collect())
}

/// Makes the parts of `source` that are missing, and gives all.
fn tokens<E: std::error::Error + Send + Sync + 'static>(
    cache: &Cache,
    source: &ShardSource<'_>,
    encode: impl Fn(&[String]) -> Result<Vec<Vec<u32>>, E>,
) -> Result<Tokens, DataError> {
    if let Some(parts) = cache.find(source)? {
        return Ok(Tokens::new(parts));
    }
    let mut making = Making::new(cache, source)?;
    while making.index().is_some() {
        if making.is_there()? { making.skip(|_| Ok(())) } else { making.make(&encode, |_| Ok(())).map(drop) }?;
    }
    Ok(Tokens::new(cache.find(source)?.expect("all parts were made")))
}

fn all(tokens: &Tokens) -> Vec<u32> {
    tokens.read(0..tokens.len()).unwrap()
}

/// Twenty documents, `0 0 0` to `19 19 19`, and their tokens.
fn twenty() -> (Scratch, Vec<u32>) {
    let document = |i: usize| format!("{i} {i} {i}");
    let text: String = (0..20).map(|i| format!("{{\"text\": \"{}\"}}\n", document(i))).collect();
    let ids = (0..20).flat_map(|i| [256].into_iter().chain(document(i).into_bytes().into_iter().map(u32::from)));
    (Scratch::with(&text), ids.collect())
}

#[test]
fn a_shard_holds_each_document_behind_its_mark() {
    let scratch = Scratch::new();
    let ids = tokens(&scratch.cache(), &scratch.source(), bytes).unwrap();
    assert_eq!(all(&ids), [256, 97, 98, 99, 256, 0xc3, 0xa9]);
    assert_eq!(ids.read(2..5).unwrap(), [98, 99, 256]);
    assert_eq!(ids.n_bytes(), 5);
    let part = &scratch.cache().find(&scratch.source()).unwrap().unwrap()[0];
    assert_eq!(part.end(), (true, 1), "one bad record was left out");

    let joined = ShardSource { begin: None, vocab_size: 70_000, ..scratch.source() };
    let wide = tokens(&scratch.cache(), &joined, bytes).unwrap();
    assert_eq!(all(&wide), [97, 98, 99, 0xc3, 0xa9]);
    let lengths: Vec<_> = scratch.files().iter().map(|file| fs::metadata(file).unwrap().len()).collect();
    assert_eq!(
        lengths.iter().sum::<u64>(),
        2 * header::HEADER_LEN as u64 + 7 * 2 + 5 * 4,
        "and nothing is left beside"
    );
}

#[test]
fn parts_one_after_the_other_are_the_whole() {
    let (scratch, expected) = twenty();
    for (part_bytes, n_parts) in [(1, 20), (20, 6), (54, 3), (1000, 1)] {
        let cache = scratch.cache().with_part_bytes(part_bytes);
        let ids = tokens(&cache, &scratch.source(), bytes).unwrap();
        assert_eq!(cache.find(&scratch.source()).unwrap().unwrap().len(), n_parts, "parts of {part_bytes} bytes");
        assert_eq!(all(&ids), expected);
        for (start, len) in [(0, 1), (3, 40), (30, 0), (expected.len() - 2, 2)] {
            assert_eq!(ids.read(start..start + len).unwrap(), expected[start..start + len]);
        }
    }
}

#[test]
fn more_parts_than_are_kept_open_are_read_in_any_order() {
    let n = 2 * tokens::MAX_OPEN + 50;
    let text: String = (0..n).map(|i| format!("{{\"text\": \"{}\"}}\n", char::from(b'a' + (i % 26) as u8))).collect();
    let scratch = Scratch::with(&text);
    let source = ShardSource { begin: None, ..scratch.source() };
    let ids = tokens(&scratch.cache().with_part_bytes(1), &source, bytes).unwrap();
    for start in (0..n - 7).step_by(37).chain((0..n - 7).rev().step_by(23)) {
        let expected: Vec<_> = (start..start + 7).map(|i| 97 + (i % 26) as u32).collect();
        assert_eq!(ids.read(start..start + 7).unwrap(), expected);
    }
    assert_eq!(ids.open.lock().unwrap().len(), tokens::MAX_OPEN);
}

#[test]
fn a_run_that_died_goes_on_after_its_last_whole_part() {
    let (scratch, expected) = twenty();
    let (cache, n_encoded) = (scratch.cache().with_part_bytes(20), Cell::new(0));
    let counted = |limit: usize| {
        let n_encoded = &n_encoded;
        move |documents: &[String]| {
            if n_encoded.get() + documents.len() > limit {
                return Err(io::Error::other("killed"));
            }
            n_encoded.set(n_encoded.get() + documents.len());
            Ok(bytes(documents).unwrap())
        }
    };
    let error = tokens(&cache, &scratch.source(), counted(12)).unwrap_err();
    assert!(matches!(error, DataError::Encode(_)), "{error}");
    let n_before = n_encoded.get();
    let left = scratch.files();
    assert!(n_before >= 8 && left.len() >= 2, "{n_before} documents in {left:?}");
    assert!(left.iter().all(|file| file.extension().is_some_and(|ending| ending == "tokens")), "{left:?}");
    // What is there is not encoded again.
    assert_eq!(all(&tokens(&cache, &scratch.source(), counted(20)).unwrap()), expected);
    assert_eq!(n_encoded.get(), 20);
}

#[test]
fn two_that_share_the_parts_make_what_one_makes() {
    let (scratch, expected) = twenty();
    let (cache, source) = (scratch.cache().with_part_bytes(20), scratch.source());
    for own in [1, 0] {
        assert!(cache.find(&source).unwrap().is_none());
        let mut making = Making::new(&cache, &source).unwrap();
        while let Some(part) = making.index() {
            if part % 2 == own { making.make(bytes, |_| Ok(())).map(drop) } else { making.skip(|_| Ok(())) }.unwrap();
        }
    }
    assert_eq!(all(&Tokens::new(cache.find(&source).unwrap().unwrap())), expected);
}

#[test]
fn a_request_to_stop_leaves_whole_parts_only() {
    let (scratch, _) = twenty();
    let (cache, source) = (scratch.cache().with_part_bytes(20), scratch.source());
    let mut making = Making::new(&cache, &source).unwrap();
    making.make(bytes, |_| Ok(())).unwrap();
    assert!(matches!(making.make(bytes, |_| Err(DataError::Stopped)), Err(DataError::Stopped)));
    assert!(matches!(making.skip(|_| Err(DataError::Stopped)), Err(DataError::Stopped)));
    assert_eq!(scratch.files().len(), 1);
}

#[test]
fn a_text_is_encoded_once_and_another_text_or_tokenizer_anew() {
    let scratch = Scratch::new();
    let n_calls = Cell::new(0);
    let open = |source: &ShardSource<'_>| {
        let counted = |documents: &[String]| {
            n_calls.set(n_calls.get() + 1);
            bytes(documents)
        };
        tokens(&scratch.cache(), source, counted).unwrap();
    };
    open(&scratch.source());
    // The text itself is not needed again: its hash is enough.
    fs::write(&scratch.text, "not even JSON").unwrap();
    open(&scratch.source());
    assert_eq!(n_calls.get(), 1);

    fs::write(&scratch.text, "{\"text\": \"abc\"}").unwrap();
    let one_a_line = Separator::Line;
    for (i, other) in [
        ShardSource { tokenizer_sha256: "u", ..scratch.source() },
        ShardSource { sha256: "of another file".to_owned(), ..scratch.source() },
        ShardSource { separator: &one_a_line, ..scratch.source() },
        ShardSource { options: OnBadRecord::Fail.into(), ..scratch.source() },
    ]
    .into_iter()
    .enumerate()
    {
        open(&other);
        assert_eq!((n_calls.get(), scratch.files().len()), (2 + i, 2 + i));
    }
}

#[test]
fn a_text_that_changes_while_it_is_read_is_refused() {
    let scratch = Scratch::new();
    let source = scratch.source();
    let appends = |documents: &[String]| {
        fs::write(&scratch.text, "{\"text\": \"abc\"}\n{\"text\": \"another\"}\n").unwrap();
        bytes(documents)
    };
    let error = tokens(&scratch.cache(), &source, appends).unwrap_err().to_string();
    assert!(error.contains("a.jsonl` has changed while it was read\nhint: "), "{error}");
    assert!(scratch.files().is_empty());
}

#[test]
fn damaged_parts_are_noticed_and_written_again() {
    let (scratch, expected) = twenty();
    let cache = scratch.cache().with_part_bytes(54);
    let open = || tokens(&cache, &scratch.source(), bytes).unwrap();
    open();
    for path in scratch.files() {
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[17] ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..50], &[], b"something else".repeat(20).as_slice(), &flipped]
        {
            fs::write(&path, damaged).unwrap();
            let error = Part::open(&path).unwrap_err();
            assert!(matches!(error, DataError::Shard { .. }), "{error}");
            assert!(error.to_string().contains("\nhint: "));
            assert_eq!(all(&open()), expected);
            assert_eq!(fs::read(&path).unwrap(), whole, "the same bytes");
        }
    }
    // A part under the name of another one.
    let files = scratch.files();
    fs::copy(&files[1], &files[0]).unwrap();
    assert_eq!(all(&open()), expected);
}

#[test]
fn a_part_that_is_cut_while_it_is_read_is_an_error() {
    let (scratch, _) = twenty();
    let cache = scratch.cache().with_part_bytes(54);
    let ids = tokens(&cache, &scratch.source(), bytes).unwrap();
    fs::write(&scratch.files()[1], "cut").unwrap();
    assert!(matches!(ids.read(0..ids.len()), Err(DataError::File(_))));
}

#[test]
fn a_failed_encoding_leaves_nothing() {
    let scratch = Scratch::new();
    let fails = |_: &[String]| Err(io::Error::other("no"));
    let error = tokens(&scratch.cache(), &scratch.source(), fails).unwrap_err();
    assert!(matches!(error, DataError::Encode(_)));
    assert!(scratch.files().is_empty());
}

#[test]
fn what_a_killed_run_left_is_removed_when_it_is_old() {
    let scratch = Scratch::new();
    let write = |name: &str, age: Duration| {
        let path = scratch.cache().dir().join(name);
        let file = fs::File::create(&path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
        path
    };
    let old = write("a.1-2.tmp", 2 * ABANDONED);
    let kept = [write("b.1-2.tmp", Duration::ZERO), write("c.tokens", 2 * ABANDONED)];
    scratch.cache().prepare().unwrap();
    assert!(!old.exists() && kept.iter().all(|path| path.exists()));
}

#[test]
fn a_cache_that_cannot_be_written_names_the_variable() {
    let scratch = Scratch::new();
    let cache = Cache::new(scratch.text.join("below-a-file"));
    let error = cache.prepare().unwrap_err().to_string();
    assert!(error.contains("below-a-file"), "{error}");
    assert!(error.contains("`\nhint: set `KINDLING_CACHE` to a folder that can be written"), "{error}");
}
