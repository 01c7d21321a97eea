//! The threads between files and rows: readers fetch units ahead, tokenizers work on documents, and the results arrive
//! in one fixed order whatever the number of threads.
//!
//! The order is kept by a queue of receivers: the dispatcher puts one into the queue for each piece of work it hands
//! out, and the consumer waits on the first. A pipeline's threads end when the consumer drops its end of the queue.

use super::data_set::{Contents, DataSet};
use super::document::{Document, Opening};
use super::order::Order;
use super::position::Position;
use super::tokenizer::DocumentEncoder;
use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, unbounded};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Units that are fetched at the same time.
const READERS: usize = 4;

/// Stored bytes of the units fetched and not yet handed to the tokenizers, as far as more than one unit is concerned.
const FETCH_AHEAD_BYTES: u64 = 64 << 20;

/// Text bytes that a tokenizing thread takes at a time, as far as more than one document is concerned.
const JOB_BYTES: usize = 32 << 10;

/// Text bytes a token: a round number, to size the queue.
const BYTES_PER_TOKEN: usize = 4;

/// Bytes of token ids (as u16) a block of rows.
const BLOCK_BYTES: u64 = 512 << 10;

/// The ids of one document, or of one row of a token file.
#[derive(Debug)]
pub(super) struct Segment {
    /// Its number in the unit, in the order of the visit.
    pub document: u64,
    pub ids: Vec<u32>,
}

/// What arrives at the consumer.
#[derive(Debug)]
pub(super) enum Delivery {
    Segments { unit: u64, segments: Vec<Segment> },
    EpochEnd,
}

/// What decides the pipeline's work.
pub(super) struct Plan {
    pub data: Arc<DataSet>,
    pub order: Order,
    pub sequence_length: usize,
    pub vocabulary_size: usize,
    /// Present if the data are documents.
    pub encoder: Option<DocumentEncoder>,
    /// Null texts met so far.
    pub nulls: AtomicUsize,
}

/// What one read of a unit gives.
enum Unit {
    Documents(Vec<(u64, Document)>),
    Rows(Vec<Segment>),
}

impl Plan {
    /// Rows a block of token files has (the last may have fewer).
    fn block_rows(&self) -> u64 {
        (BLOCK_BYTES / 2 / self.sequence_length as u64).max(1)
    }

    pub fn units(&self) -> usize {
        match &self.data.contents {
            Contents::Documents(documents) => documents.units(),
            Contents::Tokens(files) => files.rows(self.sequence_length).div_ceil(self.block_rows()) as usize,
        }
    }

    /// Bytes that reading a unit, named by its place in the files, fetches.
    pub fn unit_bytes(&self, unit: usize) -> u64 {
        match &self.data.contents {
            Contents::Documents(documents) => documents.unit_bytes(unit),
            Contents::Tokens(_) => BLOCK_BYTES,
        }
    }

    /// Deliveries that hold about `tokens` tokens.
    fn deliveries(&self, tokens: usize) -> usize {
        let each = match &self.data.contents {
            Contents::Documents(_) => JOB_BYTES / BYTES_PER_TOKEN,
            Contents::Tokens(_) => self.block_rows() as usize * self.sequence_length,
        };
        tokens.div_ceil(each).max(2)
    }

    /// What messages call a document (or a token file's row): its unit is named by the place in the epoch's order.
    pub fn describe(&self, epoch: u64, place: u64, document: u64) -> String {
        let Some(&unit) = self.order.units(epoch, self.units()).get(place as usize) else {
            return "the end".to_string();
        };
        match &self.data.contents {
            Contents::Documents(documents) => format!("document {document} of {}", documents.unit_name(unit)),
            Contents::Tokens(files) => {
                let first = unit as u64 * self.block_rows();
                let mut rows: Vec<u64> =
                    (first..files.rows(self.sequence_length).min(first + self.block_rows())).collect();
                self.order.within_unit(epoch, unit, &mut rows);
                rows.get(document as usize).map_or("the end".to_string(), |row| format!("row {row} of the token files"))
            }
        }
    }

    /// Reads a unit, named by its place in the files, without its first `skip` documents or rows in the visit's order.
    fn read(&self, epoch: u64, unit: usize, skip: u64) -> Result<Unit> {
        match &self.data.contents {
            Contents::Documents(documents) => {
                let text = documents.read(unit, self.order)?;
                self.nulls.fetch_add(text.nulls as usize, Ordering::Relaxed);
                let mut documents = text.documents;
                self.order.within_unit(epoch, unit, &mut documents);
                Ok(Unit::Documents((0..).zip(documents).skip(skip as usize).collect()))
            }
            Contents::Tokens(files) => {
                let length = self.sequence_length as u64;
                let first_row = unit as u64 * self.block_rows();
                let rows = (files.rows(self.sequence_length) - first_row).min(self.block_rows());
                let start = first_row * length;
                let ids = files.read(start..start + rows * length + 1, self.vocabulary_size)?;
                let mut row_starts: Vec<usize> = (0..rows as usize).map(|row| row * self.sequence_length).collect();
                self.order.within_unit(epoch, unit, &mut row_starts);
                let row = |(document, start): (u64, usize)| Segment {
                    document,
                    ids: ids[start..=start + self.sequence_length].to_vec(),
                };
                Ok(Unit::Rows((0..).zip(row_starts).skip(skip as usize).map(row).collect()))
            }
        }
    }

