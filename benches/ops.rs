//! Milliseconds of each operation at the shapes of one GPT-2 124M training step, 1,024 tokens: `cargo bench --bench ops`.
//!
//! A step's time is "ms a call" times "calls a step". Arguments: `--tokens 1024 --sequence 256` change the shape, a
//! word picks the operations whose name contains it.

use std::time::Instant;
use vrtrain::ops::attention::{InputGradients, Inputs, Saved, Shape};
use vrtrain::ops::cross_entropy::{Head, Labels};
use vrtrain::ops::embedding::Positions;
use vrtrain::ops::linear::{Dims, Orientation, Weight};
use vrtrain::ops::{Gradient, activation, attention, cross_entropy, embedding, layer_norm, linear, rms_norm, rotary};
use vrtrain::random::{Stream, fill_normal, generator};

const LAYERS: usize = 12;
const WIDTH: usize = 768;
const HEADS: usize = 12;
const VOCABULARY: usize = 50_257;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |flag: &str, default: usize| {
        let at = arguments.iter().position(|a| a == flag);
        at.and_then(|at| arguments.get(at + 1)).and_then(|a| a.parse().ok()).unwrap_or(default)
    };
    let (tokens, sequence) = (number("--tokens", 1024), number("--sequence", 256));
    let words = arguments.iter().filter(|a| !a.starts_with("--") && a.parse::<usize>().is_err());
    let report = Report { words: words.cloned().collect() };
    println!("{tokens} tokens in sequences of {sequence}, {} threads", rayon::current_num_threads());
    rayon::scope(|_| {
        rows(&report, tokens);
        linears(&report, tokens);
        attentions(&report, tokens, sequence);
        ends(&report, tokens, sequence);
    });
}

struct Report {
    words: Vec<String>,
}

impl Report {
    /// Best and median of up to 15 calls within a second, after one to warm up.
    fn measure(&self, name: &str, calls_a_step: usize, flops: f64, mut call: impl FnMut()) {
        if !self.words.is_empty() && !self.words.iter().any(|word| name.contains(word.as_str())) {
            return;
        }
        call();
        let begin = Instant::now();
        let mut times = Vec::new();
        while times.len() < 3 || (times.len() < 15 && begin.elapsed().as_secs_f64() < 1.0) {
            let start = Instant::now();
            call();
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        let step = median * calls_a_step as f64;
        print!("{name:32} best {best:8.3} ms  median {median:8.3} ms  x{calls_a_step:<3} = {step:7.1} ms a step");
        println!("{}", if flops > 0.0 { format!("  {:4.0} GFLOP/s", flops / best / 1e6) } else { String::new() });
    }
}

fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill_normal(&mut generator(seed, Stream::Init), 0.5, &mut values);
    values
}

fn rows(report: &Report, rows: usize) {
    let (x, dy, weight, bias) = (normal(1, rows * WIDTH), normal(2, rows * WIDTH), normal(3, WIDTH), normal(4, WIDTH));
    let (mut y, mut mean, mut rstd) = (x.clone(), vec![0.0; rows], vec![0.0; rows]);
    let (mut dweight, mut dbias) = (weight.clone(), bias.clone());
    let mut scratch = vec![0.0; layer_norm::scratch_len(rows, WIDTH)];
    report.measure("layer_norm", 2 * LAYERS + 1, 0.0, || {
        layer_norm::forward(&x, &weight, &bias, 1e-5, &mut y, &mut mean, &mut rstd);
    });
    report.measure("layer_norm backward", 2 * LAYERS + 1, 0.0, || {
        let saved = layer_norm::Saved { x: &x, weight: &weight, mean: &mean, rstd: &rstd };
        let (dx, dweight) = (Gradient::accumulate(&mut y), Gradient::overwrite(&mut dweight));
        layer_norm::backward(saved, &dy, dx, dweight, Gradient::overwrite(&mut dbias), &mut scratch);
    });
    report.measure("rms_norm (LLaMA)", 0, 0.0, || rms_norm::forward(&x, &weight, 1e-5, &mut y, &mut rstd));
    report.measure("rms_norm backward (LLaMA)", 0, 0.0, || {
        let saved = rms_norm::Saved { x: &x, weight: &weight, rstd: &rstd };
        rms_norm::backward(saved, &dy, Gradient::accumulate(&mut y), Gradient::overwrite(&mut dweight), &mut scratch);
    });

    let (x, mut dy) = (normal(1, rows * 4 * WIDTH), normal(2, rows * 4 * WIDTH));
    let (mut y, mut second) = (x.clone(), x.clone());
    report.measure("gelu", LAYERS, 0.0, || activation::gelu(&x, &mut y));
    report.measure("gelu backward", LAYERS, 0.0, || activation::gelu_backward(&x, &mut dy));
    report.measure("swiglu (LLaMA)", 0, 0.0, || activation::swiglu(&x, &dy, &mut y));
    report.measure("swiglu backward (LLaMA)", 0, 0.0, || activation::swiglu_backward(&x, &x, &dy, &mut y, &mut second));
    let table = rotary::Table::new(10_000.0, 64, rows, rotary::Scaling::None);
    let positions: Vec<u32> = (0..rows as u32).collect();
    report.measure("rotary, q alone (LLaMA)", 0, 0.0, || {
        rotary::rotate(&table, rotary::Direction::Forward, &positions, &mut y[..rows * WIDTH]);
    });
}

