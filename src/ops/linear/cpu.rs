//! The linear layer on the CPU: products over the whole pool, bias and residual added as y is written.

use super::few_rows::{self, FEW_ROWS};
use super::{Dims, Orientation, Weight};
use crate::ops::product::{
    self, Matrix, Numbers, Plus, Size, Threads, multiply_in, multiply_plus, multiply_plus_rounded, narrow,
};
use crate::ops::simd::{Level, kernel};
use crate::ops::values::each_kind;
use crate::ops::{Gradient, Into, Number, Values};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;

/// Columns that one task of the bias gradient sums: two cache lines' worth of rows at least.
const BIAS_COLUMNS: usize = 128;
/// Rows that it sums in f32 before it adds them to the total, which keeps rounding from growing with R.
const BIAS_ROWS: usize = 64;

/// y [R, O] = x [R, I] W + bias [O] + residual [R, O].
pub fn forward<'a>(
    x: impl std::convert::Into<Numbers<'a>>,
    weight: Weight,
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    y: &mut [f32],
) {
    let (x, Dims { inputs, outputs, precision, .. }) = (x.into(), weight.dims);
    let rows = rows_of("linear", y.len(), outputs);
    assert_eq!(x.len(), rows * inputs, "linear: x is not [R, I]");
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "linear: the bias is not [O]");
    assert!(residual.is_none_or(|residual| residual.len() == y.len()), "linear: the residual is not [R, O]");
    if rows <= FEW_ROWS {
        let x: Cow<[f32]> = match x {
            Numbers::F32(x) => x.into(),
            Numbers::Bf16(x) => x.iter().map(|value| value.widen()).collect(),
            Numbers::F16(_) | Numbers::Nf4(_) => unreachable!("activations are f32 or bf16"),
        };
        return few_rows::forward(&x, weight, bias, residual, y);
    }
    let (size, plus) = (Size { m: rows, k: inputs, n: outputs }, Plus { bias, residual });
    multiply_plus(precision, size, x.row_major(inputs), in_out(weight), plus, y);
}

/// [`forward`] without a residual, rounded to bf16; `raw` is working memory for [R, O].
pub fn forward_rounded<'a>(
    x: impl std::convert::Into<Numbers<'a>>,
    weight: Weight,
    bias: Option<&[f32]>,
    y: &mut [bf16],
    raw: &mut [f32],
) {
    let (x, Dims { inputs, outputs, precision, .. }) = (x.into(), weight.dims);
    let rows = rows_of("linear", y.len(), outputs);
    if rows <= FEW_ROWS {
        let raw = &mut raw[..y.len()];
        forward(x, weight, bias, None, raw);
        return narrow(Threads::All, raw, y);
    }
    assert_eq!(x.len(), rows * inputs, "linear: x is not [R, I]");
    let (size, plus) = (Size { m: rows, k: inputs, n: outputs }, Plus { bias, residual: None });
    multiply_plus_rounded(precision, size, x.row_major(inputs), in_out(weight), plus, y, raw);
}

/// Whether a row of [`forward`] has the same bits among `many` rows as among `few` (at most as many).
pub fn rows_keep_their_bits(dims: Dims, few: usize, many: usize) -> bool {
    let Dims { inputs, outputs, precision, .. } = dims;
    let product = || few > FEW_ROWS && product::rows_keep_their_bits(precision, few, many, inputs, outputs);
    few == many || many <= FEW_ROWS || product()
}

/// dx [R, I] (+)= dy [R, O] W^T.
pub fn backward_input<'a>(dy: impl std::convert::Into<Values<'a>>, weight: Weight, dx: Gradient) {
    let (dy, Dims { inputs, outputs, precision, .. }) = (Numbers::from(dy.into()), weight.dims);
    let rows = rows_of("linear backward", dx.data.len(), inputs);
    assert_eq!(dy.len(), rows * outputs, "linear backward: dy is not [R, O]");
    let size = Size { m: rows, k: outputs, n: inputs };
    let dy = dy.row_major(outputs);
    multiply_in(precision, Threads::All, size, dy, in_out(weight).transposed(), 1.0, dx.data, inputs, dx.into);
}

