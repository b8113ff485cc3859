"""FBGEMM's operators, without its Python package.

The package takes 0.6 s of a core to import, mostly for operators of training. One library takes milliseconds.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_service.late import late

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")


def fbgemm_operator(name: str, library: str) -> Any:
    """`torch.ops.fbgemm.NAME`, from this file of FBGEMM's package, or by the package if it lies elsewhere.

    Raises ModuleNotFoundError if FBGEMM is not installed, AttributeError for a release without the operator.
    """
    spec = find_spec("fbgemm_gpu")
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name(library)))  # type: ignore[union-attr,arg-type]
        return getattr(torch.ops.fbgemm, name).default
    except (AttributeError, OSError):  # a release with another layout, or none
        import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401, registers all of them
    return getattr(torch.ops.fbgemm, name).default
