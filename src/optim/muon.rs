//! Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024): orthogonalised momentum for
//! the hidden matrices, AdamW for everything else.
//!
//! ```text
//! v = mu v + (1-mu) g
//! u = (1-mu) g + mu v                               Nesterov
//! O = five steps of X <- a X + (b XX' + c (XX')^2) X from X = u / (||u||_F + 1e-7), (a, b, c) = (3.4445, -4.7750, 2.0315)
//! theta = theta (1 - eta lambda) - eta sqrt(max(1, out/in)) O
//! ```
//!
//! The scale is the original one (also torch.optim.Muon's "original"), in which `lr` = 0.02 is usual; `out` and `in`
//! are the layer's, however the matrix is stored (GPT-2 keeps its four projections as [in, out]). Hidden matrices are
//! the decayed 2-D parameters that are neither embeddings nor the head. The rest is AdamW with `adamw_lr`, which
//! follows the same schedule. Products are f32.

use super::adam::{Adam, Decay};
use super::cuda::{MatrixStep, MuonPasses, OnDevice, Part};
use super::elementwise::{At, Method, check_layout};
use super::gate::{GateScope, GateSettings, GateSource, clip_factor, gate};
use super::kernel::{self, Level, Measure};
use super::{GradientSource, OptimError, Optimizer, OptimizerState, StepInput, StepReport, groups, non_finite, whole};
use crate::ops::product::{Into, Operand, Size, Threads, multiply, narrow};
use crate::params::{Layout, Parameter, ParameterStore, WeightsMut, slice, slice_mut, zeros_on};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Coefficients of the quintic, chosen by its authors for the largest slope at zero.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;

/// The constants; `adam` is the method of the rest.
pub(super) struct MuonSettings {
    pub momentum: f64,
    pub weight_decay: f64,
    /// Peak rates of the hidden matrices and of the rest.
    pub lr: f64,
    pub adamw_lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hidden,
    Rest,
}

/// A run of parameters of one kind and one decay.
struct Segment {
    range: Range<usize>,
    kind: Kind,
    decays: bool,
}

pub(super) struct Muon {
    settings: MuonSettings,
    gate: Option<GateSettings>,
    layout: Arc<Layout>,
    segments: Vec<Segment>,
    velocity: Tensor,
    second_moment: Tensor,
    step: u64,
    /// Where the state is on a CUDA device.
    passes: Option<MuonPasses>,
}

fn kind(parameter: &Parameter) -> Kind {
    let outer = ["wte", "wpe", "embed_tokens", "lm_head"];
    let is_outer = parameter.name.split('.').any(|part| outer.contains(&part));
    if parameter.shape.len() == 2 && parameter.decays && !is_outer { Kind::Hidden } else { Kind::Rest }
}

/// sqrt(max(1, out/in)) of the layer.
fn scale(parameter: &Parameter) -> f64 {
    let (rows, columns) = (parameter.shape[0] as f64, parameter.shape[1] as f64);
    let transposed = [".c_attn.weight", ".c_proj.weight", ".c_fc.weight"];
    let is_transposed = transposed.iter().any(|end| parameter.name.ends_with(end));
    let (output, input) = if is_transposed { (columns, rows) } else { (rows, columns) };
    (output / input).max(1.0).sqrt()
}

fn segments(layout: &Layout) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let parameters = layout.parameters();
    for (index, parameter) in parameters.iter().enumerate() {
        let end = parameters.get(index + 1).map_or(layout.len(), |next| next.offset);
        let (kind, decays) = (kind(parameter), parameter.decays);
        match segments.last_mut() {
            Some(last) if (last.kind, last.decays) == (kind, decays) => last.range.end = end,
            _ => segments.push(Segment { range: parameter.offset..end, kind, decays }),
        }
    }
    segments
}

/// A segment as the device's passes take it.
fn part(segment: &Segment, adam: &Adam, at: &At) -> Part {
    Part { range: segment.range.clone(), decays: segment.decays, rule: adam.kernel_rule(at), eta: at.eta }
}

