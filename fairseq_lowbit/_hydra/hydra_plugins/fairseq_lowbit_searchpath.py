"""Lets ``fairseq-hydra-train --config-name bitla_w1a1`` find our configs without --config-dir.

Hydra imports every module of the namespace package ``hydra_plugins``, which is where setup.py puts
this file: neither that folder nor ``_hydra`` may have an ``__init__.py``. The package itself is
located, not imported: this runs at the start of every Hydra program in the environment, and
fairseq has to be the first one to import a --user-dir.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


def package_dir() -> Path:
    """The folder of ``fairseq_lowbit``, which is also fairseq's user directory."""
    spec = find_spec("fairseq_lowbit")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the Hydra plugin of fairseq_lowbit is installed but the package is not: "
            "reinstall fairseq-lowbit"
        )
    return Path(spec.origin).parent.absolute()


def config_dir() -> Path:
    """``config`` inside the installed package, or next to it in a checkout."""
    package = package_dir()
    installed = package / "config"
    return installed if installed.is_dir() else package.parent / "config"


class FairseqLowbitSearchPath(SearchPathPlugin):
    """Adds our configs after everybody else's, so that they hide nothing."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="fairseq_lowbit", path=f"file://{config_dir()}")
        # fairseq stores its schema under the name of the primary config, on purpose; Hydra warns
        # of it at every start. A filter set while Hydra imports this module would be undone.
        if "fairseq" in sys.modules:
            warnings.filterwarnings("ignore", message=r"\s*'.*' is validated against ConfigStore")


# Written in configs as ${fairseq_lowbit.user_dir:}; the colon is what makes it a call.
OmegaConf.register_new_resolver("fairseq_lowbit.user_dir", lambda: str(package_dir()), replace=True)
