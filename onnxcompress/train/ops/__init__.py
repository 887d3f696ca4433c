"""The operators of the twin, by family; each module holds builders and a table ``OPERATORS`` of them."""

from onnxcompress.train.ops import (
    activations,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resize,
    shaping,
)
from onnxcompress.train.ops.call import Builder, Call, Function, Mode, integers, torch_type

OPERATORS: dict[str, Builder] = {
    **elementwise.OPERATORS,
    **activations.OPERATORS,
    **linear.OPERATORS,
    **pooling.OPERATORS,
    **normalization.OPERATORS,
    **reduction.OPERATORS,
    **shaping.OPERATORS,
    **indexing.OPERATORS,
    **resize.OPERATORS,
    **recurrent.OPERATORS,
    **quantization.OPERATORS,
}
