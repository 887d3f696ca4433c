"""Models in Netron (https://netron.app): one, or two side by side with the nodes that differ."""

from onnxcompress.view.serving import Viewer

__all__ = ["Viewer"]
