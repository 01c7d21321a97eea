//! The optimizers' names and keys, with defaults and allowed values.

use super::config::{ConfigError, nearest};
use std::borrow::Cow;
use std::fmt;

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

/// Which values a key takes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Allowed {
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
pub(super) struct Key {
    pub name: &'static str,
    pub default: Value,
    pub allowed: Allowed,
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

/// The keys of the gate, which VRAdam has unless `gate = false` and the others where `gate = true`.
pub(super) const GATE: &[Key] = &[
    number("beta3", 1.0, Allowed::NonNegative),
    number("alpha1", 10.0, Allowed::NonNegative),
    word("gate_source", &["velocity", "gradient"]),
    word("gate_scope", &["global", "group"]),
    number("gate_power", 2.0, Allowed::Positive),
];

pub(super) const SAM: &[Key] = &[number("sam_rho", 0.05, Allowed::Positive)];

/// Keys that at 0 leave others without effect. No key is idle by more than one of them in any optimizer, but for the
/// gate's, where the first counts.
pub(super) const IDLE: &[(&str, &[&str])] = &[
    // The gate stays open.
    ("beta3", &["alpha1", "gate_source", "gate_scope", "gate_power"]),
    ("alpha1", &["beta3", "gate_source", "gate_scope", "gate_power"]),
    // There is no velocity to look ahead with.
    ("momentum", &["nesterov"]),
    // NAdam's momentum is a multiple of beta1.
    ("beta1", &["psi"]),
    ("weight_decay", &["decoupled_weight_decay"]),
];

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
pub(super) const NAMES: [&str; 12] =
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

    pub fn parse(name: &str) -> Result<Self, ConfigError> {
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
    pub fn keys(self) -> Vec<Key> {
        let mut keys = self.own_keys();
        keys.push(flag("gate", self == Self::VrAdam));
        keys.extend_from_slice(GATE);
        keys.push(flag("sam", false));
        keys.extend_from_slice(SAM);
        keys
    }
}

impl Allowed {
    /// What is wanted instead of `value`, if it does not fit.
    pub fn refusal(self, value: &Value) -> Option<String> {
        let fits = match (self, value) {
            // The kernels take it as f32.
            (Self::Positive, Value::Number(x)) => (*x as f32).is_finite() && *x as f32 > 0.0,
            (Self::NonNegative, Value::Number(x)) => (*x as f32).is_finite() && *x >= 0.0,
            (Self::Fraction, Value::Number(x)) => (0.0..1.0).contains(x),
            (Self::Count, Value::Number(x)) => (1.0..=1e15).contains(x) && x.fract() == 0.0,
            (Self::Flag, Value::Bool(_)) => true,
            (Self::OneOf(words), Value::Text(text)) => words.contains(&&**text),
            _ => false,
        };
        let wanted = match self {
            Self::Positive => "it takes a number above 0, within the range of f32 (1.4e-45 to 3.4e38)".into(),
            Self::NonNegative => "it takes a number from 0, within the range of f32 (to 3.4e38)".into(),
            Self::Fraction => "it takes a number from 0 to below 1".into(),
            Self::Count => "it takes a whole number from 1".into(),
            Self::Flag => "it takes true or false".into(),
            Self::OneOf(words) => format!("it takes one of {words:?}"),
        };
        (!fits).then_some(wanted)
    }
}
