//! Products against their definition in f64: every instruction set, precision, layout and number of threads.

use super::*;
use crate::ops::testing::normal;
use crate::random::{Stream, generator, uniform};

/// A [k, n] operand lying by rows, or by columns.
fn lie(numbers: Numbers<'_>, transposed: bool, k: usize, n: usize) -> Matrix<'_> {
    if transposed { numbers.row_major(k).transposed() } else { numbers.row_major(n) }
}

#[test]
fn operands_in_f16_and_nf4_give_the_bits_of_their_widened_numbers_in_both_orientations() {
    // Sizes with parts of panels, blocks of NF4 across rows, and more than one block of the depth.
    for (m, k, n) in [(1, 64, 64), (5, 70, 33), (40, 1700, 130), (200, 130, 50)] {
        let x = numbers(m * k, 6);
        let a = Matrix::F32(Operand::row_major(&x, k));
        let half: Vec<f16> = numbers(k * n, 7).into_iter().map(f16::from_f32).collect();
        let half_wide: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
        let four = crate::ops::nf4::quantize(&half_wide);
        let mut four_wide = vec![0.0; k * n];
        crate::ops::nf4::dequantize(crate::ops::simd::Level::current(), &four, 0, &mut four_wide);
        let stored = [(Numbers::F16(&half), &half_wide), (Numbers::Nf4(&four), &four_wide)];
        for (narrow, wide) in stored {
            for transposed in [false, true] {
                for precision in [Precision::F32, Precision::Bf16] {
                    for instructions in Instructions::available() {
                        let product = |b: Matrix, threads: Threads| {
                            let (size, mut c) = (Size { m, k, n }, vec![0.5f32; m * n]);
                            multiply_with(
                                instructions,
                                precision,
                                threads,
                                size,
                                a,
                                b,
                                1.0,
                                &mut c,
                                n,
                                Into::Accumulate,
                            );
                            c
                        };
                        let expected = product(lie(Numbers::F32(wide), transposed, k, n), Threads::One);
                        let case = format!("{instructions:?} {precision:?} {m} {k} {n} {transposed}");
                        assert!(product(lie(narrow, transposed, k, n), Threads::One) == expected, "{case}");
                        assert!(
                            product(lie(narrow, transposed, k, n), Threads::All) == expected,
                            "{case}, all threads"
                        );
                    }
                }
            }
        }
    }
}

/// The definition, in f64.
fn reference(size: Size, a: Operand, b: Operand, scale: f32, c: &mut [f32], stride: usize, into: Into) {
    for i in 0..size.m {
        for j in 0..size.n {
            let at = |o: &Operand, r: usize, s: usize| f64::from(o.data[r * o.row_stride + s * o.column_stride]);
            let sum: f64 = (0..size.k).map(|p| at(&a, i, p) * at(&b, p, j)).sum();
            let old = if into == Into::Accumulate { f64::from(c[i * stride + j]) } else { 0.0 };
            c[i * stride + j] = (old + f64::from(scale) * sum) as f32;
        }
    }
}

/// `count` numbers in [-0.5, 0.5).
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut generator = generator(seed, Stream::Init);
    (0..count).map(|_| uniform(&mut generator) - 0.5).collect()
}

fn round(numbers: &[f32]) -> Vec<bf16> {
    numbers.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn widen(numbers: &[bf16]) -> Vec<f32> {
    numbers.iter().map(|x| x.to_f32()).collect()
}

/// A [rows, columns] operand lying in `data` by rows, by columns or with gaps in both directions.
fn laid_out<N>(data: &[N], layout: usize, rows: usize, columns: usize) -> Operand<'_, N> {
    match layout {
        0 => Operand::row_major(data, columns),
        1 => Operand::row_major(data, rows).transposed(),
        _ => Operand { data, row_stride: 2 * columns + 1, column_stride: 2 },
    }
}

