use super::{archs, assert_close, poisoned, random, tensor};
use crate::cpu::kernels::panel::PanelMatrix;
use crate::cpu::linear::{Linear, LinearScratch, Matrix, Residual};
use crate::cpu::quantized::QuantizedMatrix;
use crate::weights::StoredType;
use std::sync::Arc;

struct Case {
    rows: usize,
    cols: usize,
    tokens: usize,
    bias: bool,
    /// 0: none, 1: other rows, 2: in place.
    residual: u8,
}

fn cases(rng: &mut fastrand::Rng) -> Vec<Case> {
    let mut cases: Vec<Case> = (0..24)
        .map(|i| Case {
            rows: rng.usize(1..150),
            cols: rng.usize(1..200),
            tokens: rng.usize(1..20),
            bias: rng.bool(),
            residual: i % 3,
        })
        .collect();
    // Enough tokens that they, not panels, are shared out; enough outputs that the epilogue is.
    cases.push(Case { rows: 97, cols: 40, tokens: 331, bias: true, residual: 1 });
    cases.push(Case { rows: 2000, cols: 33, tokens: 17, bias: true, residual: 2 });
    cases
}

#[test]
fn products_of_every_stored_type() {
    let mut rng = fastrand::Rng::with_seed(1);
    for case in cases(&mut rng) {
        for stored in [StoredType::F32, StoredType::F16, StoredType::BF16] {
            for arch in archs() {
                check(&mut rng, &case, stored, arch);
            }
        }
    }
}

fn check(rng: &mut fastrand::Rng, case: &Case, stored: StoredType, arch: pulp::Arch) {
    let Case { rows, cols, tokens, bias, residual } = *case;
    // Two parts stacked, as query, key and value are.
    let first = rng.usize(0..rows);
    let parts: Vec<_> = [first, rows - first]
        .into_iter()
        .filter(|&n| n > 0)
        .map(|n| tensor(stored, &[n, cols], &random(rng, n * cols)))
        .collect();
    let weights: Vec<f32> = parts.iter().flat_map(|p| p.to_f32()).collect();
    let (x, extra) = (random(rng, tokens * cols), random(rng, tokens * rows));
    let bias = bias.then(|| random(rng, rows));
    let matrix = PanelMatrix::pack(&parts);
    for row in [0, rows / 2, rows - 1] {
        let mut looked_up = poisoned(cols);
        matrix.row_into(row, &mut looked_up);
        assert_eq!(looked_up, weights[row * cols..(row + 1) * cols]);
    }
    let linear = Linear { matrix: Matrix::Panels(Arc::new(matrix)), bias };
    let mut out = if residual == 2 { extra.clone() } else { poisoned(tokens * rows) };
    let rest = match residual {
        0 => Residual::None,
        1 => Residual::Rows(&extra),
        _ => Residual::InPlace,
    };
    linear.forward(arch, &x, rest, &mut LinearScratch::default(), &mut out).unwrap();
    let mut exact = vec![0.0; tokens * rows];
    for t in 0..tokens {
        for r in 0..rows {
            let dot: f64 = (0..cols).map(|c| f64::from(x[t * cols + c]) * f64::from(weights[r * cols + c])).sum();
            let bias = linear.bias.as_ref().map_or(0.0, |b| f64::from(b[r]));
            exact[t * rows + r] = dot + bias + if residual == 0 { 0.0 } else { f64::from(extra[t * rows + r]) };
        }
    }
    assert_close(&out, &exact, &format!("{rows}x{cols}, {tokens} tokens, {stored:?}, residual {residual}"));
}

#[test]
fn quantised_products_are_close() {
    let mut rng = fastrand::Rng::with_seed(10);
    for (rows, cols, tokens) in [(1, 256, 1), (40, 210, 3), (33, 896, 8), (16, 512, 20)] {
        let parts = [tensor(StoredType::F32, &[rows, cols], &random(&mut rng, rows * cols))];
        let (x, bias) = (random(&mut rng, tokens * cols), random(&mut rng, rows));
        let exact = Linear { matrix: Matrix::Panels(Arc::new(PanelMatrix::pack(&parts))), bias: Some(bias.clone()) };
        let matrix = Matrix::Quantized(Arc::new(QuantizedMatrix::quantize(&parts).unwrap()));
        let quantised = Linear { matrix, bias: Some(bias) };
        let run = |linear: &Linear| {
            let mut out = poisoned(tokens * rows);
            linear.forward(pulp::Arch::new(), &x, Residual::None, &mut LinearScratch::default(), &mut out).unwrap();
            out
        };
        let (ours, exact) = (run(&quantised), run(&exact));
        let error: f32 = ours.iter().zip(&exact).map(|(a, b)| (a - b) * (a - b)).sum();
        let scale: f32 = exact.iter().map(|v| v * v).sum();
        // Weights and activations are both rounded to about 1 part in 250 of the largest of 32.
        assert!(error < 1e-4 * scale, "{rows}x{cols}, {tokens} tokens: {}", error / scale);
    }
    assert!(QuantizedMatrix::suits(896) && !QuantizedMatrix::suits(64));
}

#[test]
fn f16_is_widened_exactly() {
    // Every finite f16, in both halves of a panel's words, times 1.
    let values: Vec<f32> =
        (0..=u16::MAX).map(half::f16::from_bits).filter(|h| h.is_finite()).map(half::f16::to_f32).collect();
    for values in values.chunks(32) {
        let matrix = PanelMatrix::pack(&[tensor(StoredType::F16, &[values.len(), 1], values)]);
        let linear = Linear { matrix: Matrix::Panels(Arc::new(matrix)), bias: None };
        for arch in archs() {
            let mut out = poisoned(values.len());
            linear.forward(arch, &[1.0], Residual::None, &mut LinearScratch::default(), &mut out).unwrap();
            assert_eq!(out, values);
        }
    }
}
