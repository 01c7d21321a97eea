//! The operations and their references against PyTorch's numbers (tests/fixtures/ops/make.py makes them).

use super::product::Precision;
use super::testing::assert_close;
use super::*;
use std::collections::HashMap;

/// The numbers of one operation, by name.
struct Numbers(HashMap<String, Vec<f64>>);

impl Numbers {
    fn of(operation: &str) -> Self {
        let text = include_str!("../../tests/fixtures/ops/numbers.json");
        let mut all: serde_json::Value = serde_json::from_str(text).expect("numbers.json is JSON");
        let one = all[operation].take();
        Self(serde_json::from_value(one).unwrap_or_else(|error| panic!("numbers of {operation}: {error}")))
    }

    fn f64(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("numbers.json has no {name}"))
    }

    /// The same, in f32; the inputs are exact in it.
    fn f32(&self, name: &str) -> Vec<f32> {
        self.f64(name).iter().map(|&value| value as f32).collect()
    }

    /// A fast path's result.
    #[track_caller]
    fn near(&self, name: &str, actual: &[f32]) {
        assert_close(name, actual, self.f64(name), 3e-6);
    }

    /// A reference's result.
    #[track_caller]
    fn exact(&self, name: &str, actual: &[f64]) {
        let expected = self.f64(name);
        assert_eq!(actual.len(), expected.len(), "{name}: lengths");
        for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
            assert!((a - e).abs() <= 1e-10 * (1.0 + e.abs()), "{name}[{i}] of the reference is {a}, PyTorch says {e}");
        }
    }
}

