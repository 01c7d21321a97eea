//! Prompts that are read together: one pass over several, one after another, none of which attends to another.

use super::KeyValueCache;

/// Tokens of a pass over several prompts, at most: on two cores they are read no faster from 512 on, and the working memory
/// (about 110 KB a token for 135M parameters) stays well below the weights'. A longer prompt is a pass of its own.
const MOST_TOKENS: usize = 1024;

/// A prompt, and the sequence of the cache that it becomes.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    pub sequence: usize,
    pub tokens: &'a [u32],
}

/// The prompts of one pass, and their places in the list that they are from.
#[derive(Default)]
pub(super) struct Pass<'a> {
    pub prompts: Vec<Prompt<'a>>,
    pub places: Vec<usize>,
}

impl<'a> Pass<'a> {
    pub fn tokens(&self) -> Vec<u32> {
        self.prompts.iter().flat_map(|prompt| prompt.tokens).copied().collect()
    }

    pub fn lengths(&self) -> Vec<usize> {
        self.prompts.iter().map(|prompt| prompt.tokens.len()).collect()
    }

    /// Copies each prompt's last row of `rows` [R, width] to its place in `last` [prompts of the list, width].
    pub fn last_rows(&self, rows: &[f32], width: usize, last: &mut [f32]) {
        let mut end = 0;
        for (prompt, place) in self.prompts.iter().zip(&self.places) {
            end += prompt.tokens.len();
            last[place * width..][..width].copy_from_slice(&rows[(end - 1) * width..][..width]);
        }
    }

    fn push(&mut self, place: usize, prompt: Prompt<'a>) {
        self.places.push(place);
        self.prompts.push(prompt);
    }
}

/// Passes over all prompts. `rows_keep_their_bits(few, many)` tells whether a row of the model's products has the same bits
/// among `many` rows as among `few`: only prompts that have the bits that each has alone share a pass.
pub(super) fn passes<'a>(prompts: &[Prompt<'a>], rows_keep_their_bits: impl Fn(usize, usize) -> bool) -> Vec<Pass<'a>> {
    // Kernels change with the number of rows: prompts of similar length are most likely to be computed by the same ones.
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&place| prompts[place].tokens.len());
    let mut passes: Vec<Pass> = Vec::new();
    let (mut shortest, mut tokens) = (0, 0);
    for place in order {
        let length = prompts[place].tokens.len();
        let together = tokens + length;
        match passes.last_mut() {
            // What holds for the shortest holds for those between it and the whole.
            Some(pass) if together <= MOST_TOKENS && rows_keep_their_bits(shortest, together) => {
                pass.push(place, prompts[place]);
                tokens = together;
            }
            _ => {
                let mut pass = Pass::default();
                pass.push(place, prompts[place]);
                passes.push(pass);
                (shortest, tokens) = (length, length);
            }
        }
    }
    passes
}

/// Where the keys and values of a pass go.
pub(super) struct Fill<'a> {
    pub cache: &'a mut KeyValueCache,
    pub prompts: &'a [Prompt<'a>],
}

impl Fill<'_> {
    /// Keeps keys and values [R] of a layer.
    pub fn keep<'a>(&mut self, layer: usize, key_values: impl Iterator<Item = (&'a [f32], &'a [f32])>) {
        let positions = self.prompts.iter().flat_map(|prompt| {
            let sequence = prompt.sequence;
            (0..prompt.tokens.len()).map(move |position| (sequence, position))
        });
        for ((key, value), (sequence, position)) in key_values.zip(positions) {
            self.cache.put(layer, sequence, position, key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places in the list, pass by pass.
    fn places(lengths: &[usize], rows_keep_their_bits: impl Fn(usize, usize) -> bool) -> Vec<Vec<usize>> {
        let tokens = vec![0; 3000];
        let prompts = lengths.iter().map(|&length| Prompt { sequence: 0, tokens: &tokens[..length] });
        let passes = passes(&prompts.collect::<Vec<_>>(), rows_keep_their_bits);
        passes.into_iter().map(|pass| pass.places).collect()
    }

    #[test]
    fn passes_hold_what_keeps_its_bits_together_and_no_more_tokens_than_are_allowed() {
        // A kernel for up to 32 rows, and one for more.
        let kinds = |few: usize, many: usize| (few <= 32) == (many <= 32);
        assert_eq!(places(&[300, 7, 64, 31, 1, 33], kinds), [vec![4, 1], vec![3], vec![5, 2, 0]]);
        assert_eq!(places(&[300, 7, 64], |_, _| false), [vec![1], vec![2], vec![0]]);
        assert_eq!(places(&[512; 5], kinds), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(places(&[3000, 40, 3000], kinds), [vec![1], vec![0], vec![2]]);
        assert!(places(&[], kinds).is_empty());
    }

    #[test]
    fn the_last_row_of_each_prompt_goes_to_the_prompts_place() {
        let tokens = [1, 2, 3];
        let prompts = [3, 1, 2].map(|length| Prompt { sequence: 0, tokens: &tokens[..length] });
        let mut last = [0.0; 6];
        for pass in passes(&prompts, |_, _| true) {
            assert_eq!((pass.tokens(), pass.lengths()), (vec![1, 1, 2, 1, 2, 3], vec![1, 2, 3]));
            let rows: Vec<f32> = (0..12).map(|number| number as f32).collect();
            pass.last_rows(&rows, 2, &mut last);
        }
        assert_eq!(last, [10.0, 11.0, 0.0, 1.0, 4.0, 5.0]);
    }
}