impl Muon {
    pub fn new(
        settings: MuonSettings,
        gate: Option<GateSettings>,
        layout: &Arc<Layout>,
        device: &Device,
    ) -> Result<Self, OptimError> {
        Ok(Self {
            settings,
            gate,
            layout: layout.clone(),
            segments: segments(layout),
            velocity: zeros_on(layout.len(), device)?,
            second_moment: zeros_on(layout.len(), device)?,
            step: 0,
            passes: MuonPasses::new(device)?,
        })
    }

    /// AdamW for every segment, and its step's scalars. For a hidden one it is used only to look ahead at the velocity.
    fn methods(&self, input: &StepInput, factor: f32, gates: [f64; 2]) -> Vec<(&Segment, Adam, At)> {
        let method = |segment| {
            let segment: &Segment = segment;
            let beta1 = if segment.kind == Kind::Hidden { self.settings.momentum } else { self.settings.beta1 };
            let MuonSettings { beta2, eps, weight_decay, .. } = self.settings;
            let scheduled_lr = input.scheduled_lr * self.settings.adamw_lr / self.settings.lr;
            let at = At {
                step: self.step + 1,
                scheduled_lr,
                eta: scheduled_lr * gates[usize::from(!segment.decays)],
                factor,
                gradient_scale: input.gradient_scale,
                weight_decay: if segment.decays { weight_decay } else { 0.0 },
                velocity_sq: 0.0,
            };
            (segment, Adam { beta1, beta2, eps, weight_decay, decay: Decay::Decoupled }, at)
        };
        self.segments.iter().map(method).collect()
    }

    /// The gates of the decayed and of the plain parameters.
    fn gates(&self, store: &ParameterStore, input: &StepInput, factor: f32) -> Result<[f64; 2], OptimError> {
        let Some(settings) = self.gate else { return Ok([1.0; 2]) };
        let measure = match settings.source {
            GateSource::Velocity => Measure::Velocity { power: settings.power },
            GateSource::Gradient => Measure::Gradient { scale: f64::from(factor), power: settings.power },
        };
        let sums = self.predict(store, &self.methods(input, factor, [1.0; 2]), factor, measure)?;
        let mut q = [0.0; 2];
        self.segments.iter().zip(sums).for_each(|(segment, sum)| q[usize::from(!segment.decays)] += sum);
        Ok(match settings.scope {
            GateScope::Global => [gate(settings.beta3, settings.alpha1, q[0] + q[1]); 2],
            GateScope::Group => q.map(|q| gate(settings.beta3, settings.alpha1, q)),
        })
    }

    /// The sum of every segment that a gate asks for; changes nothing.
    fn predict(
        &self,
        store: &ParameterStore,
        methods: &[(&Segment, Adam, At)],
        factor: f32,
        measure: Measure,
    ) -> Result<Vec<f64>, OptimError> {
        if let Some(passes) = &self.passes {
            let states = [&self.velocity, &self.second_moment];
            let sum = |(segment, adam, at): &(&Segment, Adam, At)| {
                passes.predict(store, states, &part(segment, adam, at), factor, measure)
            };
            return Ok(methods.iter().map(sum).collect::<candle_core::Result<_>>()?);
        }
        let rules: Vec<_> = methods.iter().map(|(segment, adam, at)| (segment.range.clone(), adam.rule(at))).collect();
        let sums = slice(store.gradients(), |gradient| {
            slice(&self.velocity, |velocity| {
                slice(&self.second_moment, |second_moment| {
                    // The weights do not enter a velocity with decoupled decay; any buffer of the length will do.
                    kernel::predict(Level::best(), &rules, measure, gradient, velocity, [velocity, second_moment])
                })
            })
        })???;
        Ok(sums)
    }

