//! The largest eigenvalues of a loss's Hessian, plain or preconditioned, by Lanczos' method on Hessian-vector products.
//!
//! The loss is a function of f64 parameters built from candle primitives. A product is a central difference of gradients,
//! H v = (g(theta + h v) - g(theta - h v)) / 2h, and its error is estimated from a second difference with h/2. Where a kink
//! (of ReLU) lies within h, the gradient's jump enters as a jump / 2h: then the error is large, and smaller h are tried.
//! With P = diag(sqrt(mh) + eps), Adam's preconditioner, the eigenvalues of P^-1 H are those of P^-1/2 H P^-1/2, which is
//! symmetric.

use crate::params::Layout;
use crate::random::{Stream, generator, normal_pair};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};

/// The h of a central difference along a vector of length 1: the first, and those that are tried in turn while the
/// estimated error is above [`DOUBTFUL`].
const STEPS: [f64; 4] = [1e-4, 1e-5, 1e-6, 1e-7];

/// The share of a value from which the difference's estimated error on makes it doubtful.
pub const DOUBTFUL: f64 = 0.05;

/// A loss as a function of the parameters, in the layout's order.
pub type Loss<'a> = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + 'a>;

/// Such a loss and its gradient.
pub struct Gradient<'a> {
    variables: Vec<Var>,
    shapes: Vec<Vec<usize>>,
    loss: Loss<'a>,
}

impl<'a> Gradient<'a> {
    /// `loss` gets the parameters as f64 tensors in the layout's order.
    pub fn new(layout: &Layout, loss: impl Fn(&[Tensor]) -> Result<Tensor> + 'a) -> Result<Self> {
        let shapes: Vec<Vec<usize>> = layout.parameters().iter().map(|parameter| parameter.shape.clone()).collect();
        let zeros = |shape: &Vec<usize>| Var::zeros(shape.as_slice(), DType::F64, &Device::Cpu);
        let variables = shapes.iter().map(zeros).collect::<candle_core::Result<_>>()?;
        Ok(Self { variables, shapes, loss: Box::new(loss) })
    }

    fn set(&self, point: &[f64]) -> Result<()> {
        let mut rest = point;
        for (variable, shape) in self.variables.iter().zip(&self.shapes) {
            let (numbers, after) = rest.split_at(shape.iter().product());
            variable.set(&Tensor::from_slice(numbers, shape.as_slice(), &Device::Cpu)?)?;
            rest = after;
        }
        Ok(())
    }

    fn tensors(&self) -> Vec<Tensor> {
        self.variables.iter().map(|variable| variable.as_tensor().clone()).collect()
    }

    /// The loss at `point` (all parameters one after another, without gaps).
    pub fn loss_at(&self, point: &[f64]) -> Result<f64> {
        self.set(point)?;
        Ok((self.loss)(&self.tensors())?.to_scalar()?)
    }

    /// The gradient at `point`.
    pub fn at(&self, point: &[f64]) -> Result<Vec<f64>> {
        self.set(point)?;
        let gradients = (self.loss)(&self.tensors())?.backward()?;
        let mut out = Vec::with_capacity(point.len());
        for (variable, shape) in self.variables.iter().zip(&self.shapes) {
            match gradients.get(variable) {
                Some(gradient) => out.extend(gradient.flatten_all()?.to_vec1::<f64>()?),
                None => out.extend(std::iter::repeat_n(0.0, shape.iter().product())),
            }
        }
        Ok(out)
    }

    /// The Hessian at `point` times `vector`, by a central difference over `step`.
    fn product(&self, point: &[f64], vector: &[f64], step: f64) -> Result<Vec<f64>> {
        let shifted = |sign: f64| {
            let moved: Vec<f64> = point.iter().zip(vector).map(|(x, v)| x + sign * step * v).collect();
            self.at(&moved)
        };
        let (above, below) = (shifted(1.0)?, shifted(-1.0)?);
        Ok(above.iter().zip(below).map(|(a, b)| (a - b) / (2.0 * step)).collect())
    }
}