#[test]
fn every_instruction_set_and_precision_and_layout_gives_the_products_of_the_rounded_operands() {
    let (x, y) = (numbers(150_000, 1), numbers(150_000, 2));
    let (x16, y16) = (round(&x), round(&y));
    let (x_rounded, y_rounded) = (widen(&x16), widen(&y16));
    let sizes = [(1, 1, 1), (8, 16, 48), (9, 17, 49), (7, 1, 16), (3, 700, 33), (33, 1100, 5), (64, 128, 100)];
    for (m, k, n) in sizes {
        let size = Size { m, k, n };
        for (la, lb) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2)] {
            for precision in [Precision::F32, Precision::Bf16] {
                let stored = [false, true].map(|sixteen| match precision {
                    Precision::F32 if !sixteen => (&x, &y),
                    _ => (&x_rounded, &y_rounded),
                });
                for (sixteen, (x_used, y_used)) in [false, true].into_iter().zip(stored) {
                    let (scale, into) = if sixteen { (1.0, Into::Overwrite) } else { (0.7, Into::Accumulate) };
                    let mut expected = vec![0.25f32; m * (n + 3)];
                    let a = laid_out(x_used, la, m, k);
                    let b = laid_out(y_used, lb, k, n);
                    reference(size, a, b, scale, &mut expected, n + 3, into);
                    let (a, b) = if sixteen {
                        (Matrix::Bf16(laid_out(&x16, la, m, k)), Matrix::Bf16(laid_out(&y16, lb, k, n)))
                    } else {
                        (Matrix::F32(laid_out(&x, la, m, k)), Matrix::F32(laid_out(&y, lb, k, n)))
                    };
                    for instructions in Instructions::available() {
                        let mut c = vec![0.25f32; m * (n + 3)];
                        multiply_with(instructions, precision, Threads::All, size, a, b, scale, &mut c, n + 3, into);
                        let worst = c.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                        let case = format!("{instructions:?} {precision:?} {size:?} {la}{lb} {sixteen}");
                        assert!(worst < 2e-7 * (k as f32).sqrt() + 1e-6, "{case}: {worst}");
                    }
                }
            }
        }
    }
}

