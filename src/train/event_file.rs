//! TensorBoard's event files: records of protocol buffers (`tensorflow.Event`), each framed by its length and checksums.
//!
//! Frame: length (u64), masked CRC-32C of the length, the event, masked CRC-32C of the event; all little-endian.
//! A process writes a file of its own. Its second event is a session start at the first step that follows: TensorBoard
//! then drops what earlier files say of that step and later ones, as metrics.jsonl is cut back.

use super::log::{Sample, Telemetry};
use super::metrics::Record;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// An open event file.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates the file of a process that goes on after `step`.
    pub fn create(folder: &Path, step: u64) -> Result<Self> {
        let create = || -> Result<Self> {
            std::fs::create_dir_all(folder)?;
            let time = super::log::unix_time();
            let host = sysinfo::System::host_name().unwrap_or_else(|_| "localhost".into());
            // TensorBoard reads the files of a run in the order of their names.
            let name = format!("events.out.tfevents.{time:017.6}.{host}.{}.0", std::process::id());
            let path = folder.join(name);
            let file = File::options().create_new(true).append(true).open(&path)?;
            let mut events = Self { path, file };
            events.write(Event::new(time, 0).text(3, "brain.Event:2"))?;
            if step > 0 {
                const SESSION_START: u64 = 1;
                let session = Message::default().whole(1, SESSION_START);
                events.write(Event::new(time, step + 1).message(7, &session))?;
            }
            Ok(events)
        };
        create().with_context(|| format!("cannot write TensorBoard's events into {}", folder.display()))
    }

    /// Every number of a step, under the name that it has in metrics.jsonl and telemetry.jsonl.
    pub fn step(&mut self, record: &Record, telemetry: Option<&Telemetry>) -> Result<()> {
        let time = telemetry.map_or_else(super::log::unix_time, |telemetry| telemetry.time);
        let mut summary = Message::default();
        for object in [Some(serde_json::to_value(record)?), telemetry.map(serde_json::to_value).transpose()?] {
            let Some(Value::Object(fields)) = object else { continue };
            for (name, value) in fields.iter().filter(|(name, _)| !["step", "time"].contains(&name.as_str())) {
                if let Some(number) = value.as_f64() {
                    summary = summary.message(1, &scalar(name, number));
                }
            }
        }
        self.write(Event::new(time, record.step).message(5, &summary))
    }

    /// A sample, for TensorBoard's page of texts.
    pub fn sample(&mut self, sample: &Sample, time: f64) -> Result<()> {
        const STRING: u64 = 7;
        // TensorBoard renders Markdown; an indented block keeps the text as it is.
        let text = format!("{}{}", sample.prompt, sample.text).replace('\n', "\n    ");
        let dimension = Message::default().whole(1, 1);
        let shape = Message::default().message(2, &dimension);
        let tensor = Message::default().whole(1, STRING).message(2, &shape).text(8, &format!("    {text}"));
        let plugin = Message::default().message(1, &Message::default().text(1, "text"));
        let value = Message::default().text(1, "sample").message(9, &plugin).message(8, &tensor);
        self.write(Event::new(time, sample.step).message(5, &Message::default().message(1, &value)))
    }

    fn write(&mut self, event: Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(masked_checksum(&length).to_le_bytes());
        frame.extend(&event.0);
        frame.extend(masked_checksum(&event.0).to_le_bytes());
        self.file.write_all(&frame).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Makes what was written survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// A scalar as every reader of the format knows it. The format holds 32-bit floats: metrics.jsonl keeps the full number.
fn scalar(name: &str, number: f64) -> Message {
    Message::default().text(1, name).float(2, number as f32)
}

/// The checksum as the format stores it: rotated and shifted, so that a checksum of a checksum is none.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The beginning of every event.
struct Event;

impl Event {
    #[expect(clippy::new_ret_no_self, reason = "an event is a message with two fields set")]
    fn new(wall_time: f64, step: u64) -> Message {
        Message::default().double(1, wall_time).whole(2, step)
    }
}

/// The bytes of a protocol buffer message, field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn variable_length(mut self, mut number: u64) -> Self {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
        self
    }

    fn key(self, field: u64, wire_type: u64) -> Self {
        self.variable_length(field << 3 | wire_type)
    }

    fn whole(self, field: u64, number: u64) -> Self {
        self.key(field, 0).variable_length(number)
    }

    fn double(self, field: u64, number: f64) -> Self {
        let mut message = self.key(field, 1);
        message.0.extend(number.to_le_bytes());
        message
    }

    fn float(self, field: u64, number: f32) -> Self {
        let mut message = self.key(field, 5);
        message.0.extend(number.to_le_bytes());
        message
    }

    fn bytes(self, field: u64, bytes: &[u8]) -> Self {
        let mut message = self.key(field, 2).variable_length(bytes.len() as u64);
        message.0.extend(bytes);
        message
    }

    fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: u64, inner: &Message) -> Self {
        self.bytes(field, &inner.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_the_checksums_of_the_format() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let events = EventFile::create(folder.path(), 0)?;
        let bytes = std::fs::read(&events.path)?;
        // The first 12 bytes of every event file that holds "brain.Event:2" and no step: length 26 for a step of 0.
        assert_eq!(bytes[..8], 26u64.to_le_bytes());
        // CRC-32C of "123456789" is the check value of the polynomial's definition.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(bytes.len(), 8 + 4 + 26 + 4);
        Ok(())
    }
}
