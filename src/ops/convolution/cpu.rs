//! The convolution on the CPU: images are copied with zeros around them, a few rows at a time, and every window is read
//! where it lies in the copy.

use super::Shape;
use super::block::{Block, COLUMNS, Kernel, LANES, Start, Strided};
use crate::ops::parallel::{SharedRows, add_parts, for_each_with_scratch};
use crate::ops::simd::{Level, kernel};
use crate::ops::{Gradient, Into};
use std::ops::Range;

/// Elements of padded images that a task aims at: 256 KiB of a core's second cache.
const PADDED: usize = 1 << 16;
/// Parts of the weight's gradient, summed in order.
const PARTS: usize = 8;

/// Windows over images [H, W, C] that are spread out so that their elements stand `holes` apart with zeros between them,
/// for a result of `out_height` x `out_width`.
#[derive(Clone, Copy)]
struct Windows {
    height: usize,
    width: usize,
    channels: usize,
    kernel: usize,
    /// Distance of windows.
    stride: usize,
    /// Rows and columns of zeros before the image.
    padding: usize,
    holes: usize,
    out_height: usize,
    out_width: usize,
}

impl Windows {
    fn of_input(shape: Shape) -> Self {
        Self {
            height: shape.height,
            width: shape.width,
            channels: shape.inputs,
            kernel: shape.kernel,
            stride: shape.stride,
            padding: shape.padding,
            holes: 1,
            out_height: shape.out_height(),
            out_width: shape.out_width(),
        }
    }

    /// dx is the convolution of dy, spread out by the stride, with the mirrored weight.
    fn of_output(shape: Shape) -> Self {
        assert!(shape.padding < shape.kernel, "convolution: padding is as large as the kernel");
        Self {
            height: shape.out_height(),
            width: shape.out_width(),
            channels: shape.outputs,
            kernel: shape.kernel,
            stride: 1,
            padding: shape.kernel - 1 - shape.padding,
            holes: shape.stride,
            out_height: shape.height,
            out_width: shape.width,
        }
    }

    /// Elements of a window's row, which adjoin.
    fn run(&self) -> usize {
        self.kernel * self.channels
    }

    /// Elements of a window.
    fn depth(&self) -> usize {
        self.kernel * self.run()
    }

    /// Elements of a padded line: what the windows of one row of the result cover.
    fn line(&self) -> usize {
        ((self.out_width - 1) * self.stride + self.kernel) * self.channels
    }

    /// Elements of the padded lines under `rows` rows of the result.
    fn padded(&self, rows: usize) -> usize {
        ((rows - 1) * self.stride + self.kernel) * self.line()
    }

    /// Rows of the result in a piece: whole images where they are small.
    fn rows_a_piece(&self) -> usize {
        (PADDED / (self.stride * self.line())).clamp(1, self.out_height)
    }

    fn pieces_an_image(&self) -> usize {
        self.out_height.div_ceil(self.rows_a_piece())
    }

    /// The image, and the rows of the result in it, that a piece of a batch stands for.
    fn piece(&self, piece: usize) -> (usize, Range<usize>) {
        let (image, first) = (piece / self.pieces_an_image(), piece % self.pieces_an_image() * self.rows_a_piece());
        (image, first..self.out_height.min(first + self.rows_a_piece()))
    }

    /// The padded lines under a piece of the result.
    fn fill(&self, images: &[f32], piece: usize, padded: &mut [f32]) {
        let (image, rows) = self.piece(piece);
        let row_len = self.width * self.channels;
        let image = &images[image * self.height * row_len..][..self.height * row_len];
        let line = self.line();
        for (index, target) in padded[..self.padded(rows.len())].chunks_exact_mut(line).enumerate() {
            let place = (rows.start * self.stride + index).checked_sub(self.padding);
            let row = place.filter(|place| place.is_multiple_of(self.holes)).map(|place| place / self.holes);
            match row.filter(|&row| row < self.height) {
                None => target.fill(0.0),
                Some(row) => self.fill_line(&image[row * row_len..][..row_len], target),
            }
        }
    }

