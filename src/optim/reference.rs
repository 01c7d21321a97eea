//! Every elementwise rule once more, in f64, an element at a time, as its paper writes it: the oracle of the tests.
//!
//! Nothing here is fast, shared with the kernels, or aware of chunks, flat storages and one-pass sums.

use super::config::OptimizerConfig;
use super::gate::{GateScope, GateSource, gate};
use super::keys::Name;

/// The state of a reference run; one number of each for every weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceState {
    /// Steps made.
    pub step: u64,
    pub velocity: Vec<f64>,
    /// The second state (second moment, mean square, surprise, Hessian); zeros where the method has none.
    pub second: Vec<f64>,
    /// NAdam's product of momenta.
    pub product: f64,
}

impl ReferenceState {
    pub fn new(len: usize) -> Self {
        Self { step: 0, velocity: vec![0.0; len], second: vec![0.0; len], product: 1.0 }
    }
}

/// One step of `config`. `gradient` is scaled and clipped already; `decays` tells for every weight whether decay
/// applies; `batch` is the step's tokens and `sampled` the sampled gradient of the steps that renew SophiaG's Hessian.
/// Gives eta (of the decayed weights where the gates differ) and ||new velocity||^2.
///
/// # Panics
/// For Muon, which is not elementwise.
#[allow(clippy::too_many_arguments, reason = "a step has this many operands")]
pub fn step(
    config: &OptimizerConfig,
    state: &mut ReferenceState,
    lr: f64,
    gradient: &[f64],
    sampled: Option<&[f64]>,
    batch: f64,
    weights: &mut [f64],
    decays: &[bool],
) -> (f64, f64) {
    let name = config.method();
    let n = |key: &str| config.number(key);
    state.step += 1;
    let t = state.step as f64;
    let lambda = |i: usize| if decays[i] { n("weight_decay") } else { 0.0 };
    let is_l2 = match name {
        Name::Adam | Name::Sgd | Name::RmsProp | Name::Rgd => true,
        Name::RAdam | Name::NAdam => config.is("decoupled_weight_decay", false),
        _ => false,
    };
    if let Some(sampled) = sampled {
        let b2 = n("beta2");
        state.second.iter_mut().zip(sampled).for_each(|(h, g)| *h = b2 * *h + (1.0 - b2) * g * g);
    }

    // The new velocity and second state.
    let before = state.velocity.clone();
    let mut g = gradient.to_vec();
    for i in 0..weights.len() {
        if is_l2 {
            g[i] += lambda(i) * weights[i];
        }
        let (v, m, g) = (&mut state.velocity[i], &mut state.second[i], g[i]);
        match name {
            Name::VrAdam | Name::AdamW | Name::Adam | Name::RAdam | Name::NAdam => {
                *v = n("beta1") * *v + (1.0 - n("beta1")) * g;
                *m = n("beta2") * *m + (1.0 - n("beta2")) * g * g;
            }
            Name::Sgd => *v = n("momentum") * *v + g,
            Name::RmsProp => {
                *m = n("alpha") * *m + (1.0 - n("alpha")) * g * g;
                *v = n("momentum") * *v + g / (m.sqrt() + n("eps"));
            }
            Name::Lion => *v = n("beta2") * *v + (1.0 - n("beta2")) * g,
            Name::AdaBelief => {
                *v = n("beta1") * *v + (1.0 - n("beta1")) * g;
                *m = n("beta2") * *m + (1.0 - n("beta2")) * (g - *v) * (g - *v) + n("eps");
            }
            Name::SophiaG => *v = n("beta1") * *v + (1.0 - n("beta1")) * g,
            Name::Rgd => *v = n("momentum") * *v - lr * g,
            Name::Muon => panic!("Muon is not elementwise"),
        }
    }
    let velocity_sq: f64 = state.velocity.iter().map(|v| v * v).sum();

    // The gate.
    let mut eta = [lr; 2];
    if let Some(settings) = config.gate() {
        let measured = if settings.source == GateSource::Gradient { gradient } else { &state.velocity[..] };
        let sum = |wanted: &dyn Fn(usize) -> bool| {
            let members = (0..measured.len()).filter(|&i| wanted(i));
            members.map(|i| measured[i].abs().powf(settings.power)).sum::<f64>()
        };
        let gate = |q| lr * gate(settings.beta3, settings.alpha1, q);
        eta = match settings.scope {
            GateScope::Global => [gate(sum(&|_| true)); 2],
            GateScope::Group => [gate(sum(&|i| decays[i])), gate(sum(&|i| !decays[i]))],
        };
    }

    // The weights.
    let mu = |t: f64| n("beta1") * (1.0 - 0.5 * 0.96f64.powf(t * n("psi")));
    if name == Name::NAdam {
        // An f32 product of f32 factors, as PyTorch's.
        state.product = f64::from(state.product as f32 * mu(t) as f32);
    }
    for i in 0..weights.len() {
        let eta = eta[usize::from(!decays[i])];
        let (g, v, m) = (g[i], state.velocity[i], state.second[i]);
        let corrected = |beta: &str| 1.0 - n(beta).powf(t);
        let change = match name {
            Name::VrAdam | Name::AdamW | Name::Adam => {
                v / corrected("beta1") / ((m / corrected("beta2")).sqrt() + n("eps"))
            }
            Name::RAdam => {
                let rho_inf = 2.0 / (1.0 - n("beta2")) - 1.0;
                let rho = rho_inf - 2.0 * t * n("beta2").powf(t) / corrected("beta2");
                let vh = v / corrected("beta1");
                if rho > 5.0 {
                    let r = ((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)).sqrt();
                    r * vh * corrected("beta2").sqrt() / (m.sqrt() + n("eps"))
                } else {
                    vh
                }
            }
            Name::NAdam => {
                let (now, next) = (mu(t), mu(t + 1.0));
                let direction = (1.0 - now) * g / (1.0 - state.product) + next * v / (1.0 - state.product * next);
                direction / ((m / corrected("beta2")).sqrt() + n("eps"))
            }
            Name::Sgd if config.is("nesterov", true) => g + n("momentum") * v,
            Name::Sgd | Name::RmsProp => v,
            Name::Lion => {
                let direction = n("beta1") * before[i] + (1.0 - n("beta1")) * g;
                if direction == 0.0 { 0.0 } else { direction.signum() }
            }
            Name::AdaBelief => v / corrected("beta1") / (m.sqrt() / corrected("beta2").sqrt() + n("eps")),
            Name::SophiaG if v == 0.0 => 0.0,
            Name::SophiaG => v.signum() * (v.abs() / (n("rho") * batch * m + 1e-15)).min(1.0),
            Name::Rgd => {
                let rest = n("m") * n("c");
                -n("c") * v / (rest * rest + velocity_sq).sqrt()
            }
            Name::Muon => panic!("Muon is not elementwise"),
        };
        let shrink = if is_l2 { 1.0 } else { 1.0 - eta * lambda(i) };
        weights[i] = weights[i] * shrink - eta * change;
    }
    let reported = usize::from(!decays.contains(&true));
    (eta[reported], velocity_sq)
}
