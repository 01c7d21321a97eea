//! The two code tables.

use std::sync::LazyLock;

/// The 16 numbers of NF4, in the order of their codes: quantiles of N(0, 1) scaled to [-1, 1], with an exact 0.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Numbers of the scales' table.
pub const SCALES: usize = 256;

/// Decades of the scales' table: the lowest holds one number a sign, each further one twice as many.
const DECADES: u32 = 7;

/// The 256 numbers of the scales' codes, ascending: a dynamic 8-bit float (Dettmers, "8-bit approximations for
/// parallelism in deep learning", 2015), whose fraction grows by a bit as its decimal exponent grows by one.
pub fn scale_table() -> &'static [f32; SCALES] {
    static TABLE: LazyLock<[f32; SCALES]> = LazyLock::new(|| {
        let mut numbers = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let power = 10f64.powi(decade as i32 + 1 - DECADES as i32) as f32;
            let steps = 1usize << decade;
            for step in 0..steps {
                let middle = (border(step, steps) + border(step + 1, steps)) / 2.0;
                numbers.extend([power * middle, -(power * middle)]);
            }
        }
        numbers.sort_by(f32::total_cmp);
        let mut table = [0.0; SCALES];
        table.copy_from_slice(&numbers);
        table
    });
    &TABLE
}

/// The `step`-th of the `steps` + 1 borders that cut [0.1, 1] into equal parts, counted from the nearer end and rounded
/// once, as PyTorch's `linspace` does.
fn border(step: usize, steps: usize) -> f32 {
    let width = (1.0 - 0.1f32) / steps as f32;
    if step <= steps / 2 { width.mul_add(step as f32, 0.1) } else { (-width).mul_add((steps - step) as f32, 1.0) }
}

/// The borders between neighbours of an ascending table: a number belongs to the code that counts the borders below it.
pub fn borders<const N: usize, const BORDERS: usize>(table: &[f32; N]) -> [f32; BORDERS] {
    assert_eq!(BORDERS + 1, N);
    std::array::from_fn(|i| (table[i] + table[i + 1]) / 2.0)
}