    /// Tokenizes documents of one unit.
    fn encode(&self, documents: Vec<(u64, Document)>) -> Result<Vec<Segment>> {
        let encoder = self.encoder.as_ref().context("documents without a tokenizer")?;
        let encode = |(document, text): (u64, Document)| {
            let ids = encoder.encode(&text.text, text.opening == Opening::Begins)?;
            Ok(Segment { document, ids })
        };
        documents.into_iter().map(encode).collect()
    }
}

/// A place in the queue that a thread fills later.
type Promise = Receiver<Result<Delivery>>;

/// A unit to read.
struct ReadJob {
    epoch: u64,
    unit: usize,
    skip: u64,
    reply: Sender<Result<Unit>>,
}

/// Documents to tokenize.
struct EncodeJob {
    unit: u64,
    documents: Vec<(u64, Document)>,
    reply: Sender<Result<Delivery>>,
}

/// The consumer's end.
pub(super) struct Pipeline {
    queue: Receiver<Promise>,
    capacity: usize,
    /// Deliveries that are done and not yet taken.
    ready: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    waited: Duration,
}

impl Pipeline {
    /// Starts the threads at `from`; `threads` of them tokenize, about `queue_tokens` tokens ahead.
    pub fn start(plan: Arc<Plan>, from: &Position, threads: usize, queue_tokens: usize) -> Result<Self> {
        let capacity = plan.deliveries(queue_tokens);
        let (queue_sender, queue) = bounded(capacity);
        let (read_sender, read_jobs) = unbounded::<ReadJob>();
        let (encode_sender, encode_jobs) = bounded::<EncodeJob>(capacity);
        let (ready, stopped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for _ in 0..READERS.min(plan.units()) {
            let (plan, jobs, stopped) = (plan.clone(), read_jobs.clone(), stopped.clone());
            spawn("data-reader", move || {
                for job in jobs.iter().take_while(|_| !stopped.load(Ordering::Relaxed)) {
                    // Nobody waits for the reply when the pipeline has been dropped meanwhile.
                    let _ = job.reply.send(plan.read(job.epoch, job.unit, job.skip));
                }
            })?;
        }
        for _ in 0..threads * usize::from(plan.encoder.is_some()) {
            let (plan, jobs, stopped, ready) = (plan.clone(), encode_jobs.clone(), stopped.clone(), ready.clone());
            spawn("tokenizer", move || {
                for job in jobs.iter().take_while(|_| !stopped.load(Ordering::Relaxed)) {
                    let segments = plan.encode(job.documents);
                    ready.fetch_add(1, Ordering::Relaxed);
                    let _ = job.reply.send(segments.map(|segments| Delivery::Segments { unit: job.unit, segments }));
                }
            })?;
        }
        let dispatcher = Dispatcher {
            place: (from.epoch, from.unit, from.document),
            units: plan.order.units(from.epoch, plan.units()),
            plan,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            read_sender,
            encode_sender,
            queue_sender,
            ready: ready.clone(),
        };
        // The dispatcher stops when a channel's other end is gone: the consumer's, or a thread's that panicked.
        spawn("data-dispatcher", move || drop(dispatcher.run()))?;
        Ok(Self { queue, capacity, ready, stopped, waited: Duration::ZERO })
    }

    /// The next delivery, waited for if need be.
    pub fn next(&mut self) -> Result<Delivery> {
        let promise = match self.queue.try_recv() {
            Ok(promise) => Ok(promise),
            Err(TryRecvError::Empty) => self.wait(|pipeline| pipeline.queue.recv()),
            Err(TryRecvError::Disconnected) => Err(crossbeam_channel::RecvError),
        };
        let promise = promise.map_err(|_| anyhow!("the reading of the data has ended after an error"))?;
        let delivery = match promise.try_recv() {
            Ok(delivery) => Ok(delivery),
            Err(_) => self.wait(|_| promise.recv()),
        };
        let delivery =
            delivery.map_err(|_| anyhow!("a thread that reads or tokenizes the data has panicked (see above)"))?;
        self.ready.fetch_sub(1, Ordering::Relaxed);
        delivery
    }

    fn wait<T>(&mut self, receive: impl FnOnce(&Self) -> T) -> T {
        let start = Instant::now();
        let received = receive(self);
        self.waited += start.elapsed();
        received
    }

    /// Time that the consumer has spent waiting.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// How full the queue is, from 0 to 1.
    pub fn fill(&self) -> f64 {
        (self.ready.load(Ordering::Relaxed) as f64 / self.capacity as f64).min(1.0)
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        // The queue's end goes with this value, which stops the dispatcher and so the others. The flag spares the work
        // that is queued already. A read from a slow server is not waited for: its thread ends when it returns.
        self.stopped.store(true, Ordering::Relaxed);
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_string()).spawn(work);
    thread.map(drop).with_context(|| format!("cannot start the thread {name}"))
}

/// A unit that is being fetched.
struct Fetch {
    /// Place in the epoch's order.
    place: u64,
    ends_epoch: bool,
    bytes: u64,
    unit: Receiver<Result<Unit>>,
}

/// Hands out the work in the order of the visit.
struct Dispatcher {
    plan: Arc<Plan>,
    /// What to fetch next: epoch, place in its order, documents to skip.
    place: (u64, u64, u64),
    /// The order of that epoch.
    units: Vec<usize>,
    ahead: VecDeque<Fetch>,
    ahead_bytes: u64,
    read_sender: Sender<ReadJob>,
    encode_sender: Sender<EncodeJob>,
    queue_sender: Sender<Promise>,
    ready: Arc<AtomicUsize>,
}

/// The pipeline has been dropped, or one of its threads has panicked.
struct Stopped;

impl Dispatcher {
    /// Works until the consumer goes away or a unit cannot be read.
    fn run(mut self) -> Result<(), Stopped> {
        loop {
            self.fetch_ahead()?;
            let Some(fetch) = self.ahead.pop_front() else { continue };
            self.ahead_bytes -= fetch.bytes;
            match fetch.unit.recv() {
                Ok(Ok(Unit::Documents(documents))) => self.hand_out(fetch.place, documents)?,
                Ok(Ok(Unit::Rows(segments))) => self.deliver(Ok(Delivery::Segments { unit: fetch.place, segments }))?,
                Ok(Err(error)) => return self.deliver(Err(error)),
                Err(_) => return self.deliver(Err(anyhow!("a thread that reads the data has panicked (see above)"))),
            }
            if fetch.ends_epoch {
                self.deliver(Ok(Delivery::EpochEnd))?;
            }
        }
    }

