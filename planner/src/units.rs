//! Figures for people, and the short forms people type.

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// `65.32 GiB`, `0.78125 MiB`, `36 KiB`: the largest unit that leaves at least one, five significant decimals at most.
/// MiB is kept down to half of one, because KV per token is quoted in MiB.
pub fn format_bytes(bytes: u64) -> String {
    let (unit, name) = match bytes {
        b if b >= GIB => (GIB, "GiB"),
        b if b >= MIB / 2 => (MIB, "MiB"),
        b if b >= KIB => (KIB, "KiB"),
        _ => return format!("{bytes} B"),
    };
    let value = bytes as f64 / unit as f64;
    let text = if unit == GIB { format!("{value:.2}") } else { format!("{value:.5}") };
    let text = if unit == GIB { &text } else { text.trim_end_matches('0').trim_end_matches('.') };
    format!("{text} {name}")
}

/// `12,345,678`
pub fn format_count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a number of tokens; write one such as 4096, 32k (32,768) or 1m")]
pub struct TokensError {
    pub text: String,
}

/// `4096`, `32k` = 32 * 1,024, `1m` = 1,024 * 1,024; decimals as in `1.5k`.
///
/// # Errors
/// [`TokensError`] for anything else, zero included.
pub fn parse_tokens(text: &str) -> Result<u64, TokensError> {
    let error = || TokensError { text: text.chars().take(40).collect() };
    let plain = text.trim().replace(['_', ','], "");
    let (number, unit) = match plain.char_indices().last() {
        Some((at, 'k' | 'K')) => (&plain[..at], KIB),
        Some((at, 'm' | 'M')) => (&plain[..at], MIB),
        _ => (plain.as_str(), 1),
    };
    if !number.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return Err(error());
    }
    let tokens = number.parse::<f64>().map_err(|_| error())? * unit as f64;
    // 2^40: beyond any context, within the exact range of a double.
    if !(1.0..=1_099_511_627_776.0).contains(&tokens) || tokens.fract() != 0.0 {
        return Err(error());
    }
    Ok(tokens as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_the_unit_people_quote() {
        let table = [
            (0, "0 B"),
            (1023, "1023 B"),
            (36 * KIB, "36 KiB"),
            (144 * KIB, "144 KiB"),
            (819_200, "0.78125 MiB"),
            (MIB, "1 MiB"),
            (65 * GIB + GIB / 4, "65.25 GiB"),
        ];
        for (bytes, text) in table {
            assert_eq!(format_bytes(bytes), text);
        }
        assert_eq!(format_count(1_234_567), "1,234,567");
        assert_eq!(format_count(12), "12");
    }

    #[test]
    fn tokens_are_read_with_their_suffix() {
        for (text, tokens) in [("4096", 4096), ("32k", 32_768), ("1.5K", 1536), ("1m", 1 << 20), ("131,072", 131_072)] {
            assert_eq!(parse_tokens(text), Ok(tokens), "{text}");
        }
        for text in ["", "0", "k", "-1", "1.0001", "inf", "nan", "1e3", "32kk", "９", "99999999999999999999"] {
            assert!(parse_tokens(text).is_err(), "{text}");
        }
    }
}
