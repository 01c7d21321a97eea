//! Claims checked with real files outside the project, where VRTRAIN_SHARED names their folder.

use super::super::{NamedFiles, local_files};
use super::*;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The folder, or a line that says that the test is skipped.
fn shared(path: &str) -> Option<PathBuf> {
    let found = std::env::var_os("VRTRAIN_SHARED").map(|folder| Path::new(&folder).join(path)).filter(|p| p.exists());
    if found.is_none() {
        println!("skipped: VRTRAIN_SHARED does not name a folder with {path}");
    }
    found
}

/// Number of tokens in the first epoch's rows, and the SHA-256 of their ids as little-endian u32.
fn first_epoch_digest(data: DataSet, tokenizer: &TextTokenizer, length: usize) -> Result<(usize, String)> {
    let settings = StreamSettings { vocabulary_size: 50257, ..settings(length, Order::Sequential, 2) };
    let rows = all_rows(&mut TokenStream::open(Arc::new(data), Some(tokenizer), &settings, None)?, 1)?;
    let ids: Vec<u32> =
        rows.iter().flat_map(|row| &row[..length]).chain(rows.last().and_then(|row| row.last())).copied().collect();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Ok((ids.len(), super::super::data_set::hexadecimal(&Sha256::digest(bytes))))
}

/// Expected: Python tokenizers 0.23.3 and pyarrow on the same files: 50256 before each text, encode(text,
/// add_special_tokens=False); 2,621,600 ids in all, of which the first 2,563 * 1024 + 1 fill rows.
#[test]
fn the_look_alike_of_fineweb_edu_gives_the_ids_that_python_gives() -> Result<()> {
    let Some(folder) = shared("hub/datasets/HuggingFaceFW/fineweb-edu") else { return Ok(()) };
    let Some(tokenizer) = shared("data/tokenizers/gpt2") else { return Ok(()) };
    let data = DataSet::open(local_files(&folder, Some("sample/10BT/*.parquet"), NamedFiles::Taken)?, "text")?;
    let summary = data.summary();
    assert_eq!((summary.files, summary.units, summary.documents), (4, Some(25), Some(3246)));
    let (tokens, digest) = first_epoch_digest(data, &TextTokenizer::load(&tokenizer)?, 1024)?;
    assert_eq!(tokens, 2_621_441);
    assert_eq!(digest, "7893dd737a340b57302dbca6fbe04e7e67d58a4f2bf9fd44a25214ee5302debf");
    Ok(())
}

/// Expected: the same of the whole file as one document, 338,026 ids. The file is longer than a unit, so this is also a
/// test of the cut between two.
#[test]
fn tiny_shakespeare_gives_the_ids_that_python_gives() -> Result<()> {
    let Some(file) = shared("data/tinyshakespeare/input.txt") else { return Ok(()) };
    let Some(tokenizer) = shared("data/tokenizers/gpt2/tokenizer.json") else { return Ok(()) };
    let data = DataSet::open(local_files(&file, None, NamedFiles::Taken)?, "text")?;
    assert_eq!(data.summary().units, Some(2));
    let (tokens, digest) = first_epoch_digest(data, &TextTokenizer::load(&tokenizer)?, 64)?;
    assert_eq!(tokens, 337_985);
    assert_eq!(digest, "ba4890ec11dbe90437ddbceb0f81169f04f7dbcec92beb064fc6eab51c3c4dbe");
    Ok(())
}

#[test]
fn a_pytorch_runs_token_file_gives_its_rows_in_order() -> Result<()> {
    let Some(file) = shared("golden/train/vradam/tokens.bin") else { return Ok(()) };
    let bytes = std::fs::read(&file)?;
    let ids: Vec<u32> = bytes.as_chunks().0.iter().map(|&id| u32::from(u16::from_le_bytes(id))).collect();
    let data = Arc::new(DataSet::open(local_files(&file, None, NamedFiles::Taken)?, "text")?);
    assert_eq!(data.rows(64), Some(320));
    let settings = StreamSettings { vocabulary_size: 65536, ..settings(64, Order::Sequential, 1) };
    let mut stream = TokenStream::open(data, None, &settings, None)?;
    for step in 0..41 {
        let batch = stream.next_batch(8)?;
        for row in 0..8 {
            // Step 40 wraps to row 0.
            let start = (step * 8 + row) % 320 * 64;
            assert_eq!(batch.inputs[row * 64..][..64], ids[start..start + 64]);
            assert_eq!(batch.targets[row * 64..][..64], ids[start + 1..start + 65]);
        }
    }
    Ok(())
}

#[test]
fn problems_in_json_lines_are_read_by_their_field() -> Result<()> {
    let Some(file) = shared("data/gsm8k/train.jsonl") else { return Ok(()) };
    let tokenizer = small_tokenizer()?;
    let data = Arc::new(DataSet::open(local_files(&file, None, NamedFiles::Taken)?, "question")?);
    let settings = settings(16, Order::Sequential, 1);
    let rows = all_rows(&mut TokenStream::open(data, Some(&tokenizer), &settings, None)?, 1)?;
    assert_eq!(rows.iter().flat_map(|row| &row[..16]).filter(|&&id| id == 259).count(), 7473);
    assert!(message(DataSet::open(local_files(&file, None, NamedFiles::Taken)?, "text")).contains("line 1"));
    Ok(())
}
