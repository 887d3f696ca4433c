"""Reference architectures in plain PyTorch, and small trained .onnx files made from them.

``path("digits")`` is the file of the default model: digits of 8x8 pixels, trained by ``tools/train_digits.py``.
``path("resnet20_digits")``, ``path("resnet20_fashion_mnist")`` and their like are trained by
``tools/train_reference.py``. The architectures are the modules here, one a network family, with one function per
published network. They import torch; this file does not.
"""

from pathlib import Path

if __name__ != "onnxcompress.models":
    raise ImportError(f"import it as onnxcompress.models, not as {__name__}", name=__name__)

from onnxcompress.errors import ModelError

_FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """Return the trained .onnx file of a reference architecture.

    Raises:
        ModelError: There is no such model.
    """
    names = sorted((file.stem for file in _FOLDER.glob("*.onnx")), key=lambda stem: (stem != "digits", stem))
    if name not in names:
        raise ModelError(f"no model {name!r} comes with onnxcompress; there is {', '.join(names) or 'none'}")
    return _FOLDER / f"{name}.onnx"
