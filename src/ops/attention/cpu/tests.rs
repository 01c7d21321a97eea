//! Attention against its reference: shapes, layouts, instruction sets, threads, and gradients by differences.

use super::{backward, forward, scratch_len};
use crate::ops::attention::{Documents, InputGradients, Inputs, Pattern, Saved, Shape, reference};
use crate::ops::dropout::{self, Mask};
use crate::ops::simd::Level;
use crate::ops::testing::*;
use half::bf16;

/// q, k, v, dy of `shape`.
fn problem(shape: Shape) -> [Vec<f32>; 4] {
    let (q_len, kv_len) = (shape.rows() * shape.q_width(), shape.rows() * shape.kv_width());
    [normal(1, q_len), normal(2, kv_len), normal(3, kv_len), normal(4, q_len)]
}

/// Columns of three matrices side by side.
fn fuse(shape: Shape, [q, k, v]: [&[f32]; 3]) -> Vec<f32> {
    let mut fused = Vec::new();
    for row in 0..shape.rows() {
        for (matrix, width) in [(q, shape.q_width()), (k, shape.kv_width()), (v, shape.kv_width())] {
            fused.extend_from_slice(&matrix[row * width..][..width]);
        }
    }
    fused
}

/// y, log_sum_exp, dq, dk, dv from separate buffers.
fn run_separate(shape: Shape, scale: f32) -> [Vec<f32>; 5] {
    run_documents(shape, scale, Documents::Whole)
}

