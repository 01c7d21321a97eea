//! Causal attention by its definition, in f64, with the whole matrix of probabilities.

use super::Shape;

/// y [B*T, heads * head_dim] and log_sum_exp [B, heads, T] of separate q, k, v.
pub fn forward(shape: Shape, scale: f64, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut y = vec![0.0; shape.rows() * shape.q_width()];
    let mut log_sum_exp = Vec::new();
    for (b, h) in heads_of(shape) {
        for (i, p) in probabilities(shape, scale, q, k, b, h, &mut log_sum_exp).iter().enumerate() {
            for (j, p) in p.iter().enumerate() {
                for d in 0..shape.head_dim {
                    y[q_at(shape, b, i, h) + d] += p * v[kv_at(shape, b, j, h) + d];
                }
            }
        }
    }
    (y, log_sum_exp)
}

/// dq, dk, dv for dy [B*T, heads * head_dim].
pub fn backward(
    shape: Shape,
    scale: f64,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dy: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (b, h) in heads_of(shape) {
        for (i, p) in probabilities(shape, scale, q, k, b, h, &mut Vec::new()).iter().enumerate() {
            let at_i = q_at(shape, b, i, h);
            let dp: Vec<f64> = (0..=i)
                .map(|j| (0..shape.head_dim).map(|d| dy[at_i + d] * v[kv_at(shape, b, j, h) + d]).sum())
                .collect();
            let mean: f64 = dp.iter().zip(p).map(|(dp, p)| dp * p).sum();
            for j in 0..=i {
                let ds = p[j] * (dp[j] - mean);
                let at_j = kv_at(shape, b, j, h);
                for d in 0..shape.head_dim {
                    dq[at_i + d] += scale * ds * k[at_j + d];
                    dk[at_j + d] += scale * ds * q[at_i + d];
                    dv[at_j + d] += p[j] * dy[at_i + d];
                }
            }
        }
    }
    (dq, dk, dv)
}

fn heads_of(shape: Shape) -> impl Iterator<Item = (usize, usize)> {
    (0..shape.batch).flat_map(move |b| (0..shape.heads).map(move |h| (b, h)))
}

fn q_at(shape: Shape, b: usize, t: usize, h: usize) -> usize {
    (b * shape.sequence + t) * shape.q_width() + h * shape.head_dim
}

/// Where the key and value of query head `h` begin.
fn kv_at(shape: Shape, b: usize, t: usize, h: usize) -> usize {
    let kv_head = h / (shape.heads / shape.kv_heads);
    (b * shape.sequence + t) * shape.kv_width() + kv_head * shape.head_dim
}

/// Row i holds the probabilities of positions 0..=i.
fn probabilities(
    shape: Shape,
    scale: f64,
    q: &[f64],
    k: &[f64],
    b: usize,
    h: usize,
    log_sum_exp: &mut Vec<f64>,
) -> Vec<Vec<f64>> {
    let mut rows = Vec::new();
    for i in 0..shape.sequence {
        let dot = |j: usize| -> f64 {
            (0..shape.head_dim).map(|d| q[q_at(shape, b, i, h) + d] * k[kv_at(shape, b, j, h) + d]).sum()
        };
        let scores: Vec<f64> = (0..=i).map(|j| scale * dot(j)).collect();
        let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - greatest).exp()).sum();
        log_sum_exp.push(greatest + sum.ln());
        rows.push(scores.iter().map(|s| (s - greatest).exp() / sum).collect());
    }
    rows
}