/// dweight (+)= x^T dy in the weight's orientation, dbias [O] (+)= sum over rows of dy.
pub fn backward_weight<'a>(
    x: impl std::convert::Into<Numbers<'a>>,
    dy: impl std::convert::Into<Values<'a>>,
    dims: Dims,
    dweight: Gradient,
    dbias: Option<Gradient>,
) {
    let (x, dy, Dims { inputs, outputs, orientation, precision }) = (x.into(), dy.into(), dims);
    let rows = rows_of("linear backward", dy.len(), outputs);
    assert_eq!(x.len(), rows * inputs, "linear backward: x is not [R, I]");
    assert_eq!(dweight.data.len(), inputs * outputs, "linear backward: the weight's gradient is not I x O");
    let (x, dy_operand) = (x.row_major(inputs), Numbers::from(dy).row_major(outputs));
    let (m, n, a, b) = match orientation {
        Orientation::InOut => (inputs, outputs, x.transposed(), dy_operand),
        Orientation::OutIn => (outputs, inputs, dy_operand.transposed(), x),
    };
    multiply_in(precision, Threads::All, Size { m, k: rows, n }, a, b, 1.0, dweight.data, n, dweight.into);
    if let Some(dbias) = dbias {
        each_kind!(Values, dy, dy => add_rows(dy, dbias));
    }
}

/// target [O] (+)= sum over rows of dy [R, O].
fn add_rows<N: Number>(dy: &[N], target: Gradient) {
    let (level, outputs, into) = (Level::current(), target.data.len(), target.into);
    assert!(outputs > 0 && dy.len().is_multiple_of(outputs), "linear backward: the bias gradient is not [O]");
    target.data.par_chunks_mut(BIAS_COLUMNS).enumerate().for_each(|(index, target)| {
        column_sums(level, dy, outputs, index * BIAS_COLUMNS, into, target);
    });
}

/// The weight as an [I, O] matrix.
fn in_out(weight: Weight) -> Matrix {
    let Weight { data, dims: Dims { inputs, outputs, orientation, .. } } = weight;
    assert_eq!(data.len(), inputs * outputs, "linear: the weight is not I x O");
    match orientation {
        Orientation::InOut => data.row_major(outputs),
        Orientation::OutIn => data.row_major(inputs).transposed(),
    }
}

fn rows_of(what: &str, len: usize, columns: usize) -> usize {
    assert!(columns > 0 && len.is_multiple_of(columns), "{what}: not whole rows of {columns}");
    len / columns
}

