//! Claims about files: parquet of pyarrow and of every kind of page is read as written, and damage is an error.

use super::super::{NamedFiles, Position, documents_as_ids, local_files};
use super::*;
use proptest::prelude::*;
use std::path::Path;

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

fn first_epoch(file: SourceFile, column: &str) -> Result<(Vec<u32>, usize)> {
    let tokenizer = small_tokenizer()?;
    let data = Arc::new(DataSet::open(vec![file], column)?);
    let mut stream = TokenStream::open(data, Some(&tokenizer), &settings(1, Order::Sequential, 1), None)?;
    let rows = all_rows(&mut stream, 1)?;
    let ids: Vec<u32> = rows.iter().map(|row| row[0]).chain(rows.last().map(|row| row[1])).collect();
    Ok((ids, stream.skipped_nulls()))
}

fn decoded(ids: &[u32]) -> Result<Vec<String>> {
    let tokenizer = small_tokenizer()?;
    let documents = ids.split(|&id| id == 259).skip(1);
    documents.map(|ids| tokenizer.tokenizer().decode(ids, false).map_err(|error| anyhow!(error))).collect()
}

#[test]
fn what_pyarrow_wrote_is_read_with_nulls_skipped_and_counted() -> Result<()> {
    let texts: Vec<Option<String>> = serde_json::from_slice(&std::fs::read(fixture("texts.json"))?)?;
    let expected: Vec<String> = texts.iter().flatten().cloned().collect();
    for name in ["snappy-v1.parquet", "zstd-v2.parquet", "plain.parquet"] {
        let file = SourceFile::local(&fixture(name))?;
        let summary = *DataSet::open(vec![file.clone()], "text")?.summary();
        assert_eq!((summary.units, summary.documents), (Some(3), Some(20)), "{name}");
        let (ids, nulls) = first_epoch(file.clone(), "text")?;
        assert_eq!(decoded(&ids)?, expected, "{name}");
        // The pipeline is ahead of the rows, so it may have met the nulls of the next epochs already.
        assert!(nulls >= 3 && nulls % 3 == 0 || nulls > 3, "{nulls}");
        assert_eq!(decoded(&first_epoch(file, "also")?.0)?[19], "other 19");
    }
    Ok(())
}

#[test]
fn a_missing_or_unsuitable_column_and_compression_are_refused_with_the_columns_to_choose_from() -> Result<()> {
    let open = |name: &str, column| {
        message(SourceFile::local(&fixture(name)).and_then(|file| DataSet::open(vec![file], column)))
    };
    for (column, said) in [
        ("body", "there is no column \"body\""),
        ("score", "the column \"score\" is not text but DOUBLE"),
        ("parts.list.element", "holds lists"),
    ] {
        let error = open("snappy-v1.parquet", column);
        assert!(error.contains(said) && error.contains("one of: text, also") && error.contains("snappy-v1"), "{error}");
    }
    let error = open("gzip.parquet", "text");
    assert!(error.contains("row group 0") && error.contains("GZIP"), "{error}");
    Ok(())
}

#[test]
fn every_kind_of_page_and_compression_gives_the_texts_that_were_written() -> Result<()> {
    let text = |i: usize| (i % 7 != 3).then(|| format!("the text {} é", i % 9));
    let groups: Vec<Vec<Option<String>>> = (0..4).map(|g| (0..25 * g).map(text).collect()).collect();
    let expected: Vec<String> = groups.iter().flatten().flatten().cloned().collect();
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, zstd()?] {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            let file = memory("x.parquet", parquet_bytes(&groups, compression, version)?)?;
            assert_eq!(decoded(&first_epoch(file, "text")?.0)?, expected, "{compression} {version:?}");
        }
    }
    Ok(())
}

#[test]
fn a_parquet_file_cut_anywhere_is_refused_before_training() -> Result<()> {
    let whole = std::fs::read(fixture("zstd-v2.parquet"))?;
    for length in (1..whole.len()).step_by(13) {
        let error =
            message(memory("torn.parquet", &whole[..length]).and_then(|file| DataSet::open(vec![file], "text")));
        assert!(error.contains("torn.parquet") && error.contains("torn or damaged"), "{length}: {error}");
    }
    Ok(())
}

proptest! {
    #[test]
    fn damaged_parquet_is_an_error_or_other_text_but_never_a_panic(
        at in 0usize..4500, bytes in prop::collection::vec(any::<u8>(), 1..9)
    ) {
        let mut whole = std::fs::read(fixture("snappy-v1.parquet")).expect("the fixture");
        let at = at.min(whole.len() - bytes.len());
        whole[at..at + bytes.len()].copy_from_slice(&bytes);
        // A small file is read in full when it is opened.
        if let Err(error) = memory("x.parquet", whole).and_then(|file| DataSet::open(vec![file], "text")) {
            prop_assert!(format!("{error:#}").contains("x.parquet"), "{error:#}");
        }
    }
}

#[test]
fn a_page_at_which_the_decoder_panics_is_an_error_that_names_the_file() -> Result<()> {
    let mut whole = std::fs::read(fixture("snappy-v1.parquet"))?;
    whole[776] = 12;
    assert!(
        message(memory("x.parquet", whole).and_then(|file| DataSet::open(vec![file], "text"))).contains("x.parquet")
    );
    Ok(())
}

