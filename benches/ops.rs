//! Milliseconds of each operation at the shapes of one training step: `cargo bench --bench ops -- [WORD]... [--FLAG N]...`.
//!
//! A step's time is "ms a call" times "calls a step". The shapes are those of GPT-2 124M on 1,024 tokens; the flags
//! --tokens, --sequence, --width, --heads, --layers and --vocabulary change them, words pick the operations whose name
//! contains one.

use std::time::Instant;
use vrtrain::ops::attention::{InputGradients, Inputs, Saved, Shape};
use vrtrain::ops::cross_entropy::{Head, Labels};
use vrtrain::ops::embedding::Positions;
use vrtrain::ops::linear::{Dims, Orientation, Weight};
use vrtrain::ops::product::Precision;
use vrtrain::ops::{Gradient, activation, attention, cross_entropy, embedding, layer_norm, linear, rms_norm, rotary};
use vrtrain::random::{Stream, fill_normal, generator};

/// The model and the batch.
#[derive(Debug)]
struct Step {
    tokens: usize,
    sequence: usize,
    width: usize,
    heads: usize,
    layers: usize,
    vocabulary: usize,
    words: Vec<String>,
}

fn main() {
    let step = Step::parse(std::env::args().skip(1).filter(|a| a != "--bench"));
    println!("{step:?}, {} threads", rayon::current_num_threads());
    rayon::scope(|_| {
        step.rows();
        step.linears();
        step.attentions();
        step.ends();
    });
}

