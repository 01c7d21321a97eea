//! What must hold for every optimizer.

use super::super::OptimError;
use super::super::gate::clip_factor;
use super::super::reference::{self, ReferenceState};
use super::*;
use crate::optim::{Optimizer, OptimizerState};
use crate::params::Weights;
use half::bf16;

struct Run {
    store: ParameterStore,
    optimizer: Box<dyn Optimizer>,
    lr: f64,
}

impl Run {
    fn new(config: &OptimizerConfig, layout: &Arc<Layout>) -> Self {
        let store = store(layout, &random_flat(layout, 1, 0.5));
        Self { store, optimizer: config.build(layout, &Device::Cpu).unwrap(), lr: config.lr() }
    }

    fn steps(&mut self, steps: std::ops::Range<u64>) {
        for step in steps {
            let mut source = Noise { fixed: random_flat(self.store.layout(), 100 + step, 0.3) };
            source.recompute(&mut self.store, Labels::Data).unwrap();
            self.optimizer.step(&mut self.store, &input(self.lr), &mut source).unwrap();
        }
    }

    /// Weights, then every state tensor, then every scalar, as bits.
    fn bits(&self) -> (Vec<Vec<u32>>, Vec<u64>) {
        let state = self.optimizer.state();
        let tensors = state.tensors.iter().map(|(_, tensor)| bits(tensor));
        let scalars = state.scalars.iter().map(|(_, value)| value.to_bits()).collect();
        ([bits(self.store.weights())].into_iter().chain(tensors).collect(), scalars)
    }
}

/// A state through JSON and a copy of the tensors, as a checkpoint would take it.
fn through_a_checkpoint(state: &OptimizerState) -> OptimizerState {
    let json = serde_json::to_string(&state.scalars).unwrap();
    let tensor = |tensor: &Tensor| Tensor::from_vec(numbers(tensor), tensor.dims(), &Device::Cpu).unwrap();
    OptimizerState {
        tensors: state.tensors.iter().rev().map(|(name, t)| (name.clone(), tensor(t))).collect(),
        scalars: serde_json::from_str(&json).unwrap(),
    }
}

#[test]
fn a_resumed_run_equals_the_uninterrupted_one_bit_for_bit() {
    let layout = odd_layout();
    for config in variants() {
        let mut whole = Run::new(&config, &layout);
        whole.steps(0..13);
        let mut first = Run::new(&config, &layout);
        first.steps(0..7);
        let saved = through_a_checkpoint(&first.optimizer.state());
        let mut second = Run::new(&config, &layout);
        slice_mut(second.store.weights(), |w| w.copy_from_slice(&numbers(first.store.weights()))).unwrap();
        second.optimizer.load_state(&saved).unwrap();
        second.steps(7..13);
        assert_eq!(second.bits(), whole.bits(), "{config:?}");
    }
}

