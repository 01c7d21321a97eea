//! Root mean square normalisation by its definition, in f64.

/// y [R, C] and rstd [R] of x [R, C].
pub fn forward(x: &[f64], weight: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (mut y, mut rstds) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(width) {
        let mean_square = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
        let rstd = 1.0 / (mean_square + epsilon).sqrt();
        y.extend((0..width).map(|i| row[i] * rstd * weight[i]));
        rstds.push(rstd);
    }
    (y, rstds)
}

/// dx [R, C] and dweight [C].
pub fn backward(x: &[f64], weight: &[f64], epsilon: f64, dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (normed, rstds) = forward(x, &vec![1.0; width], epsilon);
    let (mut dx, mut dweight) = (Vec::new(), vec![0.0; width]);
    for ((normed, dy), rstd) in normed.chunks_exact(width).zip(dy.chunks_exact(width)).zip(rstds) {
        let g: Vec<f64> = (0..width).map(|i| dy[i] * weight[i]).collect();
        let mean_gn = (0..width).map(|i| g[i] * normed[i]).sum::<f64>() / width as f64;
        for i in 0..width {
            dx.push(rstd * (g[i] - normed[i] * mean_gn));
            dweight[i] += dy[i] * normed[i];
        }
    }
    (dx, dweight)
}
