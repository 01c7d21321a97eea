//! The adapter on the CPU: four thin products.

use super::Adapter;
use crate::ops::product::{self, Matrix, Numbers, Operand, Precision, Size, Threads, multiply_in};
use crate::ops::{Gradient, Into, Values, dropout};

/// Elements of scratch that [`forward`] and [`backward`] need for `rows` rows.
pub fn scratch_len(rows: usize, inputs: usize, rank: usize, dropout: bool) -> usize {
    rows * (2 * rank + if dropout { inputs } else { 0 })
}

/// y [R, O] += the adapter's part for x [R, I].
pub fn forward<'a>(x: impl std::convert::Into<Numbers<'a>>, adapter: Adapter, y: &mut [f32], scratch: &mut [f32]) {
    let (x, Adapter { rank, outputs, scaling, .. }) = (x.into(), adapter);
    let rows = check(adapter, x, y.len());
    let (hidden, _, dropped) = parts(adapter, rows, scratch);
    let x = input(adapter, x, dropped);
    down(adapter, rows, x, hidden);
    let up = Operand::row_major(adapter.b, rank).transposed();
    let size = Size { m: rows, k: rank, n: outputs };
    product(size, Operand::row_major(hidden, rank).into(), up.into(), scaling, y, Into::Accumulate);
}

/// Whether a row of [`forward`] has the same bits among `many` rows as among `few` (at most as many).
pub fn rows_keep_their_bits(few: usize, many: usize, inputs: usize, rank: usize, outputs: usize) -> bool {
    let keep = |k, n| product::rows_keep_their_bits(Precision::F32, few, many, k, n);
    keep(inputs, rank) && keep(rank, outputs)
}

/// dA and dB as their gradients say, dx [R, I] += the part that passes through the adapter.
pub fn backward<'a>(
    x: impl std::convert::Into<Numbers<'a>>,
    dy: impl std::convert::Into<Values<'a>>,
    adapter: Adapter,
    da: Gradient,
    db: Gradient,
    dx: &mut [f32],
    scratch: &mut [f32],
) {
    let (x, dy, Adapter { rank, inputs, outputs, scaling, .. }) = (x.into(), Numbers::from(dy.into()), adapter);
    let rows = check(adapter, x, dy.len());
    assert_eq!(dx.len(), rows * inputs, "lora: dx is not [R, I]");
    assert!(
        da.data.len() == rank * inputs && db.data.len() == outputs * rank,
        "lora: dA is not [r, I] or dB not [O, r]"
    );
    let (hidden, d_hidden, dropped) = parts(adapter, rows, scratch);
    let dy = dy.row_major(outputs);
    {
        let x = input(adapter, x, &mut *dropped);
        down(adapter, rows, x, hidden);
        let size = Size { m: outputs, k: rows, n: rank };
        product(size, dy.transposed(), Operand::row_major(hidden, rank).into(), scaling, db.data, db.into);
        let size = Size { m: rows, k: outputs, n: rank };
        product(size, dy, Operand::row_major(adapter.b, rank).into(), scaling, d_hidden, Into::Overwrite);
        let size = Size { m: rank, k: rows, n: inputs };
        let transposed = Operand::row_major(d_hidden, rank).transposed();
        product(size, transposed.into(), x.row_major(inputs), 1.0, da.data, da.into);
    }
    let size = Size { m: rows, k: rank, n: inputs };
    let (d_hidden, down) = (Operand::row_major(d_hidden, rank), Operand::row_major(adapter.a, inputs));
    match adapter.dropout {
        None => product(size, d_hidden.into(), down.into(), 1.0, dx, Into::Accumulate),
        Some(mask) => {
            product(size, d_hidden.into(), down.into(), 1.0, dropped, Into::Overwrite);
            dropout::add_masked(mask, dropped, inputs, dx);
        }
    }
}