#[test]
fn empty_and_mixed_sources_are_refused() -> Result<()> {
    assert_eq!(message(DataSet::open(Vec::new(), "text")), "the data set has no files");
    assert!(message(memory("a.txt", "")).contains("a.txt is empty"));
    let only_nulls = parquet_bytes(&[vec![None, None], vec![]], Compression::SNAPPY, WriterVersion::PARQUET_1_0)?;
    assert!(message(DataSet::open(vec![memory("n.parquet", only_nulls)?], "text")).contains("no documents"));
    let mixed = vec![memory("a.txt", "text")?, memory("b.bin", [1, 0])?];
    assert!(message(DataSet::open(mixed, "text")).contains("b.bin holds token ids and a.txt holds text"));
    Ok(())
}

#[test]
fn ids_outside_the_vocabulary_and_data_shorter_than_a_row_are_refused_at_the_start() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let ids = Arc::new(DataSet::open(vec![memory("ids.bin", [1, 0, 2, 1, 7, 0])?], "text")?);
    let open = |data: &Arc<DataSet>, settings: &StreamSettings| {
        TokenStream::open(data.clone(), Some(&tokenizer), settings, None)
    };
    let small = StreamSettings { vocabulary_size: 258, ..settings(2, Order::Sequential, 1) };
    assert!(message(open(&ids, &small)).contains("token 1 of ids.bin (at byte 2) has the id 258"));
    assert!(message(open(&ids, &settings(3, Order::Sequential, 1))).contains("hold 3 tokens, but a row takes 4"));
    let text = Arc::new(DataSet::open(vec![memory("x.txt", "abc")?], "text")?);
    assert!(message(open(&text, &small)).contains("the tokenizer has 260 ids, but the model's vocabulary 258"));
    let mut short = open(&text, &settings(4, Order::Sequential, 1))?;
    assert!(message(short.epoch()).contains("hold 4 tokens, but a row takes 5"));
    assert!(
        message(short.next_batch(1)).contains("ended after an error")
            || message(short.next_batch(1)).contains("hold 4")
    );
    let without = TokenStream::open(text, None, &settings(2, Order::Sequential, 1), None);
    assert!(message(without).contains("[tokenizer] source"));
    Ok(())
}

#[test]
fn a_position_of_other_data_or_settings_is_refused_and_says_what_changed() -> Result<()> {
    let open = |bytes: &[u8], settings: &StreamSettings, from: Option<&Position>| {
        let data = Arc::new(DataSet::open(vec![memory("ids.bin", bytes)?], "text")?);
        TokenStream::open(data, None, settings, from)
    };
    let (bytes, before) = ([1, 0].repeat(50), settings(4, Order::Shuffled { seed: 1 }, 1));
    let mut stream = open(&bytes, &before, None)?;
    stream.next_batch(3)?;
    let position = stream.position();
    assert!(open(&bytes, &StreamSettings { threads: 5, queue_tokens: 9, ..before.clone() }, Some(&position)).is_ok());
    let mut other = bytes.clone();
    other[40] = 2;
    assert!(message(open(&other, &before, Some(&position))).contains("the content of the data files was"));
    let longer = StreamSettings { sequence_length: 5, ..before.clone() };
    assert!(message(open(&bytes, &longer, Some(&position))).contains("sequence_length was 4 and is 5"));
    let unshuffled = StreamSettings { order: Order::Sequential, ..before.clone() };
    assert!(message(open(&bytes, &unshuffled, Some(&position))).contains("seed of the shuffle was 1 and is none"));
    let outside = Position { unit: 7, ..position };
    assert!(message(open(&bytes, &before, Some(&outside))).contains("outside the data's 1 units"));
    Ok(())
}

#[test]
fn the_documents_of_an_evaluation_have_no_tokens_added_and_a_long_text_is_one() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let folder = tempfile::tempdir()?;
    let read = |name: &str, bytes: &[u8], vocabulary_size| -> Result<Vec<Vec<u32>>> {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes)?;
        documents_as_ids(local_files(&path, None, NamedFiles::Taken)?, "text", Some(&tokenizer), vocabulary_size)?
            .collect()
    };
    let story = "the tea of the day\n".repeat(60_000);
    assert!(story.len() > 1 << 20, "two units");
    let expected = tokenizer.encode(&story)?;
    assert_eq!(read("x.txt", story.as_bytes(), 260)?, [expected]);
    let lines = read("x.jsonl", b"{\"text\": \"the\"}\n{\"text\": null}\n{\"text\": \"tea\"}", 260)?;
    assert_eq!(lines, [tokenizer.encode("the")?, tokenizer.encode("tea")?]);
    assert_eq!(tokenizer.decode(&lines[1])?, "tea");
    assert_eq!(read("x.bin", &[1, 0, 2, 0], 260)?, [[1, 2]]);
    assert!(message(read("y.txt", b"the", 257)).contains("gives the id 257"));
    assert!(
        message(
            documents_as_ids(local_files(&folder.path().join("x.txt"), None, NamedFiles::Taken)?, "text", None, 260)
                .map(drop)
        )
        .contains("no tokenizer")
    );
    Ok(())
}
