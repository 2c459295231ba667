"""Lets ``fairseq-hydra-train --config-name bitla_w1a1`` find our configs without --config-dir.

Hydra imports every module of the namespace package ``hydra_plugins``, which is where setup.py puts
this file: neither that folder nor ``_hydra`` may have an ``__init__.py``. The package itself is
located, not imported: this runs at the start of every Hydra program in the environment, and
fairseq has to be the first one to import a --user-dir.
"""

import copy
import difflib
import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import get_args
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
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
        if Path(sys.argv[0]).stem in ("fairseq-hydra-train", "hydra_train"):
            # The level that fairseq_cli.train asks for in vain: a module of fairseq that is
            # imported before has set DEBUG.
            logging.getLogger().setLevel(os.environ.get("LOGLEVEL", "INFO").upper())
            _refuse_unknown_config(self, search_path)


def _refuse_unknown_config(own: SearchPathPlugin, search_path: ConfigSearchPath) -> None:
    """Ends fairseq-hydra-train, with the names there are, when nobody has a configuration of the
    name given to it.

    Hydra is content with the schema that fairseq stores under this very name, and would complain of
    the first override instead.
    """
    options = get_args()
    if options.config_name is None:
        return
    path = copy.deepcopy(search_path)
    # What Hydra will search besides: what other plugins may add after this one, and --config-dir.
    for plugin in Plugins.instance().discover(SearchPathPlugin):
        if plugin is not type(own):
            plugin().manipulate_search_path(path)
    if options.config_dir is not None:
        path.append(provider="command-line", path=f"file://{os.path.abspath(options.config_dir)}")
    known = ConfigRepository(path)
    # Of a folder that is not there Hydra itself tells.
    is_whole = all(source.available() for source in known.get_sources())
    if known.config_exists(options.config_name) or not is_whole:
        return
    names = known.get_group_options("", ObjectType.CONFIG)
    close = difflib.get_close_matches(options.config_name, names)
    others = [name for name in names if name not in close]
    sys.stderr.write(
        f"--config-name {options.config_name}: there is no such configuration. There are, closest "
        f"first, {', '.join([*close, *others])}\n"
    )
    sys.exit(2)


# Written in configs as ${fairseq_lowbit.user_dir:}; the colon is what makes it a call.
OmegaConf.register_new_resolver("fairseq_lowbit.user_dir", lambda: str(package_dir()), replace=True)
