"""The kinds of trials. Each file of this folder is one, and defines it as `KIND`; nothing else lists them."""

import pkgutil
from importlib import import_module

from distrecon.record.kind import Kind

_FILES = sorted(module.name for module in pkgutil.iter_modules(__path__))
KINDS: dict[str, Kind] = {kind.name: kind for kind in (import_module(f"{__name__}.{file}").KIND for file in _FILES)}