#[test]
fn results_are_the_same_bits_for_any_number_of_threads() -> anyhow::Result<()> {
    // Deeper than one block, with both operands as the shared one.
    for (m, k, n) in [(300, 2100, 130), (100, 2100, 500), (1000, 64, 24)] {
        let (x, y) = (numbers(m * k, 3), numbers(k * n, 4));
        let (a, b) = (Operand::row_major(&x, k), Operand::row_major(&y, n));
        for precision in [Precision::F32, Precision::Bf16] {
            for instructions in Instructions::available() {
                let run = |threads: Threads| {
                    let mut c = vec![1.0f32; m * n];
                    let (a, b) = (a.into(), b.into());
                    let size = Size { m, k, n };
                    multiply_with(instructions, precision, threads, size, a, b, 1.0, &mut c, n, Into::Accumulate);
                    c
                };
                let alone = run(Threads::One);
                for count in [2, 3, 8] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build()?;
                    let together = pool.install(|| run(Threads::All));
                    assert!(alone == together, "{instructions:?} {precision:?} {m} {k} {n} on {count} threads");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_f32_product_is_right_and_the_same_bits_for_any_number_of_threads_on_both_sides_of_the_choice_of_kernel()
-> anyhow::Result<()> {
    for (m, k, n) in [(128, 1024, 1100), (127, 1024, 300), (256, 640, 256)] {
        let (x, y) = (numbers(m * k, 3), numbers(k * n, 4));
        let (a, b) = (Operand::row_major(&x, m).transposed(), Operand::row_major(&y, k).transposed());
        let size = Size { m, k, n };
        let run = |threads: Threads| {
            let mut c = vec![1.0f32; m * n];
            multiply(threads, size, a, b, 0.5, &mut c, n, Into::Accumulate);
            c
        };
        let alone = run(Threads::One);
        let mut expected = vec![1.0f32; m * n];
        reference(size, a, b, 0.5, &mut expected, n, Into::Accumulate);
        let worst = alone.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "{size:?}: {worst}");
        for count in [2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build()?;
            assert!(alone == pool.install(|| run(Threads::All)), "{size:?} on {count} threads");
        }
    }
    Ok(())
}

#[test]
fn not_a_number_and_infinity_reach_exactly_their_row_and_column() {
    let (m, k, n) = (20, 40, 60);
    let (mut x, mut y) = (vec![1.0f32; m * k], vec![1.0f32; k * n]);
    x[3 * k + 39] = f32::NAN;
    // All bits set: rounding by adding would carry into the sign and leave a zero.
    x[5 * k] = f32::from_bits(0x7fff_ffff);
    x[7 * k + 1] = f32::INFINITY;
    // Beyond bf16's largest number.
    x[8 * k + 2] = f32::MAX;
    y[4 * n + 11] = f32::NEG_INFINITY;
    for instructions in Instructions::available() {
        for (a, b) in [
            (Operand::row_major(&x, k), Operand::row_major(&y, n)),
            (Operand::row_major(&x, m).transposed(), Operand::row_major(&y, k).transposed()),
        ] {
            // The second pair reads the same numbers as other matrices: the definition tells what belongs where.
            let rounded = |o: &Operand, i: usize, j: usize| {
                bf16::from_f32(o.data[i * o.row_stride + j * o.column_stride]).to_f32()
            };
            let mut c = vec![0.0f32; m * n];
            let size = Size { m, k, n };
            let (precision, threads) = (Precision::Bf16, Threads::One);
            multiply_with(instructions, precision, threads, size, a.into(), b.into(), 1.0, &mut c, n, Into::Overwrite);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let expected: f32 = (0..k).map(|p| rounded(&a, i, p) * rounded(&b, p, j)).sum();
                let found = c[i * n + j];
                let same = found == expected || (found.is_nan() && expected.is_nan());
                assert!(same, "{instructions:?} at {i}, {j}: {found}, not {expected}");
            }
        }
    }
}

#[allow(clippy::excessive_precision, reason = "binary fractions, written out")]
#[test]
fn operands_round_to_the_nearest_bf16_and_ties_to_the_even_one() {
    // 1 + 2^-8 lies half way between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    let cases = [(1.00390625f32, 1.0f32), (1.01171875, 1.015625), (1.00390637, 1.0078125), (-1.00390625, -1.0)];
    for instructions in Instructions::available() {
        for (from, to) in cases {
            for lines in [1usize, 16] {
                let (x, y) = (vec![from; lines * 16], vec![1.0f32; 16 * lines]);
                let (a, b) = (Operand::row_major(&x, 16), Operand::row_major(&y, lines));
                let size = Size { m: lines, k: 16, n: lines };
                let mut c = vec![0.0f32; lines * lines];
                let (precision, threads) = (Precision::Bf16, Threads::One);
                let (a, b) = (a.into(), b.into());
                multiply_with(instructions, precision, threads, size, a, b, 1.0, &mut c, lines, Into::Overwrite);
                assert!(c.iter().all(|&x| x == 16.0 * to), "{instructions:?} {from}: {c:?}");
            }
        }
    }
}

#[test]
fn products_of_odd_sizes_and_every_orientation_match_the_definition() {
    let numbers: Vec<f32> = (0..4000).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 500.0).collect();
    for (m, k, n) in [(1, 1, 1), (17, 5, 33), (31, 64, 7), (3, 0, 4), (0, 3, 2), (50, 37, 19)] {
        for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
            let operand = |t: bool, r: usize, c: usize, from: usize| {
                let data = &numbers[from..];
                if t { Operand::row_major(data, r).transposed() } else { Operand::row_major(data, c) }
            };
            let (a, b) = (operand(ta, m, k, 0), operand(tb, k, n, 1500));
            for (into, threads) in [(Into::Overwrite, Threads::One), (Into::Accumulate, Threads::All)] {
                let mut c = vec![0.5f32; m * (n + 3)];
                let mut expected = c.clone();
                let size = Size { m, k, n };
                multiply(threads, size, a, b, 0.7, &mut c, n + 3, into);
                reference(size, a, b, 0.7, &mut expected, n + 3, into);
                let worst = c.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4, "{size:?} {ta} {tb} {into:?}: {worst}");
            }
        }
    }
}

