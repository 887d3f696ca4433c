"""What can go wrong, as one tree.

    OnnxCompressError            caught by the command line: one line on stderr
    |-- ModelError               the file: missing, corrupt, unsupported, not to be run         exit 2
    |-- DataError                samples or labels: missing, wrong shape or type                exit 2
    |-- RecipeError              the settings: unknown pass, bad value, options that conflict   exit 2
    |-- OutputError              the output cannot be written: folder, permission, full disk    exit 2
    |-- RuntimeFailure           onnxruntime refused or crashed on a model                      exit 2
    |-- PassError                our bug: a pass broke the graph; names pass and node           exit 1
    |-- TrainingError            the loss or a weight became NaN or infinite                    exit 1
    |-- QuantizationError        a weight that cannot be quantized as asked                     exit 1
    `-- EquivalenceError         outputs differ by more than allowed                            exit 1

Built-in errors (TypeError, ValueError) are for mistakes of a Python caller. Every message holds the thing, the number,
the limit, and the way out when there is one.
"""


class OnnxCompressError(Exception):
    """Base of everything that onnxcompress raises on purpose."""

    exit_code = 2


class ModelError(OnnxCompressError):
    """The model file is missing, corrupt, unsupported or cannot be run."""


class DataError(OnnxCompressError):
    """Samples or labels are missing, unreadable, or do not fit the model."""


class RecipeError(OnnxCompressError):
    """A setting is unknown, malformed, or conflicts with another."""


class OutputError(OnnxCompressError):
    """An output file cannot be written."""


class RuntimeFailure(OnnxCompressError):
    """onnxruntime refused a model, or its process died on it."""


class PassError(OnnxCompressError):
    """A pass left a broken graph: our bug, with pass and node named."""

    exit_code = 1


class TrainingError(OnnxCompressError):
    """Training cannot go on: the loss or a weight is no number any more."""

    exit_code = 1


class QuantizationError(OnnxCompressError):
    """A weight cannot be quantized as asked."""

    exit_code = 1


class EquivalenceError(OnnxCompressError):
    """The outputs of two models differ by more than allowed."""

    exit_code = 1
