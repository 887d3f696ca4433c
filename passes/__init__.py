"""The passes, one rewrite a file, listed here by hand; ``onnxcompress.pipeline`` orders them.

This folder is the package ``onnxcompress.passes``: imported as top-level ``passes`` it would be a second copy of every
class, so it refuses.
"""

if __name__ == "passes":
    raise ImportError("import onnxcompress.passes, not passes: this folder is mapped into the package")

from onnxcompress.passes.fuse_batchnorm_into_conv import FuseBatchNormIntoConv

# Within a group the order is the order of running; the reasons stand beside the lines.
CLEANUP = ()
FUSION = ()
FOLDING = (FuseBatchNormIntoConv,)
MERGING = ()
