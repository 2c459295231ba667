"""A model as an ONNX file, compared with torch before it takes its place.

Input: ``waveform`` [batch, samples], fp32 at 16 kHz, without padding: utterances of one length.
Outputs: ``hidden_state_0`` .. ``hidden_state_L``, what ``Hubert.representations`` gives. What a
caller has to know beside the graph stands in the metadata of the file (see :func:`_metadata`).
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fairseq_lowbit import __version__
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.interop.onnx_view import onnx_view
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.models.architecture import SAMPLE_RATE
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.nn import is_calibrated, is_quantized
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.quantization.execution import use_executor

if TYPE_CHECKING:
    import onnx
    import onnxruntime

OPSET = 18
# A protobuf message, which such a file is, ends at 2 GiB; the graph itself takes some of it.
MOST_BYTES = 2**31 - 2**24
# Allowed differences from torch, relative to the rms of a hidden state.
FLOAT_TOLERANCE = 1e-4
QUANTIZED_TOLERANCE = 1e-2
# Frames and batch sizes of the random waveforms that are compared.
_COMPARED = ((50, 1), (31, 2))


def obstacle(model: Hubert) -> str:
    """Why ``model`` cannot be written as ONNX; empty when it can. Its weights are not read."""
    size = stored_bytes(model)
    if size > MOST_BYTES:
        return f"an ONNX file holds at most 2 GiB and its weights take {size / 2**30:.1f}"
    return ""


def stored_bytes(model: Hubert) -> int:
    """What the weights take in the file: a byte where they are quantized, else four."""
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    quantized = (
        module.weight_shape.numel()
        for module in model.modules()
        if isinstance(module, Operator) and module.weight_quantizer is not None
    )
    return total - 3 * sum(quantized)


def export(loaded: LoadedModel, out: Path) -> None:
    """Writes ``loaded`` as ``out``, at once or not at all: a float model as it is, a quantized one
    with its quantizers (:mod:`fairseq_lowbit.interop.onnx_view`). Prints how far ONNX Runtime's
    outputs are from torch's, where it is installed.

    Raises:
        LowbitError: torch is too old, a quantizer has no scale yet, ``out`` cannot be written,
            or ONNX Runtime computes something else than torch.
    """
    if not hasattr(torch.onnx, "ops"):
        raise LowbitError(f"writing ONNX takes torch 2.8 or newer, and this is {torch.__version__}")
    model = loaded.model
    if not is_calibrated(model):
        raise LowbitError(
            f"{loaded.source} cannot be written as ONNX: its quantizers are not calibrated; run "
            "fairseq-lowbit ptq, or train it"
        )
    check_writable(out)
    proto = _traced(model)
    _describe(proto, model, loaded.normalize)
    with atomic_write(out, "wb") as file:
        file.write(proto.SerializeToString())
        file.flush()
        print(_comparison(file.name, model, out))


class _Representations(nn.Module):
    def __init__(self, model: Hubert) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> tuple[Tensor, ...]:
        states, _ = self.model.representations(waveform)
        return tuple(states)


@torch.no_grad()
def _traced(model: Hubert) -> "onnx.ModelProto":
    example = _waveform(model, *_COMPARED[1])
    fewest = receptive_field(model.conv_layers)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("samples", min=fewest)}
    # In blocks, the number of calls would depend on the length of the example.
    with _quiet(), use_executor("whole"):
        program = torch.onnx.export(
            _Representations(onnx_view(model)).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["waveform"],
            output_names=[f"hidden_state_{layer}" for layer in range(len(model.layers) + 1)],
            dynamic_shapes={"waveform": sizes},
            verbose=False,
        )
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter says which packages of no concern it misses, and what torch deprecates."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _describe(proto: "onnx.ModelProto", model: Hubert, normalize: bool) -> None:
    """Names and metadata for people and callers, then ONNX's own check."""
    import onnx

    for node in proto.graph.node:
        del node.metadata_props[:]  # the exporter's notes on where in the code it comes from
    for output in proto.graph.output:
        del output.metadata_props[:]
        output.type.tensor_type.shape.dim[1].dim_param = "frames"
    proto.producer_name, proto.producer_version = "fairseq-lowbit", __version__
    onnx.helper.set_model_props(proto, _metadata(model, normalize))
    onnx.checker.check_model(proto)


