//! The table of parameters: name -> (offset, shape, decays), in a fixed order with the decayed ones first.

use std::ops::Range;

/// Every parameter starts at a multiple of this many elements (256 bytes of f32).
pub const ALIGNMENT: usize = 64;

/// What a model asks for: one trainable tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// The Hugging Face name, without a prefix such as `transformer.`.
    pub name: String,
    pub shape: Vec<usize>,
    /// Whether weight decay applies to it.
    pub decays: bool,
}

/// One tensor's place in the flat storages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<usize>,
    pub decays: bool,
    /// First element, a multiple of [`ALIGNMENT`].
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

impl Parameter {
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// The ordered table. Decayed parameters come first, so that decay is a range of the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    parameters: Vec<Parameter>,
    len: usize,
    decayed_len: usize,
}

impl Layout {
    /// Places `specs`: decayed ones first, otherwise in the order given.
    ///
    /// # Panics
    /// When two parameters share a name: a defect of the model's code.
    pub fn new(specs: Vec<ParameterSpec>) -> Self {
        let (decayed, plain): (Vec<_>, Vec<_>) = specs.into_iter().partition(|spec| spec.decays);
        let mut parameters: Vec<Parameter> = Vec::with_capacity(decayed.len() + plain.len());
        let (mut offset, mut decayed_len) = (0, 0);
        for spec in decayed.into_iter().chain(plain) {
            assert!(parameters.iter().all(|p| p.name != spec.name), "two parameters are named {}", spec.name);
            let len = spec.shape.iter().product::<usize>();
            parameters.push(Parameter { name: spec.name, shape: spec.shape, decays: spec.decays, offset, len });
            offset += len.next_multiple_of(ALIGNMENT);
            if spec.decays {
                decayed_len = offset;
            }
        }
        Self { parameters, len: offset, decayed_len }
    }

    /// All parameters in their order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Length of a flat storage in elements, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Weight decay applies to the elements before this one.
    pub fn decayed_len(&self) -> usize {
        self.decayed_len
    }

    /// Number of trainable numbers, gaps left out.
    pub fn count(&self) -> usize {
        self.parameters.iter().map(|p| p.len).sum()
    }

    /// Place of the parameter `name` in the table.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.parameters.iter().position(|p| p.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[usize], decays: bool) -> ParameterSpec {
        ParameterSpec { name: name.into(), shape: shape.to_vec(), decays }
    }

    #[test]
    fn decayed_parameters_come_first_and_every_offset_is_aligned() {
        let layout = Layout::new(vec![
            spec("a", &[3, 7], true),
            spec("b", &[5], false),
            spec("c", &[64], true),
            spec("d", &[0], false),
        ]);
        let names: Vec<_> = layout.parameters().iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["a", "c", "b", "d"]);
        assert!(layout.parameters().iter().all(|p| p.offset % ALIGNMENT == 0));
        assert_eq!((layout.len(), layout.decayed_len(), layout.count()), (192, 128, 21 + 5 + 64));
    }
}
