"""The formats that a model is written in for use elsewhere."""

import logging
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert, LoadedModel

logger = logging.getLogger(__name__)


class Exporter(Protocol):
    """What the module of a format has."""

    def obstacle(self, model: Hubert) -> str:
        """Why ``model`` cannot be written so; empty when it can."""

    def export(self, loaded: LoadedModel, out: Path) -> None:
        """Writes ``loaded`` to ``out``, at once or not at all."""


@dataclass(frozen=True)
class Format:
    """A format of export.

    Attributes:
        what: it holds, on one line.
        module: of this folder, an :class:`Exporter`, loaded when the format is asked for.
        ending: of the file's name; empty for a folder.
        packages: which it takes beside those of this package.
        has_units: whether it holds the CTC head and its vocabulary, where a model has them.
    """

    what: str
    module: str
    ending: str
    packages: tuple[str, ...] = ()
    has_units: bool = False

    def missing_package(self) -> str:
        """Which package has to be installed first, and how; empty when none has to."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if not missing:
            return ""
        return f"it takes the package {missing[0]}: pip install 'fairseq-lowbit[{self.module}]'"

    def obstacle(self, model: Hubert) -> str:
        """Why ``model`` cannot be written in this format; empty when it can."""
        return self._exporter().obstacle(model)

    def export(self, loaded: LoadedModel, out: Path) -> None:
        """Writes ``loaded`` to ``out``, at once or not at all; warns of a CTC head that has no
        place there.

        Raises:
            LowbitError: the model has no form in this format, a package is missing, or ``out``
                cannot be written.
        """
        if self.ending and out.suffix != self.ending:
            raise LowbitError(f"{out}: give a file name that ends in {self.ending}")
        reason = self.missing_package() or self.obstacle(loaded.model)
        if reason:
            raise LowbitError(f"{loaded.source} cannot be written as {self.what}: {reason}")
        self._exporter().export(loaded, out)
        if loaded.units and not self.has_units:
            logger.warning(
                f"{out} holds the encoder alone: the CTC head of {len(loaded.units)} units, which "
                "transcribes, is left out"
            )

    def _exporter(self) -> "Exporter":
        return import_module(f"fairseq_lowbit.interop.{self.module}")


FORMATS = {
    "safetensors": Format(
        "one file of this package, with configuration, weights and plan",
        "checkpoint",
        ".safetensors",
        has_units=True,
    ),
    "hf": Format(
        "a Hugging Face folder, with the weights as they are decoded and float activations",
        "huggingface_writer",
        "",
    ),
    "onnx": Format(
        "an ONNX graph, checked against ONNX Runtime", "onnx", ".onnx", ("onnx", "onnxscript")
    ),
}
