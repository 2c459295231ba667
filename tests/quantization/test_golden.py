"""The implementation against tests/golden: exact codes, decoded values exact where they are fp32
numbers, gradients to 1e-5."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.precision import InputKind
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    LevelSet,
    SquashedQuantizer,
    UniformQuantizer,
    mid_rise,
    non_negative,
    signed,
)

FOLDER = Path(__file__).resolve().parents[1] / "golden"
OTHERS = {"squashed", "uniform"}
MAKE = {"sign": signed, "signed": signed, "non_negative": non_negative, "mid_rise": mid_rise}
SETS = sorted({path.stem for path in FOLDER.glob("*.json")} - OTHERS)
CASES = [
    pytest.param(stem, index, id=f"{stem}-{case['name']}")
    for stem in SETS
    for index, case in enumerate(json.loads((FOLDER / f"{stem}.json").read_text())["cases"])
]


class GivenScale(ElasticQuantizer):
    """Takes alpha and beta as they stand: exp(log(alpha)) would miss the ties by a rounding."""

    def __init__(self, alpha: Tensor, beta: Tensor | None, **kwargs: Any) -> None:
        shift_shape = None if beta is None else tuple(beta.shape)
        scales = len(alpha) if alpha.dim() else None
        super().__init__(**kwargs, scales=scales, shift_shape=shift_shape)
        self.alpha = nn.Parameter(alpha)
        self.beta = None if beta is None else nn.Parameter(beta)
        self.set_scale(alpha)

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        return self.alpha, self.beta


def load(stem: str, index: int) -> tuple[dict[str, Any], LevelSet]:
    golden = json.loads((FOLDER / f"{stem}.json").read_text())
    levels = MAKE[golden["kind"]](golden["bits"])
    assert (levels.lo, levels.hi) == (golden["lo"], golden["hi"])
    return golden["cases"][index], levels


def build(case: dict[str, Any], levels: LevelSet) -> tuple[GivenScale, Tensor | None]:
    alpha = torch.tensor(case["alpha"])
    alpha = alpha[0] if len(alpha) == 1 else alpha[:, None]
    beta = None if case["beta"] is None else torch.tensor(case["beta"])
    if beta is not None and len(beta) == 1:
        beta = beta[0]
    is_per_frame = case["name"] == "per_frame"
    quantizer = GivenScale(
        alpha,
        beta,
        levels=replace(levels, origin=case.get("origin", 0.0)),
        gradient_values=case["gradient_values"],
        is_per_frame=is_per_frame,
    )
    # The quantizer measures the ratio of a frame itself.
    ratio = None if case["ratio"] is None else torch.tensor(case["ratio"])[:, None]
    return quantizer, None if is_per_frame else ratio


def assert_close(actual: Tensor, expected: list[float]) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual.double().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6
    )


def test_golden_files_cover_every_level_set() -> None:
    expected = ["sign", *(f"signed_{n}" for n in range(2, 9))]
    expected += [f"{kind}_{n}" for kind in ("non_negative", "mid_rise") for n in range(1, 9)]
    assert sorted(SETS) == sorted(expected)


@pytest.mark.parametrize("kind", [InputKind.GELU, InputKind.SILU])
def test_golden_files_have_the_origins_of_the_activation_functions(kind: InputKind) -> None:
    for bits in range(1, 9):
        cases = json.loads((FOLDER / f"non_negative_{bits}.json").read_text())["cases"]
        assert [case["origin"] for case in cases if case["name"] == kind] == [kind.origin]


def test_generator_alone_writes_the_committed_files(tmp_path: Path) -> None:
    # -I -S: neither this package nor torch nor numpy can be imported by it.
    script = FOLDER / "make_golden.py"
    subprocess.run([sys.executable, "-I", "-S", str(script), str(tmp_path)], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("stem, index", CASES)
def test_codes_and_decoded_values_are_equal(stem: str, index: int) -> None:
    case, levels = load(stem, index)
    quantizer, ratio = build(case, levels)
    x = torch.tensor(case["x"])
    codes = quantizer.codes(x, ratio)
    decoded = torch.tensor(case["decoded"])
    assert torch.equal(codes.integers.long(), torch.tensor(case["codes"]))
    assert torch.equal(codes.decode(), decoded)
    assert torch.equal(quantizer(x, ratio), decoded)


@pytest.mark.parametrize("stem, index", CASES)
def test_gradients_agree(stem: str, index: int) -> None:
    case, levels = load(stem, index)
    quantizer, ratio = build(case, levels)
    x = torch.tensor(case["x"], requires_grad=True)
    quantizer(x, ratio).backward(torch.tensor(case["g"]))
    assert torch.equal(x.grad, torch.tensor(case["dx"]))
    assert quantizer.gradient_scale == pytest.approx(case["gradient_factor"], rel=1e-12)
    assert_close(quantizer.alpha.grad, case["dalpha"])
    assert_close(quantizer.alpha.grad / case["gradient_factor"], case["dalpha_sum"])
    if case["beta"] is not None:
        assert_close(quantizer.beta.grad, case["dbeta"])
        assert_close(quantizer.beta.grad / case["gradient_factor"], case["dbeta_sum"])


@pytest.mark.parametrize("stem", SETS)
def test_quantizer_with_its_own_scale_agrees(stem: str) -> None:
    case, levels = load(stem, 0)
    quantizer = ElasticQuantizer(levels, case["gradient_values"])
    quantizer.set_scale(torch.tensor(1.0))  # exp(log(1)) is 1, so that no tie moves
    x = torch.tensor(case["x"]) / case["alpha"][0]
    assert torch.equal(quantizer.codes(x).integers.long(), torch.tensor(case["codes"]))
    quantizer(x).backward(torch.tensor(case["g"]))
    assert_close(quantizer.log_scale.grad, case["dalpha"])


SQUASHED = json.loads((FOLDER / "squashed.json").read_text())
UNIFORM = json.loads((FOLDER / "uniform.json").read_text())


@pytest.mark.parametrize("case", SQUASHED, ids=lambda case: f"{case['bits']} bits")
def test_squashed_weights(case: dict[str, Any]) -> None:
    x = torch.tensor(case["x"], requires_grad=True)
    quantizer = SquashedQuantizer(case["bits"], *x.shape, target_std=0.84)
    with torch.no_grad():
        quantizer.log_gain.copy_(torch.tensor(case["log_gain"])[:, None])
    quantizer.mark_calibrated(True)
    codes = quantizer.codes(x)
    assert torch.equal(codes.integers.long(), torch.tensor(case["codes"]))
    decoded = quantizer(x)
    assert torch.equal(codes.decode(), decoded)
    assert_close(decoded, case["decoded"])
    decoded.backward(torch.tensor(case["g"]))
    assert_close(x.grad, case["dx"])
    assert_close(quantizer.log_gain.grad, case["dlog_gain"])


def test_squashed_golden_covers_every_width() -> None:
    assert [case["bits"] for case in SQUASHED] == list(range(1, 9))


@pytest.mark.parametrize("case", UNIFORM, ids=lambda case: f"{case['kind']}_{case['bits']}")
def test_plain_quantizers(case: dict[str, Any]) -> None:
    x = torch.tensor(case["x"], requires_grad=True)
    codes = UniformQuantizer(case["kind"], case["bits"], frame_dim=-1).codes(x)
    assert codes.scale.flatten().tolist() == case["scale"]
    if case["kind"] == "minmax":
        assert codes.zero_point.flatten().tolist() == case["zero_point"]
    assert torch.equal(codes.integers.long(), torch.tensor(case["codes"]))
    decoded = torch.tensor(case["decoded"])
    assert torch.equal(codes.decode(), decoded)
    per_row = UniformQuantizer(case["kind"], case["bits"], group_size=x.shape[1])
    assert torch.equal(per_row(x), decoded)
    # Feature dimension first, as in a convolution's input.
    columns = UniformQuantizer(case["kind"], case["bits"], frame_dim=0)
    assert torch.equal(columns(x.T), decoded.T)
