"""Let each Python process that imports torch have the stand-in's kernels."""

import importlib.abc
import importlib.util
import os
import sys


class Afterwards(importlib.abc.MetaPathFinder):
    """Find torch as usual, and install the kernels when it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        real = spec.loader.exec_module

        def load(module):
            real(module)
            import card_kernels

            card_kernels.install(idle=bool(os.environ.get("CARD_IDLE")))

        spec.loader.exec_module = load
        return spec


sys.meta_path.insert(0, Afterwards())
