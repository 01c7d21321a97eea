//! What happens to pictures between convolutions: halving, maxima of 2 x 2 pixels, and the way back.

use rayon::prelude::*;

/// Every second pixel, with the new channels half before and half after the old ones as zeros.
pub fn halve(x: &[f32], width: usize, inputs: usize, outputs: usize, y: &mut Vec<f32>) {
    let before = (outputs - inputs) / 2;
    y.clear();
    y.resize(x.len() / 4 / inputs * outputs, 0.0);
    let half = width / 2;
    for (index, target) in y.chunks_exact_mut(half * outputs).enumerate() {
        // Rows of all images stand below one another; each image has an even number of them.
        let row = &x[2 * index * width * inputs..][..width * inputs];
        for (pixel, target) in row.chunks_exact(2 * inputs).zip(target.chunks_exact_mut(outputs)) {
            target[before..before + inputs].copy_from_slice(&pixel[..inputs]);
        }
    }
}

/// dx += the gradient of [`halve`].
pub fn halve_backward(dy: &[f32], width: usize, inputs: usize, outputs: usize, dx: &mut [f32]) {
    let before = (outputs - inputs) / 2;
    for (index, source) in dy.chunks_exact(width / 2 * outputs).enumerate() {
        let row = &mut dx[2 * index * width * inputs..][..width * inputs];
        for (pixel, source) in row.chunks_exact_mut(2 * inputs).zip(source.chunks_exact(outputs)) {
            pixel[..inputs].iter_mut().zip(&source[before..before + inputs]).for_each(|(dx, dy)| *dx += dy);
        }
    }
}

/// The greatest of 2 x 2 pixels, a channel each, and its place in x; of equals the first, as PyTorch has it.
pub fn maximum(x: &[f32], width: usize, channels: usize, y: &mut Vec<f32>, chosen: &mut Vec<u32>) {
    y.resize(x.len() / 4, 0.0);
    chosen.resize(x.len() / 4, 0);
    let (half, line) = (width / 2, width * channels);
    let rows = y.par_chunks_mut(half * channels).zip(chosen.par_chunks_mut(half * channels));
    rows.enumerate().for_each(|(row, (y, chosen))| {
        for column in 0..half {
            let corner = 2 * row * line + 2 * column * channels;
            for c in 0..channels {
                let mut best = corner + c;
                for place in [best + channels, best + line, best + line + channels] {
                    if x[place] > x[best] {
                        best = place;
                    }
                }
                (y[column * channels + c], chosen[column * channels + c]) = (x[best], best as u32);
            }
        }
    });
}

/// Each picture [rows, columns] to [columns, rows].
pub fn transpose(x: &[f32], rows: usize, columns: usize, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(rows * columns).zip(y.chunks_exact_mut(rows * columns)) {
        for (column, y) in y.chunks_exact_mut(rows).enumerate() {
            y.iter_mut().enumerate().for_each(|(row, y)| *y = x[row * columns + column]);
        }
    }
}
