//! The loss of a classifier's logits, and labels drawn from them.

use super::{CLASSES, Objective};
use crate::model::LossSum;
use crate::random::uniform;
use rand_chacha::ChaCha8Rng;

/// Sum over the images of the loss of logits [B, 10]; its gradient goes to `slope`.
pub fn loss(objective: Objective, logits: &[f32], labels: &[u32], slope: Option<&mut [f32]>) -> LossSum {
    let mut sum = 0.0;
    let mut nowhere = Vec::new();
    let slope = slope.unwrap_or_else(|| {
        nowhere.resize(logits.len(), 0.0);
        &mut nowhere
    });
    for ((logits, slope), &label) in logits.chunks_exact(CLASSES).zip(slope.chunks_exact_mut(CLASSES)).zip(labels) {
        let one_hot = |class: usize| if class == label as usize { 1.0 } else { 0.0 };
        match objective {
            Objective::CrossEntropy => {
                let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weight = |logit: f32| f64::from(logit - greatest).exp();
                let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
                sum += total.ln() - f64::from(logits[label as usize] - greatest);
                for (class, slope) in slope.iter_mut().enumerate() {
                    *slope = (weight(logits[class]) / total - one_hot(class)) as f32;
                }
            }
            Objective::SquaredError => {
                for (class, slope) in slope.iter_mut().enumerate() {
                    let error = f64::from(logits[class]) - one_hot(class);
                    sum += error * error / CLASSES as f64;
                    *slope = (2.0 * error / CLASSES as f64) as f32;
                }
            }
        }
    }
    LossSum { sum, count: labels.len() as u64 }
}

/// A label for every image, drawn from softmax(logits).
pub fn draw_labels(logits: &[f32], generator: &mut ChaCha8Rng) -> Vec<u32> {
    let draw = |logits: &[f32]| {
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from(logit - greatest).exp();
        let mut left = f64::from(uniform(generator)) * logits.iter().map(|&logit| weight(logit)).sum::<f64>();
        let passed = logits.iter().position(|&logit| {
            left -= weight(logit);
            left < 0.0
        });
        passed.unwrap_or(CLASSES - 1) as u32
    };
    logits.chunks_exact(CLASSES).map(draw).collect()
}
