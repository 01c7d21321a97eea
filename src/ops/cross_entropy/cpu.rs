//! The fused head on the CPU: chunks of rows, whose logits become their own gradient in place.

use super::{Head, IGNORE, Labels, Loss, TargetError};
use crate::ops::product::{Matrix, Operand, Precision, Size, Threads, multiply_in};
use crate::ops::simd::{LANES, Level, aligned, exp, exp_in_place, kernel, max, sum_of};
use crate::ops::{Gradient, Into, Number};
use crate::random::uniform;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a chunk for a large vocabulary, at least and at most: enough work for the products' packing and for the pass
/// over the head's gradient that each chunk costs. Between them their logits decide, which are kept within 256 MiB.
const CHUNK_ROWS: [usize; 2] = [512, 1024];
const LARGE_CHUNK_LOGITS: usize = 1 << 26;
/// A small vocabulary takes more rows at once, up to this many logits (4 MiB).
const CHUNK_LOGITS: usize = 1 << 20;
/// Numbers whose e^l are summed in f32 before they join the f64 sum.
const SUM_PIECE: usize = 1024;

/// Elements between rows of logits: whole registers.
fn logit_stride(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(LANES)
}

/// Rows of a chunk at most.
fn most_rows(vocabulary: usize) -> usize {
    let [least, most] = CHUNK_ROWS;
    let stride = logit_stride(vocabulary);
    (CHUNK_LOGITS / stride).max((LARGE_CHUNK_LOGITS / stride).clamp(least, most))
}

/// Rows of a chunk: chunks of nearly equal size, as few as the limits allow.
fn rows_a_chunk(rows: usize, vocabulary: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most_rows(vocabulary)).max(1))
}

/// Length of the scratch that [`forward`] and [`forward_backward`] need, however many of the rows take part: the logits
/// of the largest chunk, and its rows of x.
pub fn scratch_len(rows: usize, vocabulary: usize, width: usize) -> usize {
    rows.min(most_rows(vocabulary)) * (logit_stride(vocabulary) + width) + LANES
}

/// The rows that take part. Only they are multiplied: of a fine-tuning batch the prompts' rows are left out.
struct Counted {
    /// Their places, or nothing where all take part.
    places: Option<Vec<usize>>,
    count: usize,
    /// Rows of a chunk.
    chunk: usize,
}

