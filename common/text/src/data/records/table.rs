//! The column `text` of a Parquet file.

use std::path::{Path, PathBuf};

use base::files::FileError;
use parquet::basic::Type as Physical;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use super::source::open_file;
use super::tally::{Expansion, Tally};
use super::{ReadOptions, Summary, pages};
use crate::data::DataError;

/// The column that holds the documents.
const COLUMN: &str = "text";

/// Memory of a row beside its text.
const BYTES_PER_ROW: u64 = 32;

/// The rows of a file, of which only the column `text` is read and unpacked.
pub(super) struct TextColumn {
    path: PathBuf,
    rows: RowIter<'static>,
    n_rows: u64,
    file_len: u64,
    row: usize,
    max_bytes: u64,
    tally: Tally,
    expansion: Expansion,
}

impl TextColumn {
    pub(super) fn open(path: &Path, options: ReadOptions) -> Result<Self, DataError> {
        let damaged = |error: parquet::errors::ParquetError| DataError::parquet(path, error.to_string());
        let (file, file_len) = open_file(path)?;
        if file_len == 0 {
            return Err(DataError::Empty(path.to_owned()));
        }
        let pages = file.try_clone().map_err(FileError::read(path))?;
        let reader = SerializedFileReader::new(file).map_err(damaged)?;
        let metadata = reader.metadata().file_metadata();
        let schema = metadata.schema();
        let n_rows = u64::try_from(metadata.num_rows()).unwrap_or_default();
        let Some(column) = schema.get_fields().iter().find(|field| field.name() == COLUMN).cloned() else {
            let names: Vec<_> = schema.get_fields().iter().map(|field| format!("`{}`", field.name())).collect();
            return Err(DataError::parquet(path, format!("it has no column `{COLUMN}` but {}", names.join(", "))));
        };
        if !column.is_primitive() || column.get_physical_type() != Physical::BYTE_ARRAY {
            return Err(DataError::parquet(path, format!("its column `{COLUMN}` does not hold strings")));
        }
        pages::check(&pages, reader.metadata(), COLUMN, options.max_record_bytes.bytes())
            .map_err(|reason| DataError::parquet(path, reason))?;
        let projection = Type::group_type_builder(schema.name()).with_fields(vec![column]).build().map_err(damaged)?;
        let rows = RowIter::from_file_into(Box::new(reader)).project(Some(projection)).map_err(damaged)?;
        Ok(Self {
            path: path.to_owned(),
            rows,
            n_rows,
            file_len,
            row: 0,
            max_bytes: options.max_record_bytes.bytes(),
            tally: Tally::new(path, "row", options),
            expansion: Expansion::new(path, file_len, options),
        })
    }

    /// The text of the next row that has one.
    pub(super) fn next(&mut self) -> Result<Option<String>, DataError> {
        for row in self.rows.by_ref() {
            self.row += 1;
            let row = row.map_err(|error| DataError::parquet(&self.path, format!("row {}: {error}", self.row)))?;
            let field = row.into_columns().into_iter().next().map(|(_, field)| field);
            let reason = match field {
                Some(Field::Str(text)) => {
                    self.expansion.add(text.len() as u64 + BYTES_PER_ROW)?;
                    if text.len() as u64 > self.max_bytes {
                        self.tally.too_long(self.row)?;
                        continue;
                    }
                    if !text.trim().is_empty() {
                        self.tally.good();
                        return Ok(Some(text));
                    }
                    "`text` is empty"
                }
                Some(Field::Null) | None => "`text` is null",
                Some(_) => "`text` is bytes, expected a string",
            };
            self.expansion.add(BYTES_PER_ROW)?;
            self.tally.bad(self.row, reason.to_owned())?;
        }
        Ok(None)
    }

    /// Reports what was read; see [`Tally::finish`].
    pub(super) fn finish(&mut self) -> Result<Summary, DataError> {
        self.tally.finish()
    }

    /// The part of the file that is read so far, in bytes, as far as the rows are of one size.
    pub(super) fn position(&self) -> u64 {
        (self.file_len as f64 * self.row as f64 / self.n_rows.max(1) as f64) as u64
    }
}