#[test]
fn every_elementwise_kernel_agrees_with_its_f64_reference_on_random_steps() {
    let layout = odd_layout();
    let members: Vec<(usize, bool)> =
        layout.parameters().iter().flat_map(|p| p.range().map(|i| (i, p.decays))).collect();
    let decays: Vec<bool> = members.iter().map(|&(_, decays)| decays).collect();
    let pick = |flat: &[f32]| members.iter().map(|&(i, _)| f64::from(flat[i])).collect::<Vec<f64>>();
    for config in variants() {
        if config.name() == "muon" || config.resolved().contains(&("sam", true.into())) {
            continue;
        }
        let mut run = Run::new(&config, &layout);
        let mut weights = pick(&numbers(run.store.weights()));
        let mut state = ReferenceState::new(weights.len());
        for step in 0..12 {
            let mut source = Noise { fixed: random_flat(&layout, 500 + step, 0.05) };
            source.recompute(&mut run.store, Labels::Data).unwrap();
            let raw = pick(&numbers(run.store.gradients()));
            let norm = raw.iter().map(|g| g * g).sum::<f64>().sqrt();
            let clip = clip_factor(norm, Some(1.0));
            let gradient: Vec<f64> = raw.iter().map(|g| clip * g).collect();
            let half: Vec<f64> = raw.iter().map(|g| 0.5 * g).collect();
            let sampled = (config.name() == "sophiag" && step % 10 == 0).then_some(&half[..]);
            let report = run.optimizer.step(&mut run.store, &input(config.lr()), &mut source).unwrap();
            let (eta, velocity_sq) =
                reference::step(&config, &mut state, config.lr(), &gradient, sampled, 1.0, &mut weights, &decays);
            assert!((report.grad_norm - norm).abs() < 1e-9 * norm && clip < 1.0, "{config:?}");
            assert!((report.clip_factor - clip).abs() < 1e-9);
            assert!((report.velocity_sq - velocity_sq).abs() < 1e-5 * velocity_sq, "{config:?} {velocity_sq}");
            assert!((report.eta - eta).abs() < 1e-5 * eta, "{config:?}: {} {eta}", report.eta);
            assert!((report.gate - report.eta / config.lr()).abs() < 1e-12);
            // The next step's gradient comes from the weights of the f32 run, so errors do not feed back.
            let got = pick(&numbers(run.store.weights()));
            let error = got.iter().zip(&weights).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error < 5e-6, "{config:?}, step {step}: {error:e}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // Three chunks and a bit in the decayed part, and a plain part.
    let layout = layout(&[("wte", &[1001, 199], true), ("h.mlp.weight", &[61, 83], true), ("ln", &[70_003], false)]);
    let picked = [
        config("vradam", &[]),
        config("vradam", &[("gate_power", 3.0.into()), ("gate_scope", "group".into())]),
        config("adamw", &[]),
        config("rmsprop", &[("gate", true.into())]),
        config("sophiag", &[("sam", true.into())]),
        config("muon", &[("gate", true.into())]),
    ];
    for config in picked {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut run = Run::new(&config, &layout);
                run.steps(0..3);
                run.bits()
            })
        };
        let one = run(1);
        for threads in [2, 7] {
            assert!(run(threads) == one, "{config:?} with {threads} threads");
        }
    }
}

#[test]
fn without_beta3_vradam_is_adamw_bit_for_bit() {
    let layout = odd_layout();
    let decay = ("weight_decay", Value::from(0.1));
    let mut adamw = Run::new(&config("adamw", std::slice::from_ref(&decay)), &layout);
    adamw.steps(0..10);
    for keys in [&[("beta3", 0.0.into())], &[("alpha1", 0.0.into())], &[("gate", false.into())]] {
        let mut vradam = Run::new(&config("vradam", &[keys, &[decay.clone()][..]].concat()), &layout);
        vradam.steps(0..10);
        assert_eq!(vradam.bits(), adamw.bits());
    }
}

#[test]
fn a_gradient_that_is_not_finite_is_refused_by_name_and_nothing_changes() {
    let layout = odd_layout();
    for config in variants() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut run = Run::new(&config, &layout);
            run.steps(0..3);
            let before = run.bits();
            let mut gradients = random_flat(&layout, 9, 1.0);
            let parameter = &layout.parameters()[2];
            gradients[parameter.offset + 3] = bad;
            set_gradients(&run.store, &gradients);
            let mut source = Noise { fixed: gradients };
            let error = run.optimizer.step(&mut run.store, &input(run.lr), &mut source).unwrap_err();
            let OptimError::NonFinite { parameter: name, index, value } = error else { panic!("{config:?}: {error}") };
            assert_eq!((name, index, value.to_bits()), (parameter.name.clone(), 3, bad.to_bits()), "{config:?}");
            assert_eq!(run.bits(), before, "{config:?}");
        }
    }
}

/// Gives a gradient that is not a number.
struct Broken;

impl GradientSource for Broken {
    fn recompute(&mut self, store: &mut ParameterStore, _: Labels) -> anyhow::Result<()> {
        let mut gradients = numbers(store.gradients());
        gradients[0] = f32::NAN;
        set_gradients(store, &gradients);
        Ok(())
    }
}

#[test]
fn a_second_pass_that_fails_or_is_not_finite_changes_nothing() {
    let layout = odd_layout();
    let second: Vec<_> =
        variants().into_iter().filter(|c| c.build(&layout, &Device::Cpu).unwrap().needs_second_pass()).collect();
    assert!(second.len() >= 8);
    for config in second {
        let mut run = Run::new(&config, &layout);
        run.steps(0..10);
        let before = run.bits();
        set_gradients(&run.store, &random_flat(&layout, 9, 1.0));
        let error = run.optimizer.step(&mut run.store, &input(run.lr), &mut Broken).unwrap_err();
        // SAM says where the gradient was taken; SophiaG's second pass is at the same weights.
        let sam = config.resolved().contains(&("sam", true.into()));
        let named = match &error {
            OptimError::NonFinite { parameter, index, .. } if !sam => (parameter.as_str(), *index),
            OptimError::NonFiniteAhead { parameter, index, .. } if sam => (parameter.as_str(), *index),
            other => panic!("{config:?}: {other}"),
        };
        assert_eq!(named, (layout.parameters()[0].name.as_str(), 0), "{config:?}");
        set_gradients(&run.store, &random_flat(&layout, 9, 1.0));
        let error = run.optimizer.step(&mut run.store, &input(run.lr), &mut crate::optim::NoSecondPass).unwrap_err();
        assert!(matches!(error, OptimError::SecondPass(_)), "{config:?}: {error}");
        assert_eq!(run.bits(), before, "{config:?}");
    }
}

