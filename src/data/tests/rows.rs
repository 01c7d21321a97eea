//! Claims about rows: they equal a plain model of the data, whatever the threads, and a resume changes nothing.

use super::super::data_set::Sizes;
use super::super::{Basis, Batch, Pass, Position};
use super::*;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

/// The plain model: each epoch put end to end and cut, as many epochs as give `count` rows.
fn expected_rows(epoch_ids: impl Fn(u64) -> Vec<u32>, length: usize, count: usize) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    for epoch in 0.. {
        let ids = epoch_ids(epoch);
        rows.extend(ids.windows(length + 1).step_by(length).map(<[u32]>::to_vec));
        if rows.len() >= count {
            rows.truncate(count);
            break;
        }
    }
    rows
}

fn as_batch(rows: &[Vec<u32>], length: usize) -> Batch {
    let mut batch = Batch::with_capacity(rows.len(), length);
    rows.iter().for_each(|row| batch.push(row));
    batch
}

/// End-of-text and the ids that the library gives with special tokens in the text taken as text.
fn document_ids(tokenizer: &TextTokenizer, text: &str) -> Result<Vec<u32>> {
    let mut plain = tokenizer.tokenizer().clone();
    plain.set_encode_special_tokens(true);
    let encoding = plain.encode(text, false).map_err(|error| anyhow!(error))?;
    Ok(std::iter::once(tokenizer.begin_of_text()).chain(encoding.get_ids().iter().copied()).collect())
}

/// The ids of one epoch of units of texts, by the plain model.
fn text_epoch(tokenizer: &TextTokenizer, units: &[Vec<Option<String>>], order: Order, epoch: u64) -> Result<Vec<u32>> {
    let units: Vec<&Vec<Option<String>>> = units.iter().filter(|unit| !unit.is_empty()).collect();
    let mut ids = Vec::new();
    for unit in order.units(epoch, units.len()) {
        let mut texts: Vec<&String> = units[unit].iter().flatten().collect();
        order.within_unit(epoch, unit, &mut texts);
        for text in texts {
            ids.extend(document_ids(tokenizer, text)?);
        }
    }
    Ok(ids)
}

/// Reads batches twice over, once without a stop and once with the stops, and compares with the expected rows.
fn check_stream(
    data: &Arc<DataSet>,
    tokenizer: Option<&TextTokenizer>,
    settings: &StreamSettings,
    rows: usize,
    expected: &[Vec<u32>],
    stops: &[usize],
) -> Result<(), TestCaseError> {
    let failed = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
    let open = |from: Option<&Position>| TokenStream::open(data.clone(), tokenizer, settings, from).map_err(failed);
    let mut whole = open(None)?;
    let mut stopped = open(None)?;
    for (index, chunk) in expected.chunks(rows).enumerate() {
        if stops.contains(&index) {
            let written = serde_json::to_string(&stopped.position()).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let position: Position = serde_json::from_str(&written).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(&position, &whole.position());
            stopped = open(Some(&position))?;
            prop_assert_eq!(position, stopped.position());
        }
        let batch = as_batch(chunk, settings.sequence_length);
        prop_assert_eq!(&whole.next_batch(chunk.len()).map_err(failed)?, &batch, "batch {}", index);
        prop_assert_eq!(&stopped.next_batch(chunk.len()).map_err(failed)?, &batch, "batch {} after a stop", index);
    }
    Ok(())
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![Just(Order::Sequential), any::<u64>().prop_map(|seed| Order::Shuffled { seed })]
}

