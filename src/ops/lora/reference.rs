//! The adapter by its definition, in f64, without dropout.

use super::Adapter;

/// s * (x A^T) B^T: [R, O].
pub fn forward(x: &[f64], a: &[f64], b: &[f64], adapter: &Adapter) -> Vec<f64> {
    let Adapter { rank, inputs, outputs, scaling, .. } = *adapter;
    let mut y = Vec::new();
    for x in x.chunks_exact(inputs) {
        let hidden: Vec<f64> = a.chunks_exact(inputs).map(|a| x.iter().zip(a).map(|(x, a)| x * a).sum()).collect();
        let row = b.chunks_exact(rank).map(|b| b.iter().zip(&hidden).map(|(b, h)| b * h).sum::<f64>());
        y.extend(row.map(|sum| f64::from(scaling) * sum));
    }
    assert_eq!(y.len() * inputs, x.len() * outputs);
    y
}
