//! Large storages on large pages: a pass over hundreds of megabytes then spends no time on the address translation of
//! small ones.

/// Asks the system for large pages (2 MiB on x86-64 Linux) under `numbers`, whose memory should not have been written
/// yet. It is advice: where the system has none to give, small ones come as ever.
fn prefer_large_pages<T>(numbers: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 2 << 20;
        let first = numbers.as_ptr() as usize;
        // Only pages that lie inside: the neighbours are not ours, and the memory in use stays as planned.
        let (start, end) = (first.next_multiple_of(PAGE), (first + size_of_val(numbers)) / PAGE * PAGE);
        if start < end {
            // SAFETY: the range lies inside one live allocation, and the advice changes none of its bytes.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = numbers;
}

/// `len` zeros on large pages. Memory is taken where they are written first.
pub fn zeros(len: usize) -> Vec<f32> {
    let numbers = vec![0.0; len];
    prefer_large_pages(&numbers);
    numbers
}

/// `len` times `number` on large pages, which are taken at once.
pub fn filled<T: Clone>(number: T, len: usize) -> Vec<T> {
    let mut numbers = Vec::with_capacity(len);
    prefer_large_pages(numbers.spare_capacity_mut());
    numbers.resize(len, number);
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_large_pages_are_read_and_written_like_any_others() {
        for len in [0, 1, 1000, 3 << 20] {
            for (mut numbers, first) in [(zeros(len), 0.0), (filled(7.0, len), 7.0)] {
                assert!(numbers.len() == len && numbers.iter().all(|&x| x == first));
                numbers.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
                assert!(numbers.iter().enumerate().all(|(i, &x)| x == i as f32));
            }
        }
    }
}
