"""A model as the command line names it: a configuration, any precision by name, a checkpoint."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fairseq_lowbit.configurations import (
    ModelConfig,
    build_model,
    is_configuration,
    meta_model,
    model_config,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model, open_without_weights
from fairseq_lowbit.interop.huggingface_directory import is_model_directory
from fairseq_lowbit.models.protocols import SpeechModel
from fairseq_lowbit.nn import is_calibrated
from fairseq_lowbit.profiling.timing import with_random_weights


@dataclass(frozen=True)
class Target:
    """A model as a user named it.

    Attributes:
        overrides: Hydra's, for a name; a checkpoint has its own configuration.
    """

    source: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its row, with the overrides."""
        return self.source if self.has_weights else " ".join((self.source, *self.overrides))

    @property
    def has_weights(self) -> bool:
        """Whether it is a checkpoint. A name wins over a file or folder that happens to be called
        so: ``./bitla_w1a1`` is the file."""
        if is_configuration(self.source):
            return False
        path = Path(self.source)
        is_there = path.is_file() or is_model_directory(path)
        return is_there or path.suffix == ".pt" or "/" in self.source

    def read(self) -> SpeechModel:
        """The model on the meta device.

        Raises:
            LowbitError: there is no such thing, or it cannot be read.
        """
        if not self.has_weights:
            return meta_model(self.config())
        return open_without_weights(self.source)

    def load(self) -> SpeechModel:
        """The model ready to run; a name has no weights and gets random ones.

        Raises:
            LowbitError: as :meth:`read`; quantizers of a checkpoint that have no scales yet.
        """
        if not self.has_weights:
            return with_random_weights(partial(build_model, self.config()))
        model = open_model(self.source).model
        if not is_calibrated(model):
            raise LowbitError(
                f"{self.source} has quantizers that were never calibrated, so it cannot run: want "
                "a checkpoint that training or fairseq-lowbit ptq wrote"
            )
        return model

    def config(self) -> ModelConfig:
        """The configuration of a name.

        Raises:
            LowbitError: there is no such name, or an override does not fit.
        """
        return model_config(self.source, list(self.overrides))
