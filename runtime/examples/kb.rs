use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use mserve_runtime::cpu::kernels::Lines;
use mserve_runtime::cpu::kernels::panel::{PanelMatrix, Tiles};
use mserve_runtime::weights::{HostTensor, StoredType};
fn cpu_ns() -> u64 {
    let mut s = 0;
    for t in std::fs::read_dir("/proc/self/task").unwrap() {
        let p = t.unwrap().path().join("schedstat");
        if let Ok(x) = std::fs::read_to_string(p) {
            s += x.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    s
}
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let mut b = f64::MAX;
    let t = cpu_ns();
    let w = std::time::Instant::now();
    let mut n = 0;
    while w.elapsed().as_millis() < 300 || n < 3 {
        f();
        n += 1;
    }
    let d = (cpu_ns() - t) as f64 / n as f64;
    b = b.min(d);
    b / 1e6
}
fn main() {
    let arch = pulp::Arch::new();
    println!("{arch:?}");
    for (n, k) in [(9728, 896), (896, 4864), (4096, 4096)] {
        let vals: Vec<f32> = (0..n * k).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
        let t = HostTensor {
            stored: StoredType::F32,
            shape: vec![n, k],
            bytes: vals.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let ct = Tensor::from_vec(vals, (n, k), &Device::Cpu).unwrap();
        let q = QMatMul::from_qtensor(QTensor::quantize(&ct, GgmlDType::Q8_0).unwrap()).unwrap();
        let wt = ct.t().unwrap();
        for m in [1usize, 4, 8, 64, 256] {
            let x: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32).collect();
            let flops = 2.0 * (m * n * k) as f64;
            print!("{n}x{k} M={m}:");
            for st in [StoredType::BF16, StoredType::F16, StoredType::F32] {
                let p = PanelMatrix::pack(&[t.clone().convert(st)]);
                let mut tiles = Tiles::default();
                let mut out = Lines::<f32>::zeroed(p.panels() * 2 * m);
                let ms = best(|| {
                    tiles.fill_serial(arch, &x, k);
                    p.multiply_panels(arch, 0, &tiles, out.as_mut_slice());
                });
                print!("  {st:?} {ms:.2} ms {:.0} GB/s {:.0} GF", p.bytes() as f64 / ms / 1e6, flops / ms / 1e6);
            }
            let cx = Tensor::from_vec(x, (m, k), &Device::Cpu).unwrap();
            let ms = best(|| {
                std::hint::black_box(cx.matmul(&wt).unwrap());
            });
            print!("  candle f32 {ms:.2} ms {:.0} GF", flops / ms / 1e6);
            let ms = best(|| {
                std::hint::black_box(q.forward(&cx).unwrap());
            });
            println!("  candle q8 {ms:.2} ms {:.0} GF", flops / ms / 1e6);
        }
    }
}
