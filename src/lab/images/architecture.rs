//! The two networks' layers, parameters and initial weights.
//!
//! ```text
//! ResNet-32   conv 3x3x16, then 3 stages (16, 32, 64 channels) of 5 blocks: relu(norm(conv(relu(norm(conv x)))) + x);
//!             the first block of a later stage halves the picture, its shortcut takes every second pixel and pads
//!             the channels with zeros (no parameters); mean over the pixels; linear. 464,154 parameters.
//! CNN         (conv norm relu) x 2 and a 2x2 maximum, with 64, 128 and 256 channels; linear 512, relu, linear.
//! ```

use super::unit::UnitSpec;
use super::{Architecture, CLASSES, SIDE};
use crate::ops::batch_norm::Activation;
use crate::ops::convolution::Shape;
use crate::params::{Layout, Parameter, ParameterSpec};
use crate::random::{Stream, fill_normal, generator, uniform};

/// Blocks of a ResNet stage.
pub const BLOCKS: usize = 5;
/// Width of the CNN's hidden layer.
pub const HIDDEN: usize = 512;

pub fn units(architecture: Architecture) -> Vec<UnitSpec> {
    let conv = |name: String, norm: String, side, inputs, outputs, stride, bias| UnitSpec {
        convolution: name,
        norm,
        shape: Shape { batch: 0, height: side, width: side, inputs, outputs, kernel: 3, stride, padding: 1 },
        bias,
        activation: Activation::Relu,
    };
    match architecture {
        Architecture::ResNet32 => {
            let mut units = vec![conv("conv1".into(), "bn1".into(), SIDE, 3, 16, 1, false)];
            let (mut inputs, mut side) = (16, SIDE);
            for stage in 0..3 {
                for block in 0..BLOCKS {
                    let outputs = 16 << stage;
                    let stride = outputs / inputs;
                    let name = |part: &str| format!("layer{}.{block}.{part}", stage + 1);
                    units.push(conv(name("conv1"), name("bn1"), side, inputs, outputs, stride, false));
                    side /= stride;
                    units.push(conv(name("conv2"), name("bn2"), side, outputs, outputs, 1, false));
                    inputs = outputs;
                }
            }
            units
        }
        Architecture::Cnn => {
            let channels = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)];
            let unit = |(index, (inputs, outputs))| {
                let (block, second) = (index / 2, index % 2);
                // Places in the source's sequence: convolution, norm, relu twice, then the maximum.
                let place = 7 * block + 3 * second;
                let name = |place| format!("features.{place}");
                conv(name(place), name(place + 1), SIDE >> block, inputs, outputs, 1, true)
            };
            channels.into_iter().enumerate().map(unit).collect()
        }
    }
}

/// The linear layers after the pictures: name, inputs, outputs.
pub fn linears(architecture: Architecture) -> Vec<(&'static str, usize, usize)> {
    match architecture {
        Architecture::ResNet32 => vec![("linear", 64, CLASSES)],
        Architecture::Cnn => vec![("classifier.0", 16 * 256, HIDDEN), ("classifier.2", HIDDEN, CLASSES)],
    }
}

pub fn parameter_specs(architecture: Architecture) -> Vec<ParameterSpec> {
    let mut specs: Vec<_> = units(architecture).iter().flat_map(UnitSpec::parameters).collect();
    for (name, inputs, outputs) in linears(architecture) {
        let spec = |part, shape: Vec<usize>, decays| ParameterSpec { name: format!("{name}.{part}"), shape, decays };
        specs.push(spec("weight", vec![outputs, inputs], true));
        specs.push(spec("bias", vec![outputs], false));
    }
    specs
}

/// Initial weights as the sources draw them: ResNet-32 N(0, 2 / fan-in), the CNN PyTorch's uniform numbers.
pub fn initialize(architecture: Architecture, layout: &Layout, seed: u64, weights: &mut [f32]) {
    let mut generator = generator(seed, Stream::Init);
    let mut fan_in = 1;
    for spec in parameter_specs(architecture) {
        let Some(place) = layout.index_of(&spec.name) else { continue };
        let parameter: &Parameter = &layout.parameters()[place];
        let numbers = &mut weights[parameter.range()];
        let norm = spec.name.contains("bn") || (spec.shape.len() == 1 && !biases(architecture).contains(&spec.name));
        if spec.shape.len() >= 2 {
            fan_in = spec.shape[1..].iter().product::<usize>();
        }
        let bound = 1.0 / (fan_in as f32).sqrt();
        if norm {
            numbers.fill(if spec.name.ends_with("weight") { 1.0 } else { 0.0 });
        } else if architecture == Architecture::ResNet32 && spec.shape.len() >= 2 {
            fill_normal(&mut generator, (2.0 / fan_in as f64).sqrt(), numbers);
        } else {
            numbers.iter_mut().for_each(|x| *x = bound * (2.0 * uniform(&mut generator) - 1.0));
        }
    }
}

/// Biases of convolutions and linear layers (those of norms are not among them).
fn biases(architecture: Architecture) -> Vec<String> {
    let units =
        units(architecture).into_iter().filter(|unit| unit.bias).map(|unit| format!("{}.bias", unit.convolution));
    units.chain(linears(architecture).into_iter().map(|(name, ..)| format!("{name}.bias"))).collect()
}
