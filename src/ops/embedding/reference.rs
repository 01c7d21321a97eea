//! Embeddings by their definition, in f64.

/// y [N, C]; `positions` are those of each row.
pub fn forward(ids: &[u32], tokens: &[f64], positions: &[usize], table: &[f64], width: usize) -> Vec<f64> {
    let rows = ids.iter().zip(positions);
    rows.flat_map(|(&id, &p)| (0..width).map(move |c| tokens[id as usize * width + c] + table[p * width + c])).collect()
}

/// Rows of dy [N, C] summed by index into a table of `rows` rows.
pub fn backward(indices: &[usize], dy: &[f64], rows: usize, width: usize) -> Vec<f64> {
    let mut sums = vec![0.0; rows * width];
    for (&index, dy) in indices.iter().zip(dy.chunks_exact(width)) {
        for c in 0..width {
            sums[index * width + c] += dy[c];
        }
    }
    sums
}
