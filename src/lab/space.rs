//! A search space: numeric config keys with ranges, and points of it as numbers from 0 to 1.

use serde::{Deserialize, Serialize};

/// How a range is covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    Linear,
    Log,
    Integer,
}

/// One key with its range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dimension {
    /// The config key, e.g. `optimizer.lr`.
    pub key: String,
    pub low: f64,
    pub high: f64,
    pub scale: Scale,
}

impl Dimension {
    /// Reads `key=low..high`, `key=low..high:log` or `key=low..high:integer`.
    ///
    /// # Errors
    /// A message that says what is wrong and what is taken.
    pub fn parse(text: &str) -> Result<Self, String> {
        let form = "expected KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=LOW..HIGH:integer";
        let (key, range) = text.split_once('=').ok_or(form)?;
        let (range, scale) = match range.rsplit_once(':') {
            None => (range, Scale::Linear),
            Some((range, "linear")) => (range, Scale::Linear),
            Some((range, "log")) => (range, Scale::Log),
            Some((range, "integer")) => (range, Scale::Integer),
            Some((_, word)) => return Err(format!("{word:?} is no scale: it takes linear, log or integer")),
        };
        let (low, high) = range.split_once("..").ok_or(form)?;
        let number = |text: &str| {
            let number: f64 = text.trim().parse().map_err(|_| format!("{text:?} is not a number"))?;
            if number.is_finite() { Ok(number) } else { Err(format!("{text:?} is not a finite number")) }
        };
        let dimension = Self { key: key.trim().to_owned(), low: number(low)?, high: number(high)?, scale };
        dimension.check()?;
        Ok(dimension)
    }

    fn check(&self) -> Result<(), String> {
        let Self { key, low, high, scale } = self;
        if key.is_empty() {
            return Err("the key is missing".into());
        }
        if low >= high {
            return Err(format!("the range of {key} is empty: {low} is not below {high}"));
        }
        if *scale == Scale::Log && *low <= 0.0 {
            return Err(format!("a logarithmic range begins above 0, that of {key} at {low}"));
        }
        if *scale == Scale::Integer && (low.fract() != 0.0 || high.fract() != 0.0) {
            return Err(format!("an integer range has whole ends, that of {key} has {low} and {high}"));
        }
        Ok(())
    }

    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// Whether a trial can have `value`.
    pub fn takes(&self, value: f64) -> bool {
        self.contains(value) && (self.scale != Scale::Integer || value.fract() == 0.0)
    }

    /// The value at `place`, from 0 to 1.
    pub fn value(&self, place: f64) -> f64 {
        let place = place.clamp(0.0, 1.0);
        match self.scale {
            // Rounding may lead past the end.
            Scale::Linear => (self.low + place * (self.high - self.low)).min(self.high),
            Scale::Log => (self.low.ln() + place * (self.high / self.low).ln()).exp().clamp(self.low, self.high),
            Scale::Integer => (self.low + (place * (self.high - self.low + 1.0)).floor()).min(self.high),
        }
    }

    /// The place of `value`, from 0 to 1.
    pub fn place(&self, value: f64) -> f64 {
        let place = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
            Scale::Integer => (value - self.low + 0.5) / (self.high - self.low + 1.0),
        };
        place.clamp(0.0, 1.0)
    }

    /// The value as a config's text.
    pub fn toml(&self, value: f64) -> String {
        if self.scale == Scale::Integer { format!("{value:.0}") } else { format!("{value:?}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_places_belong_together() -> Result<(), String> {
        for text in ["optimizer.lr=1e-5..0.1:log", "optimizer.beta3=0.1..5", "optimizer.alpha1=3..30:integer"] {
            let dimension = Dimension::parse(text)?;
            for place in [0.0, 0.013, 0.5, 0.77, 1.0] {
                let value = dimension.value(place);
                assert!(dimension.contains(value), "{text} {place} {value}");
                assert!((dimension.value(dimension.place(value)) - value).abs() <= 1e-12 * value, "{text} {place}");
            }
        }
        let whole = Dimension::parse("a=3..5:integer")?;
        assert_eq!([0.0, 0.34, 0.67, 1.0].map(|place| whole.value(place)), [3.0, 4.0, 5.0, 5.0]);
        assert_eq!(whole.toml(4.0), "4");
        Ok(())
    }

    #[test]
    fn a_range_that_cannot_be_is_refused() {
        let message = |text| Dimension::parse(text).expect_err("no range");
        assert!(message("a=5..1").contains("empty"));
        assert!(message("a=0..1:log").contains("above 0"));
        assert!(message("a=0.5..3:integer").contains("whole"));
        assert!(message("a=1..2:cubic").contains("\"cubic\""));
        assert!(message("a=1..NaN").contains("finite"));
        assert!(message("a").contains("KEY=LOW..HIGH"));
        assert!(message("=1..2").contains("key"));
    }
}