impl Step {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Self {
        let (tokens, sequence, width, heads, layers, vocabulary) = (1024, 256, 768, 12, 12, 50_257);
        let mut step = Self { tokens, sequence, width, heads, layers, vocabulary, words: Vec::new() };
        while let Some(argument) = arguments.next() {
            let field = match argument.as_str() {
                "--tokens" => &mut step.tokens,
                "--sequence" => &mut step.sequence,
                "--width" => &mut step.width,
                "--heads" => &mut step.heads,
                "--layers" => &mut step.layers,
                "--vocabulary" => &mut step.vocabulary,
                _ => {
                    step.words.push(argument);
                    continue;
                }
            };
            let value = arguments.next().and_then(|value| value.parse().ok());
            *field = value.unwrap_or_else(|| panic!("{argument} needs a number"));
        }
        step
    }

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
        let total = median * calls_a_step as f64;
        print!("{name:32} best {best:8.3} ms  median {median:8.3} ms  x{calls_a_step:<3} = {total:7.1} ms a step");
        println!("{}", if flops > 0.0 { format!("  {:4.0} GFLOP/s", flops / best / 1e6) } else { String::new() });
    }

    fn rows(&self) {
        let (rows, width) = (self.tokens, self.width);
        let (x, dy) = (normal(1, rows * width), normal(2, rows * width));
        let (weight, bias) = (normal(3, width), normal(4, width));
        let (mut y, mut mean, mut rstd) = (x.clone(), vec![0.0; rows], vec![0.0; rows]);
        let (mut dweight, mut dbias) = (weight.clone(), bias.clone());
        let mut scratch = vec![0.0; layer_norm::scratch_len(rows, width)];
        let norms = 2 * self.layers + 1;
        self.measure("layer_norm", norms, 0.0, || {
            layer_norm::forward(&x, &weight, &bias, 1e-5, &mut y, &mut mean, &mut rstd);
        });
        self.measure("layer_norm backward", norms, 0.0, || {
            let saved = layer_norm::Saved { x: &x, weight: &weight, mean: &mean, rstd: &rstd };
            let (dx, dweight) = (Gradient::accumulate(&mut y), Gradient::overwrite(&mut dweight));
            layer_norm::backward(saved, &dy, dx, dweight, Gradient::overwrite(&mut dbias), &mut scratch);
        });
        self.measure("rms_norm (LLaMA)", 0, 0.0, || rms_norm::forward(&x, &weight, 1e-5, &mut y, &mut rstd));
        self.measure("rms_norm backward (LLaMA)", 0, 0.0, || {
            let saved = rms_norm::Saved { x: &x, weight: &weight, rstd: &rstd };
            let (dx, dweight) = (Gradient::accumulate(&mut y), Gradient::overwrite(&mut dweight));
            rms_norm::backward(saved, &dy, dx, dweight, &mut scratch);
        });

        let (x, dy) = (normal(1, rows * 4 * width), normal(2, rows * 4 * width));
        let (mut y, mut second, mut third) = (x.clone(), x.clone(), x.clone());
        self.measure("gelu", self.layers, 0.0, || activation::gelu(&x, &mut y));
        self.measure("gelu backward", self.layers, 0.0, || activation::gelu_backward(&x, &dy, &mut y, &mut second));
        self.measure("swiglu (LLaMA)", 0, 0.0, || activation::swiglu(&x, &dy, &mut y));
        self.measure("swiglu backward (LLaMA)", 0, 0.0, || {
            let (dgate, dup, y) = ((&mut y).into(), (&mut second).into(), (&mut third).into());
            activation::swiglu_backward(&x, &x, &dy, activation::SwigluGradients { dgate, dup, y });
        });
        let table = rotary::Table::new(10_000.0, width / self.heads, rows, rotary::Scaling::None);
        let positions: Vec<u32> = (0..rows as u32).collect();
        self.measure("rotary, q alone (LLaMA)", 0, 0.0, || {
            rotary::rotate(&table, rotary::Direction::Forward, &positions, &mut y[..rows * width]);
        });
    }

    fn linears(&self) {
        let (rows, width) = (self.tokens, self.width);
        let shapes =
            [("qkv", 1, 3, false), ("attn.c_proj", 1, 1, true), ("c_fc", 1, 4, false), ("mlp.c_proj", 4, 1, true)];
        for (name, inputs, outputs, residual) in shapes {
            let (inputs, outputs) = (inputs * width, outputs * width);
            let dims = Dims { inputs, outputs, orientation: Orientation::InOut, precision: Precision::F32 };
            let (data, bias) = (normal(1, inputs * outputs), normal(2, outputs));
            let (x, dy) = (normal(3, rows * inputs), normal(4, rows * outputs));
            let (mut y, mut dx, mut dweight, mut dbias) = (dy.clone(), x.clone(), data.clone(), bias.clone());
            let weight = Weight { data: (&data).into(), dims };
            let flops = 2.0 * (rows * inputs * outputs) as f64;
            self.measure(&format!("linear {name}"), self.layers, flops, || {
                linear::forward(&x, weight, Some(&bias), residual.then_some(&dy[..]), &mut y);
            });
            self.measure(&format!("linear {name} dx"), self.layers, flops, || {
                linear::backward_input(&dy, weight, Gradient::overwrite(&mut dx));
            });
            self.measure(&format!("linear {name} dw + db"), self.layers, flops, || {
                let gradients = (Gradient::accumulate(&mut dweight), Gradient::accumulate(&mut dbias));
                linear::backward_weight(&x, &dy, dims, gradients.0, Some(gradients.1));
            });
            self.measure(&format!("linear {name}, one row"), 0, flops / rows as f64, || {
                linear::forward(&x[..inputs], weight, Some(&bias), None, &mut y[..outputs]);
            });
        }
    }

    fn attentions(&self) {
        let Self { tokens: rows, sequence, width, heads, layers, .. } = *self;
        let shape = Shape { batch: rows / sequence, sequence, heads, kv_heads: heads, head_dim: width / heads };
        let (qkv, dy) = (normal(1, rows * 3 * width), normal(2, rows * width));
        let (mut y, mut log_sum_exp, mut dqkv) = (dy.clone(), vec![0.0; rows * heads], qkv.clone());
        let mut scratch = vec![0.0; attention::scratch_len(shape)];
        let whole = attention::Documents::Whole;
        // Two products of T^2/2 * 2C operations a sequence forward, five backward.
        let product = (rows * sequence * width) as f64;
        self.measure("attention", layers, 2.0 * product, || {
            let inputs = Inputs::Fused((&qkv).into());
            attention::forward(shape, shape.scale(), inputs, whole, &mut y, &mut log_sum_exp, &mut scratch);
        });
        self.measure("attention backward", layers, 5.0 * product, || {
            let saved = Saved {
                inputs: Inputs::Fused((&qkv).into()),
                pattern: whole.into(),
                y: (&y).into(),
                log_sum_exp: &log_sum_exp,
            };
            attention::backward(shape, shape.scale(), saved, &dy, InputGradients::Fused(&mut dqkv), &mut scratch);
        });
        let (keys, values) = (&qkv[..sequence * width], &qkv[sequence * width..2 * sequence * width]);
        let cache = attention::Cache { keys, values, capacity: sequence, sequences: &[0], lengths: &[sequence] };
        let one = Shape { batch: 1, ..shape };
        let mut scratch = vec![0.0; attention::decode_scratch_len(sequence)];
        self.measure("attention, one row", 0, 0.0, || {
            attention::decode(one, one.scale(), &dy[..width], cache, &mut y[..width], &mut scratch);
        });
    }

    fn ends(&self) {
        let Self { tokens: rows, sequence, width, vocabulary, .. } = *self;
        let ids: Vec<u32> = (0..rows).map(|r| (r * r * 97 % vocabulary) as u32).collect();
        let places: Vec<u32> = (0..rows).map(|r| (r % sequence) as u32).collect();
        let (weight, table, x) = (normal(1, vocabulary * width), normal(2, 1024 * width), normal(3, rows * width));
        let (mut y, mut dweight, mut dtable) = (x.clone(), weight.clone(), table.clone());
        self.measure("embedding", 1, 0.0, || {
            let positions = Positions { table: &table, places: &places };
            embedding::forward(&ids, &weight, Some(positions), width, &mut y).expect("ids inside the vocabulary");
        });
        self.measure("embedding backward", 1, 0.0, || {
            embedding::backward(&ids, &x, width, Gradient::accumulate(&mut dweight)).expect("as before");
            embedding::backward(&places, &x, width, Gradient::accumulate(&mut dtable)).expect("as before");
        });
        let head = Head { weight: (&weight).into(), vocabulary, width, precision: Precision::F32 };
        let mut scratch = vec![0.0; cross_entropy::scratch_len(rows, vocabulary, width)];
        let (mut nll, mut dx) = (vec![0.0f64; rows], x.clone());
        let product = 2.0 * (rows * vocabulary * width) as f64;
        self.measure("cross_entropy forward alone", 0, product, || {
            cross_entropy::forward(&x, head, &ids, &mut nll, &mut scratch).expect("targets inside the vocabulary");
        });
        self.measure("cross_entropy", 1, 3.0 * product, || {
            let (labels, gradient) = (Labels::Given(&ids), Some(Gradient::overwrite(&mut dweight)));
            cross_entropy::forward_backward(&x, head, labels, &mut nll, &mut dx, gradient, &mut scratch)
                .expect("targets inside the vocabulary");
        });
    }
}

fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill_normal(&mut generator(seed, Stream::Init), 0.5, &mut values);
    values
}
