//! Embeddings on the CPU. A gradient's table is cut into ranges of rows, and each task adds its own rows in the order
//! of the batch: no races, no sorting, the same sums for any number of threads.

use super::{IdError, Positions};
use crate::ops::parallel::rows_a_piece;
use crate::ops::product::Numbers;
use crate::ops::simd::{Level, kernel};
use crate::ops::{Gradient, Into, nf4};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Ranges that a table's gradient is cut into; every one reads all ids, so more would cost more than they balance.
const RANGES: usize = 32;

/// y [N, C] = tokens [V, C] at ids [N], plus the row of the position.
///
/// # Errors
/// When an id lies outside the table; y is then partly written.
pub fn forward<'a>(
    ids: &[u32],
    tokens: impl std::convert::Into<Numbers<'a>>,
    positions: Option<Positions>,
    width: usize,
    y: &mut [f32],
) -> Result<(), IdError> {
    let tokens = tokens.into();
    check(ids, tokens.len(), width)?;
    assert_eq!(y.len(), ids.len() * width, "embedding: y is not [N, C]");
    if let Some(Positions { table, places }) = positions {
        assert_eq!(places.len(), ids.len(), "embedding: places are not [N]");
        let fits = places.iter().all(|&place| (place as usize) < table.len() / width);
        assert!(fits, "embedding: the position table is too short");
    }
    let level = Level::current();
    let rows = rows_a_piece(width);
    y.par_chunks_mut(rows * width).zip(ids.par_chunks(rows)).enumerate().for_each(|(piece, (y, ids))| {
        for (index, (y, &id)) in y.chunks_exact_mut(width).zip(ids).enumerate() {
            copy_row(level, tokens, id as usize * width, y);
            if let Some(Positions { table, places }) = positions {
                add(level, &table[places[piece * rows + index] as usize * width..][..width], y);
            }
        }
    });
    Ok(())
}

/// The numbers of a table from `first` on, in f32.
fn copy_row(level: Level, table: Numbers, first: usize, y: &mut [f32]) {
    match table {
        Numbers::F32(table) => y.copy_from_slice(&table[first..first + y.len()]),
        Numbers::Bf16(table) => table[first..first + y.len()].convert_to_f32_slice(y),
        Numbers::F16(table) => table[first..first + y.len()].convert_to_f32_slice(y),
        Numbers::Nf4(table) => nf4::dequantize(level, table, first, y),
    }
}

/// dtokens [V, C] (+)= rows of dy [N, C], each at its id.
///
/// # Errors
/// When an id lies outside the table; nothing is written then.
pub fn backward(ids: &[u32], dy: &[f32], width: usize, dtokens: Gradient) -> Result<(), IdError> {
    check(ids, dtokens.data.len(), width)?;
    assert_eq!(dy.len(), ids.len() * width, "embedding backward: dy is not [N, C]");
    let (level, into) = (Level::current(), dtokens.into);
    let rows = (dtokens.data.len() / width).div_ceil(RANGES).max(1);
    dtokens.data.par_chunks_mut(rows * width).enumerate().for_each(|(range, target)| {
        if into == Into::Overwrite {
            target.fill(0.0);
        }
        let first = range * rows;
        for (&id, dy) in ids.iter().zip(dy.chunks_exact(width)) {
            let row = (id as usize).wrapping_sub(first);
            if row < rows {
                add(level, dy, &mut target[row * width..][..width]);
            }
        }
    });
    Ok(())
}

fn check(ids: &[u32], table_len: usize, width: usize) -> Result<(), IdError> {
    assert!(width > 0 && table_len.is_multiple_of(width), "embedding: the table is not rows of {width}");
    let vocabulary = table_len / width;
    match ids.iter().position(|&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(place) => Err(IdError { place, id: ids[place], vocabulary }),
    }
}

kernel! {
    fn add(values: &[f32], target: &mut [f32]) {
        for (target, value) in target.iter_mut().zip(values) {
            *target += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    /// Ids with many duplicates, the first and the last of the vocabulary among them.
    fn ids(len: usize, vocabulary: usize) -> Vec<u32> {
        let last = |i: usize| i + 1 == len;
        (0..len).map(|i| if last(i) { vocabulary as u32 - 1 } else { (i * i * 7 % vocabulary) as u32 }).collect()
    }

    #[test]
    fn values_and_gradients_match_the_reference() {
        for (batch, sequence, vocabulary, width) in [(1, 1, 1, 1), (3, 7, 5, 10), (2, 40, 100, 33), (9, 20, 31, 64)] {
            let rows = batch * sequence;
            let (ids, positions) = (ids(rows, vocabulary), (0..rows).map(|r| 2 + r % sequence).collect::<Vec<_>>());
            let (tokens, table) = (normal(1, vocabulary * width), normal(2, (sequence + 2) * width));
            let dy = normal(3, rows * width);
            let y = reference::forward(&ids, &to_f64(&tokens), &positions, &to_f64(&table), width);
            let places: Vec<u32> = positions.iter().map(|&p| p as u32).collect();
            let indices: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
            let dtokens = reference::backward(&indices, &to_f64(&dy), vocabulary, width);
            let dtable = reference::backward(&positions, &to_f64(&dy), sequence + 2, width);
            at_every_level(|level| {
                let mut y_out = vec![7.0; rows * width];
                let place = Positions { table: &table, places: &places };
                forward(&ids, &tokens, Some(place), width, &mut y_out).expect("ids inside the vocabulary");
                assert_close(&format!("y {level:?}"), &y_out, &y, 1e-6);
                for (into, base) in [(Into::Overwrite, 0.0), (Into::Accumulate, 0.5)] {
                    let (mut dtokens_out, mut dtable_out) = (vec![0.5; tokens.len()], vec![0.5; table.len()]);
                    backward(&ids, &dy, width, Gradient { data: &mut dtokens_out, into }).expect("as before");
                    backward(&places, &dy, width, Gradient { data: &mut dtable_out, into }).expect("as before");
                    let shifted = |v: &[f64]| v.iter().map(|v| v + base).collect::<Vec<_>>();
                    assert_close(&format!("dtokens {level:?}"), &dtokens_out, &shifted(&dtokens), 1e-5);
                    assert_close(&format!("dpositions {level:?}"), &dtable_out, &shifted(&dtable), 1e-5);
                }
            });
        }
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_an_error_that_names_its_place() {
        let error = IdError { place: 1, id: 5, vocabulary: 5 };
        assert_eq!(forward(&[0, 5], &[0.0; 10][..], None, 2, &mut [0.0; 4]), Err(error));
        let mut table = [1.0; 10];
        assert_eq!(backward(&[0, 5], &[0.0; 4], 2, Gradient::overwrite(&mut table)), Err(error));
        assert_eq!(table, [1.0; 10]);
        assert!(error.to_string().contains("vocabulary has 5 tokens"));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (ids, dy) = (ids(500, 60), normal(1, 500 * 48));
        let places: Vec<u32> = (0..500).map(|row| row % 100).collect();
        assert_same_bits_for_any_threads(|| {
            let (mut dtokens, mut dpositions) = (vec![0.25; 60 * 48], vec![0.25; 100 * 48]);
            backward(&ids, &dy, 48, Gradient::accumulate(&mut dtokens)).expect("ids inside the vocabulary");
            backward(&places, &dy, 48, Gradient::accumulate(&mut dpositions)).expect("as before");
            [dtokens, dpositions].concat()
        });
    }
}
