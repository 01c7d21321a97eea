//! The linear layer by its definition, in f64.

use super::{Dims, Orientation};

fn at(dims: Dims, input: usize, output: usize) -> usize {
    match dims.orientation {
        Orientation::InOut => input * dims.outputs + output,
        Orientation::OutIn => output * dims.inputs + input,
    }
}

/// y [R, O] = x [R, I] W + bias.
pub fn forward(x: &[f64], weight: &[f64], dims: Dims, bias: &[f64]) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks_exact(dims.inputs) {
        y.extend(
            (0..dims.outputs).map(|o| bias[o] + (0..dims.inputs).map(|i| x[i] * weight[at(dims, i, o)]).sum::<f64>()),
        );
    }
    y
}

/// dx [R, I], dweight (in its own orientation) and dbias [O].
pub fn backward(x: &[f64], weight: &[f64], dims: Dims, dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let Dims { inputs, outputs, .. } = dims;
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; outputs]);
    for ((x, dy), dx) in x.chunks_exact(inputs).zip(dy.chunks_exact(outputs)).zip(dx.chunks_exact_mut(inputs)) {
        for o in 0..outputs {
            dbias[o] += dy[o];
            for i in 0..inputs {
                dx[i] += dy[o] * weight[at(dims, i, o)];
                dweight[at(dims, i, o)] += x[i] * dy[o];
            }
        }
    }
    (dx, dweight, dbias)
}
