//! OpenAI's calculator: where a solution has written `<<expression=`, the result and `>>` are put in for the model.
//!
//! Numbers are Python's: `/` gives a float and `8/2` writes `4.0`. An expression that Python would not evaluate, or that
//! needs an integer of more than 128 bits, is left to the model.

use std::iter::Peekable;
use std::str::CharIndices;

/// Watches a completion as it is written.
#[derive(Clone, Debug, Default)]
pub struct Calculator {
    /// What has been written since the last `<<`.
    open: Option<String>,
    last: Option<char>,
}

impl Calculator {
    /// Takes the next piece of the model's text; what to put after it, if it ends with an equals sign whose left side
    /// can be computed.
    pub fn push(&mut self, piece: &str) -> Option<String> {
        for character in piece.chars() {
            match (&mut self.open, self.last, character) {
                (_, Some('<'), '<') => {
                    (self.open, self.last) = (Some(String::new()), None);
                    continue;
                }
                (Some(_), Some('>'), '>') => self.open = None,
                (Some(written), _, _) => written.push(character),
                (None, _, _) => {}
            }
            self.last = Some(character);
        }
        if !piece.ends_with('=') {
            return None;
        }
        let (left, _) = self.open.as_deref()?.split_once('=')?;
        let result = evaluate(&left.replace(',', ""))?;
        self.push(&format!("{result}>>"));
        Some(format!("{result}>>"))
    }
}

/// A Python number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Number {
    Integer(i128),
    Float(f64),
}

use Number::{Float, Integer};

/// What Python's `str(eval(text))` gives for digits, `+-*/.()` alone.
fn evaluate(text: &str) -> Option<String> {
    let mut parser = Parser { characters: text.char_indices().peekable(), text };
    let value = parser.sum()?;
    if parser.characters.peek().is_some() {
        return None;
    }
    match value {
        Integer(value) => Some(value.to_string()),
        Float(value) => python_float(value),
    }
}