fn linears(report: &Report, rows: usize) {
    let shapes = [
        ("qkv", WIDTH, 3 * WIDTH),
        ("attn.c_proj", WIDTH, WIDTH),
        ("c_fc", WIDTH, 4 * WIDTH),
        ("mlp.c_proj", 4 * WIDTH, WIDTH),
    ];
    for (name, inputs, outputs) in shapes {
        let dims = Dims { inputs, outputs, orientation: Orientation::InOut };
        let (data, bias) = (normal(1, inputs * outputs), normal(2, outputs));
        let (x, dy) = (normal(3, rows * inputs), normal(4, rows * outputs));
        let (mut y, mut dx, mut dweight, mut dbias) = (dy.clone(), x.clone(), data.clone(), bias.clone());
        let weight = Weight { data: &data, dims };
        let flops = 2.0 * (rows * inputs * outputs) as f64;
        let residual = (name.contains("proj")).then_some(&dy[..]);
        report.measure(&format!("linear {name}"), LAYERS, flops, || {
            linear::forward(&x, weight, Some(&bias), residual, &mut y);
        });
        report.measure(&format!("linear {name} dx"), LAYERS, flops, || {
            linear::backward_input(&dy, weight, Gradient::overwrite(&mut dx));
        });
        report.measure(&format!("linear {name} dw + db"), LAYERS, flops, || {
            let gradients = (Gradient::accumulate(&mut dweight), Gradient::accumulate(&mut dbias));
            linear::backward_weight(&x, &dy, dims, gradients.0, Some(gradients.1));
        });
    }
}

fn attentions(report: &Report, rows: usize, sequence: usize) {
    let shape = Shape { batch: rows / sequence, sequence, heads: HEADS, kv_heads: HEADS, head_dim: WIDTH / HEADS };
    let (qkv, dy) = (normal(1, rows * 3 * WIDTH), normal(2, rows * WIDTH));
    let (mut y, mut log_sum_exp, mut dqkv) = (dy.clone(), vec![0.0; rows * HEADS], qkv.clone());
    let mut scratch = vec![0.0; attention::scratch_len(shape)];
    // Two products of 2 T^2/2 C operations a sequence forward, five backward.
    let product = (rows * sequence * WIDTH) as f64;
    report.measure("attention", LAYERS, 2.0 * product, || {
        attention::forward(shape, shape.scale(), Inputs::Fused(&qkv), &mut y, &mut log_sum_exp, &mut scratch);
    });
    report.measure("attention backward", LAYERS, 5.0 * product, || {
        let saved = Saved { inputs: Inputs::Fused(&qkv), y: &y, log_sum_exp: &log_sum_exp };
        attention::backward(shape, shape.scale(), saved, &dy, InputGradients::Fused(&mut dqkv), &mut scratch);
    });
    let lengths = vec![sequence; 4];
    let cache_len = 4 * sequence * WIDTH;
    if qkv.len() >= 2 * cache_len {
        let cache = attention::Cache {
            keys: &qkv[..cache_len],
            values: &qkv[cache_len..2 * cache_len],
            capacity: sequence,
            lengths: &lengths,
        };
        let shape = Shape { batch: 4, ..shape };
        report.measure("attention decode, 4 sequences", 0, 0.0, || {
            let scratch = &mut scratch[..attention::decode_scratch_len(sequence)];
            attention::decode(shape, shape.scale(), &dy[..4 * WIDTH], cache, &mut y[..4 * WIDTH], scratch);
        });
    }
}

fn ends(report: &Report, rows: usize, sequence: usize) {
    let ids: Vec<u32> = (0..rows).map(|r| (r * r * 97 % VOCABULARY) as u32).collect();
    let (weight, table, x) = (normal(1, VOCABULARY * WIDTH), normal(2, 1024 * WIDTH), normal(3, rows * WIDTH));
    let (mut y, mut dweight, mut dtable) = (x.clone(), weight.clone(), table.clone());
    report.measure("embedding", 1, 0.0, || {
        let positions = Positions { table: &table, sequence, first: 0 };
        embedding::forward(&ids, &weight, Some(positions), WIDTH, &mut y).expect("ids inside the vocabulary");
    });
    report.measure("embedding backward", 1, 0.0, || {
        embedding::backward(&ids, &x, WIDTH, Gradient::accumulate(&mut dweight)).expect("ids inside the vocabulary");
        embedding::backward_positions(&x, WIDTH, sequence, Gradient::accumulate(&mut dtable));
    });
    let head = Head { weight: &weight, vocabulary: VOCABULARY, width: WIDTH };
    let mut scratch = vec![0.0; cross_entropy::scratch_len(rows, VOCABULARY)];
    let (mut nll, mut dx) = (vec![0.0f64; rows], x.clone());
    let product = 2.0 * (rows * VOCABULARY * WIDTH) as f64;
    report.measure("cross_entropy forward alone", 0, product, || {
        cross_entropy::forward(&x, head, &ids, &mut nll, &mut scratch).expect("targets inside the vocabulary");
    });
    report.measure("cross_entropy", 1, 3.0 * product, || {
        let (labels, gradient) = (Labels::Given(&ids), Some(Gradient::overwrite(&mut dweight)));
        cross_entropy::forward_backward(&x, head, labels, &mut nll, &mut dx, gradient, &mut scratch)
            .expect("targets inside the vocabulary");
    });
}
