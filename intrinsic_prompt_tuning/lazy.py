"""The heavy packages, imported when first used, so that `ipt --help` answers at once."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets as datasets
    import numpy as np
    import torch as torch
    import transformers as transformers
    from torch import Tensor as Tensor
else:
    Tensor = Any

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    datasets, np, torch, transformers = map(_Lazy, ("datasets", "numpy", "torch", "transformers"))

__all__ = ["Tensor", "datasets", "np", "torch", "transformers"]