    fn fill_line(&self, row: &[f32], target: &mut [f32]) {
        let before = (self.padding * self.channels).min(target.len());
        if self.holes == 1 {
            let end = target.len().min(before + row.len());
            target[..before].fill(0.0);
            target[before..end].copy_from_slice(&row[..end - before]);
            target[end..].fill(0.0);
        } else {
            target.fill(0.0);
            let places = target[before..].chunks_mut(self.holes * self.channels);
            for (pixel, place) in row.chunks_exact(self.channels).zip(places) {
                place[..self.channels].copy_from_slice(pixel);
            }
        }
    }
}

/// `columns` cut into blocks of nearly equal numbers of whole registers.
fn column_blocks(columns: usize) -> impl Iterator<Item = Range<usize>> {
    let registers = columns.div_ceil(LANES);
    let blocks = registers.div_ceil(COLUMNS / LANES);
    (0..blocks)
        .map(move |block| registers * block / blocks * LANES..columns.min(registers * (block + 1) / blocks * LANES))
}

/// Length of a weight of `depth` x `columns` in blocks of columns.
fn packed_len(depth: usize, columns: usize) -> usize {
    depth * columns.next_multiple_of(LANES)
}

/// Writes a weight in blocks of columns, each [depth, columns of the block in whole registers], whose row `step` is made of
/// what `row` gives: the row's numbers, `stride` apart.
fn pack<'a>(columns: usize, depth: usize, stride: usize, row: impl Fn(usize) -> &'a [f32], packed: &mut [f32]) {
    for block in column_blocks(columns) {
        let width = block.len().next_multiple_of(LANES);
        for (step, target) in packed[block.start * depth..].chunks_exact_mut(width).take(depth).enumerate() {
            let (numbers, rest) = target.split_at_mut(block.len());
            let row = &row(step)[block.start * stride..];
            numbers.iter_mut().zip(row.iter().step_by(stride)).for_each(|(number, &value)| *number = value);
            rest.fill(0.0);
        }
    }
}

/// Pieces whose padded lines a task holds at once for the weight's gradient.
fn pieces_a_group(windows: &Windows) -> usize {
    (PADDED / windows.padded(windows.rows_a_piece())).max(1)
}

/// Pieces in one part of the weight's gradient, and how many parts that makes.
fn parts(windows: &Windows, batch: usize) -> (usize, usize) {
    let pieces = batch * windows.pieces_an_image();
    let pieces_a_part = pieces.div_ceil(PARTS).max(1);
    (pieces_a_part, pieces.div_ceil(pieces_a_part))
}

/// Length of the scratch that every function here needs.
pub fn scratch_len(shape: Shape) -> usize {
    let threads = rayon::current_num_threads();
    let of = |windows: Windows, columns: usize| {
        packed_len(windows.depth(), columns) + threads * windows.padded(windows.rows_a_piece())
    };
    let windows = Windows::of_input(shape);
    let (forward, backward) = (of(windows, shape.outputs), of(Windows::of_output(shape), shape.inputs));
    let sums = parts(&windows, shape.batch).1 * (shape.weight_len() + shape.outputs);
    let weight = sums + threads * pieces_a_group(&windows) * windows.padded(windows.rows_a_piece());
    forward.max(backward).max(weight)
}

/// y = convolution of x with the weight, plus the bias.
pub fn forward(shape: Shape, x: &[f32], weight: &[f32], bias: Option<&[f32]>, y: &mut [f32], scratch: &mut [f32]) {
    assert!(x.len() == shape.x_len() && y.len() == shape.y_len(), "convolution: lengths of x and y");
    assert_eq!(weight.len(), shape.weight_len(), "convolution: the weight's length");
    assert!(bias.is_none_or(|bias| bias.len() == shape.outputs), "convolution: the bias is not [O]");
    let windows = Windows::of_input(shape);
    let depth = windows.depth();
    let (packed, scratch) = scratch.split_at_mut(packed_len(depth, shape.outputs));
    pack(shape.outputs, depth, depth, |step| &weight[step..], packed);
    convolve(windows, shape.batch, x, packed, shape.outputs, bias, y, Into::Overwrite, scratch);
}