    /// Keeps the readers busy within the bounds of bytes and units.
    fn fetch_ahead(&mut self) -> Result<(), Stopped> {
        while self.ahead.len() <= READERS && (self.ahead.is_empty() || self.ahead_bytes < FETCH_AHEAD_BYTES) {
            let (epoch, place, skip) = self.place;
            let unit = self.units[place as usize];
            let (reply, receiver) = bounded(1);
            self.read_sender.send(ReadJob { epoch, unit, skip, reply }).map_err(|_| Stopped)?;
            let (ends_epoch, bytes) = (place as usize + 1 == self.units.len(), self.plan.unit_bytes(unit));
            self.ahead.push_back(Fetch { place, ends_epoch, bytes, unit: receiver });
            self.ahead_bytes += bytes;
            self.place = if ends_epoch { (epoch + 1, 0, 0) } else { (epoch, place + 1, 0) };
            if ends_epoch {
                self.units = self.plan.order.units(epoch + 1, self.units.len());
            }
        }
        Ok(())
    }

    /// Cuts a unit's documents into jobs for the tokenizers.
    fn hand_out(&mut self, unit: u64, documents: Vec<(u64, Document)>) -> Result<(), Stopped> {
        let (mut job, mut bytes) = (Vec::new(), 0);
        let mut documents = documents.into_iter().peekable();
        while let Some(document) = documents.next() {
            bytes += document.1.text.len();
            job.push(document);
            if bytes >= JOB_BYTES || documents.peek().is_none() {
                let (reply, promise) = bounded(1);
                self.queue_sender.send(promise).map_err(|_| Stopped)?;
                let documents = std::mem::take(&mut job);
                self.encode_sender.send(EncodeJob { unit, documents, reply }).map_err(|_| Stopped)?;
                bytes = 0;
            }
        }
        Ok(())
    }

    /// Puts something into the queue that needs no more work.
    fn deliver(&self, delivery: Result<Delivery>) -> Result<(), Stopped> {
        let (reply, promise) = bounded(1);
        reply.send(delivery).map_err(|_| Stopped)?;
        self.ready.fetch_add(1, Ordering::Relaxed);
        self.queue_sender.send(promise).map_err(|_| Stopped)
    }
}
