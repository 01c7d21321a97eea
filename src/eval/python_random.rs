//! The draws of Python's `random.Random(seed).sample`: lm-evaluation-harness chooses its examples with them.

use rand_mt::Mt;
use std::collections::HashSet;

/// A Mersenne Twister, seeded and read as CPython does it.
pub struct PythonRandom(Mt);

impl PythonRandom {
    /// `random.Random(seed)`.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key: &[u32] = if high == 0 { &[low] } else { &[low, high] };
        Self(Mt::new_with_key(key.iter().copied()))
    }

    /// `random.sample(range(population), count)`.
    ///
    /// # Panics
    /// When there are fewer than `count`, or more than 2^32.
    pub fn sample(&mut self, population: usize, count: usize) -> Vec<usize> {
        assert!(count <= population && u32::try_from(population).is_ok(), "a sample of {count} of {population}");
        // CPython draws from a shrinking list where that is smaller than a set of what was drawn.
        let mut list_up_to = 21;
        if count > 5 {
            list_up_to += 4usize.pow((count as f64 * 3.0).log(4.0).ceil() as u32);
        }
        if population <= list_up_to {
            let mut pool: Vec<usize> = (0..population).collect();
            return (0..count)
                .map(|drawn| {
                    let place = self.below(population - drawn);
                    let chosen = pool[place];
                    pool[place] = pool[population - drawn - 1];
                    chosen
                })
                .collect();
        }
        let mut seen = HashSet::new();
        (0..count)
            .map(|_| {
                loop {
                    let place = self.below(population);
                    if seen.insert(place) {
                        return place;
                    }
                }
            })
            .collect()
    }

    /// Uniform in 0..bound: as many leading bits as `bound` has, drawn again until they are below it.
    fn below(&mut self, bound: usize) -> usize {
        let bits = usize::BITS - bound.leading_zeros();
        loop {
            let drawn = (self.0.next_u32() >> (32 - bits)) as usize;
            if drawn < bound {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values from CPython 3: `r = random.Random(seed); [r.sample(range(n), k) for n, k in ...]`.
    #[test]
    fn samples_are_those_of_cpython() {
        let mut random = PythonRandom::new(1234);
        assert_eq!(random.sample(7473, 5), [6374, 3610, 957, 61, 742]);
        assert_eq!(random.sample(7473, 5), [7462, 6610, 4769, 286, 5501]);
        assert_eq!(random.sample(10, 6), [1, 9, 5, 8, 0, 7]);
        assert_eq!(random.sample(86, 7), [2, 44, 82, 79, 61, 78, 59]);
        assert_eq!(PythonRandom::new(1 << 40).sample(100, 3), [13, 45, 85]);
    }
}
