//! The fused head against its reference: losses, gradients, masks, sampled labels, errors.

use super::super::reference;
use super::*;
use crate::ops::product::Precision;
use crate::ops::testing::*;
use crate::random::{Stream, generator};
use half::bf16;

fn f32_head(weight: &[f32], vocabulary: usize, width: usize) -> Head<'_> {
    Head { weight: weight.into(), vocabulary, width, precision: Precision::F32 }
}

/// x, head and targets (every seventh ignored, the last token of the vocabulary among them).
fn problem(rows: usize, vocabulary: usize, width: usize) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let target = |r: usize| if r % 7 == 3 { IGNORE } else { (vocabulary - 1 - r * 31 % vocabulary) as u32 };
    (normal(1, rows * width), normal(2, vocabulary * width), (0..rows).map(target).collect())
}

/// nll, dx, dhead of the given targets.
fn run(rows: usize, vocabulary: usize, width: usize, into: Into) -> (Loss, Vec<f64>, [Vec<f32>; 2]) {
    let (x, weight, targets) = problem(rows, vocabulary, width);
    let head = f32_head(&weight, vocabulary, width);
    let mut scratch = vec![f32::NAN; scratch_len(rows, vocabulary, width)];
    let (mut nll, mut dx, mut dhead) = (vec![7.0; rows], vec![7.0; x.len()], vec![0.5; weight.len()]);
    let gradient = Some(Gradient { data: &mut dhead, into });
    let labels = Labels::Given(&targets);
    let loss = forward_backward(&x, head, labels, &mut nll, &mut dx, gradient, &mut scratch).expect("good targets");
    (loss, nll, [dx, dhead])
}

#[test]
fn losses_and_gradients_match_the_reference_for_any_vocabulary_and_several_chunks() {
    // The last shape takes three chunks.
    for (rows, vocabulary, width) in [(1, 3, 1), (9, 17, 5), (40, 512, 16), (12, 50_257, 2), (2_100, 4_090, 3)] {
        let (x, weight, targets) = problem(rows, vocabulary, width);
        let (nll, dx, dhead) = reference::forward_backward(&to_f64(&x), &to_f64(&weight), width, &targets);
        let sum: f64 = nll.iter().sum();
        at_every_level(|level| {
            let what = format!("{rows} {vocabulary} {width} {level:?}");
            for (into, base) in [(Into::Overwrite, 0.0), (Into::Accumulate, 0.5)] {
                let (loss, nll_out, [dx_out, dhead_out]) = run(rows, vocabulary, width, into);
                assert_eq!(loss.count, targets.iter().filter(|&&t| t != IGNORE).count());
                assert!((loss.sum - sum).abs() <= 1e-6 * sum, "{what}: {} {sum}", loss.sum);
                let worst = nll_out.iter().zip(&nll).map(|(a, e)| (a - e).abs()).fold(0.0, f64::max);
                assert!(worst < 4e-6, "{what}: nll is off by {worst}");
                let shifted: Vec<f64> = dhead.iter().map(|v| v + base).collect();
                assert_close(&format!("dx {what}"), &dx_out, &dx, 2e-6);
                assert_close(&format!("dhead {what}"), &dhead_out, &shifted, 2e-6);
            }
            let mut forward_nll = vec![7.0; rows];
            let head = f32_head(&weight, vocabulary, width);
            let mut scratch = vec![f32::NAN; scratch_len(rows, vocabulary, width)];
            let loss = forward(&x, head, &targets, &mut forward_nll, &mut scratch).expect("good targets");
            let (with_gradients, nll_out, _) = run(rows, vocabulary, width, Into::Overwrite);
            assert_eq!((loss, forward_nll), (with_gradients, nll_out), "{what}: the two passes differ");
        });
    }
}

/// The places of the targets that take part: few and scattered, in runs as a conversation's, one at an end, none.
fn masks(rows: usize) -> [Vec<usize>; 5] {
    let run = |row: &usize| row / 37 % 3 != 1;
    [(0..rows).filter(|row| row % 11 == 5).collect(), (0..rows).filter(run).collect(), vec![0], vec![rows - 1], vec![]]
}

