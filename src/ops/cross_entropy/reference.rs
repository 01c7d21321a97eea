//! Cross-entropy over a linear head by its definition, in f64.

use super::IGNORE;

/// The negative log-likelihood of each row (0 where ignored), dx [N, C] and dhead [V, C] of their sum.
pub fn forward_backward(x: &[f64], head: &[f64], width: usize, targets: &[u32]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut nll, mut dx, mut dhead) = (Vec::new(), vec![0.0; x.len()], vec![0.0; head.len()]);
    for (row, &target) in targets.iter().enumerate() {
        if target == IGNORE {
            nll.push(0.0);
            continue;
        }
        let x = &x[row * width..][..width];
        let logits: Vec<f64> = head.chunks_exact(width).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
        let greatest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - greatest).exp()).sum();
        nll.push(greatest + sum.ln() - logits[target as usize]);
        for (j, logit) in logits.iter().enumerate() {
            let slope = (logit - greatest).exp() / sum - if j == target as usize { 1.0 } else { 0.0 };
            for c in 0..width {
                dx[row * width + c] += slope * head[j * width + c];
                dhead[j * width + c] += slope * x[c];
            }
        }
    }
    (nll, dx, dhead)
}
