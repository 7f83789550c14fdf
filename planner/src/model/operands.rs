//! Which buffers an op works on.

use super::{BufferId, Op};

impl Op {
    /// Buffers whose values it uses, those that it changes in place too.
    pub fn reads(&self) -> impl Iterator<Item = BufferId> {
        let (first, second) = match self {
            Self::Embed { .. } => (None, None),
            Self::Norm { x, add, .. } | Self::Linear { x, add, .. } => (Some(*x), *add),
            Self::QkNormRopeKvWrite { qkv: x, .. }
            | Self::Attention { qkv: x, .. }
            | Self::GatedAct { gate_up: x, .. }
            | Self::Act { x, .. }
            | Self::GatherLast { x, .. }
            | Self::Pool { x, .. }
            | Self::L2Normalize { x, .. }
            | Self::LmHead { x, .. }
            | Self::SoftCap { x, .. } => (Some(*x), None),
            Self::Planned(op) => (Some(op.x), op.add),
        };
        first.into_iter().chain(second)
    }

    /// Buffers whose values it sets, in place or not.
    pub fn writes(&self) -> impl Iterator<Item = BufferId> {
        let (first, second) = match self {
            Self::Embed { out, .. }
            | Self::Norm { out, .. }
            | Self::Linear { out, .. }
            | Self::QkNormRopeKvWrite { qkv: out, .. }
            | Self::Attention { out, .. }
            | Self::GatedAct { out, .. }
            | Self::Act { out, .. }
            | Self::GatherLast { out, .. }
            | Self::Pool { out, .. }
            | Self::L2Normalize { out, .. }
            | Self::LmHead { out, .. }
            | Self::SoftCap { x: out, .. } => (*out, None),
            Self::Planned(op) => (op.out, Some(op.scratch)),
        };
        [first].into_iter().chain(second)
    }

    /// Every buffer that it reads or writes; one that it does both to comes twice.
    pub fn buffers(&self) -> impl Iterator<Item = BufferId> {
        self.reads().chain(self.writes())
    }

    /// The same op on other buffers.
    pub fn renamed(&self, name: impl Fn(BufferId) -> BufferId) -> Self {
        let mut op = self.clone();
        op.buffers_mut().into_iter().for_each(|id| *id = name(*id));
        op
    }

    fn buffers_mut(&mut self) -> Vec<&mut BufferId> {
        match self {
            Self::Embed { out, .. } => vec![out],
            Self::Norm { x, add, out, .. } | Self::Linear { x, add, out, .. } => {
                [x, out].into_iter().chain(add).collect()
            }
            Self::QkNormRopeKvWrite { qkv: x, .. } | Self::SoftCap { x, .. } => vec![x],
            Self::Attention { qkv: x, out, .. }
            | Self::GatedAct { gate_up: x, out, .. }
            | Self::Act { x, out, .. }
            | Self::GatherLast { x, out }
            | Self::Pool { x, out, .. }
            | Self::L2Normalize { x, out }
            | Self::LmHead { x, out, .. } => vec![x, out],
            Self::Planned(op) => [&mut op.x, &mut op.scratch, &mut op.out].into_iter().chain(&mut op.add).collect(),
        }
    }
}
