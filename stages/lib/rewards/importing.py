"""The import of the user's own reward files, and of the modules beside them: each file once, whatever it is called."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.lib.errors import UserError

TEMPER = os.path.realpath(Path(__file__).parents[2]) + os.sep


class Loaded(Loader):
    """Gives a module that was loaded before, under another name."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing again; the module keeps its own name."""
        module.__spec__ = self.spec


class Beside(MetaPathFinder):
    """Finds modules in the folders of the reward files, after those that Python finds without it."""

    homes: list[str]

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return where the module is, if it lies in one of the folders."""
        spec = PathFinder.find_spec(fullname, path)
        if spec is None and path is None:
            spec = PathFinder.find_spec(fullname, self.homes)
        if spec is None or not self.holds([spec.origin, *(spec.submodule_search_locations or ())]):
            return None
        same = module_of(os.path.realpath(spec.origin)) if spec.origin else None
        return spec if same is None else ModuleSpec(fullname, Loaded(same), origin=spec.origin)

    def holds(self, places: Iterable[str | None]) -> bool:
        """Say whether one of these paths is in a folder of a reward's file, and neither installed nor Temper's own."""
        real = [os.path.realpath(place) for place in places if isinstance(place, str)]
        mine = [place for place in real if "site-packages" not in place and not place.startswith(TEMPER)]
        return any(place.startswith(home + os.sep) for place in mine for home in self.homes)


BESIDE = Beside()
ours: set[str] = set()  # the names in sys.modules of what was loaded for rewards


def module_of(origin: str) -> ModuleType | None:
    """Return the module that was loaded from the file `origin`."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and os.path.realpath(file) == origin:
            return module
    return None


def forget_files() -> None:
    """Let the next import read the files anew."""
    for name in ours:
        sys.modules.pop(name, None)
    ours.clear()
    importlib.invalidate_caches()


def import_file(path: Path, homes: Iterable[Path]) -> ModuleType:
    """Return the module of a reward file, run once in this process; `homes` are the folders of all reward files.

    Raises what its lines raise.
    """
    BESIDE.homes = list(dict.fromkeys(os.path.realpath(home) for home in homes))
    if BESIDE not in sys.meta_path:
        sys.meta_path.insert(0, BESIDE)
    if (module := module_of(str(path))) is not None and module.__name__ in ours:
        return module
    before = set(sys.modules)
    spec: Any = importlib.util.spec_from_file_location(f"rewards_from_{path.stem}", path)
    if spec.name in sys.modules:  # of another folder
        spec = importlib.util.spec_from_file_location(f"rewards_from_{path.stem}_{len(ours)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    finally:
        ours.update(name for name in set(sys.modules) - before if is_beside(sys.modules[name]))
    return module


def is_beside(module: ModuleType) -> bool:
    """Say whether a module was loaded from one of the reward files' folders."""
    path = getattr(module, "__path__", None)  # torch has modules that answer to any name
    return BESIDE.holds([getattr(module, "__file__", None), *(path if isinstance(path, Iterable) else ())])


def refuse_unseen(name: str, files: Iterable[Path]) -> None:
    """Raise `UserError` for a module that is not among `files`, the reward's source, or not read from them.

    `name` is the reward's, as the recipe has it. A module that a file imports by a name made at run time is not seen in
    its text: a change of it would train nothing anew. One that has the name of an installed module is never read.
    """
    known = set(files)
    for module in [sys.modules[each] for each in sorted(ours) if each in sys.modules]:
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).resolve() not in known:
            raise UserError(
                f"[rewards] {name!r}: {file} was imported in a way that no file's text shows, so a change of it would "
                f"train nothing anew. Write: import {module.__name__}"
            )
    for path in known:
        top = next((path.relative_to(home).parts[0] for home in BESIDE.homes if path.is_relative_to(home)), "")
        other = sys.modules.get(top.removesuffix(".py"))
        if top and other is not None and not is_beside(other) and module_of(str(path)) is None:
            raise UserError(
                f"[rewards] {name!r}: imports {top.removesuffix('.py')!r}, and Python has another module of this name "
                f"({getattr(other, '__file__', None) or 'its own'}), which it takes. Rename {path}"
            )
