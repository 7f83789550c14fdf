/// Values in a line.
pub const LANES: usize = 16;

/// Sixteen 32-bit values, one cache line: the unit that every packed array is made of.
pub type Line<T> = [T; LANES];

/// Lines that begin on cache-line boundaries, so that a vector load never touches two. Zeroed memory comes from the
/// system untouched: pages cost nothing until they are written.
#[derive(Debug)]
pub struct Lines<T> {
    values: Vec<T>,
    /// Values before the first boundary.
    skip: usize,
    len: usize,
}

impl<T: Copy + Default> Lines<T> {
    pub fn zeroed(len: usize) -> Self {
        const LINE_BYTES: usize = 64;
        const { assert!(size_of::<Line<T>>() == LINE_BYTES) };
        let values = vec![T::default(); len * LANES + LANES - 1];
        let misaligned_bytes = values.as_ptr().addr() % LINE_BYTES;
        let skip = (LINE_BYTES - misaligned_bytes) % LINE_BYTES / size_of::<T>();
        Self { values, skip, len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<Line<T>>()) as u64
    }

    #[inline(always)]
    pub fn as_slice(&self) -> &[Line<T>] {
        self.values[self.skip..self.skip + self.len * LANES].as_chunks().0
    }

    #[inline(always)]
    pub fn as_mut_slice(&mut self) -> &mut [Line<T>] {
        self.values[self.skip..self.skip + self.len * LANES].as_chunks_mut().0
    }

    /// Grows to at least `len` lines; contents are lost when it does.
    pub fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }
}

impl<T: Copy + Default> Default for Lines<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

/// Begins to bring lines into cache, where the processor has an instruction for that.
#[inline(always)]
pub fn prefetch<T>(lines: &[Line<T>]) {
    for line in lines {
        #[cfg(target_arch = "x86_64")]
        safe_arch::prefetch_t0(line);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lie_on_cache_line_boundaries() {
        for len in [1, 3, 1000, 100_000] {
            let lines = Lines::<f32>::zeroed(len);
            assert_eq!(lines.as_slice().len(), len);
            assert_eq!(lines.as_slice().as_ptr().addr() % 64, 0);
        }
    }
}
