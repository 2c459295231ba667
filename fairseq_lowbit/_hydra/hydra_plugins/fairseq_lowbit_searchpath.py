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
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
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
        if "fairseq_cli.train" not in sys.modules:
            return
        # fairseq stores its schema under the name of the primary config, on purpose; Hydra warns
        # of it at every start. A filter set while Hydra imports this module would be undone.
        warnings.filterwarnings("ignore", message=r"\s*'.*' is validated against ConfigStore")
        # The level that fairseq_cli.train asks for in vain: one of fairseq's models has asked for
        # DEBUG before.
        logging.getLogger().setLevel(os.environ.get("LOGLEVEL", "INFO").upper())
        _refuse_unknown_config(self, search_path)


def _refuse_unknown_config(own: SearchPathPlugin, search_path: ConfigSearchPath) -> None:
    """Ends the program, with the names there are, when no file has the name given to --config-name.

    Hydra itself is content with the schema that fairseq stores under this very name, and complains
    of the first override instead.
    """
    options, _ = get_args_parser().parse_known_args()
    given = any(argument.startswith("hydra.searchpath=") for argument in sys.argv)
    if not options.config_name or given or not _is_schema(options.config_name):
        return
    known = _complete(own, search_path, options.config_dir)
    if known.config_exists(options.config_name):
        return
    names = known.get_group_options("", ObjectType.CONFIG)
    close = difflib.get_close_matches(options.config_name, names, n=3)
    rest = [name for name in names if name not in close]
    sys.stderr.write(
        f"--config-name {options.config_name}: there is no such configuration. There are "
        f"{', '.join([*close, *rest])}\n"
    )
    sys.exit(2)


def _is_schema(name: str) -> bool:
    """Whether fairseq-hydra-train has stored its schema under ``name``."""
    stored = ConfigStore.instance().repo.get(name if name.endswith(".yaml") else f"{name}.yaml")
    schema = sys.modules["fairseq.dataclass.configs"].FairseqConfig
    return stored is not None and OmegaConf.get_type(stored.node) is schema


def _complete(
    own: SearchPathPlugin, search_path: ConfigSearchPath, config_dir: str | None
) -> ConfigRepository:
    """Everything that Hydra will search, but for what is stored in Python: with --config-dir, and
    with what plugins add that are asked after this one."""
    path = copy.deepcopy(search_path)
    for plugin in Plugins.instance().discover(SearchPathPlugin):
        if plugin is not type(own):
            plugin().manipulate_search_path(path)
    if config_dir is not None:
        path.append(provider="command-line", path=f"file://{os.path.abspath(config_dir)}")
    return ConfigRepository(path)


# Written in configs as ${fairseq_lowbit.user_dir:}; the colon is what makes it a call.
OmegaConf.register_new_resolver("fairseq_lowbit.user_dir", lambda: str(package_dir()), replace=True)
