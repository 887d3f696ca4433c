"""What a caller of a model sees: its inputs and outputs."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, TypeProto

OVERRIDABLE_IR = 4  # before it, every initializer is listed as an input and none can be overridden


def interface_differences(a: ModelProto, b: ModelProto, *, initializers: bool = True) -> list[str]:
    """What a caller of ``a`` would notice of ``b``: inputs and outputs by name, order, type and shape, and defaults.

    Args:
        a: The original.
        b: What has come of it.
        initializers: False when the weights of ``b`` stand among its inputs, as in a model without weights: then inputs
            that ``a`` does not have are passed over, and defaults are not compared.
    """
    found: list[str] = []
    for side in ("input", "output"):
        ours = {v.name: v.type for v in getattr(a.graph, side) if side == "output" or _fed(a, v.name)}
        theirs = {v.name: v.type for v in getattr(b.graph, side) if side == "output" or _fed(b, v.name)}
        if side == "input" and not initializers:
            listed = {v.name: v.type for v in b.graph.input}
            theirs = {name: kind for name, kind in listed.items() if name in ours}
        found += [f"{side} {name!r} is gone" for name in ours if name not in theirs]
        found += [f"{side} {name!r} is new" for name in theirs if name not in ours]
        shared = [name for name in ours if name in theirs]
        order = [name for name in theirs if name in ours]
        if shared != order:
            found.append(f"{side}s are in another order: {', '.join(order)}, expected {', '.join(shared)}")
        for name in shared:
            if _type_text(ours[name]) != _type_text(theirs[name]):
                found.append(f"{side} {name!r} is {_type_text(theirs[name])}, expected {_type_text(ours[name])}")
    if initializers:
        ours_default, theirs_default = _defaults(a), _defaults(b)
        found += [f"input {name!r} has no default any more" for name in ours_default if name not in theirs_default]
        found += [f"input {name!r} has a default now" for name in theirs_default if name not in ours_default]
    return found


def _weights(model: ModelProto) -> set[str]:
    sparse = (tensor.values.name for tensor in model.graph.sparse_initializer)
    return {*(tensor.name for tensor in model.graph.initializer), *sparse}


def _fed(model: ModelProto, name: str) -> bool:
    """Whether a listed input can be fed: before IR 4 every initializer had to be listed, and none could be."""
    return model.ir_version >= OVERRIDABLE_IR or name not in _weights(model)


def _defaults(model: ModelProto) -> list[str]:
    weights = _weights(model)
    return [v.name for v in model.graph.input if v.name in weights and model.ir_version >= OVERRIDABLE_IR]


def _type_text(kind: TypeProto) -> str:
    """A type with its shape, as in ``float[N, 3, ?]``; two types with the same text are the same to a caller."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        name = TensorProto.DataType.Name(tensor.elem_type).lower()
        sparse = "sparse " if which == "sparse_tensor_type" else ""
        if not tensor.HasField("shape"):
            return f"{sparse}{name} of any shape"
        dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
        return f"{sparse}{name}[{', '.join(dims)}]"
    if which in ("sequence_type", "optional_type"):
        return f"{which.removesuffix('_type')} of {_type_text(getattr(kind, which).elem_type)}"
    if which == "map_type":
        key = TensorProto.DataType.Name(kind.map_type.key_type).lower()
        return f"map of {key} to {_type_text(kind.map_type.value_type)}"
    return which or "untyped"
