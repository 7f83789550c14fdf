//! Q8_0 weights, multiplied by candle-core.

use crate::weights::HostTensor;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};

/// candle's vector and matrix-unit kernels take widths that are multiples of this and fall back to others, six times
/// slower, for the rest: so weights and activations are padded with zeros.
const WIDTH_MULTIPLE: usize = 256;
/// The same for the number of rows.
const ROW_MULTIPLE: usize = 16;

/// A matrix `[rows, cols]` of eight-bit weights with one f16 scale for every 32.
///
/// candle computes on threads of its own, as many as RAYON_NUM_THREADS says or as there are cores.
#[derive(Debug)]
pub struct QuantizedMatrix {
    weight: QMatMul,
    rows: usize,
    cols: usize,
    bytes: u64,
}

impl QuantizedMatrix {
    /// Whether padding costs little beside what quantising saves.
    pub fn suits(cols: usize) -> bool {
        4 * cols.next_multiple_of(WIDTH_MULTIPLE) <= 5 * cols
    }

    /// Stacks matrices of equal width by rows and quantises them.
    ///
    /// # Errors
    /// When candle cannot.
    pub fn quantize(parts: &[HostTensor]) -> Result<Self, candle_core::Error> {
        let (rows, cols) = (parts.iter().map(|p| p.shape[0]).sum::<usize>(), parts[0].row_len());
        let padded = (rows.next_multiple_of(ROW_MULTIPLE), cols.next_multiple_of(WIDTH_MULTIPLE));
        let mut values = vec![0.0; padded.0 * padded.1];
        let sources = parts.iter().flat_map(|part| (0..part.shape[0]).map(move |row| (part, row)));
        for (out, (part, row)) in values.chunks_exact_mut(padded.1).zip(sources) {
            part.row_into(row, &mut out[..cols]);
        }
        let quantized = QTensor::quantize(&Tensor::from_vec(values, padded, &Device::Cpu)?, GgmlDType::Q8_0)?;
        let bytes = quantized.storage_size_in_bytes() as u64;
        Ok(Self { weight: QMatMul::from_qtensor(quantized)?, rows, cols, bytes })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Values from one row of a product to the next.
    pub fn stride(&self) -> usize {
        self.rows.next_multiple_of(ROW_MULTIPLE)
    }

    /// `x W^T` for `x` of `[tokens, cols]`: `[tokens, stride]`, of which the first `rows` of each row count.
    ///
    /// # Errors
    /// When candle fails.
    pub fn multiply(&self, x: &[f32]) -> Result<Vec<f32>, candle_core::Error> {
        let (tokens, width) = (x.len() / self.cols, self.cols.next_multiple_of(WIDTH_MULTIPLE));
        let mut padded = vec![0.0; tokens * width];
        for (padded, row) in padded.chunks_exact_mut(width).zip(x.chunks_exact(self.cols)) {
            padded[..self.cols].copy_from_slice(row);
        }
        let x = Tensor::from_vec(padded, (tokens, width), &Device::Cpu)?;
        self.weight.forward(&x)?.flatten_all()?.to_vec1()
    }
}
