//! Claims about the threads: errors arrive in order, what is not needed is not read, and a dropped stream ends them.

use super::super::bytes::ByteSource;
use super::super::{FileKind, ValidationSet};
use super::*;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes in memory that record which ranges are read, and that fail or tarry on request.
struct Watched {
    bytes: MemoryFile,
    reads: Mutex<Vec<Range<u64>>>,
    fails_from: u64,
    failing: AtomicBool,
    delay: Duration,
}

impl Watched {
    fn new(bytes: Vec<u8>) -> Self {
        let bytes = MemoryFile::new("watched.parquet", bytes);
        Self {
            bytes,
            reads: Mutex::default(),
            fails_from: u64::MAX,
            failing: AtomicBool::new(false),
            delay: Duration::ZERO,
        }
    }

    fn reads(&self) -> Vec<Range<u64>> {
        self.reads.lock().map(|mut reads| std::mem::take(&mut *reads)).unwrap_or_default()
    }
}

impl ByteSource for Watched {
    fn name(&self) -> &str {
        self.bytes.name()
    }

    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        std::thread::sleep(self.delay);
        if self.failing.load(Ordering::Relaxed) && range.start >= self.fails_from {
            return Err(anyhow!("the server of {} went away", self.name()));
        }
        self.reads.lock().map_err(|_| anyhow!("a reader panicked"))?.push(range.clone());
        self.bytes.read(range)
    }
}

/// Twelve row groups of 100 texts each.
fn twelve_groups() -> Result<Vec<u8>> {
    let text = |g: usize, d: usize| Some(format!("the tea of group {g}, cup {d} ").repeat(40));
    let groups: Vec<Vec<Option<String>>> = (0..12).map(|g| (0..100).map(|d| text(g, d)).collect()).collect();
    parquet_bytes(&groups, Compression::SNAPPY, WriterVersion::PARQUET_1_0)
}

fn open(source: &Arc<Watched>) -> Result<Arc<DataSet>> {
    Ok(Arc::new(DataSet::open(vec![SourceFile { bytes: source.clone(), kind: FileKind::Parquet }], "text")?))
}

#[test]
fn a_failing_read_arrives_after_the_rows_before_it_and_ends_the_stream() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let whole = twelve_groups()?;
    let half = whole.len() as u64 / 2;
    let source = Arc::new(Watched { fails_from: half, ..Watched::new(whole) });
    let data = open(&source)?;
    source.failing.store(true, Ordering::Relaxed);
    let mut stream = TokenStream::open(data, Some(&tokenizer), &settings(64, Order::Sequential, 2), None)?;
    let mut rows = 0;
    let error = loop {
        match stream.next_batch(1) {
            Ok(_) => rows += 1,
            Err(error) => break format!("{error:#}"),
        }
    };
    assert!(rows > 1000 && error.contains("the server of watched.parquet went away"), "{rows} {error}");
    assert!(message(stream.next_batch(1)).contains("ended after an error"));
    Ok(())
}

#[test]
fn a_resume_reads_the_footer_and_the_row_groups_from_the_position_on() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let source = Arc::new(Watched::new(twelve_groups()?));
    let data = open(&source)?;
    let settings = StreamSettings { queue_tokens: 1, ..settings(64, Order::Sequential, 1) };
    let mut stream = TokenStream::open(data.clone(), Some(&tokenizer), &settings, None)?;
    while stream.position().unit < 9 {
        stream.next_batch(1)?;
    }
    let position = stream.position();
    drop(stream);
    std::thread::sleep(Duration::from_millis(50));
    source.reads();
    let mut resumed = TokenStream::open(data, Some(&tokenizer), &settings, Some(&position))?;
    resumed.next_batch(1)?;
    let first = source.reads().iter().map(|range| range.start).collect::<Vec<_>>();
    assert!(first.iter().all(|&start| start > source.len() * 8 / 12 || start < source.len() * 3 / 12), "{first:?}");
    Ok(())
}

#[test]
fn dropping_a_stream_ends_its_threads() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let data = open(&Arc::new(Watched::new(twelve_groups()?)))?;
    let settings = StreamSettings { queue_tokens: 100_000_000, ..settings(64, Order::Shuffled { seed: 1 }, 3) };
    let mut stream = TokenStream::open(data.clone(), Some(&tokenizer), &settings, None)?;
    stream.next_batch(1)?;
    drop(stream);
    let start = Instant::now();
    while Arc::strong_count(&data) > 1 {
        assert!(start.elapsed() < Duration::from_secs(10), "threads still hold the data");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[test]
fn waiting_is_measured_and_the_queue_fills_while_the_trainer_works() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let source = Arc::new(Watched { delay: Duration::from_millis(30), ..Watched::new(twelve_groups()?) });
    let mut stream = TokenStream::open(open(&source)?, Some(&tokenizer), &settings(64, Order::Sequential, 1), None)?;
    stream.next_batch(1)?;
    assert!(stream.waited() >= 0.02, "{}", stream.waited());
    let start = Instant::now();
    while stream.queue_fill() < 1.0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the queue never fills: {}", stream.queue_fill());
        std::thread::sleep(Duration::from_millis(1));
    }
    let waited = stream.waited();
    stream.next_batch(1)?;
    assert_eq!(waited, stream.waited(), "a ready row was waited for");
    Ok(())
}

#[test]
fn a_validation_set_is_the_first_tokens_or_all_there_are() -> Result<()> {
    let bytes: Vec<u8> = (0..101u16).flat_map(u16::to_le_bytes).collect();
    let data = Arc::new(DataSet::open(vec![memory("valid.bin", bytes)?], "text")?);
    let open =
        |tokens, length| ValidationSet::open(data.clone(), None, &settings(length, Order::Sequential, 1), tokens, 4);
    let set = open(75, 10)?;
    assert_eq!((set.tokens(), set.batches.iter().map(|batch| batch.rows).collect::<Vec<_>>()), (70, vec![4, 3]));
    assert_eq!((set.batches[1].inputs[0], set.batches[1].targets[29]), (40, 70));
    assert_eq!(open(1_000_000, 10)?.tokens(), 100);
    assert_eq!(open(1, 10)?.tokens(), 10);
    let error = message(open(10, 101));
    assert!(error.contains("valid.bin") && error.contains("a row takes 102"), "{error}");
    Ok(())
}

#[test]
fn a_message_names_the_place_where_the_last_batch_began() -> Result<()> {
    let tokenizer = small_tokenizer()?;
    let data = open(&Arc::new(Watched::new(twelve_groups()?)))?;
    let mut stream = TokenStream::open(data, Some(&tokenizer), &settings(64, Order::Sequential, 1), None)?;
    while stream.position().unit < 3 {
        stream.next_batch(7)?;
    }
    stream.next_batch(1)?;
    let place = stream.describe_position();
    assert!(place.contains("document 0 of row group 3 of watched.parquet (in epoch 0"), "{place}");
    let ids: Vec<u8> = (0..101u16).flat_map(u16::to_le_bytes).collect();
    let data = Arc::new(DataSet::open(vec![memory("ids.bin", ids)?], "text")?);
    let mut stream = TokenStream::open(data, None, &settings(10, Order::Shuffled { seed: 4 }, 1), None)?;
    for _ in 0..12 {
        let row = one_row(&mut stream)?;
        let place = stream.describe_position();
        assert!(place.contains(&format!("row {} of the token files", row[0] / 10)), "{row:?} {place}");
    }
    Ok(())
}
