//! Token files: nanoGPT's raw u16 and llm.c's header and u16 or u32, put end to end and read by token ranges.

use super::bytes::ByteSource;
use super::files::{FileKind, LLMC_MAGIC_U16, LLMC_MAGIC_U32, SourceFile};
use anyhow::{Result, bail, ensure};
use std::ops::Range;
use std::sync::Arc;

/// llm.c's header: 256 little-endian i32: magic, version, number of tokens, zeros.
const LLMC_HEADER: u64 = 256 * 4;

/// Bytes of a stored token id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    U16 = 2,
    U32 = 4,
}

/// One file of token ids.
pub(super) struct TokenFile {
    bytes: Arc<dyn ByteSource>,
    width: Width,
    /// Where the ids begin, in bytes.
    data_start: u64,
    /// Number of ids.
    tokens: u64,
}

impl TokenFile {
    /// Checks the header and the length.
    pub fn open(file: &SourceFile) -> Result<Self> {
        let (name, len) = (file.bytes.name(), file.bytes.len());
        let (width, data_start, tokens) = match file.kind {
            FileKind::LlmcBin => {
                ensure!(len >= LLMC_HEADER, "{name} has {len} bytes, fewer than its header of {LLMC_HEADER}");
                let header = file.bytes.read(0..12)?;
                let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at * 4 + i]));
                let width = match (number(0), number(1)) {
                    (LLMC_MAGIC_U16, 1) => Width::U16,
                    (LLMC_MAGIC_U32, 7) => Width::U32,
                    (magic, version) => bail!(
                        "{name} is an llm.c file of magic {magic}, version {version}; \
                         readable are {LLMC_MAGIC_U16} version 1 and {LLMC_MAGIC_U32} version 7"
                    ),
                };
                let (tokens, expected) = (u64::from(number(2)), LLMC_HEADER + u64::from(number(2)) * width as u64);
                ensure!(
                    expected == len,
                    "the header of {name} counts {tokens} tokens, which take {expected} bytes, but the file has {len}: \
                     it is cut or damaged"
                );
                (width, LLMC_HEADER, tokens)
            }
            _ => {
                ensure!(
                    len.is_multiple_of(2),
                    "{name} has an odd length of {len} bytes: raw u16 token ids take two each"
                );
                (Width::U16, 0, len / 2)
            }
        };
        ensure!(tokens > 0, "{name} holds no tokens");
        Ok(Self { bytes: file.bytes.clone(), width, data_start, tokens })
    }

    /// The ids at `range`, checked against the vocabulary.
    fn read(&self, range: Range<u64>, vocabulary_size: usize, out: &mut Vec<u32>) -> Result<()> {
        let width = self.width as u64;
        let byte = |token: u64| self.data_start + token * width;
        let bytes = self.bytes.read(byte(range.start)..byte(range.end))?;
        let first = out.len();
        match self.width {
            Width::U16 => out.extend(bytes.as_chunks().0.iter().map(|&id| u32::from(u16::from_le_bytes(id)))),
            Width::U32 => out.extend(bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id))),
        }
        if let Some(index) = out[first..].iter().position(|&id| id as usize >= vocabulary_size) {
            let token = range.start + index as u64;
            bail!(
                "token {token} of {} (at byte {}) has the id {}, but the vocabulary has {vocabulary_size} ids: \
                 was the file written with another tokenizer, or in another format?",
                self.bytes.name(),
                byte(token),
                out[first + index]
            );
        }
        Ok(())
    }
}

/// Token files in their order, addressed as one long sequence.
pub(super) struct TokenFiles {
    files: Vec<TokenFile>,
    /// Where each file begins in the sequence, and at the end the sequence's length.
    starts: Vec<u64>,
}

impl TokenFiles {
    pub fn new(files: Vec<TokenFile>) -> Self {
        let mut starts = vec![0];
        starts.extend(files.iter().scan(0, |sum, file| {
            *sum += file.tokens;
            Some(*sum)
        }));
        Self { files, starts }
    }

    /// Number of tokens in all files.
    pub fn tokens(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Rows of `sequence_length` + 1 tokens with stride `sequence_length`.
    pub fn rows(&self, sequence_length: usize) -> u64 {
        self.tokens().saturating_sub(1) / sequence_length as u64
    }

    /// The ids at `range` of the sequence, which may span files.
    pub fn read(&self, range: Range<u64>, vocabulary_size: usize) -> Result<Vec<u32>> {
        let mut out = Vec::with_capacity((range.end - range.start) as usize);
        for (file, starts) in self.files.iter().zip(self.starts.windows(2)) {
            let (start, end) = (range.start.max(starts[0]), range.end.min(starts[1]));
            if start < end {
                file.read(start - starts[0]..end - starts[0], vocabulary_size, &mut out)?;
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryFile;
    use super::*;

    fn file(name: &str, bytes: Vec<u8>) -> Result<TokenFile> {
        TokenFile::open(&SourceFile::detect(Arc::new(MemoryFile::new(name, bytes)))?)
    }

    fn u16s(ids: &[u16]) -> Vec<u8> {
        ids.iter().flat_map(|id| id.to_le_bytes()).collect()
    }

    fn llmc(magic: u32, version: u32, count: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [magic, version, count].iter().flat_map(|n| n.to_le_bytes()).collect();
        bytes.resize(LLMC_HEADER as usize, 0);
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn files_of_all_three_formats_are_read_as_one_sequence() -> Result<()> {
        let wide: Vec<u8> = [70_000u32, 9].iter().flat_map(|id| id.to_le_bytes()).collect();
        let files = TokenFiles::new(vec![
            file("a.bin", u16s(&[1, 2, 3]))?,
            file("b.bin", llmc(LLMC_MAGIC_U16, 1, 2, &u16s(&[4, 5])))?,
            file("c.bin", llmc(LLMC_MAGIC_U32, 7, 2, &wide))?,
        ]);
        assert_eq!((files.tokens(), files.rows(3), files.rows(2), files.rows(7)), (7, 2, 3, 0));
        assert_eq!(files.read(0..7, 70_001)?, [1, 2, 3, 4, 5, 70_000, 9]);
        assert_eq!(files.read(2..4, 70_001)?, [3, 4]);
        Ok(())
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_named_with_file_and_offset() -> Result<()> {
        let files = TokenFiles::new(vec![
            file("a.bin", u16s(&[1]))?,
            file("b.bin", llmc(LLMC_MAGIC_U16, 1, 2, &u16s(&[4, 50])))?,
        ]);
        let error = files.read(0..3, 50).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("token 1 of b.bin (at byte 1026) has the id 50"), "{error}");
        Ok(())
    }

    #[test]
    fn a_wrong_length_count_or_version_is_refused() {
        for (bytes, said) in [
            (vec![1, 2, 3], "odd length of 3"),
            (llmc(LLMC_MAGIC_U16, 1, 3, &[0; 4]), "counts 3 tokens, which take 1030 bytes, but the file has 1028"),
            (llmc(LLMC_MAGIC_U16, 7, 2, &[0; 4]), "version 7"),
            (llmc(LLMC_MAGIC_U16, 1, 0, &[]), "holds no tokens"),
            (LLMC_MAGIC_U16.to_le_bytes().to_vec(), "fewer than its header"),
        ] {
            let error = file("x.bin", bytes).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(said) && error.contains("x.bin"), "{error}");
        }
    }
}
