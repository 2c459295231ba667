"""What is said about the processor."""

import pytest

from fairseq_lowbit import machine


@pytest.mark.parametrize(
    "cpuinfo, features",
    [
        (
            "model name\t: x\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n",
            ["avx2", "avx512f", "avx512_bf16", "amx"],
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", ["neon", "dotprod"]),
        ("nothing of the kind\n", []),
    ],
)
def test_cpu_features(cpuinfo: str, features: list[str]) -> None:
    assert machine.cpu_features(cpuinfo) == features


def test_the_processor_by_its_name() -> None:
    assert machine.cpu_name("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n") == "AMD EPYC"
    assert machine.cpu_name("Features\t: asimd\n")


def test_unknown_instruction_sets_are_not_none_of_them() -> None:
    assert "not known" in str(machine.Machine("cpu", 2, None))
    assert str(machine.Machine("cpu", 2, ())).endswith("none")
