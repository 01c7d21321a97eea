//! GFLOP/s of every matrix product in a training step of GPT-2 124M at 1,024 tokens, beside this machine's peak.
//!
//!     cargo bench --bench products [-- ROUNDS [ROWS [WIDTH]]]
//!
//! Each round times every kernel once on every product, so that all see the same noise; the fastest and the median
//! round are printed. WIDTH below 768 stands for a model of that width with 6 layers and 8,192 token ids.

use half::bf16;
use std::time::Instant;
use vrtrain::ops::product::{Instructions, Into, Matrix, Operand, Precision, Size, Threads, multiply_with};

/// Which product of a linear layer y [rows, outputs] = x [rows, inputs] W.
#[derive(Clone, Copy, Debug)]
enum Pass {
    /// y = x W
    Forward,
    /// dx = dy W^T
    Input,
    /// dW = x^T dy, or its transpose where W is stored so.
    Weight,
}

struct Layer {
    name: &'static str,
    inputs: usize,
    outputs: usize,
    /// W is stored [inputs, outputs] as in GPT-2, or [outputs, inputs] as its token table.
    in_out: bool,
    /// How often a step has it.
    count: usize,
}

const PASSES: [Pass; 3] = [Pass::Forward, Pass::Input, Pass::Weight];

/// Kernels compared: name, our instructions (none: the gemm crate), precision, operands stored as bf16.
type Contestant = (&'static str, Option<Instructions>, Precision, bool);

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse::<usize>().ok());
    let rounds = numbers.next().unwrap_or(3);
    let rows = numbers.next().unwrap_or(1024);
    let width = numbers.next().unwrap_or(768);
    let (blocks, vocabulary) = if width < 768 { (6, 8192) } else { (12, 50_257) };
    let layer = |name, inputs, outputs, in_out, count| Layer { name, inputs, outputs, in_out, count };
    let layers = [
        layer("fc", width, 4 * width, true, blocks),
        layer("qkv", width, 3 * width, true, blocks),
        layer("proj", width, width, true, blocks),
        layer("fcproj", 4 * width, width, true, blocks),
        layer("head", width, vocabulary, false, 1),
    ];
    let best = Instructions::best();
    let contestants: [Contestant; 4] = [
        ("gemm crate", None, Precision::F32, false),
        ("f32", Some(best), Precision::F32, false),
        ("bf16", Some(best), Precision::Bf16, false),
        ("bf16 stored", Some(best), Precision::Bf16, true),
    ];
    let peaks = peaks();
    println!(
        "{best:?}, {} threads; peak GFLOP/s: f32 {:.0}, bf16 {:.0}",
        rayon::current_num_threads(),
        peaks.0,
        peaks.1
    );
    let mut sums = [(0.0, 0.0); 4];
    let mut operations = 0.0;
    for layer in &layers {
        let x = fill(rows * layer.inputs, 1);
        let weight = fill(layer.inputs * layer.outputs, 2);
        let dy = fill(rows * layer.outputs, 3);
        let stored = [&x, &weight, &dy].map(|numbers| numbers.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        for pass in PASSES {
            let flops = 2.0 * (rows * layer.inputs * layer.outputs) as f64;
            operations += flops * layer.count as f64;
            let mut times = [const { Vec::new() }; 4];
            let mut c = vec![0.0f32; rows.max(layer.inputs.max(layer.outputs)) * layer.outputs.max(layer.inputs)];
            for round in 0..=rounds {
                for (contestant, times) in contestants.iter().zip(&mut times) {
                    let operands = if contestant.3 {
                        let [x, weight, dy] = &stored;
                        operands(layer, pass, rows, [x, weight, dy], Matrix::Bf16)
                    } else {
                        operands(layer, pass, rows, [&x, &weight, &dy], Matrix::F32)
                    };
                    let start = Instant::now();
                    run(contestant, operands, &mut c);
                    // The first round only warms up.
                    if round > 0 {
                        times.push(start.elapsed().as_secs_f64());
                    }
                }
            }
            print!("{:7} {:8}", layer.name, format!("{pass:?}"));
            for ((contestant, times), sum) in contestants.iter().zip(&mut times).zip(&mut sums) {
                times.sort_by(f64::total_cmp);
                let (fastest, median) = (times[0], times[times.len() / 2]);
                sum.0 += fastest * layer.count as f64;
                sum.1 += median * layer.count as f64;
                print!("  {} {:4.0} ({:4.0})", contestant.0, flops / fastest / 1e9, flops / median / 1e9);
            }
            println!();
        }
    }
    for (contestant, sum) in contestants.iter().zip(sums) {
        let peak = if contestant.2 == Precision::F32 { peaks.0 } else { peaks.1 };
        println!(
            "{:12} all products of a step: fastest {:6.1} ms ({:.1}% of peak), median {:6.1} ms",
            contestant.0,
            sum.0 * 1e3,
            operations / sum.0 / peak / 1e7,
            sum.1 * 1e3
        );
    }
}