#[test]
fn rows_that_take_no_part_have_no_gradient_and_change_none_whatever_stands_in_them() {
    // Two chunks of the rows that take part, where two thirds of them do.
    let (rows, vocabulary, width) = (2_600, 2_100, 6);
    let (x, weight, _) = problem(rows, vocabulary, width);
    let head = f32_head(&weight, vocabulary, width);
    for places in masks(rows) {
        let (mut x, mut targets) = (x.clone(), vec![IGNORE; rows]);
        places.iter().for_each(|&row| targets[row] = (row * 31 % vocabulary) as u32);
        let (nll, dx, dhead) = reference::forward_backward(&to_f64(&x), &to_f64(&weight), width, &targets);
        for row in (0..rows).filter(|row| !places.contains(row)) {
            x[row * width..][..width].fill(f32::NAN);
        }
        for (into, base) in [(Into::Overwrite, 0.0), (Into::Accumulate, 0.5)] {
            let mut scratch = vec![f32::NAN; scratch_len(rows, vocabulary, width)];
            let (mut nll_out, mut dx_out, mut dhead_out) =
                (vec![7.0; rows], vec![7.0; x.len()], vec![0.5; weight.len()]);
            let gradient = Some(Gradient { data: &mut dhead_out, into });
            let labels = Labels::Given(&targets);
            let loss = forward_backward(&x, head, labels, &mut nll_out, &mut dx_out, gradient, &mut scratch);
            let loss = loss.expect("good targets");
            assert_eq!(loss.count, places.len());
            assert!(nll_out.iter().zip(&nll).all(|(a, e)| (a - e).abs() < 4e-6), "{} rows", places.len());
            let shifted: Vec<f64> = dhead.iter().map(|v| v + base).collect();
            assert_close("dx", &dx_out, &dx, 2e-6);
            // Sums over up to 1,739 rows, in f32.
            assert_close("dhead", &dhead_out, &shifted, 1e-5);
            let mut forward_nll = vec![7.0; rows];
            let alone = forward(&x, head, &targets, &mut forward_nll, &mut scratch).expect("good targets");
            assert_eq!((alone, forward_nll), (loss, nll_out), "{} rows: the two passes differ", places.len());
        }
    }
}

#[test]
fn rows_of_a_padded_vocabulary_take_no_part() {
    let (x, mut weight, _) = problem(4, 6, 3);
    weight[15..].fill(1e3);
    let targets = [0, 1, 2, 4];
    let (nll, ..) = reference::forward_backward(&to_f64(&x), &to_f64(&weight[..15]), 3, &targets);
    let head = f32_head(&weight, 5, 3);
    let (mut nll_out, mut dx, mut dhead) = (vec![0.0; 4], vec![0.0; 12], vec![0.5; 18]);
    let (labels, mut scratch) = (Labels::Given(&targets), vec![0.0; scratch_len(4, 5, 3)]);
    let gradient = Some(Gradient::overwrite(&mut dhead));
    forward_backward(&x, head, labels, &mut nll_out, &mut dx, gradient, &mut scratch).expect("good targets");
    assert!(nll_out.iter().zip(&nll).all(|(a, e)| (a - e).abs() < 1e-6));
    assert_eq!(dhead[15..], [0.5; 3]);
}

#[test]
fn a_target_outside_the_vocabulary_is_an_error_and_nothing_is_written() {
    let head = f32_head(&[0.0; 6], 3, 2);
    let (mut nll, mut dx, mut scratch) = ([7.0; 2], [7.0; 4], vec![0.0; scratch_len(2, 3, 2)]);
    let error = TargetError { place: 1, target: 3, vocabulary: 3 };
    assert_eq!(forward(&[0.0; 4], head, &[IGNORE, 3], &mut nll, &mut scratch), Err(error));
    let labels = Labels::Given(&[IGNORE, 3]);
    assert_eq!(forward_backward(&[0.0; 4], head, labels, &mut nll, &mut dx, None, &mut scratch), Err(error));
    assert_eq!((nll, dx), ([7.0; 2], [7.0; 4]));
}

#[test]
fn great_logits_keep_the_loss_finite_and_nan_is_seen() {
    let head = f32_head(&[1.0, -1.0, 0.5], 3, 1);
    let (mut nll, mut scratch) = ([0.0; 3], vec![0.0; scratch_len(3, 3, 1)]);
    let loss = forward(&[1e4, -1e4, f32::NAN], head, &[0, 0, 0], &mut nll, &mut scratch).expect("good targets");
    assert_eq!(nll[..2], [0.0, 2e4]);
    assert!(nll[2].is_nan() && loss.sum.is_nan());
}

