//! Both networks from candle primitives, in any dtype: the oracle of the tests, and what sharpness differentiates in f64.
//!
//! Batch norm uses the batch's statistics, as in training.

use super::{Architecture, CLASSES, Objective, PIXELS, SIDE};
use crate::ops::batch_norm::EPSILON;
use crate::params::Layout;
use candle_core::{D, Result, Tensor, bail};

/// Parameters by name.
struct Tensors<'a> {
    layout: &'a Layout,
    /// In the layout's order.
    tensors: &'a [Tensor],
}

impl Tensors<'_> {
    fn of(&self, name: &str) -> Result<&Tensor> {
        match self.layout.index_of(name) {
            Some(index) => Ok(&self.tensors[index]),
            None => bail!("the network has no parameter {name}"),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.layout.index_of(name).is_some()
    }

    /// norm(conv(x)), pictures channels first.
    fn unit(&self, x: &Tensor, convolution: &str, norm: &str, stride: usize) -> Result<Tensor> {
        // [O, k, k, I] -> [O, I, k, k]
        let weight = self.of(&format!("{convolution}.weight"))?.permute((0, 3, 1, 2))?.contiguous()?;
        let mut y = x.contiguous()?.conv2d(&weight, 1, stride, 1, 1)?;
        let bias = format!("{convolution}.bias");
        let channel = |tensor: &Tensor| tensor.reshape((1, tensor.elem_count(), 1, 1));
        if self.has(&bias) {
            y = y.broadcast_add(&channel(self.of(&bias)?)?)?;
        }
        let mean = y.mean_keepdim((0, 2, 3))?;
        let centred = y.broadcast_sub(&mean)?;
        let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
        let normed = centred.broadcast_div(&(variance + f64::from(EPSILON))?.sqrt()?)?;
        let weight = channel(self.of(&format!("{norm}.weight"))?)?;
        normed.broadcast_mul(&weight)?.broadcast_add(&channel(self.of(&format!("{norm}.bias"))?)?)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.of(&format!("{name}.weight"))?.t()?)?.broadcast_add(self.of(&format!("{name}.bias"))?)
    }

    fn resnet(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = self.unit(images, "conv1", "bn1", 1)?.relu()?;
        for stage in 1..=3 {
            for block in 0..5 {
                let name = |part: &str| format!("layer{stage}.{block}.{part}");
                let stride = if stage > 1 && block == 0 { 2 } else { 1 };
                let inner = self.unit(&x, &name("conv1"), &name("bn1"), stride)?.relu()?;
                let inner = self.unit(&inner, &name("conv2"), &name("bn2"), 1)?;
                let shortcut = if stride == 2 { every_second(&x)? } else { x.clone() };
                x = (inner + shortcut)?.relu()?;
            }
        }
        self.linear(&x.mean((2, 3))?, "linear")
    }

    fn cnn(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = images.clone();
        for block in 0..3 {
            for place in [7 * block, 7 * block + 3] {
                let name = |place| format!("features.{place}");
                x = self.unit(&x, &name(place), &name(place + 1), 1)?.relu()?;
            }
            // The maximum of 2 x 2 as two maxima of pairs: candle's max_pool2d has a gradient, but none of second order.
            let (batch, channels, side, _) = x.dims4()?;
            x = x.reshape((batch, channels, side / 2, 2, side / 2, 2))?;
            x = x.max_keepdim(5)?.max_keepdim(3)?.reshape((batch, channels, side / 2, side / 2))?;
        }
        let hidden = self.linear(&x.flatten_from(1)?, "classifier.0")?.relu()?;
        self.linear(&hidden, "classifier.2")
    }
}

/// Every second pixel, channels padded with zeros on both sides to twice as many.
fn every_second(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, side, _) = x.dims4()?;
    let halves = x.reshape((batch, channels, side / 2, 2, side / 2, 2))?.narrow(3, 0, 1)?.narrow(5, 0, 1)?;
    let halves = halves.reshape((batch, channels, side / 2, side / 2))?;
    let zeros = Tensor::zeros((batch, channels / 2, side / 2, side / 2), x.dtype(), x.device())?;
    Tensor::cat(&[&zeros, &halves, &zeros], 1)
}

/// Images [B, 32, 32, 3] as the twin takes them.
pub fn pictures(images: &[f32], like: &Tensor) -> Result<Tensor> {
    let batch = images.len() / PIXELS;
    let images = Tensor::from_slice(images, (batch, SIDE, SIDE, 3), like.device())?.permute((0, 3, 1, 2))?;
    images.contiguous()?.to_dtype(like.dtype())
}

/// Sum over the images of their loss; `tensors` are the parameters in the layout's order.
pub fn loss(
    architecture: Architecture,
    objective: Objective,
    layout: &Layout,
    tensors: &[Tensor],
    images: &[f32],
    labels: &[u32],
) -> Result<Tensor> {
    let Some(first) = tensors.first() else { bail!("a network without parameters") };
    let (images, parameters) = (pictures(images, first)?, Tensors { layout, tensors });
    let logits = match architecture {
        Architecture::ResNet32 => parameters.resnet(&images)?,
        Architecture::Cnn => parameters.cnn(&images)?,
    };
    let labels = Tensor::from_slice(labels, (labels.len(), 1), first.device())?;
    match objective {
        Objective::CrossEntropy => {
            let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
            let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
            (log_sum - shifted.gather(&labels, D::Minus1)?)?.sum_all()
        }
        Objective::SquaredError => {
            let ones = labels.ones_like()?.to_dtype(logits.dtype())?;
            let one_hot = logits.zeros_like()?.scatter_add(&labels, &ones, D::Minus1)?.detach();
            (logits - one_hot)?.sqr()?.sum_all()? / CLASSES as f64
        }
    }
}