/// dx (+)= the gradient of x.
pub fn backward_input(shape: Shape, dy: &[f32], weight: &[f32], dx: Gradient, scratch: &mut [f32]) {
    assert!(dx.data.len() == shape.x_len() && dy.len() == shape.y_len(), "convolution backward: lengths of dx and dy");
    assert_eq!(weight.len(), shape.weight_len(), "convolution backward: the weight's length");
    let windows = Windows::of_output(shape);
    let (packed, scratch) = scratch.split_at_mut(packed_len(windows.depth(), shape.inputs));
    // [O, k, k, I] -> [k, k, O, I], both axes of the kernel reversed.
    let taps = shape.kernel * shape.kernel;
    let row = |step: usize| {
        let (tap, output) = (step / shape.outputs, step % shape.outputs);
        &weight[(output * taps + taps - 1 - tap) * shape.inputs..]
    };
    pack(shape.inputs, windows.depth(), 1, row, packed);
    convolve(windows, shape.batch, dy, packed, shape.inputs, None, dx.data, dx.into, scratch);
}

/// result [batch, out_height, out_width, channels] (+)= windows of `images` times the packed weight [depth, channels].
#[allow(clippy::too_many_arguments, reason = "a convolution has this many operands")]
fn convolve(
    windows: Windows,
    batch: usize,
    images: &[f32],
    packed: &[f32],
    channels: usize,
    bias: Option<&[f32]>,
    result: &mut [f32],
    into: Into,
    scratch: &mut [f32],
) {
    let Windows { stride, out_height, out_width, .. } = windows;
    let (depth, run, line, pixel) = (windows.depth(), windows.run(), windows.line(), stride * windows.channels);
    let row_len = out_width * channels;
    let (shared, kernel) = (SharedRows::new(result, row_len), Kernel::new(Level::current()));
    let task = |piece: usize, padded: &mut [f32]| {
        windows.fill(images, piece, padded);
        let (image, rows) = windows.piece(piece);
        // SAFETY: the rows of a piece are its own.
        let target = unsafe { shared.segment(image * out_height + rows.start, 0, rows.len() * row_len) };
        for columns in column_blocks(channels) {
            let start = match (into, bias) {
                (Into::Accumulate, _) => Start::Before,
                (Into::Overwrite, Some(bias)) => Start::Bias(&bias[columns.clone()]),
                (Into::Overwrite, None) => Start::Zero,
            };
            let width = columns.len().next_multiple_of(LANES);
            let b = Strided { data: &packed[columns.start * depth..], line: 1, step: width, run: run * width };
            let lines = kernel.lines(columns.len());
            for row in 0..rows.len() {
                for first in (0..out_width).step_by(lines) {
                    let data = &padded[row * stride * line + first * pixel..];
                    let block = Block {
                        runs: windows.kernel,
                        steps: run,
                        a: Strided { data, line: pixel, step: 1, run: line },
                        b,
                        lines: lines.min(out_width - first),
                        columns: columns.len(),
                        start,
                    };
                    kernel.run(block, &mut target[row * row_len + first * channels + columns.start..], channels);
                }
            }
        }
    };
    let padded = windows.padded(windows.rows_a_piece());
    for_each_with_scratch(batch * windows.pieces_an_image(), padded, scratch, task);
}