#[test]
fn layer_norm_gives_pytorchs_numbers() {
    let n = Numbers::of("layer_norm");
    let (y, ..) = layer_norm::reference::forward(n.f64("x"), n.f64("weight"), n.f64("bias"), 1e-5);
    let (dx, dweight, dbias) = layer_norm::reference::backward(n.f64("x"), n.f64("weight"), 1e-5, n.f64("dy"));
    [("result", y), ("dx", dx), ("dweight", dweight), ("dbias", dbias)].iter().for_each(|(name, v)| n.exact(name, v));

    let [x, weight, bias, dy] = ["x", "weight", "bias", "dy"].map(|name| n.f32(name));
    let (mut y, mut mean, mut rstd, mut dx) = (vec![0.0; 24], vec![0.0; 4], vec![0.0; 4], vec![0.0; 24]);
    layer_norm::forward(&x, &weight, &bias, 1e-5, &mut y, &mut mean, &mut rstd);
    n.near("result", &y);
    let saved = layer_norm::Saved { x: &x, weight: &weight, mean: &mean, rstd: &rstd };
    let (mut dweight, mut dbias, mut scratch) = (vec![0.0; 6], vec![0.0; 6], vec![0.0; layer_norm::scratch_len(4, 6)]);
    let [to_dx, to_dweight, to_dbias] = [&mut dx, &mut dweight, &mut dbias].map(|data| Gradient::overwrite(data));
    layer_norm::backward(saved, &dy, to_dx, to_dweight, to_dbias, &mut scratch);
    [("dx", dx), ("dweight", dweight), ("dbias", dbias)].iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn rms_norm_gives_pytorchs_numbers() {
    let n = Numbers::of("rms_norm");
    n.exact("result", &rms_norm::reference::forward(n.f64("x"), n.f64("weight"), 1e-5).0);
    let (dx, dweight) = rms_norm::reference::backward(n.f64("x"), n.f64("weight"), 1e-5, n.f64("dy"));
    [("dx", dx), ("dweight", dweight)].iter().for_each(|(name, v)| n.exact(name, v));

    let [x, weight, dy] = ["x", "weight", "dy"].map(|name| n.f32(name));
    let (mut y, mut rstd, mut dx, mut dweight) = (vec![0.0; 24], vec![0.0; 4], vec![0.0; 24], vec![0.0; 6]);
    rms_norm::forward(&x, &weight, 1e-5, &mut y, &mut rstd);
    let saved = rms_norm::Saved { x: &x, weight: &weight, rstd: &rstd };
    let mut scratch = vec![0.0; rms_norm::scratch_len(4, 6)];
    let [to_dx, to_dweight] = [&mut dx, &mut dweight].map(|data| Gradient::overwrite(data));
    rms_norm::backward(saved, &dy, to_dx, to_dweight, &mut scratch);
    [("result", y), ("dx", dx), ("dweight", dweight)].iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn activations_give_pytorchs_numbers() {
    let n = Numbers::of("gelu");
    n.exact("result", &n.f64("x").iter().map(|&x| activation::reference::gelu(x)).collect::<Vec<_>>());
    let slope = |(&x, &dy): (&f64, &f64)| dy * activation::reference::gelu_slope(x);
    n.exact("dx", &n.f64("x").iter().zip(n.f64("dy")).map(slope).collect::<Vec<_>>());
    let (x, dy) = (n.f32("x"), n.f32("dy"));
    let [mut y, mut dx, mut again] = [(); 3].map(|()| vec![0.0; 24]);
    activation::gelu(&x, &mut y);
    activation::gelu_backward(&x, &dy, &mut dx, &mut again);
    [("result", y), ("dx", dx)].iter().for_each(|(name, v)| n.near(name, v));

    let n = Numbers::of("swiglu");
    let pairs = || n.f64("gate").iter().zip(n.f64("up"));
    n.exact("result", &pairs().map(|(&g, &u)| activation::reference::swiglu(g, u)).collect::<Vec<_>>());
    let slopes = pairs().zip(n.f64("dy")).map(|((&g, &u), dy)| {
        let (gate, up) = activation::reference::swiglu_slopes(g, u);
        (gate * dy, up * dy)
    });
    let (dgate, dup): (Vec<_>, Vec<_>) = slopes.unzip();
    [("dgate", dgate), ("dup", dup)].iter().for_each(|(name, v)| n.exact(name, v));
    let [gate, up, dy] = ["gate", "up", "dy"].map(|name| n.f32(name));
    let [mut y, mut dgate, mut dup, mut again] = [(); 4].map(|()| vec![0.0; 12]);
    activation::swiglu(&gate, &up, &mut y);
    let to = activation::SwigluGradients { dgate: (&mut dgate).into(), dup: (&mut dup).into(), y: (&mut again).into() };
    activation::swiglu_backward(&gate, &up, &dy, to);
    [("result", y), ("dgate", dgate), ("dup", dup)].iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn linear_gives_pytorchs_numbers() {
    let n = Numbers::of("linear");
    let dims =
        linear::Dims { inputs: 5, outputs: 4, orientation: linear::Orientation::OutIn, precision: Precision::F32 };
    n.exact("result", &linear::reference::forward(n.f64("x"), n.f64("weight"), dims, n.f64("bias")));
    let (dx, dweight, dbias) = linear::reference::backward(n.f64("x"), n.f64("weight"), dims, n.f64("dy"));
    [("dx", dx), ("dweight", dweight), ("dbias", dbias)].iter().for_each(|(name, v)| n.exact(name, v));

    let [x, data, bias, dy] = ["x", "weight", "bias", "dy"].map(|name| n.f32(name));
    let weight = linear::Weight { data: (&data).into(), dims };
    let (mut y, mut dx, mut dweight, mut dbias) = (vec![0.0; 12], vec![0.0; 15], vec![0.0; 20], vec![0.0; 4]);
    linear::forward(&x, weight, Some(&bias), None, &mut y);
    linear::backward_input(&dy, weight, Gradient::overwrite(&mut dx));
    let to_dbias = Some(Gradient::overwrite(&mut dbias));
    linear::backward_weight(&x, &dy, dims, Gradient::overwrite(&mut dweight), to_dbias);
    let results = [("result", y), ("dx", dx), ("dweight", dweight), ("dbias", dbias)];
    results.iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn grouped_causal_attention_gives_pytorchs_numbers() {
    let n = Numbers::of("attention");
    let shape = attention::Shape { batch: 2, sequence: 5, heads: 4, kv_heads: 2, head_dim: 3 };
    let scale = 1.0 / 3f64.sqrt();
    let [q, k, v, dy] = ["q", "k", "v", "dy"].map(|name| n.f64(name));
    n.exact("result", &attention::reference::forward(shape, scale, q, k, v).0);
    let (dq, dk, dv) = attention::reference::backward(shape, scale, q, k, v, dy);
    [("dq", dq), ("dk", dk), ("dv", dv)].iter().for_each(|(name, v)| n.exact(name, v));

    let [q, k, v, dy] = ["q", "k", "v", "dy"].map(|name| n.f32(name));
    let inputs = attention::Inputs::Separate { q: (&q).into(), k: (&k).into(), v: (&v).into() };
    let (mut y, mut log_sum_exp) = (vec![0.0; q.len()], vec![0.0; 40]);
    let mut scratch = vec![0.0; attention::scratch_len(shape)];
    attention::forward(
        shape,
        shape.scale(),
        inputs,
        attention::Documents::Whole,
        &mut y,
        &mut log_sum_exp,
        &mut scratch,
    );
    let saved = attention::Saved {
        inputs,
        pattern: attention::Documents::Whole.into(),
        y: (&y).into(),
        log_sum_exp: &log_sum_exp,
    };
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    let gradients = attention::InputGradients::Separate { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    attention::backward(shape, shape.scale(), saved, &dy, gradients, &mut scratch);
    [("result", y), ("dq", dq), ("dk", dk), ("dv", dv)].iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn embedding_gives_pytorchs_numbers() {
    let n = Numbers::of("embedding");
    let (ids, positions) = ([2, 0, 2, 4, 2, 1], [0, 1, 2, 0, 1, 2]);
    n.exact("result", &embedding::reference::forward(&ids, n.f64("tokens"), &positions, n.f64("positions"), 4));
    n.exact("dtokens", &embedding::reference::backward(&ids.map(|id| id as usize), n.f64("dy"), 5, 4));
    n.exact("dpositions", &embedding::reference::backward(&positions, n.f64("dy"), 3, 4));

    let [tokens, table, dy] = ["tokens", "positions", "dy"].map(|name| n.f32(name));
    let (mut y, mut dtokens, mut dtable) = (vec![0.0; 24], vec![0.0; 20], vec![0.0; 12]);
    let places = embedding::Positions { table: &table, places: &[0, 1, 2, 0, 1, 2] };
    embedding::forward(&ids, &tokens, Some(places), 4, &mut y).expect("ids inside the vocabulary");
    embedding::backward(&ids, &dy, 4, Gradient::overwrite(&mut dtokens)).expect("ids inside the vocabulary");
    let dpositions = embedding::backward(&[0, 1, 2, 0, 1, 2], &dy, 4, Gradient::overwrite(&mut dtable));
    dpositions.expect("positions inside the table");
    [("result", y), ("dtokens", dtokens), ("dpositions", dtable)].iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn cross_entropy_gives_pytorchs_numbers() {
    use cross_entropy::{Head, IGNORE, Labels};
    let n = Numbers::of("cross_entropy");
    let targets = [3, 0, IGNORE, 10, 3];
    let (nll, dx, dhead) = cross_entropy::reference::forward_backward(n.f64("x"), n.f64("head"), 4, &targets);
    [("nll", nll), ("dx", dx), ("dhead", dhead)].iter().for_each(|(name, v)| n.exact(name, v));

    let (x, weight) = (n.f32("x"), n.f32("head"));
    let (mut nll, mut dx, mut dhead) = (vec![0.0; 5], vec![0.0; 20], vec![0.0; 44]);
    let (head, mut scratch) = (
        Head { weight: (&weight).into(), vocabulary: 11, width: 4, precision: Precision::F32 },
        vec![0.0; cross_entropy::scratch_len(5, 11, 4)],
    );
    let (labels, to_dhead) = (Labels::Given(&targets), Some(Gradient::overwrite(&mut dhead)));
    let loss = cross_entropy::forward_backward(&x, head, labels, &mut nll, &mut dx, to_dhead, &mut scratch);
    let loss = loss.expect("targets inside the vocabulary");
    assert!((loss.sum - n.f64("nll").iter().sum::<f64>()).abs() < 1e-5 && loss.count == 4);
    let nll: Vec<f32> = nll.into_iter().map(|nll| nll as f32).collect();
    [("nll", nll), ("dx", dx), ("dhead", dhead)].iter().for_each(|(name, v)| n.near(name, v));
}

#[test]
fn rotary_embedding_gives_transformers_numbers_with_and_without_llama_3_scaling() {
    let llama3 = rotary::Scaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_positions: 64,
    };
    for (name, scaling) in [("rotary", rotary::Scaling::None), ("rotary_llama3", llama3)] {
        let n = Numbers::of(name);
        let table = rotary::Table::new(10_000.0, 16, 512, scaling);
        let positions: Vec<u32> = n.f64("positions").iter().map(|&p| p as u32).collect();
        let mut x = n.f32("x");
        rotary::rotate(&table, rotary::Direction::Forward, &positions, &mut x);
        // One unit in the last place of a frequency moves the angle at position 500 by 3e-5.
        assert_close(name, &x, n.f64("result"), 5e-5);
    }
}