/// Sizes and operands of one product from x, W and dy.
fn operands<'a, N>(
    layer: &Layer,
    pass: Pass,
    rows: usize,
    [x, weight, dy]: [&'a [N]; 3],
    matrix: impl Fn(Operand<'a, N>) -> Matrix<'a>,
) -> (Size, Matrix<'a>, Matrix<'a>) {
    let Layer { inputs, outputs, in_out, .. } = *layer;
    let x = Operand::row_major(x, inputs);
    let dy = Operand::row_major(dy, outputs);
    let weight =
        if in_out { Operand::row_major(weight, outputs) } else { Operand::row_major(weight, inputs).transposed() };
    let (m, k, n, a, b) = match pass {
        Pass::Forward => (rows, inputs, outputs, x, weight),
        Pass::Input => (rows, outputs, inputs, dy, weight.transposed()),
        Pass::Weight if in_out => (inputs, rows, outputs, x.transposed(), dy),
        Pass::Weight => (outputs, rows, inputs, dy.transposed(), x),
    };
    (Size { m, k, n }, matrix(a), matrix(b))
}

fn run(contestant: &Contestant, (size, a, b): (Size, Matrix, Matrix), c: &mut [f32]) {
    let (_, instructions, precision, _) = *contestant;
    match (instructions, a, b) {
        (Some(instructions), a, b) => {
            multiply_with(instructions, precision, Threads::All, size, a, b, 1.0, c, size.n, Into::Overwrite);
        }
        (None, Matrix::F32(a), Matrix::F32(b)) => gemm_crate(size, a, b, c),
        (None, ..) => unreachable!("the gemm crate runs on f32 operands"),
    }
}

fn gemm_crate(Size { m, k, n }: Size, a: Operand, b: Operand, c: &mut [f32]) {
    assert!(a.data.len() >= m * k && b.data.len() >= k * n && c.len() >= m * n);
    let parallelism = gemm::Parallelism::Rayon(rayon::current_num_threads());
    let (a_strides, b_strides) = ([a.column_stride, a.row_stride], [b.column_stride, b.row_stride]);
    let [[a_columns, a_rows], [b_columns, b_rows]] = [a_strides, b_strides].map(|s| s.map(|stride| stride as isize));
    let (c, a, b) = (c.as_mut_ptr(), a.data.as_ptr(), b.data.as_ptr());
    // SAFETY: the operands are contiguous matrices of these sizes, as asserted.
    unsafe {
        let row = n as isize;
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            row,
            false,
            a,
            a_columns,
            a_rows,
            b,
            b_columns,
            b_rows,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `count` numbers in [-0.5, 0.5) from a linear congruential generator.
fn fill(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// The most GFLOP/s that all threads together reach in f32 and bf16, with everything in registers: best of five.
fn peaks() -> (f64, f64) {
    const STEPS: usize = 4_000_000;
    let measure = |loop_flops: fn(usize) -> f64| {
        let rate = || {
            let start = Instant::now();
            let flops: f64 = rayon::broadcast(|_| loop_flops(STEPS)).iter().sum();
            flops / start.elapsed().as_secs_f64() / 1e9
        };
        (0..5).map(|_| rate()).fold(0.0, f64::max)
    };
    #[cfg(target_arch = "x86_64")]
    match Instructions::best() {
        // SAFETY (all): the instructions are there.
        Instructions::Avx512Bf16 => {
            return (measure(|n| unsafe { peak::avx512(n) }), measure(|n| unsafe { peak::avx512_bf16(n) }));
        }
        Instructions::Avx512 => return [measure(|n| unsafe { peak::avx512(n) }); 2].into(),
        Instructions::Avx2 => return [measure(|n| unsafe { peak::avx2(n) }); 2].into(),
        Instructions::Portable => {}
    }
    // Nothing to compare with: every share of the peak is printed as 0.
    let _ = measure;
    (f64::INFINITY, f64::INFINITY)
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// More sums in flight than a multiply-add takes cycles on two units.
    const SUMS: usize = 12;

    macro_rules! peak {
        ($name:ident, $features:literal, $zero:expr, $flops:literal, $step:expr) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name(steps: usize) -> f64 {
                let mut sums = [$zero; SUMS];
                for _ in 0..steps {
                    for sum in &mut sums {
                        *sum = $step(*sum);
                    }
                }
                black_box(sums);
                (steps * SUMS * $flops) as f64
            }
        };
    }

    peak!(avx512, "avx512f", _mm512_setzero_ps(), 32, |sum| {
        _mm512_fmadd_ps(sum, _mm512_set1_ps(0.9999), _mm512_set1_ps(1e-4))
    });
    peak!(avx2, "avx2,fma", _mm256_setzero_ps(), 16, |sum| {
        _mm256_fmadd_ps(sum, _mm256_set1_ps(0.9999), _mm256_set1_ps(1e-4))
    });
    peak!(avx512_bf16, "avx512f,avx512bf16", _mm512_setzero_ps(), 64, |sum| {
        // 32 times 1.0 and 0.0078125.
        let (one, small) = (_mm512_set1_epi32(0x3f80_3f80), _mm512_set1_epi32(0x3c00_3c00));
        // SAFETY: the same bits under another name.
        let [one, small] = [one, small].map(|bits| unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) });
        _mm512_dpbf16_ps(sum, one, small)
    });
}
