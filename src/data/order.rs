//! The order of the data: as it lies in the files, or a permutation of each epoch that depends on (seed, epoch) alone.

use crate::random::{Stream, generator, shuffle};

/// In which order an epoch visits the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The order of the files and of the bytes in them, every epoch the same.
    Sequential,
    /// Units (row groups, about a megabyte of lines, blocks of rows) in random order, and what a unit holds in random
    /// order too, new in each epoch.
    Shuffled { seed: u64 },
}

impl Order {
    /// The units of `epoch` in the order of their visit.
    pub fn units(self, epoch: u64, count: usize) -> Vec<usize> {
        let mut units: Vec<usize> = (0..count).collect();
        if let Self::Shuffled { seed } = self {
            shuffle(&mut generator(mix(seed, epoch), Stream::Shuffle), &mut units);
        }
        units
    }

    /// Puts the documents or rows of one unit (named by its place in the files) into the order of their visit.
    pub fn within_unit<T>(self, epoch: u64, unit: usize, items: &mut [T]) {
        if let Self::Shuffled { seed } = self {
            // The epoch's number is offset so that no unit's seed is that of an epoch's permutation.
            let seed = mix(mix(seed, !epoch), unit as u64);
            shuffle(&mut generator(seed, Stream::Shuffle), items);
        }
    }
}

/// One seed from two numbers, by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed ^ number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_of_its_own_and_repeats_for_the_same_seed() {
        let order = Order::Shuffled { seed: 5 };
        let epochs: Vec<Vec<usize>> = (0..20).map(|epoch| order.units(epoch, 30)).collect();
        for (i, epoch) in epochs.iter().enumerate() {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..30).collect::<Vec<_>>());
            assert_eq!(*epoch, order.units(i as u64, 30));
            assert!(epochs[..i].iter().all(|other| other != epoch), "epoch {i} repeats an earlier one");
        }
        assert_ne!(epochs[0], Order::Shuffled { seed: 6 }.units(0, 30));
        assert_eq!(Order::Sequential.units(3, 4), [0, 1, 2, 3]);
    }

    #[test]
    fn every_unit_comes_first_about_equally_often() {
        let mut firsts = [0usize; 8];
        (0..8000).for_each(|epoch| firsts[Order::Shuffled { seed: 1 }.units(epoch, 8)[0]] += 1);
        // Binomial with mean 1000 and deviation 30: five deviations.
        assert!(firsts.iter().all(|&n| (850..1150).contains(&n)), "{firsts:?}");
    }

    #[test]
    fn units_are_shuffled_inside_independently_of_each_other() {
        let order = Order::Shuffled { seed: 5 };
        let inside = |epoch, unit| {
            let mut items: Vec<u32> = (0..20).collect();
            order.within_unit(epoch, unit, &mut items);
            items
        };
        assert_eq!(inside(1, 2), inside(1, 2));
        assert_ne!(inside(1, 2), inside(1, 3));
        assert_ne!(inside(1, 2), inside(2, 2));
    }
}
