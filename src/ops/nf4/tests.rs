//! NF4 against bitsandbytes' numbers (tests/fixtures/nf4/make.py makes them), and ranges against the whole.

use super::*;
use crate::ops::simd::Level;
use crate::ops::testing::{assert_same_bits_for_any_threads, at_every_level, normal};
use crate::params::Nf4;
use half::f16;
use safetensors::SafeTensors;

const FIXTURE: &[u8] = include_bytes!("../../../tests/fixtures/nf4/nf4.safetensors");

fn bytes(name: &str) -> Vec<u8> {
    let file = SafeTensors::deserialize(FIXTURE).expect("the fixture");
    file.tensor(name).expect("a tensor of the fixture").data().to_vec()
}

fn floats(name: &str) -> Vec<f32> {
    bytes(name).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn weight() -> Vec<f32> {
    bytes("weight").as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
}

#[test]
fn codes_and_dequantized_numbers_are_those_of_bitsandbytes_bit_for_bit() {
    let weight = weight();
    assert_eq!(scale_table()[..], floats("scale_table"));
    let theirs = Nf4 {
        codes: bytes("codes"),
        scale_codes: bytes("scale_codes"),
        scale_maxima: floats("scale_maxima"),
        offset: floats("offset")[0],
        len: weight.len(),
    };
    at_every_level(|level| {
        let ours = quantize(&weight);
        assert!(ours.codes == theirs.codes, "{level:?}");
        assert!(ours.scale_codes == theirs.scale_codes, "{level:?}");
        // PyTorch sums the scales for their mean in f32, in an order of its own.
        let near = |a: f32, b: f32| (a - b).abs() <= 1e-6 * b.abs();
        assert!(near(ours.offset, theirs.offset), "{level:?}: {} {}", ours.offset, theirs.offset);
        assert!(ours.scale_maxima.iter().zip(&theirs.scale_maxima).all(|(&a, &b)| near(a, b)), "{level:?}");
        let mut numbers = vec![f32::NAN; weight.len()];
        dequantize(level, &theirs, 0, &mut numbers);
        assert!(numbers == floats("dequantized"), "{level:?}");
    });
}

#[test]
fn any_range_is_that_part_of_the_whole_on_every_instruction_set() {
    for len in [1, 2, 63, 64, 65, 300, 17_001] {
        let quantized = quantize(&normal(3, len));
        let mut whole = vec![0.0; len];
        dequantize(Level::current(), &quantized, 0, &mut whole);
        at_every_level(|level| {
            for first in [0, 1, 7, 31, 64, 65, 127].into_iter().filter(|first| *first < len) {
                for count in [1, 2, 15, 17, 64, 100, len - first].into_iter().filter(|count| first + count <= len) {
                    let mut part = vec![f32::NAN; count];
                    dequantize(level, &quantized, first, &mut part);
                    assert!(part == whole[first..first + count], "{level:?} {len} {first} {count}");
                }
            }
        });
    }
}

#[test]
fn the_error_is_that_of_four_bits_and_threads_change_nothing() {
    let numbers = normal(9, 200_000);
    let quantized = quantize(&numbers);
    let mut again = vec![0.0; numbers.len()];
    dequantize(Level::current(), &quantized, 0, &mut again);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = numbers.iter().zip(&again).map(|(a, b)| square(a - b)).sum();
    let relative = (error / numbers.iter().map(|&x| square(x)).sum::<f64>()).sqrt();
    // bitsandbytes' own figure for N(0, 1) and blocks of 64.
    assert!((0.085..0.10).contains(&relative), "{relative}");
    assert_same_bits_for_any_threads(|| {
        let quantized = quantize(&numbers);
        quantized.codes.iter().chain(&quantized.scale_codes).map(|&code| f32::from(code)).collect()
    });
}

#[test]
fn a_tensor_of_zeros_and_an_empty_one_stay_what_they_are() {
    let mut numbers = vec![1.0; 130];
    dequantize(Level::current(), &quantize(&[0.0; 130]), 0, &mut numbers);
    assert_eq!(numbers, [0.0; 130]);
    assert_eq!(quantize(&[]).len, 0);
}