/// The shortest decimal that reads back as the same float, as Python's `repr` writes it.
fn python_float(value: f64) -> Option<String> {
    if !value.is_finite() {
        return None;
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e')?;
    let exponent: i32 = exponent.parse().ok()?;
    if value == 0.0 || (-4..16).contains(&exponent) {
        return Some(format!("{value:?}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    Some(format!("{digits}e{sign}{:02}", exponent.abs()))
}

struct Parser<'a> {
    characters: Peekable<CharIndices<'a>>,
    text: &'a str,
}

impl Parser<'_> {
    fn take(&mut self, wanted: char) -> bool {
        self.characters.next_if(|(_, character)| *character == wanted).is_some()
    }

    /// Whether an operator written twice stands here; it is taken.
    fn take_pair(&mut self, wanted: char) -> bool {
        let mut ahead = self.characters.clone();
        let pair = ahead.next().is_some_and(|(_, c)| c == wanted) && ahead.next().is_some_and(|(_, c)| c == wanted);
        if pair {
            self.characters = ahead;
        }
        pair
    }

    fn sum(&mut self) -> Option<Number> {
        let mut value = self.product()?;
        loop {
            let sign = if self.take('+') {
                1
            } else if self.take('-') {
                -1
            } else {
                return Some(value);
            };
            let right = self.product()?;
            value = match (value, right) {
                (Integer(a), Integer(b)) if sign > 0 => Integer(a.checked_add(b)?),
                (Integer(a), Integer(b)) => Integer(a.checked_sub(b)?),
                (a, b) => Float(a.float() + f64::from(sign) * b.float()),
            };
        }
    }

    fn product(&mut self) -> Option<Number> {
        let mut value = self.signed()?;
        loop {
            value = if self.take_pair('/') {
                floor_divide(value, self.signed()?)?
            } else if self.take('/') {
                let divisor = self.signed()?.float();
                (divisor != 0.0).then_some(Float(value.float() / divisor))?
            } else if self.take('*') {
                match (value, self.signed()?) {
                    (Integer(a), Integer(b)) => Integer(a.checked_mul(b)?),
                    (a, b) => Float(a.float() * b.float()),
                }
            } else {
                return Some(value);
            };
        }
    }

    /// A sign binds looser than a power before it: -2**2 is -4.
    fn signed(&mut self) -> Option<Number> {
        if self.take('+') {
            return self.signed();
        }
        if self.take('-') {
            return Some(match self.signed()? {
                Integer(value) => Integer(value.checked_neg()?),
                Float(value) => Float(-value),
            });
        }
        let base = self.atom()?;
        if self.take_pair('*') { power(base, self.signed()?) } else { Some(base) }
    }

    fn atom(&mut self) -> Option<Number> {
        if self.take('(') {
            let value = self.sum()?;
            return self.take(')').then_some(value);
        }
        let start = self.characters.peek()?.0;
        let mut end = start;
        while let Some((place, _)) = self.characters.next_if(|(_, c)| c.is_ascii_digit() || *c == '.') {
            end = place + 1;
        }
        let written = &self.text[start..end];
        let dots = written.matches('.').count();
        if written.is_empty() || written == "." || dots > 1 {
            return None;
        }
        if dots == 1 {
            return written.parse().ok().map(Float);
        }
        // Python refuses integers that begin with 0 and are not 0.
        let leading_zero = written.starts_with('0') && written.bytes().any(|byte| byte != b'0');
        if leading_zero { None } else { written.parse().ok().map(Integer) }
    }
}

impl Number {
    fn float(self) -> f64 {
        match self {
            Integer(value) => value as f64,
            Float(value) => value,
        }
    }
}

fn floor_divide(left: Number, right: Number) -> Option<Number> {
    match (left, right) {
        (Integer(a), Integer(b)) if b != 0 => {
            let quotient = a.checked_div(b)?;
            Some(Integer(if a % b != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient }))
        }
        (a, b) => (b.float() != 0.0).then(|| Float((a.float() / b.float()).floor())),
    }
}

fn power(base: Number, exponent: Number) -> Option<Number> {
    match (base, exponent) {
        (Integer(base), Integer(exponent)) if exponent >= 0 => {
            Some(Integer(base.checked_pow(u32::try_from(exponent).ok()?)?))
        }
        (base, exponent) => {
            let value = base.float().powf(exponent.float());
            // Python raises, or goes to complex numbers.
            value.is_finite().then_some(Float(value))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values from CPython's `str(eval(text))`; None where it raises.
    #[test]
    fn expressions_have_the_values_that_python_gives_them() {
        for (text, expected) in [
            ("48/2", Some("24.0")),
            ("48+24", Some("72")),
            ("5*12", Some("60")),
            ("12/5", Some("2.4")),
            ("1/3", Some("0.3333333333333333")),
            ("2-3*4", Some("-10")),
            ("(2-3)*4", Some("-4")),
            ("-7//2", Some("-4")),
            ("7//-2", Some("-4")),
            ("7.5//2", Some("3.0")),
            ("2**10", Some("1024")),
            ("2**-1", Some("0.5")),
            ("-2**2", Some("-4")),
            ("(-2)**2", Some("4")),
            ("2**3**2", Some("512")),
            ("0.1+0.2", Some("0.30000000000000004")),
            ("100000*100000", Some("10000000000")),
            ("10000000000000000/1", Some("1e+16")),
            ("123456789*1000000000/1", Some("1.23456789e+17")),
            ("1/100000", Some("1e-05")),
            ("0.00001*1", Some("1e-05")),
            ("5.", Some("5.0")),
            ("5.0*2", Some("10.0")),
            (".5+.5", Some("1.0")),
            ("007", None),
            ("00", Some("0")),
            ("3--2", Some("5")),
            ("3+-+2", Some("1")),
            ("4/0", None),
            ("4//0", None),
            ("((1)", None),
            ("1)", None),
            ("1.2.3", None),
            ("*3", None),
            ("3*/2", None),
            ("2*(3+4)/7", Some("2.0")),
            ("1000000*1.5", Some("1500000.0")),
            ("99/100*200", Some("198.0")),
        ] {
            assert_eq!(evaluate(text).as_deref(), expected, "{text}");
        }
        for text in ["", "2 + 2", "x", "2**", "10**40", "1e5"] {
            assert_eq!(evaluate(text), None, "{text}");
        }
    }

    #[test]
    fn the_result_is_put_in_after_an_equals_sign_inside_the_marks_only() {
        let mut calculator = Calculator::default();
        let inserted: Vec<Option<String>> =
            ["5 = ", "5 =", " <", "<48", "/2", "=", "24 = <<1,000", "+1=", " so <<", "a=", "<<3>> 3="]
                .map(|piece| calculator.push(piece))
                .to_vec();
        let mut expected = vec![None; 11];
        (expected[5], expected[7]) = (Some("24.0>>".to_owned()), Some("1001>>".to_owned()));
        assert_eq!(inserted, expected);
    }
}
