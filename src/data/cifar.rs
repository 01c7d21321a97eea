//! CIFAR-10's images: the binary layout (a label byte, then 32 x 32 bytes of red, green and blue), or the hub's parquet
//! files (columns `img`, a PNG, and `label`).

use super::bytes::ByteSource;
use super::files::extension;
use super::parquet_file::guarded;
use anyhow::{Context, Result, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use std::sync::Arc;

/// Bytes of one image's three colours.
const PICTURE: usize = 3 * 32 * 32;
/// Bytes of a record.
const RECORD: usize = PICTURE + 1;
const CLASSES: u8 = 10;

/// Images with their labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// [count, 32, 32, 3]: rows, columns, colours.
    pub pixels: Vec<u8>,
    pub labels: Vec<u8>,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Reads files one after another; at most `limit` images.
    ///
    /// # Errors
    /// When a file cannot be read, is not CIFAR-10 in either form, or has a label above 9.
    pub fn read(files: &[Arc<dyn ByteSource>], limit: Option<usize>) -> Result<Self> {
        let (mut images, limit) = (Self::default(), limit.unwrap_or(usize::MAX));
        for file in files {
            if images.len() >= limit {
                break;
            }
            match extension(file.name()).as_deref() {
                Some("parquet" | "pq") => guarded(|| images.read_parquet(&**file, limit)),
                _ => images.read_binary(&**file, limit),
            }
            .with_context(|| format!("in {}", file.name()))?;
        }
        Ok(images)
    }

    fn read_binary(&mut self, file: &dyn ByteSource, limit: usize) -> Result<()> {
        ensure!(
            !file.is_empty() && file.len().is_multiple_of(RECORD as u64),
            "{} bytes are not a whole number of CIFAR-10 records of {RECORD}: it takes the binary version \
             (data_batch_1.bin ...) or the hub's parquet files",
            file.len()
        );
        let wanted = (limit - self.len()).saturating_mul(RECORD) as u64;
        let bytes = file.read(0..file.len().min(wanted))?;
        for (index, record) in bytes.chunks_exact(RECORD).enumerate() {
            self.push_label(index, i64::from(record[0]))?;
            let plane = PICTURE / 3;
            let (red, rest) = record[1..].split_at(plane);
            let (green, blue) = rest.split_at(plane);
            let colours = red.iter().zip(green.iter().zip(blue));
            self.pixels.extend(colours.flat_map(|(red, (green, blue))| [*red, *green, *blue]));
        }
        Ok(())
    }

    fn read_parquet(&mut self, file: &dyn ByteSource, limit: usize) -> Result<()> {
        let bytes = bytes::Bytes::from(file.read(0..file.len())?);
        let reader = SerializedFileReader::new(bytes).context("it is not a readable parquet file")?;
        for (index, row) in reader.get_row_iter(None)?.take(limit - self.len()).enumerate() {
            let row = row.with_context(|| format!("row {index}"))?;
            let (picture, label) = columns(&row).with_context(|| format!("row {index}"))?;
            self.push_label(index, label)?;
            self.pixels.extend(decode(picture).with_context(|| format!("the picture of row {index}"))?);
        }
        Ok(())
    }

    fn push_label(&mut self, index: usize, label: i64) -> Result<()> {
        if !(0..i64::from(CLASSES)).contains(&label) {
            bail!("record {index} has the label {label}, not 0 to 9: this is not CIFAR-10");
        }
        self.labels.push(label as u8);
        Ok(())
    }
}

/// The picture's PNG and the label of a row.
fn columns(row: &Row) -> Result<(&[u8], i64)> {
    let (mut picture, mut label) = (None, None);
    for (name, field) in row.get_column_iter() {
        match (name.as_str(), field) {
            ("img" | "image", Field::Group(group)) => {
                picture = group.get_column_iter().find_map(|(name, field)| match field {
                    Field::Bytes(bytes) if name == "bytes" => Some(bytes.data()),
                    _ => None,
                });
            }
            ("label", Field::Long(number)) => label = Some(*number),
            ("label", Field::Int(number)) => label = Some(i64::from(*number)),
            _ => {}
        }
    }
    picture.zip(label).context("it has no column `img` with a picture's `bytes` and a `label`")
}

/// The pixels of a PNG of 32 x 32 red, green and blue.
fn decode(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info()?;
    let (info, side) = (reader.info(), (PICTURE / 3).isqrt() as u32);
    ensure!(
        (info.width, info.height) == (side, side)
            && (info.color_type, info.bit_depth) == (png::ColorType::Rgb, png::BitDepth::Eight),
        "it is {} x {} {:?}, not 32 x 32 with 8 bits of red, green and blue",
        info.width,
        info.height,
        info.color_type
    );
    let mut pixels = vec![0; PICTURE];
    reader.next_frame(&mut pixels)?;
    Ok(pixels)
}

#[cfg(test)]
mod tests {
    use super::super::bytes::LocalFile;
    use super::*;

    fn file(folder: &std::path::Path, name: &str, bytes: &[u8]) -> Result<Arc<dyn ByteSource>> {
        let path = folder.join(name);
        std::fs::write(&path, bytes)?;
        Ok(Arc::new(LocalFile::open(&path)?))
    }

    #[test]
    fn colours_of_a_pixel_come_together_and_limits_cut_across_files() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let record = |label: u8| {
            let mut record = vec![label];
            record.extend((0..PICTURE).map(|i| (i / 1024 * 100 + i % 7) as u8));
            record
        };
        let one = file(folder.path(), "a.bin", &[record(3), record(9)].concat())?;
        let two = file(folder.path(), "b.bin", &[record(1), record(2)].concat())?;
        let images = Images::read(&[one, two], Some(3))?;
        assert_eq!(images.labels, [3, 9, 1]);
        assert_eq!(images.pixels[..6], [0, 102, 204, 1, 103, 205]);
        assert_eq!(images.pixels.len(), 3 * PICTURE);
        Ok(())
    }

    #[test]
    fn other_files_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let message = |file| {
            Images::read(&[file], None).map(|_| ()).map_err(|error| format!("{error:#}")).expect_err("not CIFAR-10")
        };
        assert!(message(file(folder.path(), "short.bin", &[0; 100])?).contains("short.bin: 100 bytes"));
        assert!(message(file(folder.path(), "label.bin", &[10; RECORD])?).contains("label 10"));
        Ok(())
    }

    #[test]
    fn the_hubs_parquet_files_hold_the_pictures_of_the_binary_files() -> Result<()> {
        let Some(shared) = std::env::var_os("VRTRAIN_SHARED").map(std::path::PathBuf::from) else {
            eprintln!(
                "skipping the_hubs_parquet_files_hold_the_pictures_of_the_binary_files: VRTRAIN_SHARED is not set"
            );
            return Ok(());
        };
        let open = |path: &str| -> Result<Images> {
            let file: Arc<dyn ByteSource> = Arc::new(LocalFile::open(&shared.join(path))?);
            Images::read(&[file], Some(100))
        };
        let parquet = open("hub/datasets/uoft-cs/cifar10/plain_text/test-00000-of-00001.parquet")?;
        assert_eq!(parquet.len(), 100);
        assert_eq!(parquet, open("data/cifar10/test_1000.bin")?);
        Ok(())
    }
}