/// The number of rows.
fn check(adapter: Adapter, x: Numbers, results: usize) -> usize {
    let Adapter { a, b, rank, inputs, outputs, .. } = adapter;
    assert!(rank > 0 && a.len() == rank * inputs && b.len() == outputs * rank, "lora: A is not [r, I] or B not [O, r]");
    assert!(outputs > 0 && results.is_multiple_of(outputs), "lora: not whole rows of {outputs}");
    let rows = results / outputs;
    assert_eq!(x.len(), rows * inputs, "lora: x is not [R, I]");
    rows
}

/// u [R, r], du [R, r], and room for what dropout leaves of x.
fn parts<'a>(adapter: Adapter, rows: usize, scratch: &'a mut [f32]) -> (&'a mut [f32], &'a mut [f32], &'a mut [f32]) {
    let Adapter { rank, inputs, dropout, .. } = adapter;
    let scratch = &mut scratch[..scratch_len(rows, inputs, rank, dropout.is_some())];
    let (hidden, rest) = scratch.split_at_mut(rows * rank);
    let (d_hidden, dropped) = rest.split_at_mut(rows * rank);
    (hidden, d_hidden, dropped)
}

/// d(x)
fn input<'a>(adapter: Adapter, x: Numbers<'a>, dropped: &'a mut [f32]) -> Numbers<'a> {
    let Some(mask) = adapter.dropout else { return x };
    dropout::forward(mask, x, adapter.inputs, dropped);
    Numbers::F32(dropped)
}

/// u = d(x) A^T
fn down(adapter: Adapter, rows: usize, x: Numbers, hidden: &mut [f32]) {
    let Adapter { a, rank, inputs, .. } = adapter;
    let size = Size { m: rows, k: inputs, n: rank };
    let down = Operand::row_major(a, inputs).transposed();
    product(size, x.row_major(inputs), down.into(), 1.0, hidden, Into::Overwrite);
}

