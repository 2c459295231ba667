"""Our upstream among s3prl's own, which s3prl looks up by name in its module ``hub``."""

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.interop.s3prl.compat import find_s3prl, missing_modules_named, stand_ins
from fairseq_lowbit.interop.s3prl.upstream import LowbitUpstream

NAME = "lowbit"


def lowbit(
    ckpt: str | None = None, model_config: str | None = None, refresh: bool = False
) -> LowbitUpstream:
    """What s3prl calls for ``-u lowbit -k CKPT``.

    Args:
        ckpt: any source that :func:`open_model` reads.
        model_config: s3prl's ``-g``; a checkpoint has its own configuration.
        refresh: s3prl's ``-r``, for its own downloads; a source is read anew each time.

    Raises:
        LowbitError: no checkpoint, one that cannot be read, or a ``model_config``.
    """
    if ckpt is None:
        raise LowbitError(
            f"the upstream {NAME} needs a checkpoint: -k CKPT, or in Python "
            f'S3PRLUpstream("{NAME}", path_or_url=CKPT)'
        )
    if model_config is not None:
        raise LowbitError(
            f"the upstream {NAME} takes no configuration (-g {model_config}): the checkpoint has it"
        )
    return LowbitUpstream(open_model(ckpt))


def register() -> None:
    """Makes :func:`lowbit` one of s3prl's upstreams.

    Raises:
        LowbitError: s3prl is not installed, of an unknown version, or lacks a package.
    """
    find_s3prl()
    with missing_modules_named():
        import transformers  # noqa: F401  it remembers whether torchaudio is there

        with stand_ins():
            from s3prl import hub, nn  # noqa: F401  nn too, which needs them as well
    setattr(hub, NAME, lowbit)