/// dweight (+)= the gradient of the weight, dbias (+)= the gradient of the bias.
pub fn backward_weight(
    shape: Shape,
    x: &[f32],
    dy: &[f32],
    dweight: Gradient,
    dbias: Option<Gradient>,
    scratch: &mut [f32],
) {
    assert!(x.len() == shape.x_len() && dy.len() == shape.y_len(), "convolution backward: lengths of x and dy");
    assert_eq!(dweight.data.len(), shape.weight_len(), "convolution backward: the weight's length");
    let (level, windows, outputs) = (Level::current(), Windows::of_input(shape), shape.outputs);
    let kernel = Kernel::new(level);
    let (pieces_a_part, parts) = parts(&windows, shape.batch);
    let part_len = shape.weight_len() + outputs;
    let (sums, scratch) = scratch.split_at_mut(parts * part_len);
    let shared = SharedRows::new(sums, part_len);
    let pieces = shape.batch * windows.pieces_an_image();
    let group_len = pieces_a_group(&windows) * windows.padded(windows.rows_a_piece());
    let row_len = windows.out_width * outputs;
    let part = |part: usize, padded: &mut [f32]| {
        // SAFETY: each part's sums are its own.
        let sums = unsafe { shared.segment(part, 0, part_len) };
        let (to_weight, to_bias) = sums.split_at_mut(shape.weight_len());
        to_bias.fill(0.0);
        let of_part = part * pieces_a_part..pieces.min((part + 1) * pieces_a_part);
        for first in of_part.clone().step_by(pieces_a_group(&windows)) {
            let group = first..of_part.end.min(first + pieces_a_group(&windows));
            add_group(kernel, &windows, outputs, x, dy, group.clone(), first > of_part.start, to_weight, padded);
            for piece in group {
                let (image, rows) = windows.piece(piece);
                let first = (image * windows.out_height + rows.start) * row_len;
                add_pixels(level, &dy[first..][..rows.len() * row_len], to_bias);
            }
        }
    };
    for_each_with_scratch(parts, group_len, scratch, part);
    add_parts(level, sums, part_len, 0, dweight);
    if let Some(dbias) = dbias {
        add_parts(level, sums, part_len, shape.weight_len(), dbias);
    }
}

/// What a few pieces add to the gradient of the weight [O, k, k, I], or what it begins with.
#[allow(clippy::too_many_arguments, reason = "a convolution has this many operands")]
fn add_group(
    kernel: Kernel,
    windows: &Windows,
    outputs: usize,
    x: &[f32],
    dy: &[f32],
    group: Range<usize>,
    accumulate: bool,
    to_weight: &mut [f32],
    padded: &mut [f32],
) {
    let (run, line, row_len) = (windows.run(), windows.line(), windows.out_width * outputs);
    let piece_len = windows.padded(windows.rows_a_piece());
    for (piece, padded) in group.clone().zip(padded.chunks_exact_mut(piece_len)) {
        windows.fill(x, piece, padded);
    }
    for tap in 0..windows.kernel {
        for columns in column_blocks(run) {
            let lines = kernel.lines(columns.len());
            for output in (0..outputs).step_by(lines) {
                for (piece, padded) in group.clone().zip(padded.chunks_exact(piece_len)) {
                    let (image, rows) = windows.piece(piece);
                    let slopes = &dy[(image * windows.out_height + rows.start) * row_len + output..];
                    let pixels = &padded[tap * line + columns.start..];
                    let (step, next_run) = (windows.stride * windows.channels, windows.stride * line);
                    let block = Block {
                        runs: rows.len(),
                        steps: windows.out_width,
                        a: Strided { data: slopes, line: 1, step: outputs, run: row_len },
                        b: Strided { data: pixels, line: 1, step, run: next_run },
                        lines: lines.min(outputs - output),
                        columns: columns.len(),
                        start: if accumulate || piece > group.start { Start::Before } else { Start::Zero },
                    };
                    let to = &mut to_weight[(output * windows.kernel + tap) * run + columns.start..];
                    kernel.run(block, to, windows.depth());
                }
            }
        }
    }
}