#[test]
fn the_gaps_stay_zero_and_the_gradients_stay_as_they_were() {
    let layout = odd_layout();
    let mut in_gap = vec![true; layout.len()];
    layout.parameters().iter().for_each(|p| in_gap[p.range()].fill(false));
    for config in variants() {
        let mut run = Run::new(&config, &layout);
        run.steps(0..5);
        for tensor in std::iter::once(bits(run.store.weights())).chain(run.bits().0) {
            assert!(tensor.iter().zip(&in_gap).all(|(&x, &gap)| !gap || x & 0x7fff_ffff == 0), "{config:?}");
        }
        let fixed = random_flat(&layout, 77, 0.3);
        set_gradients(&run.store, &fixed);
        let sam = config.resolved().contains(&("sam", true.into()));
        run.optimizer.step(&mut run.store, &input(run.lr), &mut Noise { fixed: fixed.clone() }).unwrap();
        assert!(sam || numbers(run.store.gradients()) == fixed, "{config:?}");
    }
}

#[test]
fn a_zero_gradient_moves_nothing_but_what_decays_and_decay_is_applied_once() {
    let layout = odd_layout();
    for config in variants() {
        let mut keys: Vec<_> = config.resolved().iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        keys.iter_mut().filter(|(key, _)| key == "weight_decay").for_each(|(_, value)| *value = 0.25.into());
        keys.iter_mut().filter(|(key, _)| key == "lr").for_each(|(_, value)| *value = 0.125.into());
        keys.iter_mut().filter(|(key, _)| key == "adamw_lr").for_each(|(_, value)| *value = 0.125.into());
        let config = OptimizerConfig::from_keys(config.name(), &keys).unwrap();
        let mut run = Run::new(&config, &layout);
        let before = numbers(run.store.weights());
        set_gradients(&run.store, &vec![0.0; layout.len()]);
        let zero = Noise { fixed: before.iter().map(|w| -0.5 * w).collect() };
        let l2 = matches!(config.name(), "adam" | "sgd" | "rmsprop" | "rgd")
            || config.resolved().contains(&("decoupled_weight_decay", false.into()));
        let mut source = zero;
        let report = run.optimizer.step(&mut run.store, &input(config.lr()), &mut source).unwrap();
        assert_eq!((report.grad_norm, report.clip_factor), (0.0, 1.0));
        let after = numbers(run.store.weights());
        for (i, (&before, &after)) in before.iter().zip(&after).enumerate() {
            let expected = match (i < layout.decayed_len(), l2) {
                (false, _) => before,
                (true, false) => before * (1.0 - 0.125 * 0.25),
                (true, true) => {
                    assert!(before == 0.0 || (after - before) * before < 0.0, "{config:?} {i}: {before} {after}");
                    continue;
                }
            };
            assert_eq!(after, expected, "{config:?} {i}");
        }
    }
}

#[test]
fn a_store_without_parameters_or_with_empty_ones_takes_a_step() {
    for layout in [layout(&[]), layout(&[("a", &[0], true), ("b", &[3, 0], false)])] {
        for config in variants() {
            let mut run = Run::new(&config, &layout);
            let mut source = Noise { fixed: vec![] };
            let report = run.optimizer.step(&mut run.store, &input(run.lr), &mut source).unwrap();
            assert_eq!((report.grad_norm, report.velocity_sq, report.gate), (0.0, 0.0, 1.0), "{config:?}");
        }
    }
}

#[test]
fn a_schedule_at_zero_leaves_the_weights_but_not_the_moments() {
    let layout = odd_layout();
    for config in variants() {
        let mut run = Run::new(&config, &layout);
        run.lr = 0.0;
        let before = bits(run.store.weights());
        run.steps(0..2);
        assert_eq!(bits(run.store.weights()), before, "{config:?}");
    }
}