    /// The update on a CUDA device; gives ||new velocity||^2.
    fn move_on_device(
        &self,
        passes: &MuonPasses,
        store: &ParameterStore,
        input: &StepInput,
        factor: f32,
        gates: [f64; 2],
    ) -> Result<f64, OptimError> {
        let mut velocity_sq = 0.0;
        for (segment, adam, at) in self.methods(input, factor, gates) {
            if segment.kind == Kind::Rest {
                let states = [&self.velocity, &self.second_moment];
                velocity_sq += passes.update(store, states, &part(segment, &adam, &at), factor)?;
            }
        }
        let eta = input.scheduled_lr * gates[0];
        for parameter in self.layout.parameters().iter().filter(|parameter| kind(parameter) == Kind::Hidden) {
            let step = MatrixStep {
                momentum: self.settings.momentum,
                factor,
                rate: eta * scale(parameter),
                decay: eta * self.settings.weight_decay,
                quintic: QUINTIC.map(f64::from),
                iterations: ITERATIONS,
            };
            velocity_sq += passes.move_matrix(store, &self.velocity, parameter, &step)?;
        }
        Ok(velocity_sq)
    }

    /// The update on the CPU; gives ||new velocity||^2.
    fn move_on_cpu(
        &self,
        store: &mut ParameterStore,
        input: &StepInput,
        factor: f32,
        gates: [f64; 2],
    ) -> Result<f64, OptimError> {
        let methods = self.methods(input, factor, gates);
        let rest = methods.iter().filter(|(segment, ..)| segment.kind == Kind::Rest);
        let rules: Vec<_> = rest.map(|(segment, adam, at)| (segment.range.clone(), adam.rule(at))).collect();
        let hidden: Vec<&Parameter> = self.layout.parameters().iter().filter(|p| kind(p) == Kind::Hidden).collect();
        Ok(store.update(|gradient, weights| {
            slice_mut(&self.velocity, |velocity| {
                slice_mut(&self.second_moment, |second_moment| {
                    let WeightsMut { exact, mut rounded } = weights;
                    let weights = WeightsMut { exact: &mut *exact, rounded: rounded.as_deref_mut() };
                    let states = [&mut *velocity, second_moment];
                    let rest = kernel::update(Level::best(), &rules, gradient, weights, states);
                    let mut velocity_sq = rest.iter().sum::<f64>();
                    for parameter in &hidden {
                        let range = parameter.range();
                        let (gradient, weight) = (&gradient[range.clone()], &mut exact[range.clone()]);
                        let eta = input.scheduled_lr * gates[0];
                        let velocity = &mut velocity[range.clone()];
                        velocity_sq += self.move_matrix(parameter, eta, factor, gradient, weight, velocity);
                        if let Some(rounded) = &mut rounded {
                            narrow(Threads::All, weight, &mut rounded[range]);
                        }
                    }
                    velocity_sq
                })
            })
        })???)
    }

    /// Moves one hidden matrix and its velocity, and gives ||new velocity||^2. All slices are the matrix's own.
    fn move_matrix(
        &self,
        parameter: &Parameter,
        eta: f64,
        factor: f32,
        gradient: &[f32],
        weight: &mut [f32],
        velocity: &mut [f32],
    ) -> f64 {
        let (keep, take) = (self.settings.momentum as f32, (1.0 - self.settings.momentum) as f32);
        let mut update = vec![0.0f32; gradient.len()];
        let blend = |((update, velocity), gradient): ((&mut f32, &mut f32), &f32)| {
            let gradient = factor * gradient;
            *velocity = keep * *velocity + take * gradient;
            *update = take * gradient + keep * *velocity;
        };
        update.iter_mut().zip(velocity.iter_mut()).zip(gradient).for_each(blend);
        orthogonalize(&mut update, parameter.shape[0], parameter.shape[1]);
        let (rate, decay) = ((eta * scale(parameter)) as f32, (eta * self.settings.weight_decay) as f32);
        weight.iter_mut().zip(&update).for_each(|(weight, update)| *weight -= decay * *weight + rate * update);
        let whole = 0..velocity.len();
        kernel::reduce(Level::best(), std::slice::from_ref(&whole), velocity, None)[0].gradient_sq
    }
}

