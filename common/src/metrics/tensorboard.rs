//! TensorBoard's event file: the metrics once more, as TensorBoard reads them.
//!
//! The file is a sequence of records, each one `Event` in the encoding of Protocol Buffers: first the version of the
//! format, then one event for each line of `metrics.jsonl`. What a line lacks, the absolute time, is counted from the
//! stage's `seconds`, so that time in which a run stood still does not show.
//!
//! # Source
//! `tensorflow/core/lib/io/record_writer.h` (records), `tensorflow/core/util/event.proto` and
//! `tensorflow/core/framework/summary.proto` (events).

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::keep_numbers;
use crate::files::FileError;

/// The file of events in an output directory; TensorBoard knows it by the `tfevents` in its name.
pub const EVENTS_FILE: &str = "events.out.tfevents.kindling";

/// Version of the format, which the first event names.
const VERSION: &str = "brain.Event:2";

/// Fields of `Event`.
const WALL_TIME: u8 = 1;
const STEP: u8 = 2;
const FILE_VERSION: u8 = 3;
const SUMMARY: u8 = 5;

/// Field of `Summary`.
const VALUE: u8 = 1;

/// Fields of `Summary.Value`.
const TAG: u8 = 1;
const SIMPLE_VALUE: u8 = 2;

/// How a field is encoded: as a varint, as 8 or 4 bytes, or as bytes with their number before them.
const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const BYTES: u8 = 2;
const FIXED_32: u8 = 5;

/// The event file of a running stage.
#[derive(Debug)]
pub(super) struct Events {
    /// Unix time, in seconds, at which the stage would have begun had it never stopped.
    began: f64,
}

impl Events {
    /// Writes the file in `out` anew, with the `rows` of metrics so far; the stage is `seconds` old.
    ///
    /// That way a resumed run has each step once, whatever an earlier process left, and may begin to write the file. It is
    /// written in place: a TensorBoard that has it open goes on reading.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn create(out: &Path, rows: &[Map<String, Value>], seconds: f64) -> Result<Self, FileError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let events = Self { began: now - seconds };
        let mut bytes = record(&version(events.began));
        for row in rows {
            bytes.extend(events.record_of(row));
        }
        let path = out.join(EVENTS_FILE);
        fs::write(&path, bytes).map_err(FileError::write(&path))?;
        Ok(events)
    }

    /// Adds a row of metrics to the file in `out`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn append(&self, out: &Path, row: &Map<String, Value>) -> Result<(), FileError> {
        let path = out.join(EVENTS_FILE);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(&self.record_of(row))).map_err(FileError::write(&path))
    }

    fn record_of(&self, row: &Map<String, Value>) -> Vec<u8> {
        let seconds = row.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
        let step = row.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut values = BTreeMap::new();
        keep_numbers(&mut values, row);
        record(&scalars(self.began + seconds, step, values.iter().map(|(name, &value)| (name.as_str(), value))))
    }
}

/// A record: the length of `data` in 8 bytes, its checksum, `data` and its checksum; little-endian.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// CRC-32C, turned and shifted so that the checksum of bytes that contain checksums is not one of theirs.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// The event at the head of a file.
fn version(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put(&mut event, WALL_TIME, FIXED_64, &wall_time.to_le_bytes());
    put_bytes(&mut event, FILE_VERSION, VERSION.as_bytes());
    event
}

/// The event of one step's numbers.
fn scalars<'a>(wall_time: f64, step: u64, values: impl Iterator<Item = (&'a str, f64)>) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, number) in values {
        let mut value = Vec::new();
        put_bytes(&mut value, TAG, tag.as_bytes());
        put(&mut value, SIMPLE_VALUE, FIXED_32, &(number as f32).to_le_bytes());
        put_bytes(&mut summary, VALUE, &value);
    }
    let mut event = Vec::new();
    put(&mut event, WALL_TIME, FIXED_64, &wall_time.to_le_bytes());
    put(&mut event, STEP, VARINT, &varint(step));
    put_bytes(&mut event, SUMMARY, &summary);
    event
}

/// Adds a field to a message.
fn put(message: &mut Vec<u8>, field: u8, encoding: u8, content: &[u8]) {
    message.push(field << 3 | encoding);
    message.extend(content);
}

/// Adds a field whose length is not known from its encoding.
fn put_bytes(message: &mut Vec<u8>, field: u8, content: &[u8]) {
    put(message, field, BYTES, &varint(content.len() as u64));
    message.extend(content);
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn records_are_to_the_byte_those_of_tensorboards_own_writer() {
        // TensorBoard 2.21.0, `RecordWriter` and `Event.SerializeToString`.
        assert_eq!(
            hex(&record(&version(1_700_000_000.5))),
            "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b353110"
        );
        let values = [("train/loss", 2.5), ("train/lr", 1e-3)];
        assert_eq!(
            hex(&record(&scalars(1_700_000_001.5, 300, values.into_iter()))),
            "3200000000000000241956ec0900006040fc54d94110ac022a240a110a0a747261696e2f6c6f737315000020400a0f0a0874\
             7261696e2f6c72156f12833ae6050dc4"
        );
    }

    #[test]
    fn a_checksum_is_crc_32c_and_masked() {
        // The check value of the catalogue of CRC algorithms for CRC-32/ISCSI.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let masked = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(b"123456789"), masked.to_le_bytes());
    }

    #[test]
    fn large_numbers_take_more_bytes() {
        assert_eq!([0, 127, 128, 300].map(varint), [vec![0], vec![127], vec![0x80, 1], vec![0xac, 2]]);
        assert_eq!(varint(u64::MAX).len(), 10);
    }
}