/// The numbers of a flat storage without its gaps.
pub fn packed(layout: &Layout, flat: &[f32]) -> Vec<f64> {
    layout.parameters().iter().flat_map(|parameter| flat[parameter.range()].iter().map(|&x| f64::from(x))).collect()
}

/// Adam's preconditioner, sqrt(m / (1 - b2^t)) + eps, from a second moment.
pub fn preconditioner(second_moment: &[f64], beta2: f64, step: u64, epsilon: f64) -> Vec<f64> {
    let correction = 1.0 - beta2.powf(step as f64);
    second_moment.iter().map(|m| (m / correction).sqrt() + epsilon).collect()
}

/// What Lanczos' method found.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    /// The largest eigenvalues, descending.
    pub largest: Vec<f64>,
    /// Bound of the first one's error by the method itself (the residual's norm).
    pub residual: f64,
    /// Estimate of its error by the difference: from a second one with half the step, and, where that is more than
    /// [`DOUBTFUL`] of the value, from how far the products are from a linear map's.
    pub difference_error: f64,
    pub iterations: usize,
}

impl Spectrum {
    /// The difference's estimated error as a share of the largest value.
    fn share_of_error(&self) -> f64 {
        self.share(self.difference_error)
    }

    /// An error as a share of the largest value; above [`DOUBTFUL`] the values are not to be trusted.
    pub fn share(&self, error: f64) -> f64 {
        error / self.largest.first().map_or(0.0, |value| value.abs()).max(f64::MIN_POSITIVE)
    }
}

/// The Hessian of a loss at `point`, or P^-1 H where `preconditioner` gives P, and how its eigenvalues are sought.
pub struct Hessian<'a> {
    pub gradient: &'a Gradient<'a>,
    pub point: &'a [f64],
    pub preconditioner: Option<&'a [f64]>,
    /// How many of the largest eigenvalues are wanted, and after how many of Lanczos' iterations.
    pub count: usize,
    pub iterations: usize,
    pub seed: u64,
}

/// Its largest eigenvalues.
///
/// # Errors
/// When a product is not finite.
pub fn spectrum(hessian: &Hessian) -> Result<Spectrum> {
    let mut best: Option<Spectrum> = None;
    for step in STEPS {
        let found = spectrum_by(step, hessian)?;
        let share = found.share_of_error();
        if best.as_ref().is_none_or(|best| share < best.share_of_error()) {
            best = Some(found);
        }
        if share <= DOUBTFUL {
            break;
        }
    }
    best.context("no step of the difference was tried")
}

