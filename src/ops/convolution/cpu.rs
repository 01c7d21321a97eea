//! The convolution on the CPU: patches gathered row by row of the result, then matrix products on one thread each.

use super::Shape;
use crate::ops::parallel::{SharedRows, add_parts, for_each_with_scratch};
use crate::ops::product::{Operand, Size, Threads, multiply};
use crate::ops::simd::{Level, kernel};
use crate::ops::{Gradient, Into};

/// Elements of a patch matrix that a task aims at: 512 KiB, which a core's second cache holds.
const PATCHES: usize = 1 << 17;
/// Parts of the weight's gradient, summed in order.
const PARTS: usize = 8;

/// What patches are taken from: an image [H, W, C], spread out so that its elements stand `holes` apart with zeros
/// between them, and where the patches of a result of `out_height` x `out_width` begin.
#[derive(Clone, Copy)]
struct Gather {
    height: usize,
    width: usize,
    channels: usize,
    kernel: usize,
    /// Distance of patches.
    stride: usize,
    /// Rows and columns of zeros before the image.
    padding: usize,
    holes: usize,
    out_height: usize,
    out_width: usize,
}

impl Gather {
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

    /// Elements of a patch.
    fn columns(&self) -> usize {
        self.kernel * self.kernel * self.channels
    }

    /// Rows of the result (of one image and height each) that a task takes; more where the weight, which every task
    /// packs anew, has many columns.
    fn rows_a_task(&self, result_channels: usize) -> usize {
        let pixels = (PATCHES / self.columns()).max(4 * result_channels);
        (pixels / self.out_width).max(1)
    }

    /// The image row that a patch's row comes from, if it is not one of zeros.
    fn source(&self, out: usize, tap: usize, len: usize) -> Option<usize> {
        let place = (out * self.stride + tap).checked_sub(self.padding)?;
        (place.is_multiple_of(self.holes) && place / self.holes < len).then_some(place / self.holes)
    }

    /// Fills `patches` [rows * out_width, columns] for the result's rows first..first + rows of a batch of images.
    fn fill(&self, images: &[f32], first: usize, rows: usize, patches: &mut [f32]) {
        let (row_len, line) = (self.kernel * self.channels, self.width * self.channels);
        let columns = self.columns();
        for (index, patches) in patches.chunks_exact_mut(self.out_width * columns).take(rows).enumerate() {
            let (image, out_row) = ((first + index) / self.out_height, (first + index) % self.out_height);
            let image = &images[image * self.height * line..][..self.height * line];
            for tap in 0..self.kernel {
                let source = self.source(out_row, tap, self.height).map(|row| &image[row * line..][..line]);
                for (column, patch) in patches.chunks_exact_mut(columns).enumerate() {
                    let patch = &mut patch[tap * row_len..][..row_len];
                    match source {
                        None => patch.fill(0.0),
                        Some(source) if self.holes == 1 => self.contiguous(source, column, patch),
                        Some(source) => self.spread(source, column, patch),
                    }
                }
            }
        }
    }

    /// One row of a patch: a stretch of the image's row, with zeros where it sticks out.
    fn contiguous(&self, source: &[f32], column: usize, patch: &mut [f32]) {
        let start = column * self.stride;
        let before = self.padding.saturating_sub(start).min(self.kernel);
        let from = (start + before).saturating_sub(self.padding);
        let taps = self.width.saturating_sub(from).min(self.kernel - before);
        let (low, high) = (before * self.channels, (before + taps) * self.channels);
        patch[..low].fill(0.0);
        patch[low..high].copy_from_slice(&source[from * self.channels..][..high - low]);
        patch[high..].fill(0.0);
    }

    fn spread(&self, source: &[f32], column: usize, patch: &mut [f32]) {
        for (tap, patch) in patch.chunks_exact_mut(self.channels).enumerate() {
            match self.source(column, tap, self.width) {
                None => patch.fill(0.0),
                Some(place) => patch.copy_from_slice(&source[place * self.channels..][..self.channels]),
            }
        }
    }
}

/// Length of the scratch that every function here needs.
pub fn scratch_len(shape: Shape) -> usize {
    let threads = rayon::current_num_threads();
    let patches = |gather: Gather, channels: usize| gather.rows_a_task(channels) * gather.out_width * gather.columns();
    let forward = threads * patches(Gather::of_input(shape), shape.outputs);
    let backward = threads * patches(Gather::of_output(shape), shape.inputs) + shape.weight_len();
    let part = shape.weight_len() + shape.outputs;
    let weight = PARTS * part + threads * patches(Gather::of_input(shape), shape.outputs);
    forward.max(backward).max(weight)
}

/// y = convolution of x with the weight, plus the bias.
pub fn forward(shape: Shape, x: &[f32], weight: &[f32], bias: Option<&[f32]>, y: &mut [f32], scratch: &mut [f32]) {
    assert!(x.len() == shape.x_len() && y.len() == shape.y_len(), "convolution: lengths of x and y");
    assert_eq!(weight.len(), shape.weight_len(), "convolution: the weight's length");
    assert!(bias.is_none_or(|bias| bias.len() == shape.outputs), "convolution: the bias is not [O]");
    let gather = Gather::of_input(shape);
    let b = Operand::row_major(weight, gather.columns()).transposed();
    convolve(gather, shape.batch, x, b, shape.outputs, bias, y, Into::Overwrite, scratch);
}