fn product(size: Size, a: Matrix, b: Matrix, scale: f32, c: &mut [f32], into: Into) {
    multiply_in(Precision::F32, Threads::All, size, a, b, scale, c, size.n, into);
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    struct Case {
        rows: usize,
        x: Vec<f32>,
        dy: Vec<f32>,
        a: Vec<f32>,
        b: Vec<f32>,
        rank: usize,
        inputs: usize,
        outputs: usize,
    }

    fn case(rows: usize, rank: usize, inputs: usize, outputs: usize) -> Case {
        let [x, dy] = [normal(1, rows * inputs), normal(2, rows * outputs)];
        Case { rows, x, dy, a: normal(3, rank * inputs), b: normal(4, outputs * rank), rank, inputs, outputs }
    }

    impl Case {
        fn adapter(&self, dropout: Option<dropout::Mask>) -> Adapter<'_> {
            let Self { a, b, rank, inputs, outputs, .. } = self;
            Adapter { a, b, rank: *rank, inputs: *inputs, outputs: *outputs, scaling: 1.75, dropout }
        }

        /// y, dA, dB, dx, each added to 0.5.
        fn run(&self, dropout: Option<dropout::Mask>) -> [Vec<f32>; 4] {
            let Self { rows, x, dy, rank, inputs, outputs, .. } = self;
            let len = [rows * outputs, rank * inputs, outputs * rank, rows * inputs];
            let [mut y, mut da, mut db, mut dx] = len.map(|len| vec![0.5; len]);
            let mut scratch = vec![f32::NAN; scratch_len(*rows, *inputs, *rank, dropout.is_some())];
            forward(x, self.adapter(dropout), &mut y, &mut scratch);
            scratch.fill(f32::NAN);
            let [to_a, to_b] = [&mut da, &mut db].map(|data| Gradient::accumulate(data));
            backward(x, dy, self.adapter(dropout), to_a, to_b, &mut dx, &mut scratch);
            [y, da, db, dx]
        }
    }

    /// Gradients of sum(y * dy) by differences of the reference, for the input `x`.
    fn expected(case: &Case, x: &[f64]) -> [Vec<f64>; 4] {
        let adapter = case.adapter(None);
        let [a, b, dy] = [&case.a, &case.b, &case.dy].map(|v| to_f64(v));
        let loss = |x: &[f64], a: &[f64], b: &[f64]| weighted(&reference::forward(x, a, b, &adapter), &dy);
        [
            reference::forward(x, &a, &b, &adapter),
            differences(&a, |a| loss(x, a, &b)),
            differences(&b, |b| loss(x, &a, b)),
            differences(x, |x| loss(x, &a, &b)),
        ]
    }

    #[test]
    fn values_and_gradients_are_those_of_the_definition_and_its_differences() {
        for (rows, rank, inputs, outputs) in [(1, 1, 1, 1), (5, 2, 7, 3), (6, 4, 3, 9), (17, 3, 20, 11)] {
            let case = case(rows, rank, inputs, outputs);
            let expected = expected(&case, &to_f64(&case.x));
            for ((found, expected), name) in case.run(None).iter().zip(expected).zip(["y", "dA", "dB", "dx"]) {
                let shifted: Vec<f64> = expected.iter().map(|x| x + 0.5).collect();
                assert_close(&format!("{name} {rows} {rank} {inputs} {outputs}"), found, &shifted, 2e-5);
            }
        }
    }

    #[test]
    fn dropout_is_that_of_the_input_in_both_passes() {
        let case = case(9, 2, 30, 5);
        let mask = dropout::Mask::new(77, 0.4);
        let mut dropped = vec![0.0; case.x.len()];
        dropout::forward(mask, Numbers::F32(&case.x), case.inputs, &mut dropped);
        let [y, da, db, dx] = expected(&case, &to_f64(&dropped));
        // dx passes through the mask as x did.
        let kept = |x: f32, dropped: f32| if dropped == 0.0 { 0.0 } else { f64::from(dropped / x) };
        let dx = dx.iter().zip(case.x.iter().zip(&dropped)).map(|(dx, (&x, &d))| dx * kept(x, d)).collect();
        for ((found, expected), name) in case.run(Some(mask)).iter().zip([y, da, db, dx]).zip(["y", "dA", "dB", "dx"]) {
            let shifted: Vec<f64> = expected.iter().map(|x| x + 0.5).collect();
            assert_close(name, found, &shifted, 2e-5);
        }
    }

    #[test]
    fn a_row_keeps_its_bits_among_others_where_that_is_said() {
        let mut kept = 0;
        for (rank, inputs, outputs) in [(1, 300, 200), (8, 300, 200), (16, 576, 1536), (64, 700, 300)] {
            for (few, many) in [(1, 20), (20, 33), (33, 64), (40, 300), (70, 300), (300, 570)] {
                if !rows_keep_their_bits(few, many, inputs, rank, outputs) {
                    continue;
                }
                kept += 1;
                let [alone, among] = [few, many].map(|rows| {
                    let case = case(many, rank, inputs, outputs);
                    let mut y = case.dy[..rows * outputs].to_vec();
                    let mut scratch = vec![0.0; scratch_len(rows, inputs, rank, false)];
                    forward(&case.x[..rows * inputs], case.adapter(None), &mut y, &mut scratch);
                    y
                });
                assert!(alone[..] == among[..few * outputs], "{few} of {many}, {rank} {inputs} {outputs}");
            }
        }
        assert!(kept >= 8, "{kept}");
    }

    #[test]
    fn an_adapter_whose_b_is_zero_changes_no_bit_and_threads_change_none() {
        let mut fresh = case(40, 8, 300, 200);
        assert_same_bits_for_any_threads(|| fresh.run(Some(dropout::Mask::new(5, 0.1))).concat());
        fresh.b.fill(0.0);
        let mut y = normal(8, 40 * 200);
        let before = y.clone();
        forward(&fresh.x, fresh.adapter(None), &mut y, &mut vec![0.0; scratch_len(40, 300, 8, false)]);
        assert!(y == before);
    }
}
