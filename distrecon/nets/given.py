"""Modules that users name: `package.file:factory`, from their settings or options and from nowhere else.

What a zoo says of the module that it was made with is shown to people and never imported.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from distrecon.errors import UserError
from distrecon.nets.architectures import Architecture, ModuleArchitecture

Given = str | nn.Module | Callable[[], nn.Module]


def factory(named: str) -> Callable[[], nn.Module]:
    """The function or class `package.file:factory`, which called without arguments makes the module; also of files in
    the working directory. UserError that says what cannot be found."""
    file, colon, name = named.partition(":")
    if not colon or not name or not file:
        raise UserError(f"a module is named PACKAGE.FILE:FACTORY, not {named!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(file)
    except ImportError as error:
        raise UserError(f"{named}: {file!r} cannot be imported: {error}") from None
    try:
        made = attrgetter(name)(found)
    except AttributeError:
        made = None
    if not callable(made):
        raise UserError(f"{named}: {file!r} has no callable {name!r}")
    return made


def module_of(given: Given) -> nn.Module:
    """The module of a name, of a factory, or itself; UserError where it is none."""
    if isinstance(given, nn.Module):
        return given
    make = factory(given) if isinstance(given, str) else given
    try:
        made = make()
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{given}: cannot make its module: {error}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{given}: gives {type(made).__name__}, not a torch module")
    return made


def running(arch: Architecture, modules: Sequence[nn.Module]) -> Architecture:
    """The architecture with the first of these modules that has its tensors, if it needs one and any is given.

    Raises UserError that says in what the last of them differs when none has.
    """
    if not isinstance(arch, ModuleArchitecture):
        return arch
    for place, module in enumerate(modules):
        try:
            return arch.with_module(module)
        except UserError:
            if place + 1 == len(modules):
                raise
    return arch