impl Counted {
    fn new(targets: &[u32], vocabulary: usize) -> Self {
        let ignored = targets.iter().filter(|&&target| target == IGNORE).count();
        let taking_part = |(place, &target): (usize, &u32)| (target != IGNORE).then_some(place);
        let places = (ignored > 0).then(|| targets.iter().enumerate().filter_map(taking_part).collect());
        let count = targets.len() - ignored;
        Self { places, count, chunk: rows_a_chunk(count, vocabulary).max(1) }
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> {
        let (count, chunk) = (self.count, self.chunk);
        (0..count).step_by(chunk).map(move |first| first..count.min(first + chunk))
    }

    fn place(&self, row: usize) -> usize {
        self.places.as_ref().map_or(row, |places| places[row])
    }

    /// Some of the rows of x [N, width] side by side: where they stand, or brought together in `to`.
    fn gather<'a>(&self, rows: Range<usize>, x: &'a [f32], width: usize, to: &'a mut [f32]) -> &'a [f32] {
        let Some(places) = &self.places else { return &x[rows.start * width..rows.end * width] };
        let to = &mut to[..rows.len() * width];
        for (to, place) in to.chunks_exact_mut(width).zip(&places[rows]) {
            to.copy_from_slice(&x[place * width..][..width]);
        }
        to
    }

    /// Moves the first rows of [N, width], one for each that takes part, to their places; the others become zeros.
    fn spread<T: Copy + Default>(&self, rows: &mut [T], width: usize) {
        let Some(places) = &self.places else { return };
        // From the last on: a row's place never lies before it.
        let mut end = rows.len() / width;
        for (row, &place) in places.iter().enumerate().rev() {
            rows[(place + 1) * width..end * width].fill(T::default());
            rows.copy_within(row * width..(row + 1) * width, place * width);
            end = place;
        }
        rows[..end * width].fill(T::default());
    }
}

/// Each row's negative log-likelihood into nll [N] (0 where the target is [`IGNORE`]), and their sum.
///
/// # Errors
/// When a target lies outside the vocabulary; nothing is written then.
pub fn forward(
    x: &[f32],
    head: Head,
    targets: &[u32],
    nll: &mut [f64],
    scratch: &mut [f32],
) -> Result<Loss, TargetError> {
    let Head { vocabulary, width, .. } = head;
    check(x, head, targets, nll)?;
    let (level, stride) = (Level::current(), logit_stride(vocabulary));
    let counted = Counted::new(targets, vocabulary);
    let (logits, gathered) = aligned(scratch).split_at_mut(counted.chunk * stride);
    for rows in counted.chunks() {
        let x = counted.gather(rows.clone(), x, width, gathered);
        let logits = &mut logits[..rows.len() * stride];
        form_logits(x, head, rows.len(), logits);
        let numbers = logits.par_chunks_exact(stride).zip(rows.clone()).zip(&mut nll[rows]);
        numbers.for_each(|((logits, row), nll)| {
            let logits = &logits[..vocabulary];
            let (greatest, sum) = exp_sum(level, logits);
            *nll = f64::from(greatest) + sum.ln() - f64::from(logits[targets[counted.place(row)] as usize]);
        });
    }
    counted.spread(nll, 1);
    Ok(total(targets, nll))
}

/// As [`forward`], with the gradients of the loss: dx [N, C] overwritten, dweight [V, C] as it asks (left out where the
/// head is frozen).
///
/// # Errors
/// When a target lies outside the vocabulary; nothing is written then.
pub fn forward_backward(
    x: &[f32],
    head: Head,
    labels: Labels,
    nll: &mut [f64],
    dx: &mut [f32],
    mut dweight: Option<Gradient>,
    scratch: &mut [f32],
) -> Result<Loss, TargetError> {
    let Head { vocabulary, width, weight, precision } = head;
    let (targets, sampled) = match labels {
        Labels::Given(targets) => (targets, None),
        Labels::Sampled { mask, generator } => (mask, Some(generator)),
    };
    if sampled.is_none() {
        check(x, head, targets, nll)?;
    }
    assert!(x.len() == targets.len() * width && nll.len() == targets.len(), "cross-entropy: x or nll are not [N, ..]");
    assert_eq!(dx.len(), x.len(), "cross-entropy: dx is not [N, C]");
    let gradient_fits = dweight.as_ref().is_none_or(|dweight| dweight.data.len() >= vocabulary * width);
    assert!(gradient_fits, "cross-entropy: the head's gradient is shorter than [V, C]");
    let draws = sampled.is_some();
    let counted = Counted::new(targets, vocabulary);
    if let Some(generator) = sampled {
        // `nll` carries each row's draw until its loss takes the place.
        nll[..counted.count].iter_mut().for_each(|nll| *nll = f64::from(uniform(generator)));
    }
    let (level, stride) = (Level::current(), logit_stride(vocabulary));
    let logits = aligned(scratch);
    for rows in counted.chunks() {
        // x and dx of the chunk stand in the same place of `dx`, one after the other.
        let dx = &mut dx[rows.start * width..rows.end * width];
        let x = counted.gather(rows.clone(), x, width, &mut *dx);
        let logits = &mut logits[..rows.len() * stride];
        form_logits(x, head, rows.len(), logits);
        let numbers = logits.par_chunks_exact_mut(stride).zip(rows.clone()).zip(&mut nll[rows.clone()]);
        numbers.for_each(|((logits, row), nll)| {
            let target = targets[counted.place(row)] as usize;
            let label = if draws { Label::Draw(*nll) } else { Label::Target(target) };
            *nll = row_gradient(level, &mut logits[..vocabulary], label, precision);
        });
        let slopes = match precision {
            Precision::F32 => Matrix::F32(Operand::row_major(logits, stride)),
            Precision::Bf16 => Matrix::Bf16(Operand::row_major(bytemuck::cast_slice(logits), 2 * stride)),
        };
        if let Some(dweight) = &mut dweight {
            let size = Size { m: vocabulary, k: rows.len(), n: width };
            let x = Operand::row_major(x, width);
            let (slopes, into) = (slopes.transposed(), dweight.into);
            multiply_in(precision, Threads::All, size, slopes, x, 1.0, dweight.data, width, into);
            dweight.into = Into::Accumulate;
        }
        let size = Size { m: rows.len(), k: vocabulary, n: width };
        multiply_in(precision, Threads::All, size, slopes, weight.row_major(width), 1.0, dx, width, Into::Overwrite);
    }
    if let (0, Some(Gradient { data, into: Into::Overwrite })) = (counted.count, dweight) {
        data[..vocabulary * width].fill(0.0);
    }
    counted.spread(nll, 1);
    counted.spread(dx, width);
    Ok(total(targets, nll))
}

fn check(x: &[f32], head: Head, targets: &[u32], nll: &[f64]) -> Result<(), TargetError> {
    let Head { weight, vocabulary, width, .. } = head;
    assert!(width > 0 && weight.len() >= vocabulary * width, "cross-entropy: the head is shorter than [V, C]");
    assert!(x.len() == targets.len() * width && nll.len() == targets.len(), "cross-entropy: x or nll are not [N, ..]");
    match targets.iter().position(|&target| target != IGNORE && target as usize >= vocabulary) {
        None => Ok(()),
        Some(place) => Err(TargetError { place, target: targets[place], vocabulary }),
    }
}

/// Logits [rows, V] = x [rows, C] head^T.
fn form_logits(x: &[f32], head: Head, rows: usize, logits: &mut [f32]) {
    let Head { weight, vocabulary, width, precision } = head;
    let size = Size { m: rows, k: width, n: vocabulary };
    let (x, head) = (Operand::row_major(x, width), weight.row_major(width).transposed());
    let stride = logit_stride(vocabulary);
    multiply_in(precision, Threads::All, size, x, head, 1.0, logits, stride, Into::Overwrite);
}

/// Sum and count over the rows that take part, in their order.
fn total(targets: &[u32], nll: &[f64]) -> Loss {
    let taking_part = targets.iter().zip(nll).filter(|(target, _)| **target != IGNORE);
    taking_part.fold(Loss::default(), |loss, (_, nll)| Loss { sum: loss.sum + nll, count: loss.count + 1 })
}

enum Label {
    Target(usize),
    /// A uniform number in [0, 1) that picks a label by its probability.
    Draw(f64),
}

/// Logits become softmax - onehot(label), in bf16 at the front of the row where that is the precision; the label's
/// negative log-likelihood.
fn row_gradient(level: Level, row: &mut [f32], label: Label, precision: Precision) -> f64 {
    let (greatest, sum, label, logit) = match label {
        Label::Target(label) => {
            let logit = row[label];
            let (greatest, sum) = exp_sum_in_place(level, row);
            (greatest, sum, label, logit)
        }
        Label::Draw(draw) => {
            let (greatest, sum) = exp_sum_in_place(level, row);
            let label = pick(row, draw);
            (greatest, sum, label, greatest + row[label].ln())
        }
    };
    let slope = (f64::from(row[label]) / sum - 1.0) as f32;
    let factor = (1.0 / sum) as f32;
    match precision {
        Precision::F32 => {
            scale(level, row, factor);
            row[label] = slope;
        }
        Precision::Bf16 => {
            scale_to_front(level, row, factor);
            bytemuck::cast_slice_mut::<f32, bf16>(row)[label] = bf16::from_f32(slope);
        }
    }
    f64::from(greatest) + sum.ln() - f64::from(logit)
}

/// The index at which the running sum of `weights` passes draw * their sum.
fn pick(weights: &[f32], draw: f64) -> usize {
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    let mut left = draw * total;
    for (index, &weight) in weights.iter().enumerate() {
        left -= f64::from(weight);
        if left < 0.0 {
            return index;
        }
    }
    // Rounding, or NaN: the last index that has a weight.
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0)
}

