"""distrecon: learn from, recover and generate neural networks' weights.

The names below are what notebooks and other projects import; each is loaded when first used, so `import distrecon` is
quick and does not import Ray.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# Read when torch is loaded: waiting threads sleep. Where they spin, one other busy process makes small operations on
# two threads twenty times slower; asleep they cost some tens of microseconds an operation.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from distrecon.errors import UserError
    from distrecon.expand_cluster import recover_network
    from distrecon.kinds.autoencoder import load_autoencoder
    from distrecon.nets import Architecture, architecture
    from distrecon.zoos import Zoo, open_zoo, write_zoo
    from distrecon.zoos.importing import import_zoo

_HOMES = {
    "Architecture": "distrecon.nets",
    "architecture": "distrecon.nets",
    "Zoo": "distrecon.zoos",
    "open_zoo": "distrecon.zoos",
    "write_zoo": "distrecon.zoos",
    "import_zoo": "distrecon.zoos.importing",
    "load_autoencoder": "distrecon.kinds.autoencoder",
    "recover_network": "distrecon.expand_cluster",
    "UserError": "distrecon.errors",
}

__all__ = [
    "Architecture",
    "UserError",
    "Zoo",
    "architecture",
    "import_zoo",
    "load_autoencoder",
    "open_zoo",
    "recover_network",
    "write_zoo",
]
__version__ = version("distrecon")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distrecon' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
