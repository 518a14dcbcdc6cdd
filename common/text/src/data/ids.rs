//! Rows of token ids as others prepared them.

use std::path::Path;

use base::files::FileError;

use super::DataError;

/// Reads a JSON array of arrays of token ids.
///
/// # Errors
/// If the file cannot be read, is no such array, or a row is empty, longer than `max_seq_len` or holds an id outside
/// `0..vocab_size`.
pub fn read(path: &Path, vocab_size: usize, max_seq_len: usize) -> Result<Vec<Vec<u32>>, DataError> {
    let text = std::fs::read_to_string(path).map_err(FileError::read(path))?;
    let invalid = |reason: String| DataError::Ids { path: path.to_owned(), reason };
    let rows: Vec<Vec<u32>> = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    if rows.is_empty() {
        return Err(invalid("there is no row".to_owned()));
    }
    for (i, row) in rows.iter().enumerate() {
        if row.is_empty() || row.len() > max_seq_len {
            return Err(invalid(format!("row {i} has {} ids, expected 1 to {max_seq_len}", row.len())));
        }
        if let Some(id) = row.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(invalid(format!("row {i} holds the id {id}, the vocabulary ends at {}", vocab_size - 1)));
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_checked() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("ids.json");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("written");
            read(&path, 10, 3).map_err(|error| error.to_string())
        };
        assert_eq!(read("[[1, 2], [9]]"), Ok(vec![vec![1, 2], vec![9]]));
        for (text, reason) in [
            ("[]", "there is no row"),
            ("[[]]", "row 0 has 0 ids, expected 1 to 3"),
            ("[[1],[1,2,3,4]]", "row 1 has 4 ids, expected 1 to 3"),
            ("[[10]]", "row 0 holds the id 10, the vocabulary ends at 9"),
            ("[[-1]]", "invalid value: integer `-1`, expected u32"),
        ] {
            assert!(read(text).expect_err(text).contains(reason), "{text}");
        }
    }
}