#[test]
fn settings_of_a_step_that_make_no_sense_are_refused() {
    let layout = odd_layout();
    let mut run = Run::new(&config("vradam", &[]), &layout);
    for (scheduled_lr, gradient_scale, grad_clip) in [
        (f64::NAN, 1.0, None),
        (-1.0, 1.0, None),
        (1.0, 0.0, None),
        (1.0, f64::INFINITY, None),
        (1.0, 1.0, Some(0.0)),
        (1.0, 1.0, Some(f64::NAN)),
    ] {
        let input = StepInput { scheduled_lr, gradient_scale, grad_clip };
        let error = run.optimizer.step(&mut run.store, &input, &mut Noise { fixed: vec![] }).unwrap_err();
        assert!(matches!(error, OptimError::BadInput { .. }), "{input:?}: {error}");
    }
}

#[test]
fn a_state_of_another_optimizer_or_model_is_refused_and_the_old_one_stays() {
    let layout = odd_layout();
    let mut run = Run::new(&config("vradam", &[]), &layout);
    run.steps(0..3);
    let before = run.bits();
    let good = through_a_checkpoint(&run.optimizer.state());
    let mut bad =
        ["lion", "nadam", "rmsprop"].map(|name| Run::new(&config(name, &[]), &layout).optimizer.state()).to_vec();
    bad.push(Run::new(&config("vradam", &[]), &super::layout(&[("a", &[3], true)])).optimizer.state());
    for value in [f64::NAN, -1.0, 1.5] {
        let mut state = good.clone();
        state.scalars[0].1 = value;
        bad.push(state);
    }
    let mut state = through_a_checkpoint(&good);
    slice_mut(&state.tensors[0].1, |numbers| numbers[5] = f32::NAN).unwrap();
    bad.push(state.clone());
    state.tensors.pop();
    bad.push(state);
    for state in bad {
        let error = run.optimizer.load_state(&state).unwrap_err();
        assert!(matches!(error, OptimError::State(_)), "{error}");
        assert_eq!(run.bits(), before, "{error}");
    }
    // Its own state, sharing the very memory, changes nothing.
    let own = run.optimizer.state();
    run.optimizer.load_state(&own).unwrap();
    assert_eq!(run.bits(), before);
}

