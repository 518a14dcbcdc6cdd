//! The files that a configuration names.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserializer;
use serde::de::{SeqAccess, Visitor};

use super::DataError;

/// Reads a list of paths, or one path alone, for `#[serde(deserialize_with)]`.
///
/// # Errors
/// If the value is neither.
pub fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    struct Paths;

    impl<'de> Visitor<'de> for Paths {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a path or a list of paths")
        }

        fn visit_str<E>(self, path: &str) -> Result<Self::Value, E> {
            Ok(vec![path.into()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut paths = Vec::new();
            while let Some(path) = items.next_element()? {
                paths.push(path);
            }
            Ok(paths)
        }
    }

    deserializer.deserialize_any(Paths)
}

/// The files that `path` names: itself, or, if there is no such file, those that match it as a pattern with `*`, `?`,
/// `[…]` or `**`, in the order of their names.
///
/// # Errors
/// If `path` is a pattern that has no meaning or no match.
pub fn expand(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let text = path.to_string_lossy();
    if !text.contains(['*', '?', '[']) || path.exists() {
        return Ok(vec![path.to_owned()]);
    }
    let invalid = |reason: String| DataError::Pattern { pattern: path.to_owned(), reason };
    let matches = glob::glob(&text).map_err(|error| invalid(error.to_string()))?;
    let files = matches.collect::<Result<Vec<_>, _>>().map_err(|error| invalid(error.to_string()))?;
    if files.is_empty() { Err(DataError::NoMatch(path.to_owned())) } else { Ok(files) }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Section {
        #[serde(deserialize_with = "one_or_many")]
        train: Vec<PathBuf>,
    }

    #[test]
    fn one_path_stands_for_a_list_of_one() {
        let parse = |text: &str| toml::from_str::<Section>(text).map(|section| section.train);
        assert_eq!(parse("train = 'a.txt'").expect("a path"), [Path::new("a.txt")]);
        assert_eq!(parse("train = ['a.txt', 'b.txt']").expect("a list"), [Path::new("a.txt"), Path::new("b.txt")]);
        let error = parse("train = 3").expect_err("a number").to_string();
        assert!(error.contains("expected a path or a list of paths"), "{error}");
    }

    #[test]
    fn patterns_name_the_files_that_match_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for name in ["b.jsonl", "a.jsonl", "c.txt", "x[1].txt"] {
            std::fs::write(dir.path().join(name), "").expect("written");
        }
        let names = |pattern: &str| {
            let files = expand(&dir.path().join(pattern)).map_err(|error| error.to_string())?;
            Ok(files.iter().map(|file| file.file_name().expect("a name").to_string_lossy().into_owned()).collect())
        };
        assert_eq!(names("*.jsonl"), Ok(vec!["a.jsonl".to_owned(), "b.jsonl".to_owned()]));
        assert_eq!(names("missing.txt"), Ok(vec!["missing.txt".to_owned()]));
        assert_eq!(names("x[1].txt"), Ok(vec!["x[1].txt".to_owned()]), "a file of that very name");
        let error: Result<Vec<String>, String> = names("*.parquet");
        assert!(error.expect_err("no match").starts_with("no file matches `"));
        assert!(names("***").expect_err("no pattern").starts_with("invalid pattern `"));
    }
}
