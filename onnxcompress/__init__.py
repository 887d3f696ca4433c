"""onnxcompress: smaller, faster ``.onnx`` files for stock onnxruntime, with the proof of what changed."""