fn text() -> impl Strategy<Value = Option<String>> {
    prop_oneof![
        1 => Just(None),
        1 => Just(Some("a <|endoftext|> the".to_string())),
        6 => "( ?(the|tea|é|\n)){0,12}".prop_map(Some),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_of_parquet_files_equal_the_plain_model_and_a_resume_changes_nothing(
        groups in prop::collection::vec(prop::collection::vec(text(), 0..6), 1..8),
        split in 0usize..8, length in 1usize..40, rows in 1usize..5, threads in 1usize..4, order in order(),
        stops in prop::collection::vec(0usize..12, 1..4),
    ) {
        let tokenizer = small_tokenizer().expect("a tokenizer");
        let epoch = |epoch| text_epoch(&tokenizer, &groups, order, epoch).expect("texts are tokenized");
        prop_assume!(epoch(0).len() > length);
        let split = split.min(groups.len());
        let files = [("a.parquet", &groups[..split]), ("b.parquet", &groups[split..])].map(|(name, groups)| {
            let bytes = parquet_bytes(groups, Compression::SNAPPY, WriterVersion::PARQUET_2_0).expect("parquet");
            memory(name, bytes).expect("a file")
        });
        let data = Arc::new(DataSet::open(files.to_vec(), "text").expect("a data set"));
        let expected = expected_rows(epoch, length, 12 * rows);
        check_stream(&data, Some(&tokenizer), &settings(length, order, threads), rows, &expected, &stops)?;
    }

    #[test]
    fn rows_of_json_lines_and_text_equal_the_plain_model_and_a_resume_changes_nothing(
        lines in prop::collection::vec(text(), 1..40), story in "((the|tea|a .|é)\n){1,200}(the)?",
        length in 1usize..40, rows in 1usize..5, stops in prop::collection::vec(0usize..12, 1..4),
    ) {
        let tokenizer = small_tokenizer().expect("a tokenizer");
        let mut jsonl: String = lines.iter().map(|text| json!({"n": 1, "text": text}).to_string() + "\r\n").collect();
        jsonl.truncate(jsonl.len() - 2);
        let files = vec![memory("a.jsonl", jsonl).expect("a file"), memory("b.txt", story.as_str()).expect("a file")];
        // A cut is looked for in 16 bytes, and every line is shorter.
        let sizes = Sizes { unit: 256, piece: 32 };
        let data = Arc::new(DataSet::open_with_sizes(files, "text", sizes).expect("a data set"));
        let mut ids = Vec::new();
        for text in lines.iter().flatten().chain([&story]) {
            ids.extend(document_ids(&tokenizer, text).expect("texts are tokenized"));
        }
        prop_assume!(ids.len() > length);
        let expected = expected_rows(|_| ids.clone(), length, 12 * rows);
        let settings = settings(length, Order::Sequential, 2);
        check_stream(&data, Some(&tokenizer), &settings, rows, &expected, &stops)?;
    }

    #[test]
    fn rows_of_token_files_equal_windows_of_the_concatenation_and_a_resume_changes_nothing(
        sizes in prop::collection::vec(1usize..300, 1..5), length in 1usize..40, rows in 1usize..5,
        stops in prop::collection::vec(0usize..12, 1..4),
    ) {
        let ids: Vec<u32> = (0..sizes.iter().sum::<usize>() as u32).map(|i| i * 7919 % 300).collect();
        prop_assume!(ids.len() > length);
        let mut rest = ids.iter();
        let files = sizes.iter().map(|&size| {
            let bytes: Vec<u8> = rest.by_ref().take(size).flat_map(|&id| (id as u16).to_le_bytes()).collect();
            memory("ids.bin", bytes).expect("a file")
        });
        let data = Arc::new(DataSet::open(files.collect(), "text").expect("a data set"));
        let expected = expected_rows(|_| ids.clone(), length, 12 * rows);
        check_stream(&data, None, &settings(length, Order::Sequential, 1), rows, &expected, &stops)?;
    }
}

/// A token file larger than a block, whose ids tell their place.
fn large_token_file() -> Result<Arc<DataSet>> {
    let bytes: Vec<u8> = (0..700_000u32).flat_map(|i| (i * 7919 % 50_021).to_le_bytes()[..2].to_vec()).collect();
    Ok(Arc::new(DataSet::open(vec![memory("large.bin", bytes)?], "text")?))
}

#[test]
fn a_shuffled_epoch_of_a_token_file_has_every_row_once_and_epochs_differ_also_after_a_resume() -> Result<()> {
    let data = large_token_file()?;
    let sequential = StreamSettings { vocabulary_size: 50_021, ..settings(999, Order::Sequential, 1) };
    let shuffled = StreamSettings { order: Order::Shuffled { seed: 9 }, ..sequential.clone() };
    assert_eq!(data.rows(999), Some(700));
    let ordered = all_rows(&mut TokenStream::open(data.clone(), None, &sequential, None)?, 1)?;
    let mut stream = TokenStream::open(data.clone(), None, &shuffled, None)?;
    let rows = all_rows(&mut stream, 2)?;
    assert_eq!((ordered.len(), rows.len()), (700, 1400));
    assert_ne!(rows[..700], rows[700..]);
    for epoch in rows.chunks(700) {
        let (mut epoch, mut ordered) = (epoch.to_vec(), ordered.clone());
        assert_ne!(epoch, ordered);
        epoch.sort_unstable();
        ordered.sort_unstable();
        assert_eq!(epoch, ordered);
    }
    for stop in [0, 1, 261, 262, 263, 699, 700, 701, 1300] {
        let mut stream = TokenStream::open(data.clone(), None, &shuffled, None)?;
        stream.next_batch(stop)?;
        let mut resumed = TokenStream::open(data.clone(), None, &shuffled, Some(&stream.position()))?;
        assert_eq!(all_rows(&mut resumed, 2)?, rows[stop..], "stopped before row {stop}");
    }
    Ok(())
}

#[test]
fn one_two_and_seven_tokenizing_threads_give_the_same_rows() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let text = |i: usize| Some(format!("the {i} ").repeat(1 + i * 37 % 400));
    let groups: Vec<Vec<Option<String>>> = (0..20).map(|g| (0..30).map(|d| text(g * 30 + d)).collect()).collect();
    let file = memory("x.parquet", parquet_bytes(&groups, zstd()?, WriterVersion::PARQUET_1_0)?)?;
    let data = Arc::new(DataSet::open(vec![file], "text")?);
    let read = |threads| -> Result<Vec<Vec<u32>>> {
        let settings = settings(64, Order::Shuffled { seed: 3 }, threads);
        all_rows(&mut TokenStream::open(data.clone(), Some(&tokenizer), &settings, None)?, 1)
    };
    let rows = read(1)?;
    let expected = text_epoch(&tokenizer, &groups, Order::Shuffled { seed: 3 }, 0)?;
    assert_eq!(rows, expected_rows(|_| expected.clone(), 64, rows.len()));
    assert_eq!(rows.len(), (expected.len() - 1) / 64);
    assert!(rows == read(2)? && rows == read(7)?);
    Ok(())
}

