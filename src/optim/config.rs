//! From a name and keys to a complete, checked config, and from that to an optimizer.

use super::adam::{Adam, Decay};
use super::elementwise::{Elementwise, Method};
use super::gate::{GateScope, GateSettings, GateSource};
pub use super::keys::Value;
use super::keys::{GATE, IDLE, Key, NAMES, Name, SAM};
use super::muon::{Muon, MuonSettings};
use super::sgd::{Momentum, Sgd};
use super::sophia::{Sophia, SophiaG};
use super::{OptimError, Optimizer, adabelief, lion, nadam, radam, rgd, rmsprop, sam};
use crate::params::Layout;
use candle_core::Device;
use std::sync::Arc;

/// A setting that cannot be used. The message is complete; `key` says where it belongs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    pub key: Option<String>,
    pub message: String,
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
        // So are keys that another value makes idle: a sweep may pass through 0, and a resumed run has not given them.
        for (cause, idle) in IDLE {
            if settings.contains(&(cause, Value::Number(0.0))) {
                settings.retain(|(key, _)| !idle.contains(key));
            }
        }
        Ok(Self { name: method, settings })
    }

    /// Those of `keys`, from which this config was made, that have no effect because of another's value: key and reason.
    pub fn without_effect<'a>(&self, keys: &'a [(String, Value)]) -> Vec<(&'a str, String)> {
        let reason = |key: &str| {
            let idle_by = |(cause, idle): &&(&str, &[&str])| idle.contains(&key) && self.is(cause, 0.0);
            IDLE.iter().find(idle_by).map(|(cause, _)| format!("has no effect while `optimizer.{cause}` is 0"))
        };
        let left_out = |key: &str| self.settings.iter().all(|(name, _)| *name != key);
        // What is switched off by its own value as well contradicts nothing.
        let given = keys.iter().filter(|(key, value)| left_out(key) && *value != Value::Bool(false));
        given.filter_map(|(key, _)| Some((key.as_str(), reason(key)?))).collect()
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

    /// Memory of the state, with the copy of the weights that SAM keeps.
    pub fn state_bytes_per_parameter(&self) -> usize {
        let moments = if matches!(self.name, Name::Sgd | Name::Lion | Name::Rgd) { 4 } else { 8 };
        if self.is("sam", true) { moments + 4 } else { moments }
    }

    pub(super) fn method(&self) -> Name {
        self.name
    }

    /// The value of `key`; of one that has no effect, the default.
    fn get(&self, key: &str) -> Option<Value> {
        let set = self.settings.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone());
        set.or_else(|| self.name.keys().into_iter().find(|entry| entry.name == key).map(|entry| entry.default))
    }

    /// # Panics
    /// When the optimizer has no such key: a defect of this module.
    pub(super) fn number(&self, key: &str) -> f64 {
        match self.get(key) {
            Some(Value::Number(number)) => number,
            other => panic!("{key} of {} is {other:?}, not a number", self.name()),
        }
    }

    pub(super) fn is(&self, key: &str, value: impl Into<Value>) -> bool {
        self.get(key) == Some(value.into())
    }

    /// The gate, where the optimizer has one that can close.
    pub(super) fn gate(&self) -> Option<GateSettings> {
        if self.is("gate", false) || self.is("beta3", 0.0) || self.is("alpha1", 0.0) {
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
    /// When the device has no kernels (another than the CPU; with the cuda feature, than CUDA) or no memory for the
    /// state.
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
        Ok(if self.is("sam", true) { Box::new(sam::Sam::new(n("sam_rho"), inner)) } else { inner })
    }
}