kernel! {
    /// The greatest logit, and the sum of e^(l - greatest).
    fn exp_sum(row: &[f32]) -> (f32, f64) {
        let greatest = max(row);
        let mut sum = 0.0f64;
        for piece in row.chunks(SUM_PIECE) {
            sum += f64::from(sum_of(piece, |logit| exp(logit - greatest)));
        }
        (greatest, sum)
    }
}

kernel! {
    /// As `exp_sum`, with each logit replaced by e^(l - greatest).
    fn exp_sum_in_place(row: &mut [f32]) -> (f32, f64) {
        let greatest = max(row);
        let mut sum = 0.0f64;
        for piece in row.chunks_mut(SUM_PIECE) {
            sum += f64::from(exp_in_place(piece, greatest));
        }
        (greatest, sum)
    }
}

kernel! {
    fn scale(row: &mut [f32], factor: f32) {
        row.iter_mut().for_each(|value| *value *= factor);
    }
}

kernel! {
    /// As `scale`, with the results in bf16 at the front of the row: half of it, and the other half is left over.
    fn scale_to_front(row: &mut [f32], factor: f32) {
        let len = row.len();
        let words: &mut [u16] = bytemuck::cast_slice_mut(row);
        let of = |low: u16, high: u16| {
            // An f32 is two words in memory, whose order is the machine's.
            f32::from_ne_bytes(bytemuck::cast([low, high]))
        };
        // A block is read before it is written, and everything before it has been read already.
        for first in (0..len - len % LANES).step_by(LANES) {
            let mut block = [0u16; 2 * LANES];
            block.copy_from_slice(&words[2 * first..][..2 * LANES]);
            let mut rounded = [0u16; LANES];
            for lane in 0..LANES {
                rounded[lane] = bf16::round(factor * of(block[2 * lane], block[2 * lane + 1])).to_bits();
            }
            words[first..][..LANES].copy_from_slice(&rounded);
        }
        for index in len - len % LANES..len {
            words[index] = bf16::round(factor * of(words[2 * index], words[2 * index + 1])).to_bits();
        }
    }
}

#[cfg(test)]
mod tests;
