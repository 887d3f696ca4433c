"""Where a sliding window goes: strides, dilations, padding and the number of outputs, for convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.train.ops.call import Call

Sizes = tuple[int, ...]


def spatial_rank(call: Call) -> int | None:
    """Number of spatial axes, where an attribute tells it."""
    for name in ("kernel_shape", "strides", "dilations", "output_padding"):
        if call.attribute(name):
            return len(call.attribute(name))
    return len(call.attribute("pads")) // 2 if call.attribute("pads") else None


def kernel_shape(call: Call) -> Sizes:
    """The window of a pool, which has no weight to tell it.

    Raises:
        ModelError: The node does not say.
    """
    if not call.attribute("kernel_shape"):
        raise call.refuse("a pool without kernel_shape")
    return tuple(call.attribute("kernel_shape"))


def torch_order(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Padding as torch's pad takes it: last axis first, begin before end."""
    return [pad for pair in reversed(list(zip(begins, ends, strict=True))) for pad in pair]


def same_padding(total: int, *, upper: bool) -> tuple[int, int]:
    """Padding for auto_pad, the odd one at the end for SAME_UPPER."""
    return (total // 2, total - total // 2) if upper else (total - total // 2, total // 2)


@dataclass(frozen=True)
class Window:
    """The attributes of a window over ``rank`` spatial axes; absent ones at their defaults.

    ``begins`` and ``ends`` are the explicit padding, which an ``auto_pad`` of SAME_UPPER or SAME_LOWER replaces.
    """

    strides: Sizes
    dilations: Sizes
    begins: Sizes
    ends: Sizes
    auto_pad: str
    ceil: bool

    @staticmethod
    def of(call: Call, rank: int) -> Window:
        """The window of a node.

        Raises:
            ModelError: The attributes do not fit each other, or torch has no window over so many axes.
        """
        if not 1 <= rank <= 3:
            raise call.refuse(f"a window over {rank} spatial axes (torch has 1 to 3)")
        auto_pad = call.attribute("auto_pad", "NOTSET")
        if auto_pad not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise call.refuse(f"auto_pad = {auto_pad!r}")
        pads = call.attribute("pads") if auto_pad == "NOTSET" else None
        pads = tuple(pads) if pads else (0,) * (2 * rank)
        strides = tuple(call.attribute("strides") or (1,) * rank)
        dilations = tuple(call.attribute("dilations") or (1,) * rank)
        if (len(strides), len(dilations), len(pads)) != (rank, rank, 2 * rank):
            raise call.refuse(
                f"{len(strides)} strides, {len(dilations)} dilations and {len(pads)} pads for {rank} axes"
            )
        if auto_pad.startswith("SAME") and dilations != (1,) * rank:
            raise call.refuse("auto_pad with dilations, which runtimes take differently,")
        ceil = bool(call.attribute("ceil_mode", 0))
        return Window(strides, dilations, pads[:rank], pads[rank:], auto_pad, ceil)

    @property
    def same(self) -> bool:
        """Whether the padding depends on the sizes of the input."""
        return self.auto_pad.startswith("SAME")

    @property
    def symmetric(self) -> bool:
        return not self.same and self.begins == self.ends

    def extents(self, kernel: Sequence[int]) -> Sizes:
        """From the first to the last element that a window reads."""
        return tuple((k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True))

    def padding(self, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[Sizes, Sizes]:
        """Elements added before and after each spatial axis of an input of these sizes."""
        if not self.same:
            return self.begins, self.ends
        upper = self.auto_pad == "SAME_UPPER"
        pairs = [
            same_padding(max((-(-size // stride) - 1) * stride + extent - size, 0), upper=upper)
            for size, stride, extent in zip(sizes, self.strides, self.extents(kernel), strict=True)
        ]
        return tuple(begin for begin, _ in pairs), tuple(end for _, end in pairs)

    def counts(self, sizes: Sequence[int], kernel: Sequence[int]) -> Sizes:
        """Outputs along each spatial axis; rounded up, no window starts in the padding at the end."""
        found = []
        begins, ends = self.padding(sizes, kernel)
        for size, stride, extent, begin, end in zip(
            sizes, self.strides, self.extents(kernel), begins, ends, strict=True
        ):
            room = size + begin + end - extent
            count = room // stride + 1
            if self.ceil and room % stride and count * stride < size + begin:
                count += 1
            found.append(count)
        return tuple(found)

    def exact_padding(self, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Padding, for torch's pad, of which the windows leave nothing over and need nothing more."""
        begins, _ = self.padding(sizes, kernel)
        ends = [
            (count - 1) * stride + extent - size - begin
            for count, stride, extent, size, begin in zip(
                self.counts(sizes, kernel), self.strides, self.extents(kernel), sizes, begins, strict=True
            )
        ]
        return torch_order(begins, ends)
