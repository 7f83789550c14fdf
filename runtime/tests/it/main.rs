mod any_device;
mod cpu;
mod cuda_emulation;
mod engine;
mod server;
mod weights;
