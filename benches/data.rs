//! Measures the data path: files to batches, in tokens a second, with one tokenizing thread and with one a core.
//!
//! `cargo bench --bench data -- TOKENIZER SOURCE [COLUMN]`: a tokenizer.json (or its folder), a folder or file of data,
//! and the text column. Without arguments it takes the real shards that VRTRAIN_SHARED holds.

use anyhow::{Context, Result};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use vrtrain::data::{DataSet, NamedFiles, Order, StreamSettings, TextTokenizer, TokenStream, local_files};

const SEQUENCE_LENGTH: usize = 1024;
const ROWS: usize = 16;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let shared = std::env::var_os("VRTRAIN_SHARED").map(PathBuf::from);
    let (tokenizer, source) = match (arguments.as_slice(), shared) {
        ([tokenizer, source, ..], _) => (PathBuf::from(tokenizer), PathBuf::from(source)),
        (_, Some(shared)) => {
            (shared.join("data/tokenizers/gpt2"), shared.join("hub/datasets/HuggingFaceFW/fineweb-edu/sample/10BT"))
        }
        _ => {
            println!("skipped: give TOKENIZER and SOURCE, or set VRTRAIN_SHARED");
            return Ok(());
        }
    };
    let column = arguments.get(2).map_or("text", String::as_str);
    let start = Instant::now();
    let tokenizer = TextTokenizer::load(&tokenizer)?;
    println!("tokenizer loaded in {:.3} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let data = Arc::new(DataSet::open(local_files(&source, None, NamedFiles::Taken)?, column)?);
    println!("{:?}: opened in {:.3} s", data.summary(), start.elapsed().as_secs_f64());
    let cores = std::thread::available_parallelism().context("counting cores")?.get();
    for threads in [1, cores] {
        let settings = StreamSettings {
            sequence_length: SEQUENCE_LENGTH,
            order: Order::Shuffled { seed: 1 },
            vocabulary_size: tokenizer.vocabulary_size(),
            threads,
            queue_tokens: 1 << 18,
        };
        let start = Instant::now();
        let mut stream = TokenStream::open(data.clone(), Some(&tokenizer), &settings, None)?;
        stream.next_batch(1)?;
        let first = start.elapsed().as_secs_f64();
        let mut batches = 0;
        while stream.epoch()? == 0 {
            stream.next_batch(ROWS)?;
            batches += 1;
        }
        let (seconds, tokens) = (start.elapsed().as_secs_f64(), batches * ROWS * SEQUENCE_LENGTH);
        println!(
            "{threads} tokenizing thread(s): first row after {first:.3} s, {tokens} tokens in {seconds:.2} s, {:.0}/s",
            tokens as f64 / seconds
        );
    }
    Ok(())
}
