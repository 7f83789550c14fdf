mod cpu;
mod cuda_emulation;
mod engine;
