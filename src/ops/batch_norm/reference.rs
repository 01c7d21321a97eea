//! The definition of batch normalisation in training and its gradients, in f64, a channel at a time.

use super::Activation;

/// Rows of x [R, C] as the numbers of one channel.
fn channel(x: &[f64], channels: usize, index: usize) -> Vec<f64> {
    x.iter().skip(index).step_by(channels).copied().collect()
}

/// (y, mean, biased variance)
pub fn forward(
    x: &[f64],
    weight: &[f64],
    bias: &[f64],
    residual: Option<&[f64]>,
    activation: Activation,
    epsilon: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let channels = weight.len();
    let (mut y, mut means, mut variances) = (vec![0.0; x.len()], Vec::new(), Vec::new());
    for c in 0..channels {
        let numbers = channel(x, channels, c);
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / numbers.len() as f64;
        for (row, x) in numbers.iter().enumerate() {
            let place = row * channels + c;
            let value = (x - mean) / (variance + epsilon).sqrt() * weight[c] + bias[c];
            let value = value + residual.map_or(0.0, |residual| residual[place]);
            y[place] = if activation == Activation::Relu { value.max(0.0) } else { value };
        }
        means.push(mean);
        variances.push(variance);
    }
    (y, means, variances)
}

/// (dx, dweight, dbias, dresidual)
pub fn backward(
    x: &[f64],
    y: &[f64],
    weight: &[f64],
    activation: Activation,
    epsilon: f64,
    dy: &[f64],
) -> [Vec<f64>; 4] {
    let channels = weight.len();
    let masked = |i: usize| if activation == Activation::Relu && y[i] <= 0.0 { 0.0 } else { dy[i] };
    let g: Vec<f64> = (0..dy.len()).map(masked).collect();
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], Vec::new(), Vec::new());
    for c in 0..channels {
        let (numbers, slopes) = (channel(x, channels, c), channel(&g, channels, c));
        let rows = numbers.len() as f64;
        let mean = numbers.iter().sum::<f64>() / rows;
        let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / rows;
        let rstd = 1.0 / (variance + epsilon).sqrt();
        let sum: f64 = slopes.iter().sum();
        let dot: f64 = slopes.iter().zip(&numbers).map(|(g, x)| g * (x - mean) * rstd).sum();
        for (row, (g, x)) in slopes.iter().zip(&numbers).enumerate() {
            dx[row * channels + c] = weight[c] * rstd * (g - sum / rows - (x - mean) * rstd * dot / rows);
        }
        dweight.push(dot);
        dbias.push(sum);
    }
    [dx, dweight, dbias, g]
}
