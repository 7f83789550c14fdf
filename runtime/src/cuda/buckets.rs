//! Step sizes that are prepared for. A decode step is padded to the next of them and replayed as a graph; other steps
//! round their rows too, so that the number of different matrix products stays small.

/// Batches of this size or less have a bucket every [`FINE_STEP`].
const FINE_UP_TO: usize = 256;
const FINE_STEP: usize = 8;
const COARSE_STEP: usize = 32;
/// Rows of steps beyond the decode buckets: half a tile of the large matrix kernels.
const TOKEN_STEP: usize = 64;

/// 1, 2, 4, 8, 16, 24 ... 256, then every 32, and `max_num_seqs` itself.
pub fn decode_buckets(max_num_seqs: usize) -> Vec<usize> {
    let small = [1, 2, 4].into_iter();
    let fine = (FINE_STEP..=FINE_UP_TO).step_by(FINE_STEP);
    let coarse = (FINE_UP_TO + COARSE_STEP..max_num_seqs.max(FINE_UP_TO)).step_by(COARSE_STEP);
    let mut buckets: Vec<usize> = small.chain(fine).chain(coarse).filter(|&b| b < max_num_seqs).collect();
    buckets.push(max_num_seqs.max(1));
    buckets
}

/// The smallest bucket that holds `rows`. `None` when none does.
pub fn bucket_for(buckets: &[usize], rows: usize) -> Option<usize> {
    buckets.get(buckets.partition_point(|&b| b < rows)).copied()
}

/// Rows that a step of `tokens` is padded to, at most `most`.
pub fn padded_tokens(tokens: usize, most: usize) -> usize {
    let padded = match tokens {
        0..=2 => tokens.max(1),
        3..=4 => 4,
        5..=FINE_UP_TO => tokens.next_multiple_of(FINE_STEP),
        _ => tokens.next_multiple_of(TOKEN_STEP),
    };
    padded.min(most).max(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_fine_where_batches_are_small_and_end_with_the_limit() {
        assert_eq!(decode_buckets(1), [1]);
        assert_eq!(decode_buckets(6), [1, 2, 4, 6]);
        assert_eq!(decode_buckets(30), [1, 2, 4, 8, 16, 24, 30]);
        let many = decode_buckets(600);
        assert!(many.ends_with(&[256, 288, 320, 352, 384, 416, 448, 480, 512, 544, 576, 600]), "{many:?}");
        assert!(many.is_sorted());
    }

    #[test]
    fn a_batch_goes_to_the_next_bucket() {
        let buckets = decode_buckets(30);
        let to = [1, 3, 8, 9, 25, 30, 31].map(|rows| bucket_for(&buckets, rows));
        assert_eq!(to, [Some(1), Some(4), Some(8), Some(16), Some(30), Some(30), None]);
    }

    #[test]
    fn padding_never_goes_below_the_tokens_nor_above_the_arena() {
        for most in [1, 7, 100, 2048] {
            for tokens in 1..=most {
                let padded = padded_tokens(tokens, most);
                assert!((tokens..=most).contains(&padded), "{tokens} of {most} became {padded}");
            }
        }
        assert_eq!([3, 9, 250, 257, 1000].map(|t| padded_tokens(t, 2048)), [4, 16, 256, 320, 1024]);
    }
}
