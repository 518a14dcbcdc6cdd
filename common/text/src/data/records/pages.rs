//! The sizes of Parquet pages, checked before any is unpacked.
//!
//! A page says how long it is unpacked, and readers reserve that much; gzip and Brotli unpack to more than they say.
//! Nothing in the `parquet` crate limits either, so a file of a kilobyte could take all memory.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use flate2::read::MultiGzDecoder;
use parquet::basic::Compression;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};

use super::tally::MAX_EXPANSION;

/// How deep the structures of a page's header nest: four levels in the format.
const MAX_DEPTH: usize = 8;

/// The sizes in a page's header.
struct PageSizes {
    unpacked: u64,
    packed: u64,
}

/// Checks every page of the column `name`: its place, and that it unpacks to what it says and to no more than
/// `max_bytes`, or a fixed multiple of its packed size if that is more.
pub(super) fn check(file: &File, metadata: &ParquetMetaData, name: &str, max_bytes: u64) -> Result<(), String> {
    let file_len = file.metadata().map_err(|error| error.to_string())?.len();
    for (i, group) in metadata.row_groups().iter().enumerate() {
        for chunk in group.columns().iter().filter(|chunk| chunk.column_path().parts() == [name]) {
            check_chunk(file, file_len, chunk, max_bytes).map_err(|reason| format!("row group {}: {reason}", i + 1))?;
        }
    }
    Ok(())
}

fn check_chunk(file: &File, file_len: u64, chunk: &ColumnChunkMetaData, max_bytes: u64) -> Result<(), String> {
    let start = u64::try_from(chunk.dictionary_page_offset().unwrap_or_else(|| chunk.data_page_offset()));
    let len = u64::try_from(chunk.compressed_size());
    let (Ok(start), Ok(len), 0..) = (start, len, chunk.num_values()) else {
        return Err("a place or count is negative".to_owned());
    };
    if start.checked_add(len).is_none_or(|end| end > file_len) {
        return Err("its pages lie beyond the end of the file".to_owned());
    }
    let mut file = file;
    file.seek(SeekFrom::Start(start)).map_err(|error| error.to_string())?;
    let mut bytes = BufReader::new(file.take(len));
    while !is_at_end(&mut bytes).map_err(|error| error.to_string())? {
        let page = sizes(&mut bytes).map_err(|error| format!("a page's header is damaged: {error}"))?;
        if page.unpacked > page.packed.saturating_mul(MAX_EXPANSION).max(max_bytes) {
            return Err(format!("a page of {} bytes would unpack to {}", page.packed, page.unpacked));
        }
        let mut packed = bytes.by_ref().take(page.packed);
        // These two are unpacked to their end, whatever the header says.
        let n_unpacked = match chunk.compression() {
            Compression::GZIP(_) => length(MultiGzDecoder::new(&mut packed), page.unpacked),
            Compression::BROTLI(_) => length(brotli::Decompressor::new(&mut packed, 1 << 12), page.unpacked),
            _ => 0,
        };
        if n_unpacked > page.unpacked {
            return Err(format!("a page unpacks to more than the {} bytes it says", page.unpacked));
        }
        io::copy(&mut packed, &mut io::sink()).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn is_at_end(bytes: &mut BufReader<impl Read>) -> io::Result<bool> {
    use io::BufRead;
    Ok(bytes.fill_buf()?.is_empty())
}

/// How many bytes can be read, counted up to one more than `limit`. Damage is left for the reader to report.
fn length(unpacked: impl Read, limit: u64) -> u64 {
    let mut counted = Counted(0);
    let _ = io::copy(&mut unpacked.take(limit + 1), &mut counted);
    counted.0
}

struct Counted(u64);

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a page's header, of which the second and third field are its sizes.
///
/// # Source
/// `PageHeader` in Apache Parquet's `parquet.thrift`, in Thrift's compact protocol.
fn sizes(bytes: &mut impl Read) -> io::Result<PageSizes> {
    let mut found = [None; 4];
    let mut field = 0;
    while let Some(kind) = next_field(bytes, &mut field)? {
        match usize::try_from(field) {
            Ok(at @ 1..4) if kind == 5 => found[at] = Some(zigzag(varint(bytes)?)),
            _ => skip(bytes, kind, 0)?,
        }
    }
    let size = |at: usize| found[at].and_then(|size| u64::try_from(size).ok()).ok_or_else(damaged);
    Ok(PageSizes { unpacked: size(2)?, packed: size(3)? })
}

/// The type of a structure's next field, whose number replaces `field`; `None` at the structure's end.
fn next_field(bytes: &mut impl Read, field: &mut i64) -> io::Result<Option<u8>> {
    let head = byte(bytes)?;
    if head == 0 {
        return Ok(None);
    }
    *field = match head >> 4 {
        0 => zigzag(varint(bytes)?),
        step => field.saturating_add(i64::from(step)),
    };
    Ok(Some(head & 15))
}

/// Reads over a value.
fn skip(bytes: &mut impl Read, kind: u8, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(damaged());
    }
    match kind {
        1 | 2 => {}
        3 => drop(byte(bytes)?),
        4..=6 => drop(varint(bytes)?),
        7 => skip_bytes(bytes, 8)?,
        8 => {
            let n = varint(bytes)?;
            skip_bytes(bytes, n)?;
        }
        9 | 10 => {
            let head = byte(bytes)?;
            let n = if head >> 4 == 15 { varint(bytes)? } else { u64::from(head >> 4) };
            // A bool takes a byte in a list, and none as a field.
            let kind = if matches!(head & 15, 1 | 2) { 3 } else { head & 15 };
            for _ in 0..n {
                skip(bytes, kind, depth + 1)?;
            }
        }
        12 => {
            let mut field = 0;
            while let Some(kind) = next_field(bytes, &mut field)? {
                skip(bytes, kind, depth + 1)?;
            }
        }
        _ => return Err(damaged()),
    }
    Ok(())
}

fn skip_bytes(bytes: &mut impl Read, n: u64) -> io::Result<()> {
    if io::copy(&mut bytes.take(n), &mut io::sink())? < n { Err(damaged()) } else { Ok(()) }
}

fn byte(bytes: &mut impl Read) -> io::Result<u8> {
    let mut one = [0];
    bytes.read_exact(&mut one)?;
    Ok(one[0])
}

fn varint(bytes: &mut impl Read) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let part = byte(bytes)?;
        value |= u64::from(part & 127) << shift;
        if part < 128 {
            return Ok(value);
        }
    }
    Err(damaged())
}

fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

fn damaged() -> io::Error {
    io::Error::other("it is not a header")
}
