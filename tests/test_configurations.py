"""Rules from files: combined in order, and alone what they were before files could be combined."""

import pytest

from fairseq_lowbit.configurations import compose_config, config_dir, meta_model, read_model_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision import Plan, Rule

FILES = sorted(path.stem for path in (config_dir() / "rules").glob("*.yaml"))
SMALL = ("model=fastconv_tiny", "task.data=x", "task.teacher=x")


def rules_of(*overrides: str) -> list[Rule]:
    config = compose_config("bitl_w2a2", [*SMALL, *overrides])
    return read_model_config(config.model).precision.rules


def plan_of(*overrides: str, decide: str = "fields") -> Plan:
    config = read_model_config(compose_config("bitl_w2a2", [*SMALL, *overrides]).model)
    config.precision.rules_decide = decide
    return meta_model(config).plan


def test_files_come_in_the_order_of_their_names_and_own_rules_last() -> None:
    own = "model.precision.rules=[{match: '*.fc1', weight_bits: 4}]"
    front_end, channels = rules_of("rules=front_end_w8a8"), rules_of("rules=per_channel")
    assert rules_of("rules=[per_channel,front_end_w8a8]", own) == [
        *channels,
        *front_end,
        Rule("*.fc1", weight_bits=4),
    ]
    assert rules_of("rules=[front_end_w8a8,per_channel]") == [*front_end, *channels]
    assert rules_of() == []


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_alone_means_what_it_meant(name: str) -> None:
    def decided(plan: Plan) -> list[tuple]:
        return [(e.module, e.method, e.weight, e.input, e.bytes) for e in plan.entries]

    chosen = f"rules={name}"
    assert decided(plan_of(chosen)) == decided(plan_of(chosen, decide="modules"))


def test_two_files_together_do_what_both_say() -> None:
    entries = {e.module: e for e in plan_of("rules=[front_end_w8a8,per_channel]").entries}
    assert entries["post_extract_proj"].method == "minmax"
    assert entries["encoder.layers.0.fc1"].granularity == "per_channel"


@pytest.mark.parametrize("chosen", [["quant=float"], ["model=fastconv_tiny"], []])
def test_what_only_a_checkpoint_tells_is_not_known_before(chosen: list[str]) -> None:
    config = compose_config("asr_ctc", ["task.data=x", "task.init_from=y", *chosen])
    with pytest.raises(LowbitError, match="name that checkpoint instead"):
        read_model_config(config.model)