def _metadata(model: Hubert, normalize: bool) -> dict[str, str]:
    """
    - ``sample_rate`` in Hz, ``samples_per_frame``, and ``fewest_samples`` of an utterance;
    - ``normalize``: "true" where the caller has to bring every utterance to zero mean and unit
      variance before, as the model was trained;
    - ``precision``: its name, ``precision_rules``: its rules in JSON, and ``precision_form``.
    """
    precision = model.plan.precision
    rules = [{"match": rule.match} | rule.settings() for rule in precision.rules]
    return {
        "sample_rate": str(SAMPLE_RATE),
        "samples_per_frame": str(model.samples_per_frame),
        "fewest_samples": str(receptive_field(model.conv_layers)),
        "normalize": str(normalize).lower(),
        "precision": precision.name,
        "precision_rules": json.dumps(rules),
        "precision_form": precision.form,
    }


def _comparison(path: str, model: Hubert, out: Path) -> str:
    """What ONNX Runtime makes of the file ``path``, in words.

    Raises:
        LowbitError: it differs from torch by more than :func:`tolerance` in some hidden state.
    """
    try:
        import onnxruntime
    except ImportError:
        return f"{out}: not compared with torch, because onnxruntime is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = [
        closeness
        for frames, batch in _COMPARED
        for closeness in _closeness(session, model, _waveform(model, frames, batch))
    ]
    worst = max(found, key=lambda closeness: closeness.difference / closeness.limit)
    words = (
        f"hidden_state_{worst.state} differs most from torch's, by {worst.difference:.1e} of its "
        f"rms (allowed: {worst.limit:.1e}; ONNX Runtime {onnxruntime.__version__})"
    )
    if not worst.difference <= worst.limit:
        raise LowbitError(f"{out} was not written: {words}")
    return f"{out}: {words}"


class _Closeness(NamedTuple):
    state: int
    difference: float
    limit: float


def _closeness(
    session: "onnxruntime.InferenceSession", model: Hubert, waveform: Tensor
) -> list[_Closeness]:
    expected = _states(model, waveform)
    found = map(torch.from_numpy, session.run(None, {"waveform": waveform.numpy()}))
    differences = map(relative_difference, found, expected)
    limits = tolerances(model, waveform, expected)
    return list(map(_Closeness, range(len(expected)), differences, limits))


def tolerances(model: Hubert, waveform: Tensor, states: list[Tensor]) -> list[float]:
    """The difference from torch that is allowed in each of ``states``, the model's own outputs for
    ``waveform``, relative to its rms.

    Two float computations agree to rounding. Behind a quantizer, a value that lies at the edge of a
    code may fall to either side, and then counts for a step, the larger the fewer the bits, which
    moves further values across further edges. Torch does the same to itself: allowed is twice what
    it changes when the waveform is rounded to 16 bits, and 1 % in any case.
    """
    if not is_quantized(model):
        return [FLOAT_TOLERANCE] * len(states)
    rounded = _states(model, (waveform * 2**15).round() / 2**15)
    return [
        max(QUANTIZED_TOLERANCE, 2 * relative_difference(moved, state))
        for moved, state in zip(rounded, states, strict=True)
    ]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Rms of the difference over the rms of ``expected``."""
    error, size = (t.detach().square().mean().sqrt() for t in (found - expected, expected))
    return float(error / size)


def _waveform(model: Hubert, frames: int, batch: int) -> Tensor:
    """Noise, [batch, samples] of so many frames."""
    samples = receptive_field(model.conv_layers) + (frames - 1) * model.samples_per_frame
    generator = torch.Generator().manual_seed(frames)
    return 0.1 * torch.randn(batch, samples, generator=generator)


@torch.no_grad()
def _states(model: Hubert, waveform: Tensor) -> list[Tensor]:
    return model.representations(waveform)[0]
