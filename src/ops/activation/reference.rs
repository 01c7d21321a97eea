//! The activations by their definitions, in f64.

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044715;

pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + CUBIC * x.powi(3))).tanh())
}

/// The derivative of [`gelu`] at x.
pub fn gelu_slope(x: f64) -> f64 {
    let tanh = (SQRT_2_OVER_PI * (x + CUBIC * x.powi(3))).tanh();
    let inner_slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner_slope
}

pub fn swiglu(gate: f64, up: f64) -> f64 {
    gate / (1.0 + (-gate).exp()) * up
}

/// The derivatives of [`swiglu`] by gate and by up.
pub fn swiglu_slopes(gate: f64, up: f64) -> (f64, f64) {
    let sigmoid = 1.0 / (1.0 + (-gate).exp());
    (up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), gate * sigmoid)
}