/// Replaces `x` [rows, columns] by nearly the nearest matrix with orthonormal rows or columns: singular values come to
/// lie around 1 (about 0.7 to 1.2), singular vectors stay.
fn orthogonalize(x: &mut [f32], rows: usize, columns: usize) {
    let [a, b, c] = QUINTIC;
    let whole = 0..x.len();
    let norm = kernel::reduce(Level::best(), std::slice::from_ref(&whole), x, None)[0].gradient_sq.sqrt();
    let scale = (1.0 / (norm + 1e-7)) as f32;
    x.iter_mut().for_each(|x| *x *= scale);
    let (small, large) = (rows.min(columns), rows.max(columns));
    let square = Size { m: small, k: small, n: small };
    let (mut gram, mut polynomial) = (vec![0.0f32; small * small], vec![0.0f32; small * small]);
    let mut next = vec![0.0f32; x.len()];
    for _ in 0..ITERATIONS {
        // The Gram matrix of the short side: XX' of a wide matrix, X'X of a tall one.
        let natural = Operand::row_major(x, columns);
        let (left, right) =
            if rows <= columns { (natural, natural.transposed()) } else { (natural.transposed(), natural) };
        let size = Size { m: small, k: large, n: small };
        multiply(Threads::All, size, left, right, 1.0, &mut gram, small, Into::Overwrite);
        polynomial.iter_mut().zip(&gram).for_each(|(polynomial, gram)| *polynomial = b * gram);
        let gram = Operand::row_major(&gram, small);
        multiply(Threads::All, square, gram, gram, c, &mut polynomial, small, Into::Accumulate);
        next.par_iter_mut().zip(&*x).for_each(|(next, x)| *next = a * x);
        let (polynomial, size) = (Operand::row_major(&polynomial, small), Size { m: rows, k: small, n: columns });
        let (left, right) = if rows <= columns { (polynomial, natural) } else { (natural, polynomial) };
        multiply(Threads::All, size, left, right, 1.0, &mut next, columns, Into::Accumulate);
        x.copy_from_slice(&next);
    }
}

impl Optimizer for Muon {
    fn step(
        &mut self,
        store: &mut ParameterStore,
        input: &StepInput,
        _: &mut dyn GradientSource,
    ) -> Result<StepReport, OptimError> {
        input.check()?;
        check_layout(store, &self.layout)?;
        let sums = whole::squares(store.gradients(), &groups(&self.layout))?;
        let grad_norm = input.gradient_scale * (sums[0] + sums[1]).sqrt();
        if !grad_norm.is_finite() {
            return Err(non_finite(store));
        }
        let clip = clip_factor(grad_norm, input.grad_clip);
        let factor = (input.gradient_scale * clip) as f32;
        let gates = self.gates(store, input, factor)?;
        let velocity_sq = match &self.passes {
            Some(passes) => self.move_on_device(passes, store, input, factor, gates)?,
            None => self.move_on_cpu(store, input, factor, gates)?,
        };
        self.step += 1;
        let gate = gates[usize::from(self.layout.decayed_len() == 0)];
        Ok(StepReport { grad_norm, clip_factor: clip, eta: input.scheduled_lr * gate, gate, velocity_sq })
    }

    fn state(&self) -> OptimizerState {
        let tensors = [("velocity", &self.velocity), ("second_moment", &self.second_moment)];
        OptimizerState {
            tensors: tensors.map(|(name, tensor)| (name.to_string(), tensor.clone())).to_vec(),
            scalars: vec![("step".to_string(), self.step as f64)],
        }
    }