/// The first `few` rows of a product of `many` rows, and the product of those rows alone.
fn among_and_alone(
    few: usize,
    many: usize,
    k: usize,
    n: usize,
    run: impl Fn(Size, Matrix, &mut [f32]),
) -> [Vec<f32>; 2] {
    let x = numbers(many * k, 3);
    [many, few].map(|m| {
        let mut c = vec![1.0f32; m * n];
        run(Size { m, k, n }, Operand::row_major(&x[..m * k], k).into(), &mut c);
        c.truncate(few * n);
        c
    })
}

#[test]
fn a_row_has_the_same_bits_among_any_number_of_others_in_our_kernels_with_every_instruction_set() {
    // Blocks of the depth that are whole, cut and several; the narrower operand is A, and B.
    for (k, n) in [(64, 192), (576, 576), (1601, 130), (2100, 40)] {
        let y = numbers(k * n, 4);
        let rounded = round(&y);
        for (few, many) in [(1, 33), (5, 300), (33, 34), (33, 1024), (130, 570)] {
            for (instructions, transposed) in Instructions::available().flat_map(|i| [(i, false), (i, true)]) {
                for (precision, y) in [
                    (Precision::F32, Numbers::F32(&y)),
                    (Precision::Bf16, Numbers::F32(&y)),
                    (Precision::Bf16, Numbers::Bf16(&rounded)),
                ] {
                    let b = lie(y, transposed, k, n);
                    let [among, alone] = among_and_alone(few, many, k, n, |size, a, c| {
                        let all = Threads::All;
                        multiply_with(instructions, precision, all, size, a, b, 1.0, c, n, Into::Accumulate);
                    });
                    let case = format!("{instructions:?} {precision:?} {few} of {many}, {k} x {n} {transposed}");
                    assert!(among == alone, "{case}");
                    assert!(rows_keep_their_bits(Precision::Bf16, few, many, k, n), "{case}");
                }
            }
        }
    }
}

#[test]
fn a_row_of_an_f32_product_keeps_its_bits_where_that_is_said() {
    let mut kept = 0;
    // On both sides of every size at which the gemm crate or the choice of kernels changes its ways.
    for k in [2, 3, 60, 128, 255, 256, 512, 513, 576, 1536, 2100] {
        for n in [1, 2, 5, 16, 64, 65, 127, 128, 192, 576] {
            let y = numbers(k * n, 4);
            for (few, many) in
                [(1, 2), (2, 5), (7, 300), (33, 37), (33, 64), (38, 300), (64, 65), (65, 300), (130, 1024)]
            {
                if !rows_keep_their_bits(Precision::F32, few, many, k, n) {
                    continue;
                }
                kept += 1;
                for transposed in [false, true] {
                    let b = lie(Numbers::F32(&y), transposed, k, n);
                    let [among, alone] = among_and_alone(few, many, k, n, |size, a, c| {
                        multiply_in(Precision::F32, Threads::All, size, a, b, 1.0, c, n, Into::Accumulate);
                    });
                    assert!(among == alone, "{few} of {many}, {k} x {n} {transposed}");
                }
            }
        }
    }
    // About half of all cases: the rule is worth having.
    assert!(kept > 400, "{kept}");
    // What a small LLaMA's layers have, whichever kernel takes them.
    for (k, n) in [(576, 576), (576, 192), (576, 1536), (1536, 576)] {
        assert!(rows_keep_their_bits(Precision::F32, 38, 1500, k, n) || (k, n) == (576, 192), "{k} x {n}");
    }
}