#[test]
fn a_text_file_is_one_document_in_order_and_pieces_when_shuffled() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let story: String = (0..400).map(|i| format!("the line {i}\n")).collect();
    let sizes = Sizes { unit: 512, piece: 128 };
    let open = |order| -> Result<TokenStream> {
        let data = DataSet::open_with_sizes(vec![memory("x.txt", story.as_str())?], "text", sizes)?;
        TokenStream::open(Arc::new(data), Some(&tokenizer), &settings(1, order, 1), None)
    };
    let firsts = |rows: Vec<Vec<u32>>| -> Vec<u32> { rows.iter().map(|row| row[0]).collect() };
    let ids = document_ids(&tokenizer, &story)?;
    assert_eq!(firsts(all_rows(&mut open(Order::Sequential)?, 1)?), ids[..ids.len() - 1]);
    let shuffled = firsts(all_rows(&mut open(Order::Shuffled { seed: 1 })?, 1)?);
    let documents = shuffled.iter().filter(|&&id| id == 259).count();
    assert!((20..60).contains(&documents), "{documents}");
    assert!(shuffled.len().abs_diff(ids.len() + documents) < 3);
    Ok(())
}

#[test]
fn a_counted_pass_has_the_rows_of_an_epoch_in_any_order_and_knows_its_data() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let text = |i: usize| (i % 7 != 3).then(|| format!("the {i} ").repeat(1 + i * 37 % 40));
    let groups: Vec<Vec<Option<String>>> = (0..9).map(|g| (0..30).map(|d| text(g * 30 + d)).collect()).collect();
    let lines: String = (0..50).map(|i| json!({ "text": format!("tea {i} the") }).to_string() + "\n").collect();
    let parquet = parquet_bytes(&groups, zstd()?, WriterVersion::PARQUET_1_0)?;
    let files =
        || Ok::<_, anyhow::Error>(vec![memory("x.parquet", parquet.clone())?, memory("y.jsonl", lines.as_str())?]);
    let data = Arc::new(DataSet::open(files()?, "text")?);
    for order in [Order::Sequential, Order::Shuffled { seed: 3 }] {
        let settings = settings(64, order, 2);
        let mut parts = Vec::new();
        let pass = Pass::count(&data, Some(&tokenizer), &settings, &mut |_, part| parts.push(part))?;
        let rows = all_rows(&mut TokenStream::open(data.clone(), Some(&tokenizer), &settings, None)?, 1)?;
        assert_eq!((pass.rows(), pass.basis), (rows.len() as u64, Basis::Counted));
        assert!(
            parts.is_sorted() && parts.len() > 5 && parts.iter().all(|part| (0.0..1.0).contains(part)),
            "{parts:?}"
        );
        let kept: Pass = serde_json::from_str(&serde_json::to_string(&pass)?)?;
        assert_eq!(kept, pass);
        assert!(kept.is_of(&data, Some(&tokenizer), &settings));
        let shorter = StreamSettings { sequence_length: 63, ..settings.clone() };
        assert!(!kept.is_of(&data, Some(&tokenizer), &shorter));
        let less = DataSet::open(files()?.drain(1..).collect(), "text")?;
        assert!(!kept.is_of(&less, Some(&tokenizer), &settings));
        // From one of ten units, of about equal lengths but for the last.
        let about = Pass::estimate(&data, Some(&tokenizer), &settings)?;
        assert_eq!(about.basis, Basis::Estimated);
        let ratio = about.tokens as f64 / pass.tokens as f64;
        assert!((0.3..3.0).contains(&ratio), "{ratio}");
        let long = StreamSettings { sequence_length: pass.tokens as usize, ..settings };
        let refused = message(Pass::count(&data, Some(&tokenizer), &long, &mut |_, _| {}));
        assert!(refused.contains(&format!("hold {} tokens", pass.tokens)), "{refused}");
    }
    Ok(())
}
