"""A folder of the user's that is named as our second package is, and is found before it."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path


def warn_if_shadowed() -> None:
    """Warn, naming the folder, if `import analysis` would find another one than ours."""
    ours = Path(__file__).resolve().parents[1] / "analysis" / "__init__.py"
    spec = importlib.util.find_spec("analysis")
    if spec is None:
        return
    # A folder without __init__.py has no origin; one is found where ours is not on the path.
    found = Path(spec.origin or (spec.submodule_search_locations or [])[0]).resolve()
    if found != ours:
        warnings.warn(
            f"'import analysis' finds {found}, which shadows this project's package of that name: "
            "rename it, or start Python in another folder (the command cartmoe-study is not "
            "affected)",
            stacklevel=3,
        )
