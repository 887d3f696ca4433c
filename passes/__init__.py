"""The passes, one rewrite a file, listed here by hand; ``onnxcompress.pipeline`` orders them.

This folder is the package ``onnxcompress.passes``: imported as top-level ``passes`` it would be a second copy of every
class, so it refuses.
"""

if __name__ == "passes":
    raise ImportError("import onnxcompress.passes, not passes: this folder is mapped into the package")

from onnxcompress.passes.deduplicate_initializers import DeduplicateInitializers
from onnxcompress.passes.deduplicate_nodes import DeduplicateNodes
from onnxcompress.passes.eliminate_dead_code import EliminateDeadCode
from onnxcompress.passes.eliminate_dropout import EliminateDropout
from onnxcompress.passes.eliminate_identity import EliminateIdentity
from onnxcompress.passes.eliminate_noop_arithmetic import EliminateNoopArithmetic
from onnxcompress.passes.eliminate_noop_cast import EliminateNoopCast
from onnxcompress.passes.eliminate_noop_clip import EliminateNoopClip
from onnxcompress.passes.eliminate_noop_concat import EliminateNoopConcat
from onnxcompress.passes.eliminate_noop_expand import EliminateNoopExpand
from onnxcompress.passes.eliminate_noop_pad import EliminateNoopPad
from onnxcompress.passes.eliminate_noop_reduce import EliminateNoopReduce
from onnxcompress.passes.eliminate_noop_reshape import EliminateNoopReshape
from onnxcompress.passes.eliminate_noop_resize import EliminateNoopResize
from onnxcompress.passes.eliminate_noop_slice import EliminateNoopSlice
from onnxcompress.passes.eliminate_noop_split import EliminateNoopSplit
from onnxcompress.passes.eliminate_noop_transpose import EliminateNoopTranspose
from onnxcompress.passes.eliminate_redundant_activation import EliminateRedundantActivation
from onnxcompress.passes.eliminate_redundant_expand import EliminateRedundantExpand
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.passes.fuse_batchnorm_into_conv import FuseBatchNormIntoConv
from onnxcompress.passes.fuse_batchnorm_into_gemm import FuseBatchNormIntoGemm
from onnxcompress.passes.fuse_batchnorm_into_next_conv import FuseBatchNormIntoNextConv
from onnxcompress.passes.fuse_batchnorm_into_next_gemm import FuseBatchNormIntoNextGemm
from onnxcompress.passes.fuse_cast_chain import FuseCastChain
from onnxcompress.passes.fuse_channel_affine_into_batchnorm import FuseChannelAffineIntoBatchNorm
from onnxcompress.passes.fuse_channel_affine_into_conv import FuseChannelAffineIntoConv
from onnxcompress.passes.fuse_channel_affine_into_gemm import FuseChannelAffineIntoGemm
from onnxcompress.passes.fuse_channel_layer_normalization import FuseChannelLayerNormalization
from onnxcompress.passes.fuse_clip_chain import FuseClipChain
from onnxcompress.passes.fuse_concat_chain import FuseConcatChain
from onnxcompress.passes.fuse_concat_into_conv import FuseConcatIntoConv
from onnxcompress.passes.fuse_concat_into_gemm import FuseConcatIntoGemm
from onnxcompress.passes.fuse_constant_affine_chain import FuseConstantAffineChain
from onnxcompress.passes.fuse_conv_chain import FuseConvChain
from onnxcompress.passes.fuse_conv_into_conv_transpose import FuseConvIntoConvTranspose
from onnxcompress.passes.fuse_conv_into_flatten_gemm import FuseConvIntoFlattenGemm
from onnxcompress.passes.fuse_conv_into_global_pool_gemm import FuseConvIntoGlobalPoolGemm
from onnxcompress.passes.fuse_gelu import FuseGelu
from onnxcompress.passes.fuse_gemm_chain import FuseGemmChain
from onnxcompress.passes.fuse_hard_sigmoid import FuseHardSigmoid
from onnxcompress.passes.fuse_hard_swish import FuseHardSwish
from onnxcompress.passes.fuse_instance_normalization import FuseInstanceNormalization
from onnxcompress.passes.fuse_layer_normalization import FuseLayerNormalization
from onnxcompress.passes.fuse_leaky_relu import FuseLeakyRelu
from onnxcompress.passes.fuse_left_matmul_chain import FuseLeftMatMulChain
from onnxcompress.passes.fuse_log_softmax import FuseLogSoftmax
from onnxcompress.passes.fuse_matmul_add_into_gemm import FuseMatMulAddIntoGemm
from onnxcompress.passes.fuse_mish import FuseMish
from onnxcompress.passes.fuse_pad_into_conv import FusePadIntoConv
from onnxcompress.passes.fuse_pad_into_pool import FusePadIntoPool
from onnxcompress.passes.fuse_parallel_convs import FuseParallelConvs
from onnxcompress.passes.fuse_parallel_gemms import FuseParallelGemms
from onnxcompress.passes.fuse_reshape_chain import FuseReshapeChain
from onnxcompress.passes.fuse_reshape_into_reduce import FuseReshapeIntoReduce
from onnxcompress.passes.fuse_rms_normalization import FuseRMSNormalization
from onnxcompress.passes.fuse_sibling_convs import FuseSiblingConvs
from onnxcompress.passes.fuse_sigmoid import FuseSigmoid
from onnxcompress.passes.fuse_skip_into_conv import FuseSkipIntoConv
from onnxcompress.passes.fuse_slice_chain import FuseSliceChain
from onnxcompress.passes.fuse_softmax import FuseSoftmax
from onnxcompress.passes.fuse_softplus import FuseSoftplus
from onnxcompress.passes.fuse_softsign import FuseSoftsign
from onnxcompress.passes.fuse_transpose_chain import FuseTransposeChain
from onnxcompress.passes.inline_constant_if import InlineConstantIf
from onnxcompress.passes.replace_constant_nodes import ReplaceConstantNodes
from onnxcompress.passes.replace_conv_before_pool import ReplaceConvBeforePool
from onnxcompress.passes.replace_min_max_with_clip import ReplaceMinMaxWithClip
from onnxcompress.passes.replace_transposed_batchnorm import ReplaceTransposedBatchNorm
from onnxcompress.passes.simplify_shape_computation import SimplifyShapeComputation

