//! What a start does not wait for: products to measure and graphs to capture, a piece at a time.

use super::super::arena::StepRows;
use super::super::executor::PrefillChunks;
use super::super::graph::Graph;
use super::super::load::LoadedModel;
use super::super::prepare::run_products;
use super::super::{CudaError, GraphCapture};
use super::{CudaBackend, decode_shape};

impl CudaBackend {
    /// One piece of what can wait: a measurement, or the graph of a batch size whose products are all measured. The
    /// commonest sizes come first. False: all is done.
    pub(super) fn do_next(&mut self) -> Result<bool, CudaError> {
        let LoadedModel { executor, tuner, sizes, .. } = &mut self.model;
        let device = executor.device.clone();
        device.bind()?;
        let graphs = &self.graphs;
        let missing = |bucket: &usize| !graphs.contains_key(bucket) && !tuner.is_pending(*bucket);
        let wanted = sizes.commonest_buckets().into_iter().find(missing);
        if let Some(bucket) = wanted.filter(|_| self.graph_capture != GraphCapture::Never) {
            self.capture(bucket)?;
            return Ok(true);
        }
        if tuner.is_done() {
            if !self.settled {
                self.settled = true;
                let (graphs, report) = (self.graphs.len(), tuner.report());
                tracing::info!(graphs, products = report.remembered + report.measured, "all is measured and captured");
            }
            return Ok(false);
        }
        // SAFETY: the operands are weights and arena of this model, made for rows up to those tried; no step is under way,
        // so what is written over activations is read by none.
        if let Some(rows) = unsafe { tuner.step(&device, &mut executor.linears)? } {
            // Its graph computes the shape in the old way.
            self.graphs.remove(&rows);
        }
        Ok(true)
    }

    /// Records a decode step of this many rows. Nothing of it runs but its products, to have their kernels loaded: in
    /// stream order, so over activations that no step needs any more. False: the card has no room for graphs, since
    /// others took what was left of it; from then on steps are launched one kernel at a time.
    pub(super) fn capture(&mut self, bucket: usize) -> Result<bool, CudaError> {
        let (shape, rows) = (decode_shape(bucket), StepRows { tokens: bucket, sequences: bucket });
        let executor = &mut self.model.executor;
        let device = executor.device.clone();
        // SAFETY: the memory of the model was allocated for the largest step, which no bucket exceeds.
        unsafe { run_products(&executor.plan, &mut executor.linears, rows)? };
        let graph = Graph::capture(&device, || {
            // SAFETY: as above; the graph is dropped before the memory (field order), and is only launched with metadata
            // of this shape on the device.
            unsafe { executor.run(&shape, PrefillChunks::default()) }
        });
        match graph {
            Ok(graph) => {
                self.graphs.insert(bucket, graph);
                Ok(true)
            }
            Err(error @ CudaError::OutOfMemoryInCall { .. }) => {
                tracing::warn!(%error, "no more graphs are captured: decode steps get a little slower");
                self.graph_capture = GraphCapture::Never;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