/// Muon's step from its formula, in f64: momentum, the quintic on the matrix, scale and decay; AdamW for the rest.
#[test]
fn a_step_of_muon_is_its_formula_on_hidden_matrices_and_adamw_elsewhere() {
    let layout = layout(&[("wte", &[7, 3], true), ("h.mlp.up_proj.weight", &[6, 3], true), ("ln.weight", &[3], false)]);
    let (lr, gate) = (0.02, Value::from(true));
    let muon = config("muon", &[("weight_decay", 0.1.into()), ("gate", gate), ("beta3", 2.0.into())]);
    let adamw = config("adamw", &[("weight_decay", 0.1.into()), ("beta2", 0.95.into()), ("lr", 3e-4.into())]);
    let mut run = Run::new(&muon, &layout);
    let hidden = layout.parameters()[1].range();
    let member = |i: usize| layout.parameters().iter().any(|p| p.range().contains(&i));
    let decays: Vec<bool> = (0..layout.len()).map(|i| i < layout.decayed_len()).collect();
    let mut weights: Vec<f64> = numbers(run.store.weights()).iter().map(|&x| f64::from(x)).collect();
    let mut rest = ReferenceState::new(weights.len());
    let mut velocity = vec![0.0; hidden.len()];
    for step in 0..3 {
        let raw = random_flat(&layout, 40 + step, 0.1);
        set_gradients(&run.store, &raw);
        let step_input = StepInput { scheduled_lr: lr, gradient_scale: 1.0, grad_clip: None };
        let report = run.optimizer.step(&mut run.store, &step_input, &mut crate::optim::NoSecondPass).unwrap();
        let gradient: Vec<f64> = raw.iter().map(|&g| f64::from(g)).collect();
        let own = &gradient[hidden.clone()];
        velocity.iter_mut().zip(own).for_each(|(v, g)| *v = 0.95 * *v + 0.05 * g);
        let mut others = gradient.clone();
        others[hidden.clone()].fill(0.0);
        let mut q: f64 = velocity.iter().map(|v| v * v).sum();
        let mut look_ahead = rest.clone();
        q += reference::step(&adamw, &mut look_ahead, 1.0, &others, None, 1.0, &mut weights.clone(), &decays).1;
        let eta = lr / (1.0 + (2.0 * q).min(10.0));
        assert!((report.eta - eta).abs() < 1e-6 * eta && (report.velocity_sq - q).abs() < 1e-6 * q, "{report:?} {q}");
        // The rest first: its reference also decays the hidden matrix, which is put back.
        let before = weights[hidden.clone()].to_vec();
        reference::step(&adamw, &mut rest, eta * 3e-4 / 0.02, &others, None, 1.0, &mut weights, &decays);
        // Six rows of three: the Gram matrix is X'X.
        let mut x: Vec<f64> = velocity.iter().zip(own).map(|(v, g)| 0.05 * g + 0.95 * v).collect();
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt() + 1e-7;
        x.iter_mut().for_each(|x| *x /= norm);
        for _ in 0..5 {
            let product =
                |a: &dyn Fn(usize, usize) -> f64, b: &dyn Fn(usize, usize) -> f64, rows: usize, inner: usize| {
                    let entry = |place: usize| (0..inner).map(|p| a(place / 3, p) * b(p, place % 3)).sum::<f64>();
                    (0..rows * 3).map(entry).collect::<Vec<f64>>()
                };
            let gram = product(&|i, p| x[p * 3 + i], &|p, j| x[p * 3 + j], 3, 6);
            let square = product(&|i, p| gram[i * 3 + p], &|p, j| gram[p * 3 + j], 3, 3);
            let b: Vec<f64> = gram.iter().zip(&square).map(|(g, s)| -4.7750 * g + 2.0315 * s).collect();
            let moved = product(&|i, p| x[i * 3 + p], &|p, j| b[p * 3 + j], 6, 3);
            x.iter_mut().zip(moved).for_each(|(x, moved)| *x = 3.4445 * *x + moved);
        }
        let scale = 2f64.sqrt();
        for ((weight, before), x) in weights[hidden.clone()].iter_mut().zip(before).zip(&x) {
            *weight = before * (1.0 - eta * 0.1) - eta * scale * x;
        }
        for (i, (&got, &expected)) in numbers(run.store.weights()).iter().zip(&weights).enumerate() {
            assert!(!member(i) || (f64::from(got) - expected).abs() < 2e-6, "step {step}, {i}: {got} {expected}");
        }
    }
}

/// A source that finds the bf16 copy equal to the weights whenever a second pass runs.
struct Watching(Noise);

impl GradientSource for Watching {
    fn recompute(&mut self, store: &mut ParameterStore, labels: Labels) -> anyhow::Result<()> {
        assert_copy_is_exact(store);
        self.0.recompute(store, labels)
    }
}

#[track_caller]
fn assert_copy_is_exact(store: &ParameterStore) {
    let same = |weights: Weights| {
        let rounded = weights.exact.iter().map(|&weight| bf16::from_f32(weight).to_bits());
        weights.rounded.is_some_and(|copy| rounded.eq(copy.iter().map(|copy| copy.to_bits())))
    };
    assert!(store.read(same).unwrap(), "the bf16 copy is not the weights rounded to nearest even");
}

#[test]
fn every_step_leaves_the_weights_rounded_to_bf16_beside_them_and_moves_them_as_without() {
    let small = odd_layout();
    let large = layout(&[("wte", &[1001, 99], true), ("h.mlp.weight", &[61, 83], true), ("ln", &[70_003], false)]);
    for config in variants() {
        let run = |layout: &Arc<Layout>, threads: usize, with_copy: bool| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let mut run = Run::new(&config, layout);
                if with_copy {
                    run.store.keep_rounded().unwrap();
                }
                for step in 0..3 {
                    let noise = Noise { fixed: random_flat(layout, 100 + step, 0.3) };
                    set_gradients(&run.store, &noise.fixed);
                    let (mut plain, mut watching) = (Noise { fixed: noise.fixed.clone() }, Watching(noise));
                    let source: &mut dyn GradientSource = if with_copy { &mut watching } else { &mut plain };
                    run.optimizer.step(&mut run.store, &input(run.lr), source).unwrap();
                    if with_copy {
                        assert_copy_is_exact(&run.store);
                    }
                }
                run.bits()
            })
        };
        let without = run(&small, 1, false);
        assert!([1, 2, 7].iter().all(|&threads| run(&small, threads, true) == without), "{config:?}");
        // More than one chunk.
        run(&large, 2, true);
    }
}
