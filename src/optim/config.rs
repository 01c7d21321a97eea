//! The optimizers by name: their keys with defaults and allowed ranges, and what builds them.

use super::adam::{Adam, Decay};
use super::elementwise::{Elementwise, Method};
use super::gate::{GateScope, GateSettings, GateSource};
use super::muon::{Muon, MuonSettings};
use super::sgd::{Momentum, Sgd};
use super::sophia::{Sophia, SophiaG};
use super::{OptimError, Optimizer, adabelief, lion, nadam, radam, rgd, rmsprop, sam};
use crate::params::Layout;
use candle_core::Device;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// A key's value, as a config file has it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Number(f64),
    Bool(bool),
    Text(Cow<'static, str>),
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Bool(flag)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(Cow::Owned(text.to_string()))
    }
}

/// As TOML writes it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number:?}"),
            Self::Bool(flag) => write!(f, "{flag}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// A setting that cannot be used. The message is complete; `key` says where it belongs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    pub key: Option<String>,
    pub message: String,
}

/// Which values a key takes.
#[derive(Clone, Copy, Debug)]
enum Allowed {
    /// x > 0
    Positive,
    /// x >= 0
    NonNegative,
    /// 0 <= x < 1
    Fraction,
    /// A whole number from 1.
    Count,
    Flag,
    OneOf(&'static [&'static str]),
}

#[derive(Clone, Debug)]
struct Key {
    name: &'static str,
    default: Value,
    allowed: Allowed,
}

const fn number(name: &'static str, default: f64, allowed: Allowed) -> Key {
    Key { name, default: Value::Number(default), allowed }
}

const fn flag(name: &'static str, default: bool) -> Key {
    Key { name, default: Value::Bool(default), allowed: Allowed::Flag }
}