fn run_documents(shape: Shape, scale: f32, documents: Documents) -> [Vec<f32>; 5] {
    let [q, k, v, dy] = problem(shape);
    let inputs = Inputs::Separate { q: (&q).into(), k: (&k).into(), v: (&v).into() };
    let (mut y, mut log_sum_exp) = (vec![7.0; q.len()], vec![7.0; shape.batch * shape.heads * shape.sequence]);
    let mut scratch = vec![f32::NAN; scratch_len(shape)];
    forward(shape, scale, inputs, documents, &mut y, &mut log_sum_exp, &mut scratch);
    let (mut dq, mut dk, mut dv) = (vec![7.0; q.len()], vec![7.0; k.len()], vec![7.0; v.len()]);
    let saved = Saved { inputs, pattern: documents.into(), y: (&y).into(), log_sum_exp: &log_sum_exp };
    let gradients = InputGradients::Separate { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    scratch.fill(f32::NAN);
    backward(shape, scale, saved, &dy, gradients, &mut scratch);
    [y, log_sum_exp, dq, dk, dv]
}

/// y and the fused gradient, from one fused buffer.
fn run_fused(shape: Shape, scale: f32) -> (Vec<f32>, Vec<f32>) {
    let [q, k, v, dy] = problem(shape);
    let fused = fuse(shape, [&q, &k, &v]);
    let (mut y, mut log_sum_exp) = (vec![7.0; q.len()], vec![7.0; shape.batch * shape.heads * shape.sequence]);
    let (mut scratch, mut gradient) = (vec![0.0; scratch_len(shape)], vec![7.0; fused.len()]);
    let documents = Documents::Whole;
    forward(shape, scale, Inputs::Fused((&fused).into()), documents, &mut y, &mut log_sum_exp, &mut scratch);
    let saved = Saved {
        inputs: Inputs::Fused((&fused).into()),
        pattern: documents.into(),
        y: (&y).into(),
        log_sum_exp: &log_sum_exp,
    };
    backward(shape, scale, saved, &dy, InputGradients::Fused(&mut gradient), &mut scratch);
    (y, gradient)
}

#[test]
fn values_and_gradients_match_the_reference_for_any_length_width_and_grouping() {
    // (B, T, heads, kv_heads, head_dim): one position, odd lengths, exact blocks, one more; grouped and odd heads.
    let shapes =
        [(1, 1, 1, 1, 1), (2, 7, 2, 2, 16), (1, 65, 3, 1, 5), (2, 64, 4, 2, 8), (1, 130, 2, 2, 64), (1, 300, 2, 1, 33)];
    for (batch, sequence, heads, kv_heads, head_dim) in shapes {
        let shape = Shape { batch, sequence, heads, kv_heads, head_dim };
        let scale = shape.scale();
        let [q, k, v, dy] = problem(shape).map(|m| to_f64(&m));
        let (y, log_sum_exp) = reference::forward(shape, scale.into(), &q, &k, &v);
        let (dq, dk, dv) = reference::backward(shape, scale.into(), &q, &k, &v, &dy);
        let expected = [y, log_sum_exp, dq, dk, dv];
        at_every_level(|level| {
            let results = run_separate(shape, scale);
            for ((a, e), name) in results.iter().zip(&expected).zip(["y", "log_sum_exp", "dq", "dk", "dv"]) {
                assert_close(&format!("{name} {shape:?} {level:?}"), a, e, 1e-5);
            }
            let (y, gradient) = run_fused(shape, scale);
            assert!(y == results[0], "{shape:?} {level:?}: the layout changes y");
            let [_, _, dq, dk, dv] = &results;
            assert!(gradient == fuse(shape, [dq, dk, dv]), "{shape:?} {level:?}: the layout changes the gradients");
        });
    }
}

#[test]
fn a_thousand_positions_with_sharp_scores_match_the_reference() {
    let shape = Shape { batch: 1, sequence: 1000, heads: 1, kv_heads: 1, head_dim: 16 };
    let [q, k, v, dy] = problem(shape).map(|m| to_f64(&m));
    // Scores of up to about 60: without the maximum taken off, sums of e^s would reach 1e26.
    let (y, _) = reference::forward(shape, 3.0, &q, &k, &v);
    let (dq, dk, dv) = reference::backward(shape, 3.0, &q, &k, &v, &dy);
    let [y_out, _, dq_out, dk_out, dv_out] = run_separate(shape, 3.0);
    for (name, a, e) in [("y", y_out, y), ("dq", dq_out, dq), ("dk", dk_out, dk), ("dv", dv_out, dv)] {
        assert_close(name, &a, &e, 1e-4);
    }
}

#[test]
fn the_future_plays_no_part() {
    let shape = Shape { batch: 1, sequence: 70, heads: 1, kv_heads: 1, head_dim: 4 };
    let [q, mut k, mut v, _] = problem(shape);
    let run = |k: &[f32], v: &[f32]| {
        let (mut y, mut logs) = (vec![0.0; q.len()], vec![0.0; 70]);
        let mut scratch = vec![0.0; scratch_len(shape)];
        let inputs = Inputs::Separate { q: (&q).into(), k: k.into(), v: v.into() };
        forward(shape, 0.5, inputs, Documents::Whole, &mut y, &mut logs, &mut scratch);
        y
    };
    let before = run(&k, &v);
    k[66 * 4..].fill(1e3);
    v[66 * 4..].fill(-1e3);
    let after = run(&k, &v);
    assert_eq!(before[..66 * 4], after[..66 * 4]);
    assert_ne!(before[66 * 4..], after[66 * 4..]);
}

/// y, log_sum_exp, dq, dk, dv from inputs rounded to bf16, with what is kept of y in bf16 too.
fn run_in_bf16(shape: Shape, documents: Documents) -> [Vec<f32>; 5] {
    let narrow = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
    let [q, k, v, dy] = problem(shape);
    let [q, k, v] = [&q, &k, &v].map(|m| narrow(m));
    let inputs = Inputs::Separate { q: q[..].into(), k: k[..].into(), v: v[..].into() };
    let (mut y, mut log_sum_exp) = (vec![7.0; q.len()], vec![7.0; shape.batch * shape.heads * shape.sequence]);
    let mut scratch = vec![f32::NAN; scratch_len(shape)];
    forward(shape, shape.scale(), inputs, documents, &mut y, &mut log_sum_exp, &mut scratch);
    let (mut dq, mut dk, mut dv) = (vec![7.0; q.len()], vec![7.0; k.len()], vec![7.0; v.len()]);
    let kept = narrow(&y);
    let saved = Saved { inputs, pattern: documents.into(), y: kept[..].into(), log_sum_exp: &log_sum_exp };
    let gradients = InputGradients::Separate { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    scratch.fill(f32::NAN);
    backward(shape, shape.scale(), saved, &dy, gradients, &mut scratch);
    [y, log_sum_exp, dq, dk, dv]
}

#[test]
fn in_bf16_values_and_gradients_are_those_of_the_rounded_inputs_up_to_the_rounding_of_the_products() {
    let shapes = [(2, 7, 2, 2, 16), (1, 65, 3, 1, 5), (1, 130, 2, 2, 64), (1, 300, 2, 1, 33)];
    for (batch, sequence, heads, kv_heads, head_dim) in shapes {
        let shape = Shape { batch, sequence, heads, kv_heads, head_dim };
        let [q, k, v, dy] = problem(shape);
        let [q, k, v] = [q, k, v].map(|m| m.iter().map(|&x| f64::from(bf16::from_f32(x))).collect::<Vec<_>>());
        let (scale, dy) = (f64::from(shape.scale()), to_f64(&dy));
        let (y, log_sum_exp) = reference::forward(shape, scale, &q, &k, &v);
        let (dq, dk, dv) = reference::backward(shape, scale, &q, &k, &v, &dy);
        let expected = [y, log_sum_exp, dq, dk, dv];
        at_every_level(|level| {
            let results = run_in_bf16(shape, Documents::Whole);
            for ((a, e), name) in results.iter().zip(&expected).zip(["y", "log_sum_exp", "dq", "dk", "dv"]) {
                // Half of bf16's last place is 2^-9 of a number; queries are rounded again after their scale.
                let norm = e.iter().map(|e| e * e).sum::<f64>().sqrt();
                let error = a.iter().zip(e).map(|(&a, e)| (f64::from(a) - e).powi(2)).sum::<f64>().sqrt();
                assert!(error <= 0.015 * norm, "{name} {shape:?} {level:?}: {error} of {norm}");
            }
        });
    }
    let shape = Shape { batch: 2, sequence: 150, heads: 6, kv_heads: 3, head_dim: 24 };
    assert_same_bits_for_any_threads(|| run_in_bf16(shape, Documents::Whole).concat());
    let places = places(&[&[70, 1, 79], &[150]]);
    assert_same_bits_for_any_threads(|| run_in_bf16(shape, Documents::Packed(&places)).concat());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let shape = Shape { batch: 2, sequence: 150, heads: 6, kv_heads: 3, head_dim: 24 };
    assert_same_bits_for_any_threads(|| run_separate(shape, shape.scale()).concat());
    let places = places(&[&[70, 1, 79], &[150]]);
    assert_same_bits_for_any_threads(|| run_documents(shape, shape.scale(), Documents::Packed(&places)).concat());
}

/// Each position's place in its document, from the documents' lengths in every row.
fn places(rows: &[&[u32]]) -> Vec<u32> {
    rows.iter().flat_map(|lengths| lengths.iter().flat_map(|&length| 0..length)).collect()
}

#[test]
fn documents_packed_into_a_row_are_attended_to_as_each_by_itself() {
    // Borders inside a block and on one, documents of one position, of several blocks, and a whole row.
    let lengths: [&[u32]; 3] = [&[50, 1, 1, 44, 104], &[200], &[7, 130, 63]];
    let places = places(&lengths);
    let shape = Shape { batch: 3, sequence: 200, heads: 4, kv_heads: 2, head_dim: 10 };
    let problem = problem(shape).map(|m| to_f64(&m));
    let mut expected: [Vec<f64>; 4] = Default::default();
    let mut expected_log: Vec<Vec<f64>> = vec![Vec::new(); shape.batch * shape.heads];
    let mut first = 0;
    for (b, lengths) in lengths.iter().enumerate() {
        for &length in *lengths {
            let one = Shape { batch: 1, sequence: length as usize, ..shape };
            let widths = [shape.q_width(), shape.kv_width(), shape.kv_width(), shape.q_width()];
            let [q, k, v, dy] = std::array::from_fn(|i| &problem[i][first * widths[i]..][..one.sequence * widths[i]]);
            let (y, log_sum_exp) = reference::forward(one, shape.scale().into(), q, k, v);
            let (dq, dk, dv) = reference::backward(one, shape.scale().into(), q, k, v, dy);
            expected.iter_mut().zip([y, dq, dk, dv]).for_each(|(all, part)| all.extend(part));
            for (h, logs) in log_sum_exp.chunks_exact(one.sequence).enumerate() {
                expected_log[b * shape.heads + h].extend_from_slice(logs);
            }
            first += one.sequence;
        }
    }
    at_every_level(|level| {
        let results = run_documents(shape, shape.scale(), Documents::Packed(&places));
        let [y, log_sum_exp, dq, dk, dv] = &results;
        for ((name, found), expected) in [("y", y), ("dq", dq), ("dk", dk), ("dv", dv)].iter().zip(&expected) {
            assert_close(&format!("{name} {level:?}"), found, expected, 1e-5);
        }
        assert_close(&format!("log_sum_exp {level:?}"), log_sum_exp, &expected_log.concat(), 1e-5);
    });
}

#[test]
#[should_panic(expected = "do not count up")]
fn places_that_leave_one_out_are_refused() {
    let shape = Shape { batch: 1, sequence: 3, heads: 1, kv_heads: 1, head_dim: 2 };
    run_documents(shape, 1.0, Documents::Packed(&[0, 1, 3]));
}

#[test]
fn the_references_gradients_are_those_of_finite_differences() {
    let shape = Shape { batch: 2, sequence: 4, heads: 4, kv_heads: 2, head_dim: 3 };
    let [q, k, v, dy] = problem(shape).map(|m| to_f64(&m));
    let loss = |q: &[f64], k: &[f64], v: &[f64]| weighted(&reference::forward(shape, 0.6, q, k, v).0, &dy);
    let (dq, dk, dv) = reference::backward(shape, 0.6, &q, &k, &v, &dy);
    assert_same_gradient("dq", &dq, &differences(&q, |q| loss(q, &k, &v)));
    assert_same_gradient("dk", &dk, &differences(&k, |k| loss(&q, k, &v)));
    assert_same_gradient("dv", &dv, &differences(&v, |v| loss(&q, &k, v)));
}

#[test]
fn dropped_probabilities_give_the_values_and_gradients_of_the_masked_softmax() {
    for (sequence, documents) in [(1, None), (9, None), (70, None), (70, Some(vec![30u32, 1, 39]))] {
        let shape = Shape { batch: 2, sequence, heads: 2, kv_heads: 1, head_dim: 8 };
        let places = documents.map(|lengths| {
            let row: Vec<u32> = lengths.iter().flat_map(|&length| 0..length).collect();
            [row.clone(), row].concat()
        });
        let documents = places.as_deref().map_or(Documents::Whole, Documents::Packed);
        let mask = Mask::new(77, 0.4);
        let [q, k, v, dy] = problem(shape);
        let (mut y, mut log_sum_exp) = (vec![7.0; q.len()], vec![7.0; shape.batch * shape.heads * sequence]);
        let mut scratch = vec![f32::NAN; scratch_len(shape)];
        let inputs = Inputs::Separate { q: (&q).into(), k: (&k).into(), v: (&v).into() };
        let pattern = Pattern { documents, dropout: Some(mask) };
        forward(shape, shape.scale(), inputs, pattern, &mut y, &mut log_sum_exp, &mut scratch);
        let (mut dq, mut dk, mut dv) = (vec![7.0; q.len()], vec![7.0; k.len()], vec![7.0; v.len()]);
        let saved = Saved { inputs, pattern, y: (&y).into(), log_sum_exp: &log_sum_exp };
        let gradients = InputGradients::Separate { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        backward(shape, shape.scale(), saved, &dy, gradients, &mut scratch);

        // The definition, one query at a time in f64.
        let at =
            |m: &[f32], row: usize, head: usize, heads: usize, d: usize| f64::from(m[(row * heads + head) * 8 + d]);
        let [mut e_y, mut e_dq] = [(); 2].map(|()| vec![0.0f64; q.len()]);
        let [mut e_dk, mut e_dv] = [(); 2].map(|()| vec![0.0f64; k.len()]);
        let scale = f64::from(shape.scale());
        let queries = (0..2 * sequence).flat_map(|row| [(row, 0), (row, 1)]);
        let mut dropped = 0;
        for (row, h) in queries {
            let (b, i) = (row / sequence, row % sequence);
            let first = places.as_ref().map_or(0, |places| i - places[row] as usize);
            let mut kept = vec![1.0f32; i + 1 - first];
            dropout::columns(Level::current(), mask, (b * 2 + h) * sequence + i, first, &mut kept);
            dropped += kept.iter().filter(|&&kept| kept == 0.0).count();
            let keys: Vec<usize> = (first..=i).map(|j| b * sequence + j).collect();
            let dot = |a: &[f32], b: &[f32], key: usize| {
                (0..8).map(|d| at(a, row, h, 2, d) * at(b, key, 0, 1, d)).sum::<f64>()
            };
            let e: Vec<f64> = keys.iter().map(|&key| (scale * dot(&q, &k, key)).exp()).collect();
            let p: Vec<f64> = e.iter().map(|x| x / e.iter().sum::<f64>()).collect();
            let dp: Vec<f64> =
                keys.iter().zip(&kept).map(|(&key, &kept)| f64::from(kept) * dot(&dy, &v, key)).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for (place, &key) in keys.iter().enumerate() {
                let (weight, ds) = (f64::from(kept[place]) * p[place], scale * p[place] * (dp[place] - delta));
                for d in 0..8 {
                    e_y[(row * 2 + h) * 8 + d] += weight * at(&v, key, 0, 1, d);
                    e_dv[key * 8 + d] += weight * at(&dy, row, h, 2, d);
                    e_dq[(row * 2 + h) * 8 + d] += ds * at(&k, key, 0, 1, d);
                    e_dk[key * 8 + d] += ds * at(&q, row, h, 2, d);
                }
            }
        }
        assert!(sequence == 1 || dropped > 0);
        for (name, a, e) in [("y", y, e_y), ("dq", dq, e_dq), ("dk", dk, e_dk), ("dv", dv, e_dv)] {
            assert_close(&format!("{name}, {sequence} positions"), &a, &e, 1e-5);
        }
    }
}

#[test]
fn documents_apart_have_the_bits_that_each_has_alone() {
    let lengths = [64, 1, 300, 7, 2, 33, 48, 31, 100];
    let total = lengths.iter().sum();
    // Heads of one panel of columns, of two and of four.
    for (heads, kv_heads, head_dim) in [(3, 1, 20), (4, 4, 64), (2, 1, 160)] {
        let shape = Shape { batch: 1, sequence: total, heads, kv_heads, head_dim };
        let [q, k, v, _] = problem(shape);
        let fused = fuse(shape, [&q, &k, &v]);
        let [q_16, k_16, v_16, fused_16] =
            [&q, &k, &v, &fused].map(|m| m.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        let kinds = [
            Inputs::Separate { q: (&q).into(), k: (&k).into(), v: (&v).into() },
            Inputs::Separate { q: q_16[..].into(), k: k_16[..].into(), v: v_16[..].into() },
            Inputs::Fused((&fused).into()),
            Inputs::Fused(fused_16[..].into()),
        ];
        for (kind, inputs) in kinds.into_iter().enumerate() {
            let run = |shape: Shape, inputs: Inputs, documents: Documents| {
                let (mut y, mut logs) = (vec![7.0; shape.rows() * shape.q_width()], vec![7.0; shape.rows() * heads]);
                let mut scratch = vec![f32::NAN; scratch_len(shape)];
                forward(shape, shape.scale(), inputs, documents, &mut y, &mut logs, &mut scratch);
                [y, logs]
            };
            at_every_level(|level| {
                let [y, logs] = run(shape, inputs, Documents::Apart(&lengths));
                let mut first = 0;
                for length in lengths {
                    let one = Shape { sequence: length, ..shape };
                    let [own_y, own_logs] = run(one, inputs.rows(shape, first, length), Documents::Whole);
                    let name = format!("{length} at {first}, {one:?}, kind {kind}, {level:?}");
                    assert!(y[first * shape.q_width()..][..own_y.len()] == own_y, "y {name}");
                    assert!(logs[first * heads..][..own_logs.len()] == own_logs, "log_sum_exp {name}");
                    first += length;
                }
            });
        }
    }
}

#[test]
#[should_panic(expected = "not one row")]
fn documents_apart_that_do_not_fill_the_row_are_refused() {
    run_documents(Shape { batch: 1, sequence: 5, heads: 1, kv_heads: 1, head_dim: 2 }, 1.0, Documents::Apart(&[2, 2]));
}