kernel! {
    /// target (+)= sums of the columns first..first + target.len() of dy, whose rows have `outputs` columns.
    fn column_sums<N>(dy: &[N], outputs: usize, first: usize, into: Into, target: &mut [f32]) {
        let width = target.len();
        if into == Into::Overwrite {
            target.fill(0.0);
        }
        for rows in dy.chunks(BIAS_ROWS * outputs) {
            let mut sums = [0.0f32; BIAS_COLUMNS];
            for row in rows.chunks_exact(outputs) {
                for (sum, value) in sums.iter_mut().zip(&row[first..first + width]) {
                    *sum += value.widen();
                }
            }
            for (total, sum) in target.iter_mut().zip(sums) {
                *total += sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::product::Precision;
    use crate::ops::testing::*;

    /// y, dx, dweight, dbias; gradients added to 0.5 where `into` accumulates.
    fn run(rows: usize, dims: Dims, residual: bool, into: Into) -> [Vec<f32>; 4] {
        let Dims { inputs, outputs, .. } = dims;
        let (x, data, bias) = (normal(1, rows * inputs), normal(2, inputs * outputs), normal(3, outputs));
        let (residual_rows, dy) = (normal(4, rows * outputs), normal(5, rows * outputs));
        let weight = Weight { data: data[..].into(), dims };
        let (mut y, mut dx) = (vec![7.0; rows * outputs], vec![0.5; rows * inputs]);
        let (mut dweight, mut dbias) = (vec![0.5; inputs * outputs], vec![0.5; outputs]);
        forward(&x, weight, Some(&bias), residual.then_some(&residual_rows), &mut y);
        backward_input(&dy, weight, Gradient { data: &mut dx, into });
        let gradient = Gradient { data: &mut dweight, into };
        backward_weight(&x, &dy, dims, gradient, Some(Gradient { data: &mut dbias, into }));
        [y, dx, dweight, dbias]
    }

    #[test]
    fn values_and_gradients_match_the_reference_in_both_orientations() {
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 7, 3), (33, 20, 150), (130, 64, 48)] {
            for orientation in [Orientation::InOut, Orientation::OutIn] {
                let dims = Dims { inputs, outputs, orientation, precision: Precision::F32 };
                let lengths = [rows * inputs, inputs * outputs, outputs, rows * outputs, rows * outputs];
                let mut seed = 0;
                let [x, weight, bias, residual, dy] = lengths.map(|len| {
                    seed += 1;
                    to_f64(&normal(seed, len))
                });
                let y = reference::forward(&x, &weight, dims, &bias);
                let (dx, dweight, dbias) = reference::backward(&x, &weight, dims, &dy);
                at_every_level(|level| {
                    for (with_residual, into) in [(false, Into::Overwrite), (true, Into::Accumulate)] {
                        let base = if into == Into::Accumulate { 0.5 } else { 0.0 };
                        let shifted = |v: &[f64]| v.iter().map(|v| v + base).collect::<Vec<_>>();
                        let y: Vec<f64> = if with_residual {
                            y.iter().zip(&residual).map(|(y, r)| y + r).collect()
                        } else {
                            y.clone()
                        };
                        let expected = [y, shifted(&dx), shifted(&dweight), shifted(&dbias)];
                        let results = run(rows, dims, with_residual, into);
                        for ((a, e), name) in results.iter().zip(&expected).zip(["y", "dx", "dweight", "dbias"]) {
                            assert_close(&format!("{name} {rows} {dims:?} {level:?} {into:?}"), a, e, 2e-5);
                        }
                    }
                });
            }
        }
    }

    #[test]
    fn in_bf16_values_and_gradients_are_those_of_rounded_operands_and_near_those_of_f32() {
        let (rows, inputs, outputs) = (70, 129, 83);
        let rounded = |v: &[f32]| v.iter().map(|&v| f64::from(bf16::from_f32(v))).collect::<Vec<_>>();
        let (x, weight, bias) = (normal(1, rows * inputs), normal(2, inputs * outputs), normal(3, outputs));
        let dy = normal(5, rows * outputs);
        for orientation in [Orientation::InOut, Orientation::OutIn] {
            let dims = Dims { inputs, outputs, orientation, precision: Precision::Bf16 };
            let expected = |round: &dyn Fn(&[f32]) -> Vec<f64>| {
                let y = reference::forward(&round(&x), &round(&weight), dims, &to_f64(&bias));
                let (dx, dweight, _) = reference::backward(&round(&x), &round(&weight), dims, &round(&dy));
                let (.., dbias) = reference::backward(&to_f64(&x), &to_f64(&weight), dims, &to_f64(&dy));
                [y, dx, dweight, dbias]
            };
            let (of_rounded, exact) = (expected(&rounded), expected(&to_f64));
            let results = run(rows, dims, false, Into::Overwrite);
            let names = ["y", "dx", "dweight", "dbias"];
            for (((result, of_rounded), exact), name) in results.iter().zip(&of_rounded).zip(&exact).zip(names) {
                assert_close(&format!("{name} {orientation:?}"), result, of_rounded, 2e-5);
                // Sums of about 100 products of N(0, 1), each off by up to 2^-8 of itself.
                assert_close(&format!("{name} {orientation:?} against f32"), result, exact, 0.12);
            }
        }
    }

    #[test]
    fn operands_stored_as_bf16_give_the_bits_of_f32_operands_that_are_rounded_on_the_way() {
        let dims = |orientation| Dims { inputs: 70, outputs: 90, orientation, precision: Precision::Bf16 };
        let (x, data, dy) = (normal(1, 40 * 70), normal(2, 70 * 90), normal(3, 40 * 90));
        let stored = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
        let [x_stored, data_stored, dy_stored] = [&x, &data, &dy].map(|v| stored(v));
        for dims in [Orientation::InOut, Orientation::OutIn].map(dims) {
            let run = |x: Numbers, data: Numbers, dy: Values| {
                let weight = Weight { data, dims };
                let (mut y, mut dx, mut dweight) = (vec![0.0; 40 * 90], vec![0.0; 40 * 70], vec![0.0; 70 * 90]);
                forward(x, weight, None, None, &mut y);
                backward_input(dy, weight, Gradient::overwrite(&mut dx));
                backward_weight(x, dy, dims, Gradient::overwrite(&mut dweight), None);
                [y, dx, dweight]
            };
            let on_the_way = run(x[..].into(), data[..].into(), (&dy).into());
            assert!(on_the_way == run(x_stored[..].into(), data_stored[..].into(), dy_stored[..].into()), "{dims:?}");
        }
    }

    #[test]
    fn a_result_stored_in_bf16_is_the_rounded_one_for_few_rows_and_for_many() {
        for (rows, orientation) in [(1, Orientation::InOut), (FEW_ROWS, Orientation::OutIn), (70, Orientation::OutIn)] {
            let dims = Dims { inputs: 50, outputs: 90, orientation, precision: Precision::Bf16 };
            let (x, data, bias) = (normal(1, rows * 50), normal(2, 50 * 90), normal(3, 90));
            let weight = Weight { data: data[..].into(), dims };
            let (mut y, mut raw) = (vec![f32::NAN; rows * 90], vec![f32::NAN; rows * 90 + 7]);
            let mut found = vec![bf16::NAN; rows * 90];
            forward(&x, weight, Some(&bias), None, &mut y);
            forward_rounded(&x, weight, Some(&bias), &mut found, &mut raw);
            assert!(found.iter().zip(&y).all(|(found, y)| found.to_bits() == bf16::from_f32(*y).to_bits()), "{rows}");
        }
    }

    #[test]
    fn the_bias_gradient_of_bf16_rows_is_the_sum_of_their_numbers() {
        for (rows, outputs) in [(1, 1), (3, 17), (200, 129), (70, 300)] {
            let dy: Vec<bf16> = normal(1, rows * outputs).into_iter().map(bf16::from_f32).collect();
            let wide: Vec<f32> = dy.iter().map(|x| x.to_f32()).collect();
            at_every_level(|level| {
                let [mut sums, mut expected] = [(); 2].map(|()| vec![0.5; outputs]);
                add_rows(&dy, Gradient::accumulate(&mut sums));
                add_rows(&wide, Gradient::accumulate(&mut expected));
                assert!(sums == expected, "{rows}x{outputs} {level:?}");
            });
        }
    }

    #[test]
    fn without_a_bias_the_product_stands_alone_or_on_the_residual() {
        let dims = Dims { inputs: 2, outputs: 1, orientation: Orientation::OutIn, precision: Precision::F32 };
        let weight = Weight { data: [2.0, 3.0][..].into(), dims };
        let mut y = [9.0, 9.0];
        forward(&[1.0, 1.0, 2.0, 0.0][..], weight, None, None, &mut y);
        assert_eq!(y, [5.0, 4.0]);
        forward(&[1.0, 1.0, 2.0, 0.0][..], weight, None, Some(&[10.0, 20.0]), &mut y);
        assert_eq!(y, [15.0, 24.0]);
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let dims = Dims { inputs: 70, outputs: 300, orientation: Orientation::InOut, precision: Precision::F32 };
        assert_same_bits_for_any_threads(|| run(257, dims, true, Into::Accumulate).concat());
    }

    #[test]
    fn a_row_keeps_its_bits_among_others_where_that_is_said() {
        let mut kept = 0;
        for (inputs, outputs) in [(70, 90), (300, 130), (576, 192), (600, 40)] {
            let (x, data) = (normal(1, 400 * inputs), normal(2, inputs * outputs));
            let (bias, residual) = (normal(3, outputs), normal(4, 400 * outputs));
            for (orientation, precision) in [Orientation::InOut, Orientation::OutIn]
                .into_iter()
                .flat_map(|orientation| [Precision::F32, Precision::Bf16].map(|precision| (orientation, precision)))
            {
                let dims = Dims { inputs, outputs, orientation, precision };
                let weight = Weight { data: data[..].into(), dims };
                for (few, many) in [(1, 32), (7, 12), (20, 33), (33, 40), (38, 400), (65, 400), (200, 400)] {
                    if !rows_keep_their_bits(dims, few, many) {
                        continue;
                    }
                    kept += 1;
                    let [mut alone, mut among] = [few, many].map(|rows| vec![7.0; rows * outputs]);
                    for (rows, y) in [(few, &mut alone), (many, &mut among)] {
                        let (x, residual) = (&x[..rows * inputs], &residual[..rows * outputs]);
                        forward(x, weight, Some(&bias), Some(residual), y);
                    }
                    assert!(alone[..] == among[..few * outputs], "{few} of {many}, {dims:?}");
                }
                assert!(rows_keep_their_bits(dims, 1, FEW_ROWS) && !rows_keep_their_bits(dims, 20, 33));
            }
        }
        assert!(kept >= 60, "{kept}");
    }

    #[test]
    fn the_references_gradients_are_those_of_finite_differences() {
        let dims = Dims { inputs: 3, outputs: 4, orientation: Orientation::OutIn, precision: Precision::F32 };
        let [x, weight, bias, dy] = [normal(1, 6), normal(2, 12), normal(3, 4), normal(4, 8)].map(|v| to_f64(&v));
        let loss = |x: &[f64], weight: &[f64], bias: &[f64]| weighted(&reference::forward(x, weight, dims, bias), &dy);
        let (dx, dweight, dbias) = reference::backward(&x, &weight, dims, &dy);
        assert_same_gradient("dx", &dx, &differences(&x, |x| loss(x, &weight, &bias)));
        assert_same_gradient("dweight", &dweight, &differences(&weight, |weight| loss(&x, weight, &bias)));
        assert_same_gradient("dbias", &dbias, &differences(&bias, |bias| loss(&x, &weight, bias)));
    }
}