const fn word(name: &'static str, choices: &'static [&'static str]) -> Key {
    Key { name, default: Value::Text(Cow::Borrowed(choices[0])), allowed: Allowed::OneOf(choices) }
}

const fn lr(default: f64) -> Key {
    number("lr", default, Allowed::Positive)
}

const fn beta1(default: f64) -> Key {
    number("beta1", default, Allowed::Fraction)
}

const fn beta2(default: f64) -> Key {
    number("beta2", default, Allowed::Fraction)
}

const fn eps(default: f64) -> Key {
    number("eps", default, Allowed::Positive)
}

const fn weight_decay(default: f64) -> Key {
    number("weight_decay", default, Allowed::NonNegative)
}

const fn momentum(default: f64) -> Key {
    number("momentum", default, Allowed::Fraction)
}

/// VRAdam has these always; the others where `gate = true`.
const GATE: &[Key] = &[
    number("beta3", 1.0, Allowed::NonNegative),
    number("alpha1", 10.0, Allowed::NonNegative),
    word("gate_source", &["velocity", "gradient"]),
    word("gate_scope", &["global", "group"]),
    number("gate_power", 2.0, Allowed::Positive),
];

const SAM: &[Key] = &[number("sam_rho", 0.05, Allowed::Positive)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    VrAdam,
    AdamW,
    Adam,
    RAdam,
    NAdam,
    Sgd,
    RmsProp,
    Lion,
    AdaBelief,
    SophiaG,
    Rgd,
    Muon,
}

/// In the order of [`Name`].
const NAMES: [&str; 12] =
    ["vradam", "adamw", "adam", "radam", "nadam", "sgd", "rmsprop", "lion", "adabelief", "sophiag", "rgd", "muon"];

impl Name {
    const ALL: [Self; 12] = [
        Self::VrAdam,
        Self::AdamW,
        Self::Adam,
        Self::RAdam,
        Self::NAdam,
        Self::Sgd,
        Self::RmsProp,
        Self::Lion,
        Self::AdaBelief,
        Self::SophiaG,
        Self::Rgd,
        Self::Muon,
    ];

    fn parse(name: &str) -> Result<Self, ConfigError> {
        let place = NAMES.iter().position(|&other| other == name);
        place.map(|place| Self::ALL[place]).ok_or_else(|| ConfigError {
            key: Some("name".into()),
            message: format!("no optimizer is named {name:?}; {}", nearest(name, NAMES)),
        })
    }

    /// The keys of the method itself.
    fn own_keys(self) -> Vec<Key> {
        let decoupled = flag("decoupled_weight_decay", false);
        match self {
            Self::VrAdam => vec![lr(1e-3), beta1(0.9), beta2(0.999), eps(1e-8), weight_decay(1e-5)],
            Self::AdamW => vec![lr(1e-3), beta1(0.9), beta2(0.999), eps(1e-8), weight_decay(0.01)],
            Self::Adam => vec![lr(1e-3), beta1(0.9), beta2(0.999), eps(1e-8), weight_decay(0.0)],
            Self::RAdam => vec![lr(1e-3), beta1(0.9), beta2(0.999), eps(1e-8), weight_decay(0.0), decoupled],
            Self::NAdam => vec![
                lr(2e-3),
                beta1(0.9),
                beta2(0.999),
                number("psi", 0.004, Allowed::NonNegative),
                eps(1e-8),
                weight_decay(0.0),
                decoupled,
            ],
            Self::Sgd => vec![lr(1e-3), momentum(0.9), flag("nesterov", true), weight_decay(0.0)],
            Self::RmsProp => {
                vec![lr(1e-2), number("alpha", 0.99, Allowed::Fraction), momentum(0.0), eps(1e-8), weight_decay(0.0)]
            }
            Self::Lion => vec![lr(1e-4), beta1(0.9), beta2(0.99), weight_decay(0.0)],
            Self::AdaBelief => vec![lr(1e-3), beta1(0.9), beta2(0.999), eps(1e-16), weight_decay(0.0)],
            Self::SophiaG => vec![
                lr(1e-4),
                beta1(0.965),
                beta2(0.99),
                number("rho", 0.04, Allowed::Positive),
                weight_decay(0.1),
                number("hessian_every", 10.0, Allowed::Count),
            ],
            Self::Rgd => vec![
                lr(1e-3),
                momentum(0.9),
                number("c", 1e4, Allowed::Positive),
                number("m", 1e-3, Allowed::Positive),
                weight_decay(0.0),
            ],
            Self::Muon => vec![
                lr(0.02),
                momentum(0.95),
                number("adamw_lr", 3e-4, Allowed::Positive),
                beta1(0.9),
                beta2(0.95),
                eps(1e-8),
                weight_decay(0.01),
            ],
        }
    }

    /// Every key of the optimizer.
    fn keys(self) -> Vec<Key> {
        let mut keys = self.own_keys();
        if self != Self::VrAdam {
            keys.push(flag("gate", false));
        }
        keys.extend_from_slice(GATE);
        keys.push(flag("sam", false));
        keys.extend_from_slice(SAM);
        keys
    }
}

/// One optimizer with all its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerConfig {
    name: Name,
    settings: Vec<(&'static str, Value)>,
}

impl OptimizerConfig {
    pub fn names() -> &'static [&'static str] {
        &NAMES
    }

    /// Every key of the optimizer `name` with its default, or nothing for an unknown name.
    pub fn keys(name: &str) -> Option<Vec<(&'static str, Value)>> {
        let keys = Name::parse(name).ok()?.keys();
        Some(keys.into_iter().map(|key| (key.name, key.default)).collect())
    }

    /// The optimizer `name` with `keys` over its defaults.
    ///
    /// # Errors
    /// For an unknown name or key, a wrong type, a value out of range, a key given twice, and a key that has no effect
    /// (beta3 without `gate = true`, sam_rho without `sam = true`).
    pub fn from_keys(name: &str, keys: &[(String, Value)]) -> Result<Self, ConfigError> {
        let method = Name::parse(name)?;
        let known = method.keys();
        for (index, (key, value)) in keys.iter().enumerate() {
            let refuse = |message| Err(ConfigError { key: Some(key.clone()), message });
            let Some(entry) = known.iter().find(|entry| entry.name == key) else {
                let hint = nearest(key, known.iter().map(|entry| entry.name));
                return refuse(format!("the optimizer {name:?} has no key {key:?}; {hint}"));
            };
            if keys[..index].iter().any(|(other, _)| other == key) {
                return refuse(format!("the key {key:?} is given twice"));
            }
            if let Some(wanted) = entry.allowed.refusal(value) {
                return refuse(format!("{key} = {value} does not fit the optimizer {name:?}: {wanted}"));
            }
        }
        let get = |key: &Key| match keys.iter().find(|(name, _)| name == key.name) {
            Some((_, value)) => (key.name, value.clone()),
            None => (key.name, key.default.clone()),
        };
        let mut settings: Vec<_> = known.iter().map(get).collect();
        // Keys of a part that is switched off are left out; given, they would silently do nothing.
        for (switch, part) in [("gate", GATE), ("sam", SAM)] {
            if !settings.contains(&(switch, Value::Bool(false))) {
                continue;
            }
            if let Some((key, _)) = keys.iter().find(|(key, _)| part.iter().any(|entry| entry.name == key)) {
                let message = format!("{key} has no effect on the optimizer {name:?} without {switch} = true");
                return Err(ConfigError { key: Some(key.clone()), message });
            }
            settings.retain(|(key, _)| part.iter().all(|entry| entry.name != *key));
        }
        Ok(Self { name: method, settings })
    }

    pub fn name(&self) -> &'static str {
        NAMES[self.name as usize]
    }

    /// The peak learning rate, alpha0.
    pub fn lr(&self) -> f64 {
        self.number("lr")
    }

    /// All settings that have an effect, in a fixed order; [`Self::from_keys`] takes them back.
    pub fn resolved(&self) -> &[(&'static str, Value)] {
        &self.settings
    }

    /// Memory of the state.
    pub fn state_bytes_per_parameter(&self) -> usize {
        if matches!(self.name, Name::Sgd | Name::Lion | Name::Rgd) { 4 } else { 8 }
    }

    pub(super) fn method(&self) -> Name {
        self.name
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.settings.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// # Panics
    /// When the optimizer has no such key: a defect of this module.
    pub(super) fn number(&self, key: &str) -> f64 {
        match self.get(key) {
            Some(Value::Number(number)) => *number,
            other => panic!("{key} of {} is {other:?}, not a number", self.name()),
        }
    }

    pub(super) fn is(&self, key: &str, value: impl Into<Value>) -> bool {
        self.get(key) == Some(&value.into())
    }

    /// The gate, where the optimizer has one.
    pub(super) fn gate(&self) -> Option<GateSettings> {
        if self.is("gate", false) {
            return None;
        }
        let source = if self.is("gate_source", "gradient") { GateSource::Gradient } else { GateSource::Velocity };
        let scope = if self.is("gate_scope", "group") { GateScope::Group } else { GateScope::Global };
        let [beta3, alpha1, power] = ["beta3", "alpha1", "gate_power"].map(|key| self.number(key));
        Some(GateSettings { beta3, alpha1, source, scope, power })
    }

    pub(super) fn decay(&self) -> Decay {
        match self.name {
            Name::RAdam | Name::NAdam if self.is("decoupled_weight_decay", true) => Decay::Decoupled,
            Name::RAdam | Name::NAdam | Name::Adam | Name::Sgd | Name::RmsProp | Name::Rgd => Decay::L2,
            Name::VrAdam | Name::AdamW | Name::Lion | Name::AdaBelief | Name::SophiaG | Name::Muon => Decay::Decoupled,
        }
    }

    /// The optimizer for parameters laid out by `layout`, with its state at the start.
    ///
    /// # Errors
    /// When the device has no memory for the state.
    pub fn build(&self, layout: &Arc<Layout>, device: &Device) -> Result<Box<dyn Optimizer>, OptimError> {
        fn elementwise<const N: usize, M: Method<N> + 'static>(
            config: &OptimizerConfig,
            method: M,
            layout: &Arc<Layout>,
            device: &Device,
        ) -> Result<Box<dyn Optimizer>, OptimError> {
            Ok(Box::new(Elementwise::new(method, config.gate(), layout, device)?))
        }
        let n = |key| self.number(key);
        let (weight_decay, decay) = (n("weight_decay"), self.decay());
        let inner = match self.name {
            Name::VrAdam | Name::AdamW | Name::Adam => {
                let method = Adam { beta1: n("beta1"), beta2: n("beta2"), eps: n("eps"), weight_decay, decay };
                elementwise(self, method, layout, device)
            }
            Name::RAdam => {
                let (beta1, beta2, eps) = (n("beta1"), n("beta2"), n("eps"));
                elementwise(self, radam::RAdam { beta1, beta2, eps, weight_decay, decay }, layout, device)
            }
            Name::NAdam => {
                let (beta1, beta2, psi, eps) = (n("beta1"), n("beta2"), n("psi"), n("eps"));
                let method = nadam::NAdam { beta1, beta2, psi, eps, weight_decay, decay, product: 1.0 };
                elementwise(self, method, layout, device)
            }
            Name::Sgd => {
                let kind = if self.is("nesterov", true) { Momentum::Nesterov } else { Momentum::HeavyBall };
                elementwise(self, Sgd { momentum: n("momentum"), kind, weight_decay }, layout, device)
            }
            Name::RmsProp => {
                let (alpha, momentum, eps) = (n("alpha"), n("momentum"), n("eps"));
                elementwise(self, rmsprop::RmsProp { alpha, momentum, eps, weight_decay }, layout, device)
            }
            Name::Lion => {
                elementwise(self, lion::Lion { beta1: n("beta1"), beta2: n("beta2"), weight_decay }, layout, device)
            }
            Name::AdaBelief => {
                let (beta1, beta2, eps) = (n("beta1"), n("beta2"), n("eps"));
                elementwise(self, adabelief::AdaBelief { beta1, beta2, eps, weight_decay }, layout, device)
            }
            Name::SophiaG => {
                let method = Sophia { beta1: n("beta1"), beta2: n("beta2"), rho: n("rho"), weight_decay };
                let every = n("hessian_every") as u64;
                Ok(Box::new(SophiaG::new(method, every, self.gate(), layout, device)?) as Box<dyn Optimizer>)
            }
            Name::Rgd => {
                let (momentum, speed, mass) = (n("momentum"), n("c"), n("m"));
                elementwise(self, rgd::Rgd { momentum, speed, mass, weight_decay }, layout, device)
            }
            Name::Muon => {
                let settings = MuonSettings {
                    momentum: n("momentum"),
                    weight_decay,
                    lr: n("lr"),
                    adamw_lr: n("adamw_lr"),
                    beta1: n("beta1"),
                    beta2: n("beta2"),
                    eps: n("eps"),
                };
                Ok(Box::new(Muon::new(settings, self.gate(), layout, device)?) as Box<dyn Optimizer>)
            }
        }?;
        Ok(if self.is("sam", true) { Box::new(sam::Sam { rho: n("sam_rho"), inner }) } else { inner })
    }
}

