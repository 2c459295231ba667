"""Everything that knows fairseq: tasks, criterions, models, optimizer, registration."""

_registered = False


def register() -> None:
    """Registers this package's tasks, criterions, models and optimizer with fairseq.

    Idempotent. Runs by itself under ``fairseq-hydra-train`` and with ``--user-dir``; call it before
    ``fairseq.checkpoint_utils.load_model_ensemble_and_task`` in programs of your own.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from fairseq_lowbit.plugin import compat, loop, progress

    compat.apply()
    loop.apply()
    progress.apply()
    from fairseq_lowbit.plugin import (  # noqa: F401
        criterions,
        ctc,
        models,
        optimizer,
        recognition,
        tasks,
    )
