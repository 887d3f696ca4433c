"""``.onnx`` files to graphs and back, losing nothing that no pass changed.

The ModelProto that was read stays as the *carrier*. Writing copies from it every node, attribute, initializer, doc
string and metadata entry that is still what it was; only what a pass made or changed is encoded anew. Weights are read
one at a time: from the carrier, or from memory-mapped external files, which must lie inside the model's folder.

A file is written to a temporary folder beside its target and renamed into place, so it appears whole or not at all.
"""

from onnxcompress.model_io.reading import element_dtype, load, parse_proto, read_proto, variable_of
from onnxcompress.model_io.staging import StagedFile, check_replaceable, save
from onnxcompress.model_io.stored import StoredValues, all_tensors, external_files, external_location
from onnxcompress.model_io.writing import PASS_KEY, to_proto

__all__ = [
    "PASS_KEY",
    "StagedFile",
    "StoredValues",
    "all_tensors",
    "check_replaceable",
    "element_dtype",
    "external_files",
    "external_location",
    "load",
    "parse_proto",
    "read_proto",
    "save",
    "to_proto",
    "variable_of",
]
