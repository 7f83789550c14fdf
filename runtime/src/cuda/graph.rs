//! Launches recorded once and replayed as a whole.

use super::CudaError;
use super::device::Device;
use cudarc::driver::sys::{self, CUstreamCaptureMode};
use std::sync::Arc;

/// What was launched between begin and end of a capture, ready to be replayed.
#[derive(Debug)]
pub struct Graph {
    device: Arc<Device>,
    exec: sys::CUgraphExec,
}

// SAFETY: an opaque handle; launches of one graph are serialised by `&self` living in one backend on one thread at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `launches` puts into the device's stream; nothing runs yet.
    ///
    /// # Errors
    /// Those of `launches`, or the driver's: a captured call that may not be captured spoils the capture.
    pub fn capture(device: &Arc<Device>, launches: impl FnOnce() -> Result<(), CudaError>) -> Result<Self, CudaError> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live and not capturing: captures are made by this function only, which ends them.
        let result = unsafe { sys::cuStreamBeginCapture_v2(device.stream(), mode) };
        device.check("cuStreamBeginCapture", result)?;
        let recorded = launches();
        let mut graph = std::ptr::null_mut();
        // SAFETY: begun above. Ends the capture also when a launch failed.
        let result = unsafe { sys::cuStreamEndCapture(device.stream(), &raw mut graph) };
        let ended = device.check("cuStreamEndCapture", result);
        let instantiated = recorded.and(ended).and_then(|()| {
            let mut exec = std::ptr::null_mut();
            // SAFETY: the graph is whole, since the capture ended well; writes one handle.
            let result = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) };
            device.check("cuGraphInstantiate", result).map(|()| exec)
        });
        if !graph.is_null() {
            // SAFETY: made by the capture, destroyed only here; the executable graph is a copy.
            unsafe { sys::cuGraphDestroy(graph) };
        }
        Ok(Self { device: device.clone(), exec: instantiated? })
    }

    /// Puts all of it into the device's stream.
    ///
    /// # Safety
    /// All memory that the captured launches use must still be there and stay until the stream has passed the graph.
    pub unsafe fn launch(&self) -> Result<(), CudaError> {
        // SAFETY: the executable graph is live; the caller vouches for the memory.
        let result = unsafe { sys::cuGraphLaunch(self.exec, self.device.stream()) };
        self.device.check("cuGraphLaunch", result)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: instantiated in `capture`, destroyed only here; the driver waits for a launch under way.
            unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}