#[test]
fn sampled_labels_follow_the_softmax_and_the_generator_alone() {
    // Probabilities 1/2, 1/4, 1/4 in every row, so that dl sums to (count of label j) - N p_j, up to sign.
    const ROWS: usize = 20_000;
    let weight = [2.0f32.ln(), 0.0, 0.0];
    let head = f32_head(&weight, 3, 1);
    let x = vec![1.0f32; ROWS];
    let mask: Vec<u32> = (0..ROWS as u32).map(|r| if r % 4 == 1 { IGNORE } else { 0 }).collect();
    let run = || {
        let mut stream = generator(5, Stream::SampledLabels);
        let (mut nll, mut dx, mut dhead) = (vec![0.0; ROWS], vec![0.0; ROWS], vec![0.0; 3]);
        let mut scratch = vec![0.0; scratch_len(ROWS, 3, 1)];
        let labels = Labels::Sampled { mask: &mask, generator: &mut stream };
        let gradient = Some(Gradient::overwrite(&mut dhead));
        let loss = forward_backward(&x, head, labels, &mut nll, &mut dx, gradient, &mut scratch).expect("no targets");
        assert_eq!(stream.get_word_pos(), 15_000, "one draw a row that takes part");
        (loss, nll, dhead)
    };
    let (loss, nll, dhead) = run();
    assert_eq!(loss.count, 15_000);
    for (j, p) in [0.5, 0.25, 0.25].into_iter().enumerate() {
        // Standard deviation of a count: sqrt(15,000 p (1 - p)) < 62.
        assert!(dhead[j].abs() < 250.0, "label {j} with p = {p}: {}", dhead[j]);
    }
    assert!(nll.iter().zip(&mask).all(|(nll, &m)| match m {
        IGNORE => *nll == 0.0,
        _ => (nll - 2.0f64.ln()).abs() < 1e-6 || (nll - 4.0f64.ln()).abs() < 1e-6,
    }));
    assert_eq!(run().1, nll, "the same stream draws the same labels");
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    assert_same_bits_for_any_threads(|| {
        let (loss, nll, [dx, dhead]) = run(300, 5_003, 24, Into::Accumulate);
        let bits = |value: f64| [(value.to_bits() >> 32) as u32, value.to_bits() as u32].map(f32::from_bits);
        let losses = nll.into_iter().chain([loss.sum]).flat_map(bits).collect();
        [losses, dx, dhead].concat()
    });
}

#[test]
fn the_references_gradients_are_those_of_finite_differences() {
    let (x, head, targets) = problem(5, 6, 3);
    let (x, head) = (to_f64(&x), to_f64(&head));
    let loss = |x: &[f64], head: &[f64]| reference::forward_backward(x, head, 3, &targets).0.iter().sum();
    let (_, dx, dhead) = reference::forward_backward(&x, &head, 3, &targets);
    assert_same_gradient("dx", &dx, &differences(&x, |x| loss(x, &head)));
    assert_same_gradient("dhead", &dhead, &differences(&head, |head| loss(&x, head)));
}

#[test]
fn slopes_in_bf16_take_the_front_of_their_row_and_are_those_in_f32_rounded_once() {
    for len in [1, 2, 15, 16, 17, 32, 33, 1000, 50_257] {
        let mut row = crate::ops::testing::normal(1, len);
        row[len / 2] = f32::NAN;
        row[len - 1] = f32::INFINITY;
        let expected: Vec<u16> = row.iter().map(|&x| bf16::from_f32(0.37 * x).to_bits()).collect();
        at_every_level(|level| {
            let mut row = row.clone();
            scale_to_front(level, &mut row, 0.37);
            let front: &[bf16] = &bytemuck::cast_slice(&row)[..len];
            assert!(front.iter().map(|x| x.to_bits()).eq(expected.iter().copied()), "{len} {level:?}");
        });
    }
}

#[test]
fn in_bf16_the_loss_is_that_of_rounded_operands_and_the_gradients_round_only_the_slopes_further() {
    let (rows, vocabulary, width) = (40, 517, 48);
    let (x, weight, targets) = problem(rows, vocabulary, width);
    // Logits of about 1, as at the start of training: so the slopes are many and small.
    let weight: Vec<f32> = weight.iter().map(|w| w * 0.15).collect();
    let stored: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
    let rounded = |v: &[f32]| v.iter().map(|&v| f64::from(bf16::from_f32(v))).collect::<Vec<_>>();
    let (nll, dx, dhead) = reference::forward_backward(&rounded(&x), &rounded(&weight), width, &targets);
    let (exact, ..) = reference::forward_backward(&to_f64(&x), &to_f64(&weight), width, &targets);
    for weight in [weight[..].into(), stored[..].into()] {
        let head = Head { weight, vocabulary, width, precision: Precision::Bf16 };
        let (mut nll_out, mut scratch) = (vec![7.0; rows], vec![f32::NAN; scratch_len(rows, vocabulary, width)]);
        let (mut dx_out, mut dhead_out) = (vec![7.0; x.len()], vec![7.0; weight.len()]);
        let (labels, gradient) = (Labels::Given(&targets), Some(Gradient::overwrite(&mut dhead_out)));
        let loss = forward_backward(&x, head, labels, &mut nll_out, &mut dx_out, gradient, &mut scratch);
        let loss = loss.expect("good targets");
        assert!(nll_out.iter().zip(&nll).all(|(a, e)| (a - e).abs() < 4e-6), "{nll_out:?}, not {nll:?}");
        // Each slope is off by at most 2^-9 of itself; the greatest, of the target, is nearly 1.
        assert_close("dx", &dx_out, &dx, 2e-3);
        assert_close("dhead", &dhead_out, &dhead, 4e-3);
        let in_f32: f64 = exact.iter().sum();
        assert!((loss.sum - in_f32).abs() < 1e-3 * in_f32, "{} in bf16, {in_f32} in f64", loss.sum);
    }
}
