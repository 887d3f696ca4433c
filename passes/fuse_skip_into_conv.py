"""Merge a skip connection around a convolution into its weights.

    before   y = Add(Conv(x, W, b), x)
    after    y = Conv(x, W + I, b)

I has a one per channel at the tap that reads the output's own position. The skip may be scaled and shifted per
channel, by a BatchNormalization or by constants, and the Conv may be a chain. Exact for any group and dilation, as the
skip reads no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.merging.branches import Branch, BranchPass


class FuseSkipIntoConv(BranchPass):
    name = "fuse-skip-into-conv"

    def wants(self, group: Sequence[Branch]) -> bool:
        return any(b.path.is_affine for b in group) and any(b.path.has_conv for b in group)

    def candidates(self, branches: Sequence[Branch]) -> list[list[Branch]]:
        skips = [branch for branch in branches if branch.path.is_affine]
        return [[branch, *skips] for branch in branches if branch.path.has_conv and skips]
