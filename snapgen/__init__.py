"""SnapGen: text to 1024x1024 pictures with 0.38B parameters; the model, its training, and its export to phones.

Everything is imported on first use: `import snapgen` loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "SnapGenPipeline": "snapgen.pipeline",
    "SnapGenUNet": "snapgen.unet",
    "TinyDecoder": "snapgen.decoder",
    "TinyEncoder": "snapgen.decoder",
    "PRESETS": "snapgen.config",
    "get_preset": "snapgen.config",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'snapgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