# Within a group the order is the order of running; the reasons stand beside the lines.
CLEANUP = (
    # First: every other pass looks for initializers.
    ReplaceConstantNodes,
    # Then what stands in a branch that is always taken is seen by the rest.
    InlineConstantIf,
    # Dead readers keep a tensor from being read once only.
    EliminateDeadCode,
    # Before the patterns: what is computed from constants is a constant to them.
    FoldConstants,
    SimplifyShapeComputation,
    EliminateIdentity,
    EliminateDropout,
    EliminateNoopCast,
    EliminateNoopReshape,
    EliminateNoopTranspose,
    EliminateNoopSlice,
    EliminateNoopConcat,
    EliminateNoopPad,
    EliminateNoopResize,
    EliminateNoopArithmetic,
    EliminateNoopExpand,
    EliminateRedundantExpand,
    EliminateNoopReduce,
    EliminateNoopSplit,
    EliminateNoopClip,
    EliminateRedundantActivation,
    FuseClipChain,
    FuseTransposeChain,
    FuseReshapeChain,
    FuseConcatChain,
    FuseSliceChain,
    FuseCastChain,
    # Equal constants first, so that equal nodes read the same tensors.
    DeduplicateInitializers,
    DeduplicateNodes,
)
FUSION = (
    # HardSwish and HardSigmoid look for one Clip, Mish for a plain Softplus.
    ReplaceMinMaxWithClip,
    FuseSigmoid,
    FuseSoftsign,
    FuseLeakyRelu,
    FuseSoftplus,
    FuseMish,
    FuseHardSwish,
    FuseHardSigmoid,
    FuseLogSoftmax,
    FuseSoftmax,
    FuseGelu,
    # Before LayerNormalization, which would take it with a vector of ones over the positions.
    FuseInstanceNormalization,
    FuseLayerNormalization,
    FuseChannelLayerNormalization,
    FuseRMSNormalization,
    FuseReshapeIntoReduce,
)
FOLDING = (
    # The affine folds behind it take what it leaves.
    ReplaceTransposedBatchNorm,
    # BatchNormalization -> Pad -> Conv only shows afterwards.
    FusePadIntoConv,
    FusePadIntoPool,
    # Into the operator before: exact with any pads, so ahead of the folds into the next one.
    FuseBatchNormIntoConv,
    FuseChannelAffineIntoConv,
    # The folds into Gemm then find a bias.
    FuseMatMulAddIntoGemm,
    FuseBatchNormIntoGemm,
    FuseChannelAffineIntoGemm,
    # What no operator in front took.
    FuseBatchNormIntoNextConv,
    FuseBatchNormIntoNextGemm,
    # Only what no linear operator took.
    FuseChannelAffineIntoBatchNorm,
    FuseConstantAffineChain,
)
MERGING = (
    # Pools first: a chain could turn a 1x1 Conv and a pool into a larger dense Conv.
    FuseConvIntoGlobalPoolGemm,
    ReplaceConvBeforePool,
    FuseConvIntoFlattenGemm,
    FuseConvIntoConvTranspose,
    # Chains before sums: a branch of two convolutions is then one.
    FuseConvChain,
    FuseSkipIntoConv,
    FuseParallelConvs,
    FuseConcatIntoConv,
    FuseGemmChain,
    FuseLeftMatMulChain,
    FuseParallelGemms,
    FuseConcatIntoGemm,
    # Last: a Split blocks every other merge.
    FuseSiblingConvs,
)