#[test]
fn bias_and_residual_are_added_as_by_accumulating_onto_them() {
    // Depths of one block and of three, tiles at every edge, either operand shared.
    for (m, k, n) in [(1, 3, 5), (21, 45, 130), (130, 40, 20), (19, 2000, 97)] {
        let (a, b) = (normal(1, m * k), normal(2, k * n));
        let (a, b) = (Operand::row_major(&a[..], k), Operand::row_major(&b[..], n));
        let (bias, residual) = (normal(3, n), normal(4, m * n));
        for bias in [None, Some(&bias[..])] {
            for residual in [None, Some(&residual[..])] {
                let plus = Plus { bias, residual };
                for precision in [Precision::F32, Precision::Bf16] {
                    for instructions in Instructions::available() {
                        let (mut expected, mut found) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                        let (size, threads) = (Size { m, k, n }, Threads::All);
                        let into = plus.preset(&mut expected, n);
                        let (a, b) = (a.into(), b.into());
                        multiply_with(instructions, precision, threads, size, a, b, 1.0, &mut expected, n, into);
                        let c = ValuesMut::F32(&mut found);
                        let into = Into::Overwrite;
                        multiply_plus_with(instructions, precision, threads, size, a, b, 1.0, c, n, into, plus);
                        let [expected, found] =
                            [expected, found].map(|c| c.into_iter().map(f32::to_bits).collect::<Vec<_>>());
                        assert_eq!(expected, found, "{m} x {k} x {n} {instructions:?} {precision:?} {plus:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn results_in_bf16_are_the_rounded_results_in_f32_on_every_path() {
    // Tiles whole and cut; k = 1,600 is more than one block of the depth, and goes by way of f32.
    for (m, k, n) in [(1, 7, 1), (40, 300, 130), (67, 1100, 49), (130, 64, 48), (33, 1600, 50)] {
        let (x, y, bias, residual) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3), numbers(m * n, 4));
        let (x16, y16) = (round(&x), round(&y));
        let size = Size { m, k, n };
        let plus = [
            Plus::default(),
            Plus { bias: Some(&bias), residual: None },
            Plus { bias: None, residual: Some(&residual) },
        ];
        for (plus, precision) in plus.into_iter().flat_map(|plus| [Precision::F32, Precision::Bf16].map(|p| (plus, p)))
        {
            for (a, b) in [
                (Matrix::F32(Operand::row_major(&x, k)), Matrix::F32(Operand::row_major(&y, n))),
                (Matrix::Bf16(Operand::row_major(&x16, k)), Matrix::Bf16(Operand::row_major(&y16, n))),
            ] {
                let (mut found, mut raw) = (vec![bf16::NAN; m * n], vec![f32::NAN; m * n + 5]);
                multiply_plus_rounded(precision, size, a, b, plus, &mut found, &mut raw);
                let mut exact = vec![f32::NAN; m * n];
                multiply_plus(precision, size, a, b, plus, &mut exact);
                assert!(found == round(&exact), "{size:?} {precision:?} {plus:?}");
                for instructions in Instructions::available() {
                    if !blocks::one_block(instructions.word(precision), k) {
                        continue;
                    }
                    for threads in [Threads::One, Threads::All] {
                        let run = |c| {
                            multiply_plus_with(
                                instructions,
                                precision,
                                threads,
                                size,
                                a,
                                b,
                                0.7,
                                c,
                                n,
                                Into::Overwrite,
                                plus,
                            )
                        };
                        found.fill(bf16::NAN);
                        run(ValuesMut::Bf16(&mut found));
                        run(ValuesMut::F32(&mut exact));
                        assert!(found == round(&exact), "{size:?} {precision:?} {instructions:?} {threads:?}");
                    }
                }
            }
        }
    }
    let infinite = [f32::INFINITY, f32::NAN, 1e-40, 3.4e38];
    let mut found = [bf16::ZERO; 4];
    let (one, row) = (Operand::row_major(&[1.0f32], 1), Operand::row_major(&infinite[..], 4));
    let (size, c) = (Size { m: 1, k: 1, n: 4 }, ValuesMut::Bf16(&mut found));
    multiply_plus_with(
        Instructions::best(),
        Precision::F32,
        Threads::One,
        size,
        one.into(),
        row.into(),
        1.0,
        c,
        4,
        Into::Overwrite,
        Plus::default(),
    );
    let bits = found.map(bf16::to_bits);
    assert!(
        bits[0] == 0x7f80 && found[1].is_nan() && bits[2..] == [bf16::from_f32(1e-40).to_bits(), 0x7f80],
        "{found:?}"
    );
}