kernel! {
    /// sums [O] += the rows of dy [R, O].
    fn add_pixels(dy: &[f32], sums: &mut [f32]) {
        for pixel in dy.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(pixel) {
                *sum += value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    /// Kernels of 3 and 1, strides of 1 and 2, odd sizes, more rows than one task takes.
    const SHAPES: [Shape; 7] = [
        Shape { batch: 3, height: 5, width: 7, inputs: 3, outputs: 4, kernel: 3, stride: 1, padding: 1 },
        Shape { batch: 2, height: 8, width: 6, inputs: 5, outputs: 3, kernel: 3, stride: 2, padding: 1 },
        Shape { batch: 2, height: 4, width: 4, inputs: 6, outputs: 2, kernel: 1, stride: 1, padding: 0 },
        Shape { batch: 2, height: 5, width: 5, inputs: 2, outputs: 3, kernel: 3, stride: 1, padding: 0 },
        Shape { batch: 40, height: 16, width: 16, inputs: 16, outputs: 8, kernel: 3, stride: 1, padding: 1 },
        Shape { batch: 2, height: 9, width: 33, inputs: 20, outputs: 70, kernel: 3, stride: 2, padding: 1 },
        Shape { batch: 1, height: 80, width: 40, inputs: 24, outputs: 17, kernel: 5, stride: 1, padding: 2 },
    ];

    fn all(shape: Shape) -> [Vec<f32>; 4] {
        let [x, weight] = [(1, shape.x_len()), (2, shape.weight_len())].map(|(seed, len)| normal(seed, len));
        let (bias, dy) = (normal(3, shape.outputs), normal(4, shape.y_len()));
        let mut scratch = vec![f32::NAN; scratch_len(shape)];
        let mut y = vec![f32::NAN; shape.y_len()];
        forward(shape, &x, &weight, Some(&bias), &mut y, &mut scratch);
        let [mut dx, mut dweight, mut dbias] = [x.len(), weight.len(), bias.len()].map(|len| vec![f32::NAN; len]);
        backward_input(shape, &dy, &weight, Gradient::overwrite(&mut dx), &mut scratch);
        let to_bias = Some(Gradient::overwrite(&mut dbias));
        backward_weight(shape, &x, &dy, Gradient::overwrite(&mut dweight), to_bias, &mut scratch);
        [y, dx, dweight, dbias]
    }

    #[test]
    fn forward_and_gradients_are_those_of_the_definition() {
        for shape in SHAPES {
            let [x, weight, bias, dy] =
                [(1, shape.x_len()), (2, shape.weight_len()), (3, shape.outputs), (4, shape.y_len())]
                    .map(|(seed, len)| to_f64(&normal(seed, len)));
            let (dx, dweight, dbias) = reference::backward(shape, &x, &weight, &dy);
            let expected = [reference::forward(shape, &x, &weight, &bias), dx, dweight, dbias];
            at_every_level(|level| {
                for (name, (actual, expected)) in
                    ["y", "dx", "dweight", "dbias"].iter().zip(all(shape).iter().zip(&expected))
                {
                    let size = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
                    assert_close(&format!("{name} of {shape:?} {level:?}"), actual, expected, 3e-6 * size);
                }
            });
        }
    }

    #[test]
    fn the_references_gradient_is_that_of_differences() {
        let shape = SHAPES[1];
        let [x, weight, dy] = [(1, shape.x_len()), (2, shape.weight_len()), (4, shape.y_len())]
            .map(|(seed, len)| to_f64(&normal(seed, len)));
        let bias = vec![0.5; shape.outputs];
        let (dx, dweight, _) = reference::backward(shape, &x, &weight, &dy);
        let by_x = differences(&x, |x| weighted(&reference::forward(shape, x, &weight, &bias), &dy));
        assert_same_gradient("dx", &dx, &by_x);
        let by_weight = differences(&weight, |weight| weighted(&reference::forward(shape, &x, weight, &bias), &dy));
        assert_same_gradient("dweight", &dweight, &by_weight);
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads_and_gradients_accumulate() {
        let shape = SHAPES[4];
        assert_same_bits_for_any_threads(|| all(shape).concat());
        let (dy, weight) = (normal(4, shape.y_len()), normal(2, shape.weight_len()));
        let mut scratch = vec![0.0; scratch_len(shape)];
        let (mut once, mut twice) = (vec![0.0; shape.x_len()], vec![1.0; shape.x_len()]);
        backward_input(shape, &dy, &weight, Gradient::overwrite(&mut once), &mut scratch);
        backward_input(shape, &dy, &weight, Gradient::accumulate(&mut twice), &mut scratch);
        let expected: Vec<f64> = once.iter().map(|&value| f64::from(value) + 1.0).collect();
        assert_close("accumulated", &twice, &expected, 1e-5);
    }
}
