//! Layer normalisation by its definition, in f64.

/// y [R, C], mean [R] and rstd [R] of x [R, C].
pub fn forward(x: &[f64], weight: &[f64], bias: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (mut y, mut means, mut rstds) = (Vec::new(), Vec::new(), Vec::new());
    for row in x.chunks_exact(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let rstd = 1.0 / (variance + epsilon).sqrt();
        y.extend((0..width).map(|i| (row[i] - mean) * rstd * weight[i] + bias[i]));
        means.push(mean);
        rstds.push(rstd);
    }
    (y, means, rstds)
}

/// dx [R, C], dweight [C] and dbias [C].
pub fn backward(x: &[f64], weight: &[f64], epsilon: f64, dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (normed, _, rstds) = forward(x, &vec![1.0; width], &vec![0.0; width], epsilon);
    let (mut dx, mut dweight, mut dbias) = (Vec::new(), vec![0.0; width], vec![0.0; width]);
    for ((normed, dy), rstd) in normed.chunks_exact(width).zip(dy.chunks_exact(width)).zip(rstds) {
        let g: Vec<f64> = (0..width).map(|i| dy[i] * weight[i]).collect();
        let mean_g = g.iter().sum::<f64>() / width as f64;
        let mean_gn = (0..width).map(|i| g[i] * normed[i]).sum::<f64>() / width as f64;
        for i in 0..width {
            dx.push(rstd * (g[i] - mean_g - normed[i] * mean_gn));
            dweight[i] += dy[i] * normed[i];
            dbias[i] += dy[i];
        }
    }
    (dx, dweight, dbias)
}
