"""What h2optimizer and the programs are built of: `h2optimizer.utils`.

In a clone, `utils` is another name for it, with the same modules and classes.
"""

if __name__ == "utils":
    import sys
    from importlib import import_module
    from importlib.abc import InspectLoader, MetaPathFinder
    from importlib.machinery import ModuleSpec
    from importlib.util import find_spec

    class _SameModule(MetaPathFinder, InspectLoader):
        """Finds `utils.X` as the module `h2optimizer.utils.X`, where a path would find a second one."""

        def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
            there = find_spec(f"h2optimizer.{name}") if name.startswith("utils.") else None
            return None if there is None else ModuleSpec(name, self, origin=there.origin)

        def create_module(self, spec: ModuleSpec):
            module = import_module(f"h2optimizer.{spec.name}")
            spec.loader_state = module.__spec__
            return module

        def exec_module(self, module) -> None:  # it has run, and importing it once more has replaced its spec
            module.__spec__ = module.__spec__.loader_state

        def get_source(self, name: str) -> str | None:
            there = find_spec(f"h2optimizer.{name}")
            return there.loader.get_source(there.name)

        def get_code(self, name: str):  # for python -m
            there = find_spec(f"h2optimizer.{name}")
            return there.loader.get_code(there.name)

    sys.meta_path.insert(0, _SameModule())
    sys.modules[__name__] = import_module("h2optimizer.utils")