    fn load_state(&mut self, state: &OptimizerState) -> Result<(), OptimError> {
        let own = self.state();
        let scalars = state.scalars_as(&own)?;
        state.copy_tensors_into(&own)?;
        self.step = scalars[0] as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::ParameterSpec;
    use crate::random::{Stream, fill_normal, generator};

    fn spec(name: &str, shape: &[usize], decays: bool) -> ParameterSpec {
        ParameterSpec { name: name.into(), shape: shape.to_vec(), decays }
    }

    /// X X' of the short side in f64.
    fn gram(x: &[f32], rows: usize, columns: usize) -> Vec<f64> {
        let at = |i: usize, p: usize| f64::from(if rows <= columns { x[i * columns + p] } else { x[p * columns + i] });
        let (small, large) = (rows.min(columns), rows.max(columns));
        let entry = |i: usize, j: usize| (0..large).map(|p| at(i, p) * at(j, p)).sum::<f64>();
        (0..small * small).map(|place| entry(place / small, place % small)).collect()
    }

    /// The iteration acts on each singular value alone: s <- a s + b s^3 + c s^5. On a matrix with known singular
    /// vectors that is an outside truth for every shape.
    #[test]
    fn orthogonalizing_maps_each_singular_value_by_the_quintic_and_keeps_the_vectors() {
        for (rows, columns) in [(3, 3), (3, 7), (7, 3), (1, 5), (5, 1)] {
            let small = rows.min(columns);
            let singular: Vec<f64> = (0..small).map(|i| 1.0 / (1.0 + 2.0 * i as f64)).collect();
            // Singular vectors: a rotation of the first two axes on each side.
            let (sin, cos) = 0.6f64.sin_cos();
            let turn = |i: usize, j: usize, n: usize| match (i, j) {
                (0, 0) | (1, 1) if n > 1 => cos,
                (0, 1) if n > 1 => -sin,
                (1, 0) if n > 1 => sin,
                _ => f64::from(u8::from(i == j)),
            };
            let build = |values: &[f64]| {
                let entry = |i: usize, j: usize| {
                    (0..small).map(|k| turn(i, k, rows) * values[k] * turn(j, k, columns)).sum::<f64>()
                };
                (0..rows * columns).map(|place| entry(place / columns, place % columns)).collect::<Vec<f64>>()
            };
            let mut x: Vec<f32> = build(&singular).iter().map(|&x| x as f32).collect();
            orthogonalize(&mut x, rows, columns);
            let norm = singular.iter().map(|s| s * s).sum::<f64>().sqrt();
            let mapped = singular.iter().map(|s| {
                (0..ITERATIONS).fold(s / (norm + 1e-7), |s, _| 3.4445 * s - 4.7750 * s.powi(3) + 2.0315 * s.powi(5))
            });
            let expected = build(&mapped.collect::<Vec<f64>>());
            let worst = x.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(worst < 2e-5, "{rows}x{columns}: {worst:e}");
        }
    }

    #[test]
    fn a_random_matrix_becomes_nearly_orthonormal_on_its_short_side() {
        for (rows, columns) in [(16, 16), (16, 50), (50, 16)] {
            let mut x = vec![0.0f32; rows * columns];
            fill_normal(&mut generator(5, Stream::Init), 0.02, &mut x);
            orthogonalize(&mut x, rows, columns);
            let small = rows.min(columns);
            let trace: f64 = (0..small).map(|i| gram(&x, rows, columns)[i * small + i]).sum();
            // The mean of the squared singular values; each is between about 0.7^2 and 1.2^2, save those near zero.
            assert!((0.5..1.4).contains(&(trace / small as f64)), "{rows}x{columns}: {trace}");
        }
    }

    #[test]
    fn hidden_matrices_are_told_apart_from_embeddings_head_norms_and_biases() {
        let layout = Layout::new(vec![
            spec("wte.weight", &[10, 4], true),
            spec("h.0.mlp.c_fc.weight", &[4, 16], true),
            spec("h.0.mlp.c_fc.bias", &[16], false),
            spec("layers.0.self_attn.q_proj.weight", &[4, 4], true),
            spec("embed_tokens.weight", &[10, 4], true),
            spec("lm_head.weight", &[10, 4], true),
        ]);
        let kinds: Vec<_> = layout.parameters().iter().map(kind).collect();
        use Kind::{Hidden, Rest};
        assert_eq!(kinds, [Rest, Hidden, Hidden, Rest, Rest, Rest]);
        let segments = segments(&layout);
        let ends: Vec<_> = segments.iter().map(|s| (s.range.start, s.range.end, s.kind, s.decays)).collect();
        assert_eq!(
            ends,
            [(0, 64, Rest, true), (64, 192, Hidden, true), (192, 320, Rest, true), (320, 384, Rest, false)]
        );
        // c_fc is stored [in, out]: 16 outputs of 4 inputs.
        assert_eq!(scale(&layout.parameters()[1]), 2.0);
    }
}
