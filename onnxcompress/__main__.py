"""``python -m onnxcompress`` is the command line."""

from onnxcompress.cli import main

main()
