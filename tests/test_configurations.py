"""Rules from files: combined in order, and alone what they were before files could be combined."""

import pytest

from fairseq_lowbit.configurations import compose_config, config_dir, meta_model, read_model_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision import Plan, Precision, Rule

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


def test_form_paper_restores_what_the_paper_has_otherwise() -> None:
    own, paper = (
        read_model_config(compose_config("bitla_w2a2", [*SMALL, *chosen]).model).precision
        for chosen in ((), ("form=paper",))
    )
    assert own == Precision("bitla_w2a2")
    assert paper == Precision("bitla_w2a2", length_scaled=False, squash_std=0.84, form="paper")


def test_an_unknown_form_is_refused() -> None:
    config = read_model_config(
        compose_config("bitla_w2a2", [*SMALL, "model.precision.form=papr"]).model
    )
    with pytest.raises(LowbitError, match="precision.form 'papr'.* knows paper, asymmetric"):
        meta_model(config)


def test_shipped_rules_reach_the_inputs_that_they_are_for() -> None:
    entries = {e.module: e for e in plan_of("rules=[ffn_inputs_a2,per_frame]").entries}
    layer = "encoder.layers.0"
    frames = {module for module, e in entries.items() if e.input and e.input.is_per_frame}
    assert {module for module in frames if module.startswith(layer)} == {
        *(f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        f"{layer}.fc1",
    }
    config = compose_config("bitla_w1a1", [*SMALL, "rules=ffn_inputs_a2"])
    bits = {e.module: e for e in meta_model(read_model_config(config.model)).plan.entries}
    inputs = {module: e.activation_bits for module, e in bits.items() if module.startswith(layer)}
    assert {module for module, count in inputs.items() if count == 2} == {
        f"{layer}.fc1",
        f"{layer}.fc2",
    }
    assert {e.weight_bits for e in bits.values()} == {1, 16}


@pytest.mark.parametrize("chosen", [["quant=float"], ["model=fastconv_tiny"], []])
def test_what_only_a_checkpoint_tells_is_not_known_before(chosen: list[str]) -> None:
    config = compose_config("asr_ctc", ["task.data=x", "task.init_from=y", *chosen])
    with pytest.raises(LowbitError, match="name that checkpoint instead"):
        read_model_config(config.model)
