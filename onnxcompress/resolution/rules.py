"""Which rule each operator of the standard domain has; one that is not here pins the resolution of what it reads."""

from __future__ import annotations

from onnxcompress.resolution import elementwise_rules, moving_rules, spatial_rules
from onnxcompress.resolution.walk import Rule

SAME = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu"),
    *("Clip", "Cos", "Cosh", "CumSum", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"),
    *("Hardmax", "Identity", "IsInf", "IsNaN", "LRN", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization"),
    *("MeanVarianceNormalization", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid"),
    *("Sign", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
SEVERAL = (
    *("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)
REDUCTIONS = (
    *("ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, elementwise_rules.same),
    **dict.fromkeys(SEVERAL, elementwise_rules.several),
    **dict.fromkeys(REDUCTIONS, moving_rules.reduce),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization"), elementwise_rules.batch_normalization),
    "InstanceNormalization": elementwise_rules.batch_normalization,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), elementwise_rules.layer_normalization),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), elementwise_rules.per_axis),
    "DynamicQuantizeLinear": elementwise_rules.per_axis,
    "Gemm": elementwise_rules.gemm,
    **dict.fromkeys(("MatMul", "MatMulInteger"), elementwise_rules.matmul),
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv"), spatial_rules.conv),
    "ConvTranspose": spatial_rules.conv_transpose,
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), spatial_rules.pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), spatial_rules.global_pool),
    **dict.fromkeys(("Resize", "Upsample"), spatial_rules.resize),
    "DepthToSpace": spatial_rules.depth_to_space,
    "SpaceToDepth": spatial_rules.space_to_depth,
    "Pad": spatial_rules.pad,
    "Concat": moving_rules.concat,
    "ConstantOfShape": moving_rules.constant_of_shape,
    "Expand": moving_rules.expand,
    "Flatten": moving_rules.flatten,
    "Gather": moving_rules.gather,
    "Range": moving_rules.range_,
    "Reshape": moving_rules.reshape,
    "Shape": moving_rules.shape,
    "Size": moving_rules.shape,
    "Slice": moving_rules.slice_,
    "Split": moving_rules.split,
    **dict.fromkeys(("Squeeze", "Unsqueeze"), moving_rules.squeeze),
    "Tile": moving_rules.tile,
    "Transpose": moving_rules.transpose,
}
