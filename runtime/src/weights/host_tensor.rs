use half::{bf16, f16};
use mserve_planner::model::DType;

/// Element types that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    F32,
    F16,
    BF16,
}

impl StoredType {
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    pub const fn from_dtype(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }
}

/// A tensor in memory, in its stored type: little endian, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    pub stored: StoredType,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// Elements of one row: all dimensions but the first. A vector is one row.
    pub fn row_len(&self) -> usize {
        match self.shape.len() {
            0 | 1 => self.len(),
            _ => self.shape[1..].iter().product(),
        }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widens row `row` into `out`, exactly. `out` has [`Self::row_len`] elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        let stride = self.row_len() * self.stored.bytes();
        widen(self.stored, &self.bytes[row * stride..(row + 1) * stride], out);
    }

    /// The same values in another type; rounded to nearest when it is narrower.
    pub fn convert(self, stored: StoredType) -> Self {
        if stored == self.stored {
            return self;
        }
        let values = self.to_f32();
        let bytes = match stored {
            StoredType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            StoredType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            StoredType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        };
        Self { stored, shape: self.shape, bytes }
    }

    /// All elements, widened exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        widen(self.stored, &self.bytes, &mut out);
        out
    }
}

fn widen(stored: StoredType, bytes: &[u8], out: &mut [f32]) {
    match stored {
        StoredType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        StoredType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16::from_le_bytes(*b).to_f32();
            }
        }
        StoredType::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}
