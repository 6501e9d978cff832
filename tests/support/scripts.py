"""Stage scripts as modules: their folders begin with a digit, so they cannot be imported by name."""

import importlib.util
from pathlib import Path
from types import ModuleType

from slm_swap.common.settings import PACKAGE


def load_script(path: str) -> ModuleType:
    """A stage script as a module, by its path below `slm_swap/`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", PACKAGE / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
