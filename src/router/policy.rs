//! Which replica gets a request. Pure: a snapshot and a random source in, an index out.

/// A replica that could take the request now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Estimated tokens of the requests it has and has not finished.
    pub outstanding_tokens: u64,
    pub in_flight: u64,
}

impl Candidate {
    fn burden(&self) -> (u64, u64) {
        (self.outstanding_tokens, self.in_flight)
    }
}

/// Of two candidates picked at random, the one with less outstanding work (the first of them when equal).
///
/// Two random choices keep the longest queue exponentially shorter than one, and avoid the stampede onto a single
/// least-loaded replica that a full comparison of slightly old figures causes (Mitzenmacher, "The power of two
/// choices in randomized load balancing", 2001).
pub fn choose(candidates: &[Candidate], rng: &mut fastrand::Rng) -> Option<usize> {
    match candidates.len() {
        0 => None,
        1 => Some(0),
        n => {
            let first = rng.usize(..n);
            // The other n - 1, each as likely.
            let second = (first + rng.usize(1..n)) % n;
            let better = candidates[second].burden() < candidates[first].burden();
            Some(if better { second } else { first })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn candidates(tokens: &[u64]) -> Vec<Candidate> {
        tokens.iter().map(|&outstanding_tokens| Candidate { outstanding_tokens, in_flight: 0 }).collect()
    }

    fn picks(tokens: &[u64], rounds: usize) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(7);
        let candidates = candidates(tokens);
        let mut counts = vec![0; tokens.len()];
        (0..rounds).for_each(|_| counts[choose(&candidates, &mut rng).unwrap()] += 1);
        counts
    }

    #[test]
    fn none_and_one() {
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(choose(&[], &mut rng), None);
        assert_eq!(choose(&candidates(&[9]), &mut rng), Some(0));
    }

    #[test]
    fn of_two_the_emptier_always() {
        assert_eq!(picks(&[100, 10], 1000), [0, 1000]);
    }

    #[test]
    fn equals_share_evenly() {
        let counts = picks(&[5, 5, 5, 5], 4000);
        assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_fullest_of_many_is_never_chosen_and_the_rest_are() {
        let counts = picks(&[1, 2, 3, 1000], 4000);
        assert_eq!(counts[3], 0);
        assert!(counts[0] > counts[1] && counts[1] > counts[2] && counts[2] > 0, "{counts:?}");
    }

    #[test]
    fn sends_work_away_from_a_busy_replica_until_level() {
        let mut rng = fastrand::Rng::with_seed(3);
        let mut tokens = [600, 0, 0];
        for _ in 0..120 {
            tokens[choose(&candidates(&tokens), &mut rng).unwrap()] += 10;
        }
        assert!(tokens.iter().all(|&sum| (550..=650).contains(&sum)), "{tokens:?}");
    }
}
