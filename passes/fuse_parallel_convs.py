"""Merge convolutions of one input whose outputs are added (RepVGG, Ding et al. 2021; ACNet, Ding et al. 2019).

    before   y = Add(Conv(x, W3, b3), Conv(x, W1, b1))                      3x3 and 1x1
    after    y = Conv(x, W3 + embed(W1), b3 + b1)                           3x3

The smaller kernel is laid into the larger one where both read the same place: strides and output sizes must be the
same, kernels, pads and dilations need not. Both pad with zeros, so this is exact. A branch may be a chain, with
AveragePool (the shortcut of ResNet-D), BatchNormalization or constants per channel in it; Sub gives a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from onnxcompress.merging.branches import Branch, BranchPass

MOST_PAIRS = 64


class FuseParallelConvs(BranchPass):
    name = "fuse-parallel-convs"

    def wants(self, group: Sequence[Branch]) -> bool:
        return sum(not b.path.is_affine for b in group) > 1 and any(b.path.has_conv for b in group)

    def candidates(self, branches: Sequence[Branch]) -> list[list[Branch]]:
        convs = [branch for branch in branches if not branch.path.is_affine]
        if len(convs) < 2:
            return []
        # All at once, or else the best pair: what is left over is looked at again.
        pairs = [list(pair) for pair in combinations(convs, 2)][:MOST_PAIRS]
        return [list(branches), convs, *pairs]