/// dx (+)= the gradient of x.
pub fn backward_input(shape: Shape, dy: &[f32], weight: &[f32], dx: Gradient, scratch: &mut [f32]) {
    assert!(dx.data.len() == shape.x_len() && dy.len() == shape.y_len(), "convolution backward: lengths of dx and dy");
    assert_eq!(weight.len(), shape.weight_len(), "convolution backward: the weight's length");
    let (mirrored, scratch) = scratch.split_at_mut(shape.weight_len());
    // [O, k, k, I] -> [k, k, O, I], both axes of the kernel reversed.
    let taps = shape.kernel * shape.kernel;
    for (tap, target) in mirrored.chunks_exact_mut(shape.outputs * shape.inputs).enumerate() {
        for (output, target) in target.chunks_exact_mut(shape.inputs).enumerate() {
            target.copy_from_slice(&weight[(output * taps + taps - 1 - tap) * shape.inputs..][..shape.inputs]);
        }
    }
    let b = Operand::row_major(mirrored, shape.inputs);
    convolve(Gather::of_output(shape), shape.batch, dy, b, shape.inputs, None, dx.data, dx.into, scratch);
}

/// result [batch, out_height, out_width, channels] (+)= patches of `images` times b [columns, channels].
#[allow(clippy::too_many_arguments, reason = "a convolution has this many operands")]
fn convolve(
    gather: Gather,
    batch: usize,
    images: &[f32],
    b: Operand,
    channels: usize,
    bias: Option<&[f32]>,
    result: &mut [f32],
    into: Into,
    scratch: &mut [f32],
) {
    let (rows, rows_a_task) = (batch * gather.out_height, gather.rows_a_task(channels));
    let (columns, row_len) = (gather.columns(), gather.out_width * channels);
    let shared = SharedRows::new(result, row_len);
    let task = |task: usize, patches: &mut [f32]| {
        let first = task * rows_a_task;
        let rows = rows_a_task.min(rows - first);
        gather.fill(images, first, rows, patches);
        // SAFETY: the rows of a task are its own.
        let target = unsafe { shared.segment(first, 0, rows * row_len) };
        let mut into = into;
        if let Some(bias) = bias {
            target.chunks_exact_mut(channels).for_each(|pixel| pixel.copy_from_slice(bias));
            into = Into::Accumulate;
        }
        let size = Size { m: rows * gather.out_width, k: columns, n: channels };
        multiply(Threads::One, size, Operand::row_major(patches, columns), b, 1.0, target, channels, into);
    };
    for_each_with_scratch(rows.div_ceil(rows_a_task), rows_a_task * gather.out_width * columns, scratch, task);
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
    let (level, gather, outputs) = (Level::current(), Gather::of_input(shape), shape.outputs);
    let (columns, row_len) = (gather.columns(), gather.out_width * outputs);
    let (rows, rows_a_task) = (shape.batch * gather.out_height, gather.rows_a_task(outputs));
    let tasks = rows.div_ceil(rows_a_task);
    let tasks_a_part = tasks.div_ceil(PARTS).max(1);
    let (parts, part_len) = (tasks.div_ceil(tasks_a_part), shape.weight_len() + outputs);
    let (sums, scratch) = scratch.split_at_mut(parts * part_len);
    let shared = SharedRows::new(sums, part_len);
    let part = |part: usize, patches: &mut [f32]| {
        // SAFETY: each part's sums are its own.
        let sums = unsafe { shared.segment(part, 0, part_len) };
        let (to_weight, to_bias) = sums.split_at_mut(shape.weight_len());
        to_bias.fill(0.0);
        let first_task = part * tasks_a_part;
        for task in first_task..tasks.min(first_task + tasks_a_part) {
            let first = task * rows_a_task;
            let rows = rows_a_task.min(rows - first);
            gather.fill(x, first, rows, patches);
            let dy = &dy[first * row_len..][..rows * row_len];
            let size = Size { m: outputs, k: rows * gather.out_width, n: columns };
            let (a, b) = (Operand::row_major(dy, outputs).transposed(), Operand::row_major(patches, columns));
            multiply(Threads::One, size, a, b, 1.0, to_weight, columns, (task > first_task).into());
            add_pixels(level, dy, to_bias);
        }
    };
    for_each_with_scratch(parts, rows_a_task * gather.out_width * columns, scratch, part);
    add_parts(level, sums, part_len, 0, dweight);
    if let Some(dbias) = dbias {
        add_parts(level, sums, part_len, shape.weight_len(), dbias);
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
    const SHAPES: [Shape; 5] = [
        Shape { batch: 3, height: 5, width: 7, inputs: 3, outputs: 4, kernel: 3, stride: 1, padding: 1 },
        Shape { batch: 2, height: 8, width: 6, inputs: 5, outputs: 3, kernel: 3, stride: 2, padding: 1 },
        Shape { batch: 2, height: 4, width: 4, inputs: 6, outputs: 2, kernel: 1, stride: 1, padding: 0 },
        Shape { batch: 2, height: 5, width: 5, inputs: 2, outputs: 3, kernel: 3, stride: 1, padding: 0 },
        Shape { batch: 40, height: 16, width: 16, inputs: 16, outputs: 8, kernel: 3, stride: 1, padding: 1 },
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
            for (name, (actual, expected)) in
                ["y", "dx", "dweight", "dbias"].iter().zip(all(shape).iter().zip(expected))
            {
                let size = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
                assert_close(&format!("{name} of {shape:?}"), actual, &expected, 3e-6 * size);
            }
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