impl Allowed {
    /// What is wanted instead of `value`, if it does not fit.
    fn refusal(self, value: &Value) -> Option<String> {
        let fits = match (self, value) {
            (Self::Positive, Value::Number(x)) => x.is_finite() && *x > 0.0,
            (Self::NonNegative, Value::Number(x)) => x.is_finite() && *x >= 0.0,
            (Self::Fraction, Value::Number(x)) => (0.0..1.0).contains(x),
            (Self::Count, Value::Number(x)) => (1.0..=1e15).contains(x) && x.fract() == 0.0,
            (Self::Flag, Value::Bool(_)) => true,
            (Self::OneOf(words), Value::Text(text)) => words.contains(&&**text),
            _ => false,
        };
        let wanted = match self {
            Self::Positive => "it takes a number above 0".into(),
            Self::NonNegative => "it takes a number from 0".into(),
            Self::Fraction => "it takes a number from 0 to below 1".into(),
            Self::Count => "it takes a whole number from 1".into(),
            Self::Flag => "it takes true or false".into(),
            Self::OneOf(words) => format!("it takes one of {words:?}"),
        };
        (!fits).then_some(wanted)
    }
}

/// "did you mean ..." or, where nothing is near, all the choices.
pub(super) fn nearest<'a>(given: &str, choices: impl IntoIterator<Item = &'a str>) -> String {
    let choices: Vec<&str> = choices.into_iter().collect();
    let best = choices.iter().map(|choice| (strsim::jaro_winkler(given, choice), choice));
    match best.max_by(|(a, _), (b, _)| a.total_cmp(b)) {
        Some((similarity, choice)) if similarity > 0.7 => format!("did you mean {choice:?}?"),
        _ => format!("it is one of {}", choices.join(", ")),
    }
}