/// [`spectrum`] by differences over `step`.
fn spectrum_by(step: f64, hessian: &Hessian) -> Result<Spectrum> {
    let &Hessian { gradient, point, preconditioner, count, iterations, seed } = hessian;
    ensure!(!point.is_empty(), "a model without parameters has no Hessian");
    let roots: Option<Vec<f64>> = preconditioner.map(|p| p.iter().map(|p| 1.0 / p.sqrt()).collect());
    let scale = |vector: &[f64]| match &roots {
        None => vector.to_vec(),
        Some(roots) => vector.iter().zip(roots).map(|(v, root)| v * root).collect(),
    };
    let product = |vector: &[f64], step: f64| -> Result<Vec<f64>> {
        let inner = scale(vector);
        let length = norm(&inner);
        // The difference is taken over a vector of length 1, whatever the preconditioner makes of it.
        let unit: Vec<f64> = inner.iter().map(|x| x / length).collect();
        let curved: Vec<f64> = gradient.product(point, &unit, step)?.iter().map(|x| x * length).collect();
        ensure!(curved.iter().all(|x| x.is_finite()), "the gradient of the loss is not finite here");
        Ok(scale(&curved))
    };
    let lanczos = lanczos(point.len(), iterations, seed, |vector| product(vector, step))?;
    let (values, vectors) = symmetric_eigen(&lanczos.tridiagonal());
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    let top = *order.first().context("Lanczos' method made no step")?;
    // The Ritz vector of the largest value, once more with half the step.
    let mut ritz = vec![0.0; point.len()];
    for (row, basis) in lanczos.basis.iter().enumerate() {
        ritz.iter_mut().zip(basis).for_each(|(r, b)| *r += vectors[row][top] * b);
    }
    let value = values[top];
    let at_step = product(&ritz, step)?;
    let quotient = |image: &[f64]| dot(&ritz, image) / dot(&ritz, &ritz);
    let mut difference_error = (quotient(&at_step) - quotient(&product(&ritz, 0.5 * step)?)).abs();
    let last = vectors.last().map_or(0.0, |row| row[top]);
    let residual = (lanczos.beta.last().unwrap_or(&0.0) * last).abs();
    // Of a linear map the products leave this vector no other residual than that. A kink that some of them met makes the
    // two differ, also where this vector does not meet it.
    let left: Vec<f64> = at_step.iter().zip(&ritz).map(|(image, r)| image - value * r).collect();
    let excess = norm(&left) / norm(&ritz) - residual;
    if excess > DOUBTFUL * value.abs() {
        difference_error = difference_error.max(excess);
    }
    Ok(Spectrum {
        largest: order.iter().take(count).map(|&index| values[index]).collect(),
        residual,
        difference_error,
        iterations: lanczos.alpha.len(),
    })
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// The tridiagonal matrix of Lanczos' method and its basis.
struct Lanczos {
    alpha: Vec<f64>,
    /// One more than the tridiagonal has: the last is the residual's length.
    beta: Vec<f64>,
    basis: Vec<Vec<f64>>,
}

impl Lanczos {
    fn tridiagonal(&self) -> Vec<Vec<f64>> {
        let size = self.alpha.len();
        let entry = |i: usize, j: usize| match i.abs_diff(j) {
            0 => self.alpha[i],
            1 => self.beta[i.min(j)],
            _ => 0.0,
        };
        (0..size).map(|i| (0..size).map(|j| entry(i, j)).collect()).collect()
    }
}

/// Lanczos' method with full reorthogonalisation, from a seeded normal vector.
fn lanczos(
    size: usize,
    iterations: usize,
    seed: u64,
    mut product: impl FnMut(&[f64]) -> Result<Vec<f64>>,
) -> Result<Lanczos> {
    let mut generator = generator(seed, Stream::Lanczos);
    let mut vector: Vec<f64> = (0..size).map(|_| normal_pair(&mut generator).0).collect();
    let length = norm(&vector);
    vector.iter_mut().for_each(|x| *x /= length);
    let mut result = Lanczos { alpha: Vec::new(), beta: Vec::new(), basis: Vec::new() };
    for _ in 0..iterations.clamp(1, size) {
        let mut next = product(&vector)?;
        result.alpha.push(dot(&vector, &next));
        result.basis.push(vector);
        // Twice is enough (Kahan and Parlett).
        for _ in 0..2 {
            for basis in &result.basis {
                let part = dot(basis, &next);
                next.iter_mut().zip(basis).for_each(|(x, b)| *x -= part * b);
            }
        }
        let length = norm(&next);
        result.beta.push(length);
        let largest = result.alpha.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        if length <= 1e-10 * largest {
            // An invariant subspace: its eigenvalues are exact.
            return Ok(result);
        }
        vector = next.into_iter().map(|x| x / length).collect();
    }
    Ok(result)
}

/// Eigenvalues of a small symmetric matrix and its eigenvectors as columns, by Jacobi's rotations.
pub fn symmetric_eigen(matrix: &[Vec<f64>]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let size = matrix.len();
    let mut a = matrix.to_vec();
    let mut vectors: Vec<Vec<f64>> =
        (0..size).map(|i| (0..size).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..100 {
        let off: f64 = (0..size).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i][j] * a[i][j]).sum();
        let diagonal: f64 = (0..size).map(|i| a[i][i] * a[i][i]).sum();
        if off <= 1e-30 * diagonal.max(f64::MIN_POSITIVE) {
            break;
        }
        for p in 0..size {
            for q in p + 1..size {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let tangent = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let tangent = if theta == 0.0 { 1.0 } else { tangent };
                let cosine = 1.0 / (tangent * tangent + 1.0).sqrt();
                let sine = tangent * cosine;
                let rotate = |x: f64, y: f64| (cosine * x - sine * y, sine * x + cosine * y);
                for row in &mut a {
                    (row[p], row[q]) = rotate(row[p], row[q]);
                }
                let (above, below) = a.split_at_mut(q);
                for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                    (*x, *y) = rotate(*x, *y);
                }
                for row in &mut vectors {
                    (row[p], row[q]) = rotate(row[p], row[q]);
                }
            }
        }
    }
    ((0..size).map(|i| a[i][i]).collect(), vectors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::gridworld::{Shape, twin_loss};
    use crate::params::ParameterSpec;

    /// A network small enough for its whole Hessian.
    const SHAPE: Shape = Shape { side: 3, layers: 1, width: 6 };

    #[test]
    fn lanczos_finds_the_largest_eigenvalues_of_the_dense_hessian() -> Result<()> {
        let layout = Layout::new(SHAPE.parameter_specs());
        let mut flat = vec![0.0; layout.len()];
        SHAPE.initialize(&layout, 4, &mut flat);
        let point = packed(&layout, &flat);
        let batch = SHAPE.draw(32, &mut generator(1, Stream::Walks));
        let gradient = Gradient::new(&layout, |tensors| Ok(twin_loss(SHAPE, &layout, tensors, &batch)?))?;

        // Second differences of the loss itself, pair by pair: nothing of the gradient's code.
        let size = point.len();
        let step = 1e-4;
        let mut hessian = vec![vec![0.0; size]; size];
        for i in 0..size {
            for j in 0..=i {
                let value = |a: f64, b: f64| {
                    let mut moved = point.clone();
                    moved[i] += a * step;
                    moved[j] += b * step;
                    gradient.loss_at(&moved)
                };
                let second = value(1.0, 1.0)? - value(1.0, -1.0)? - value(-1.0, 1.0)? + value(-1.0, -1.0)?;
                hessian[i][j] = second / (4.0 * step * step);
                hessian[j][i] = hessian[i][j];
            }
        }
        let diagonal: Vec<f64> = (0..size).map(|i| 0.5 + (i % 5) as f64).collect();
        for preconditioner in [None, Some(&diagonal[..])] {
            let mut matrix = hessian.clone();
            if let Some(p) = preconditioner {
                matrix.iter_mut().enumerate().for_each(|(i, row)| {
                    row.iter_mut().enumerate().for_each(|(j, x)| *x /= (p[i] * p[j]).sqrt());
                });
            }
            let (mut dense, _) = symmetric_eigen(&matrix);
            dense.sort_by(|a, b| b.total_cmp(a));
            let (gradient, point) = (&gradient, &point[..]);
            let found = spectrum(&Hessian { gradient, point, preconditioner, count: 3, iterations: 30, seed: 7 })?;
            for (found, dense) in found.largest.iter().zip(&dense) {
                assert!((found / dense - 1.0).abs() < 1e-4, "{found} {dense}");
            }
            assert!(found.residual < 1e-4 * dense[0] && found.difference_error < 1e-4 * dense[0], "{found:?}");
        }
        Ok(())
    }

    /// The spectrum by `STEPS`, and by the first of them alone, of sum of (i + 1) x_i^2 / 2 over four numbers and
    /// slope |x_0 - kink|, whose gradient jumps there.
    fn with_a_kink(slope: f64, kink: f64, seed: u64) -> Result<[Spectrum; 2]> {
        let spec = ParameterSpec { name: "x".into(), shape: vec![4], decays: true };
        let curvatures = Tensor::new(&[1.0f64, 2.0, 3.0, 4.0], &Device::Cpu)?;
        let gradient = Gradient::new(&Layout::new(vec![spec]), |tensors| {
            let x = &tensors[0];
            let bowl = (x.sqr()?.mul(&curvatures)?.sum_all()? * 0.5)?;
            let bend = ((x.narrow(0, 0, 1)? - kink)?.abs()?.sum_all()? * slope)?;
            Ok((bowl + bend)?)
        })?;
        let (gradient, point, preconditioner) = (&gradient, &[0.0; 4], None);
        let hessian = Hessian { gradient, point, preconditioner, count: 2, iterations: 4, seed };
        Ok([spectrum(&hessian)?, spectrum_by(STEPS[0], &hessian)?])
    }

    #[test]
    fn a_kink_within_the_difference_is_stepped_around_and_one_at_the_point_is_told() -> Result<()> {
        // Out of reach of the first step, where nothing changes, and within it.
        let [found, first] = with_a_kink(1.0, 1e-2, 7)?;
        assert_eq!(found, first);
        let [_, first] = with_a_kink(1.0, 1.5e-5, 7)?;
        assert!(first.largest[0] > 1e3 && first.share_of_error() > DOUBTFUL, "{first:?}");
        for kink in [1e-2, 1.5e-5] {
            let [found, _] = with_a_kink(1.0, kink, 7)?;
            assert!(
                (found.largest[0] - 4.0).abs() < 1e-3 && (found.largest[1] - 3.0).abs() < 1e-3,
                "{kink}: {found:?}"
            );
            assert!(found.share_of_error() < 1e-3, "{kink}: {found:?}");
        }
        // One that bends the loss downwards shows only where the products and the vector that they lead to disagree.
        for seed in 0..20 {
            let [found, _] = with_a_kink(-1.0, 3e-5, seed)?;
            assert!((found.largest[0] - 4.0).abs() < 0.25 && found.share_of_error() < DOUBTFUL, "{seed}: {found:?}");
        }
        let [within, _] = with_a_kink(1.0, 1e-9, 7)?;
        assert!(within.share_of_error() > DOUBTFUL, "{within:?}");
        Ok(())
    }

    #[test]
    fn jacobi_gives_the_eigenvalues_of_a_known_matrix() {
        // The second-difference matrix: 2 - 2 cos(k pi / (n + 1)).
        let size = 7;
        let entry = |i: usize, j: usize| [2.0, -1.0, 0.0][i.abs_diff(j).min(2)];
        let matrix: Vec<Vec<f64>> = (0..size).map(|i| (0..size).map(|j| entry(i, j)).collect()).collect();
        let (mut values, vectors) = symmetric_eigen(&matrix);
        for (column, value) in values.iter().enumerate() {
            let image: f64 = (0..size).map(|j| matrix[0][j] * vectors[j][column]).sum();
            assert!((image - value * vectors[0][column]).abs() < 1e-12);
        }
        values.sort_by(f64::total_cmp);
        for (k, value) in values.iter().enumerate() {
            let expected = 2.0 - 2.0 * ((k + 1) as f64 * std::f64::consts::PI / (size + 1) as f64).cos();
            assert!((value - expected).abs() < 1e-12, "{value} {expected}");
        }
    }

    #[test]
    fn the_preconditioner_is_adams() {
        let p = preconditioner(&[0.04, 0.0], 0.999, 1, 1e-8);
        assert!((p[0] - ((0.04f64 / 0.001).sqrt() + 1e-8)).abs() < 1e-9 && p[1] == 1e-8);
    }
}
