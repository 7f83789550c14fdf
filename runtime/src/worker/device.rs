//! What a replica runs on, as people write it.

use std::str::FromStr;

/// `auto`, `cpu`, `cuda`, `cuda:1`, `cuda:GPU-8932f937-d72c-4106-c12f-20bd9faed9f6`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A card when there is one that can run the model, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda(CudaDevice),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CudaDevice {
    /// Among the cards that CUDA_VISIBLE_DEVICES shows.
    Ordinal(usize),
    /// As `nvidia-smi -L` prints it, or its beginning.
    Uuid(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a device; known: auto, cpu, cuda, cuda:N, cuda:GPU-UUID")]
pub struct UnknownDevice(String);

impl FromStr for DeviceChoice {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        let unknown = || UnknownDevice(text.chars().take(80).collect());
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(CudaDevice::Ordinal(0))),
            _ => {}
        }
        let which = text.strip_prefix("cuda:").ok_or_else(unknown)?;
        if let Ok(ordinal) = which.parse::<u16>() {
            return Ok(Self::Cuda(CudaDevice::Ordinal(ordinal.into())));
        }
        let digits = which.strip_prefix("GPU-").or_else(|| which.strip_prefix("MIG-")).ok_or_else(unknown)?;
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        if plain { Ok(Self::Cuda(CudaDevice::Uuid(which.to_owned()))) } else { Err(unknown()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_as_people_write_them() {
        let cuda = |device| Ok(DeviceChoice::Cuda(device));
        for (text, device) in [
            ("auto", Ok(DeviceChoice::Auto)),
            ("cpu", Ok(DeviceChoice::Cpu)),
            ("cuda", cuda(CudaDevice::Ordinal(0))),
            ("cuda:3", cuda(CudaDevice::Ordinal(3))),
            ("cuda:GPU-8932f937-d72c", cuda(CudaDevice::Uuid("GPU-8932f937-d72c".to_owned()))),
            ("cuda:", Err(())),
            ("cuda:-1", Err(())),
            ("cuda:GPU-", Err(())),
            ("cuda:GPU-x/../y", Err(())),
            ("gpu", Err(())),
            ("", Err(())),
        ] {
            assert_eq!(text.parse().map_err(|_: UnknownDevice| ()), device, "{text:?}");
        }
    }
}
