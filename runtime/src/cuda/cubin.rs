//! What a cubin says about its kernels. It is an ELF file; each kernel has a section `.nv.info.NAME` of attributes
//! (the layout that `cuobjdump -elf` shows).

use std::collections::BTreeMap;

/// Format of an attribute with a 16-bit length and a payload; the other formats hold their value in place of the length.
const SIZED: u8 = 0x04;
/// One parameter: u32 index, u16 ordinal, u16 offset, u32 of which the upper 14 bits are the size in bytes.
const PARAMETER: u8 = 0x17;
/// The same from sm_100 on.
const PARAMETER_V2: u8 = 0x45;
const PREFIX: &str = ".nv.info.";

/// Sizes of the parameters of each kernel, in order. Kernels about which the file says nothing are left out; nothing is
/// found in a file that is no ELF file.
pub fn parameter_sizes(cubin: &[u8]) -> BTreeMap<String, Vec<usize>> {
    let mut found = BTreeMap::new();
    for (name, data) in sections(cubin).unwrap_or_default() {
        if let Some(kernel) = name.strip_prefix(PREFIX) {
            let sizes = parameters(data);
            // Ordinals from 0 without a gap, or the attribute was not understood.
            if sizes.keys().copied().eq(0..sizes.len()) && !sizes.is_empty() {
                found.insert(kernel.to_owned(), sizes.into_values().collect());
            }
        }
    }
    found
}

/// Size by ordinal.
fn parameters(mut data: &[u8]) -> BTreeMap<usize, usize> {
    let mut sizes = BTreeMap::new();
    while let Some((&[format, attribute, a, b], rest)) = data.split_first_chunk::<4>() {
        let length = if format == SIZED { usize::from(u16::from_le_bytes([a, b])) } else { 0 };
        let Some((payload, rest)) = rest.split_at_checked(length) else { break };
        data = rest;
        if format == SIZED
            && [PARAMETER, PARAMETER_V2].contains(&attribute)
            && let (Some(ordinal), Some(flags)) = (number(payload, 4, 2), number(payload, 8, 4))
        {
            sizes.insert(ordinal, flags >> 18);
        }
    }
    sizes
}

/// Name and content of every section of a 64-bit little-endian ELF file.
fn sections(file: &[u8]) -> Option<Vec<(&str, &[u8])>> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (at, entry, count, names) =
        (number(file, 0x28, 8)?, number(file, 0x3a, 2)?, number(file, 0x3c, 2)?, number(file, 0x3e, 2)?);
    let header = |index: usize| file.get(at.checked_add(index.checked_mul(entry)?)?..);
    let content = |index: usize| {
        let header = header(index)?;
        let (offset, size) = (number(header, 0x18, 8)?, number(header, 0x20, 8)?);
        file.get(offset..offset.checked_add(size)?)
    };
    let names = content(names)?;
    let named = |index: usize| {
        let name = names.get(number(header(index)?, 0, 4)?..)?;
        let end = name.iter().position(|&byte| byte == 0)?;
        Some((std::str::from_utf8(&name[..end]).ok()?, content(index)?))
    };
    Some((0..count).filter_map(named).collect())
}

fn number(data: &[u8], at: usize, bytes: usize) -> Option<usize> {
    let mut wide = [0; 8];
    wide[..bytes].copy_from_slice(data.get(at..at.checked_add(bytes)?)?);
    usize::try_from(u64::from_le_bytes(wide)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of two sections: names, and attributes of a kernel `k`.
    fn elf(attributes: &[u8]) -> Vec<u8> {
        const HEADER: usize = 0x40;
        let names = b"\0.names\0.nv.info.k\0";
        let sections = [(1_u32, names.as_slice()), (8, attributes)];
        let mut file = vec![0; HEADER];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut headers = Vec::new();
        for (name, data) in sections {
            let mut header = vec![0; 0x40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(file.len() as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(data.len() as u64).to_le_bytes());
            headers.extend(header);
            file.extend(data);
        }
        let at = (file.len() as u64).to_le_bytes();
        file[0x28..0x30].copy_from_slice(&at);
        (file[0x3a], file[0x3c], file[0x3e]) = (0x40, 2, 0);
        file.extend(headers);
        file
    }

    /// As NVRTC 13.0 writes them: the last parameter first.
    fn parameter(ordinal: u8, size: u8) -> Vec<u8> {
        let [a, b, c, d] = (u32::from(size) << 18 | 0x1f000).to_le_bytes();
        vec![0x04, 0x17, 12, 0, 0, 0, 0, 0, ordinal, 0, 8 * ordinal, 0, a, b, c, d]
    }

    #[test]
    fn sizes_in_order_whatever_else_is_said() {
        let mut attributes = vec![0x03, 0x1b, 0xff, 0x00, 0x04, 0x0a, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        attributes.extend(parameter(1, 4));
        attributes.extend(parameter(0, 8));
        let found = parameter_sizes(&elf(&attributes));
        assert_eq!(found, BTreeMap::from([("k".to_owned(), vec![8, 4])]));
    }

    #[test]
    fn what_is_not_understood_is_not_found() {
        let gap = [parameter(0, 8), parameter(2, 8)].concat();
        assert!(parameter_sizes(&elf(&gap)).is_empty());
        let whole = elf(&parameter(0, 8));
        for file in [&whole[..whole.len() - 0x40], &whole[..0x30], b"cubin", b""] {
            assert!(parameter_sizes(file).is_empty());
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            drop(parameter_sizes(&damaged));
        }
    }
}
