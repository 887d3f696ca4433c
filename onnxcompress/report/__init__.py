"""What is said of a run: one dictionary, shown as JSON, as Markdown, as a page, or by the command line as a table."""

from onnxcompress.report.optimization import EXACTNESS_TEXT, as_dict, markdown, proof_line, rows
from onnxcompress.report.provenance import environment, provenance_of
from onnxcompress.report.quantization import layer_rows, quantization_lines, quantization_markdown
from onnxcompress.report.wording import bytes_text, change, speed_text
from onnxcompress.report.writing import check_suffix, write, write_as, write_quantization

__all__ = [
    "EXACTNESS_TEXT",
    "as_dict",
    "bytes_text",
    "change",
    "check_suffix",
    "environment",
    "layer_rows",
    "markdown",
    "proof_line",
    "provenance_of",
    "quantization_lines",
    "quantization_markdown",
    "rows",
    "speed_text",
    "write",
    "write_as",
    "write_quantization",
]