/// "did you mean ..." or, where nothing is near, all the choices.
pub(super) fn nearest<'a>(given: &str, choices: impl IntoIterator<Item = &'a str>) -> String {
    let choices: Vec<&str> = choices.into_iter().collect();
    let best = choices.iter().map(|choice| (strsim::jaro_winkler(&given.to_lowercase(), choice), choice));
    match best.max_by(|(a, _), (b, _)| a.total_cmp(b)) {
        Some((similarity, choice)) if similarity > 0.7 => format!("did you mean {choice:?}?"),
        _ => format!("it is one of {}", choices.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, keys: &[(&str, Value)]) -> Result<OptimizerConfig, ConfigError> {
        let keys: Vec<_> = keys.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        OptimizerConfig::from_keys(name, &keys)
    }

    fn refusal(name: &str, keys: &[(&str, Value)]) -> String {
        parse(name, keys).unwrap_err().to_string()
    }

    #[test]
    fn the_documentation_lists_every_key_with_its_default() {
        let text = include_str!("../../docs/optimizers.md");
        let line = |keys: &[Key]| keys.iter().map(|key| format!("{} = {}", key.name, key.default)).collect::<Vec<_>>();
        for name in OptimizerConfig::names() {
            let all = Name::parse(name).unwrap().keys();
            let own = all.iter().take_while(|key| key.name != "beta3").cloned().collect::<Vec<_>>();
            let row = format!("| `{name}` | {} |", line(&own).join(", "));
            assert!(text.contains(&row), "docs/optimizers.md lacks: {row}");
        }
        for key in line(&[GATE, SAM].concat()) {
            assert!(
                text.split_whitespace().collect::<Vec<_>>().join(" ").contains(&key),
                "docs/optimizers.md lacks: {key}"
            );
        }
    }

    #[test]
    fn a_resolved_config_is_complete_and_gives_itself_back() {
        for name in OptimizerConfig::names() {
            for extra in [vec![], vec![("gate", true)], vec![("sam", true)]] {
                let extra: Vec<_> = extra.into_iter().map(|(key, value)| (key, value.into())).collect();
                let config = parse(name, &extra).unwrap();
                let keys: Vec<(&str, Value)> = config.resolved().to_vec();
                assert_eq!(parse(name, &keys).unwrap(), config);
                assert_eq!(config.name(), *name);
                assert!(config.lr() > 0.0);
            }
        }
    }

    #[test]
    fn the_defaults_are_those_of_the_papers() {
        let config = parse("vradam", &[]).unwrap();
        let expected = [
            ("lr", 1e-3),
            ("beta1", 0.9),
            ("beta2", 0.999),
            ("eps", 1e-8),
            ("weight_decay", 1e-5),
            ("beta3", 1.0),
            ("alpha1", 10.0),
            ("gate_power", 2.0),
        ];
        expected.iter().for_each(|&(key, value)| assert_eq!(config.number(key), value, "{key}"));
        assert!(config.is("gate_source", "velocity") && config.is("gate_scope", "global"));
        let lrs = ["adamw", "nadam", "rmsprop", "lion", "sophiag", "rgd", "muon"].map(|n| parse(n, &[]).unwrap().lr());
        assert_eq!(lrs, [1e-3, 2e-3, 1e-2, 1e-4, 1e-4, 1e-3, 0.02]);
    }

    #[test]
    fn a_wrong_key_is_refused_with_the_nearest_right_one() {
        let message = refusal("vradam", &[("bata3", 1.0.into())]);
        assert!(message.contains("\"bata3\"") && message.contains("\"vradam\"") && message.contains("\"beta3\""));
        assert!(refusal("sgd", &[("beta1", 0.9.into())]).contains("\"sgd\" has no key \"beta1\""));
        assert!(refusal("vradma", &[]).contains("\"vradam\""));
        assert!(refusal("zzz", &[]).contains("vradam, adamw"));
        assert_eq!(parse("vradam", &[("bata3", 1.0.into())]).unwrap_err().key.as_deref(), Some("bata3"));
    }

    #[test]
    fn a_value_out_of_range_or_of_another_type_is_refused() {
        for (name, key, value) in [
            ("vradam", "lr", Value::from(0.0)),
            ("vradam", "lr", f64::INFINITY.into()),
            ("vradam", "lr", f64::NAN.into()),
            ("vradam", "beta1", 1.0.into()),
            ("vradam", "beta2", (-0.1).into()),
            ("vradam", "eps", 0.0.into()),
            ("vradam", "weight_decay", (-1.0).into()),
            // Infinite in f32: the weights would be NaN after a step.
            ("vradam", "weight_decay", 1e39.into()),
            ("vradam", "beta3", f64::INFINITY.into()),
            ("vradam", "gate_power", 0.0.into()),
            ("vradam", "gate_source", "momentum".into()),
            ("vradam", "gate_scope", true.into()),
            ("vradam", "lr", "fast".into()),
            ("sgd", "nesterov", 1.0.into()),
            ("sophiag", "hessian_every", 2.5.into()),
            ("sophiag", "hessian_every", 0.0.into()),
        ] {
            let message = refusal(name, &[(key, value.clone())]);
            assert!(message.contains(key) && message.contains("it takes"), "{message}");
        }
        assert!(refusal("adamw", &[("lr", 1.0.into()), ("lr", 2.0.into())]).contains("twice"));
    }

    #[test]
    fn a_key_that_would_do_nothing_is_refused() {
        assert!(refusal("lion", &[("beta3", 3.0.into())]).contains("without gate = true"));
        assert!(refusal("vradam", &[("sam_rho", 0.1.into())]).contains("without sam = true"));
        assert!(refusal("vradam", &[("alpha1", 3.0.into()), ("gate", false.into())]).contains("without gate = true"));
        assert!(parse("lion", &[("beta3", 3.0.into()), ("gate", true.into())]).is_ok());
    }

    #[test]
    fn a_key_that_another_value_makes_idle_is_told_and_left_out() {
        let idle = |name: &str, keys: &[(&str, Value)]| {
            let keys: Vec<_> = keys.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
            let config = OptimizerConfig::from_keys(name, &keys).unwrap();
            let told: Vec<_> = config.without_effect(&keys).iter().map(|(key, _)| key.to_string()).collect();
            assert!(told.iter().all(|told| config.resolved().iter().all(|(key, _)| key != told)));
            // What is written down tells nothing on reading.
            let written: Vec<_> =
                config.resolved().iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
            let again = OptimizerConfig::from_keys(name, &written).unwrap();
            assert!(again == config && again.without_effect(&written).is_empty(), "{config:?} {again:?}");
            told
        };
        let (zero, on) = (|key| (key, Value::from(0.0)), |key| (key, Value::from(true)));
        assert_eq!(idle("vradam", &[("alpha1", 5.0.into()), zero("beta3")]), ["alpha1"]);
        assert_eq!(idle("vradam", &[zero("alpha1"), ("beta3", 2.0.into())]), ["beta3"]);
        assert_eq!(idle("vradam", &[zero("alpha1"), zero("beta3")]), ["alpha1"]);
        assert_eq!(idle("lion", &[on("gate"), ("gate_scope", "group".into()), zero("beta3")]), ["gate_scope"]);
        assert_eq!(idle("sgd", &[zero("momentum"), on("nesterov")]), ["nesterov"]);
        assert_eq!(idle("nadam", &[("psi", 0.01.into()), zero("beta1")]), ["psi"]);
        assert_eq!(idle("radam", &[on("decoupled_weight_decay")]), ["decoupled_weight_decay"]);
        for name in OptimizerConfig::names() {
            assert!(idle(name, &[]).is_empty() && idle(name, &[on("gate"), ("alpha1", 5.0.into())]).is_empty());
        }
        assert!(idle("vradam", &[zero("beta3")]).is_empty());
        // A flag that is off contradicts nothing.
        assert!(idle("sgd", &[zero("momentum"), ("nesterov", false.into())]).is_empty());
        assert!(idle("rmsprop", &[zero("momentum")]).is_empty());
    }
}
