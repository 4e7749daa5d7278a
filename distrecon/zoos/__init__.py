"""Zoos: matrices theta[S, P] of trained models with their properties, on disk, in bounded memory.

Importing this package does not import Ray; `zoos.train`, `zoos.stream` and `zoos.importing` do.
"""

from distrecon.zoos.models import Models
from distrecon.zoos.write import write_zoo
from distrecon.zoos.zoo import Zoo, open_zoo

__all__ = ["Models", "Zoo", "open_zoo", "write_zoo"]
