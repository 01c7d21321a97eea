//! The definition of the convolution and its gradients, in f64, an element at a time.

use super::Shape;

/// Calls `f(x index, weight index, y index)` for every product of the convolution.
fn products(shape: Shape, mut f: impl FnMut(usize, usize, usize)) {
    let Shape { batch, height, width, inputs, outputs, kernel, stride, padding } = shape;
    let (out_height, out_width) = (shape.out_height(), shape.out_width());
    for b in 0..batch {
        for (i, j) in (0..out_height).flat_map(|i| (0..out_width).map(move |j| (i, j))) {
            for (u, v) in (0..kernel).flat_map(|u| (0..kernel).map(move |v| (u, v))) {
                let (row, column) = (i * stride + u, j * stride + v);
                if row < padding || column < padding || row - padding >= height || column - padding >= width {
                    continue;
                }
                let x = ((b * height + row - padding) * width + column - padding) * inputs;
                for o in 0..outputs {
                    let weight = ((o * kernel + u) * kernel + v) * inputs;
                    let y = ((b * out_height + i) * out_width + j) * outputs + o;
                    (0..inputs).for_each(|c| f(x + c, weight + c, y));
                }
            }
        }
    }
}

pub fn forward(shape: Shape, x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let mut y: Vec<f64> = (0..shape.y_len()).map(|i| bias[i % shape.outputs]).collect();
    products(shape, |xi, wi, yi| y[yi] += x[xi] * weight[wi]);
    y
}

/// (dx, dweight, dbias)
pub fn backward(shape: Shape, x: &[f64], weight: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dx, mut dweight) = (vec![0.0; shape.x_len()], vec![0.0; shape.weight_len()]);
    products(shape, |xi, wi, yi| {
        dx[xi] += dy[yi] * weight[wi];
        dweight[wi] += dy[yi] * x[xi];
    });
    let mut dbias = vec![0.0; shape.outputs];
    dy.iter().enumerate().for_each(|(i, dy)| dbias[i % shape.outputs] += dy);
    (dx, dweight, dbias)
}
