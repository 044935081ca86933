# SPDX-License-Identifier: Apache-2.0
"""Start-up: modules are described, checked against the model, or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm.plugins.steering as plugin
from tests.plugins.steering.conftest import D_SAE, write_sae
from tests.steering_testing import models
from vllm.config import KVTransferConfig
from vllm.config.steering import SteeringConfig, get_steering_config
from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_points import HookPoint
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.engine.steering_args import fold_modules, parse_module
from vllm.engine.steering_kv_connectors import (
    BLOCK_HASH_CONNECTORS,
    MULTI_CONNECTOR,
)
from vllm.engine.steering_resolution import (
    refuse_unsupported_features,
    resolve_steering,
)
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.utils.argparse_utils import FlexibleArgumentParser


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.install_front_end_seams()


@pytest.fixture(scope="module")
def vllm_config(model_path: Path) -> Any:
    """A real configuration of the tiny model, not steered."""
    args = EngineArgs(str(model_path), skip_tokenizer_init=True, max_model_len=128)
    return args.create_engine_config()


def resolved(vllm_config: Any, steering: Any) -> SteeringConfig | None:
    config = copy.copy(vllm_config)
    config.additional_config = {"steering": steering}
    resolve_steering(config)
    return get_steering_config(config.additional_config)


def refusal(vllm_config: Any, steering: Any) -> str:
    with pytest.raises(SteeringConfigError) as caught:
        resolved(vllm_config, steering)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_path_is_resolved_to_the_module_it_holds(
    vllm_config: Any, sae_path: Path
) -> None:
    config = resolved(vllm_config, {"modules": {"bridge": str(sae_path)}})
    assert config is not None
    module = config.modules["bridge"]
    (site,) = module.sites
    assert (site.layer, site.hook, site.d_sae) == (1, HookPoint.POST_BLOCK, D_SAE)
    assert module.skip_token_ids == (models.PAD, models.BOS, models.EOS)
    assert config.max_clamps == 64


def test_engine_args_resolve_without_changing_the_callers_dict(
    model_path: Path, sae_path: Path
) -> None:
    given = {"steering": {"modules": {"bridge": str(sae_path)}, "max_clamps": 3}}
    before = copy.deepcopy(given)
    config = EngineArgs(
        str(model_path), skip_tokenizer_init=True, additional_config=given
    ).create_engine_config()
    assert given == before
    steering = get_steering_config(config.additional_config)
    assert steering is not None
    assert steering.max_clamps == 3
    json.dumps(config.additional_config)
    assert config.compute_hash()


def test_resolving_again_changes_nothing(vllm_config: Any, sae_path: Path) -> None:
    config = copy.copy(vllm_config)
    config.additional_config = {"steering": {"modules": {"bridge": str(sae_path)}}}
    resolve_steering(config)
    once = config.additional_config
    resolve_steering(config)
    assert config.additional_config is once


@pytest.mark.parametrize("additional", [{}, {"steering": None}, {"other": 1}])
def test_without_steering_nothing_is_touched(vllm_config: Any, additional: Any) -> None:
    config = copy.copy(vllm_config)
    config.additional_config = additional
    resolve_steering(config)
    assert config.additional_config is additional


def test_options_of_a_module_are_kept(vllm_config: Any, sae_path: Path) -> None:
    form = {
        "path": str(sae_path),
        "feature_units": "unit_decoder",
        "skip_token_ids": [],
    }
    config = resolved(vllm_config, {"modules": {"bridge": form}})
    assert config is not None
    assert config.modules["bridge"].skip_token_ids == ()
    assert config.modules["bridge"].feature_units == "unit_decoder"


def test_a_layer_the_model_lacks_is_refused(vllm_config: Any, tmp_path: Path) -> None:
    path = write_sae(tmp_path / "sae", layer=models.LAYERS)
    message = refusal(vllm_config, {"modules": {"bridge": str(path)}})
    for part in ("bridge", str(path), f"layer {models.LAYERS}", "expected 0..2"):
        assert part in message


def test_another_width_is_refused(vllm_config: Any, tmp_path: Path) -> None:
    path = write_sae(tmp_path / "sae", d_model=48)
    message = refusal(vllm_config, {"modules": {"bridge": str(path)}})
    for part in ("bridge", "d_in 48", f"expected {models.HIDDEN}"):
        assert part in message


def test_a_point_has_its_own_width(vllm_config: Any, tmp_path: Path) -> None:
    heads = vllm_config.model_config.model_arch_config.total_num_attention_heads
    z = heads * vllm_config.model_config.get_head_size()
    path = write_sae(tmp_path / "sae", d_model=z + 8, hook="attn.hook_z")
    message = refusal(vllm_config, {"modules": {"bridge": str(path)}})
    for part in ("attn_z.1", f"d_in {z + 8}", f"expected {z}, the width of attn_z"):
        assert part in message


def write_transcoder(path: Path, hook: str, hook_out: str) -> str:
    D, F = models.HIDDEN, 8
    content = {
        "W_enc": torch.ones(F, D),
        "b_enc": torch.zeros(F),
        "W_dec": torch.ones(F, D),
        "b_dec": torch.zeros(D),
        "W_skip": torch.zeros(D, D),
        "hook_out": hook_out,
    }
    save_native(path, {(1, hook): content})
    return str(path)


def test_a_transcoder_gets_a_slot_of_its_own(vllm_config: Any, tmp_path: Path) -> None:
    path = write_transcoder(tmp_path / "t", "mlp_in", "mlp_out")
    config = resolved(vllm_config, {"modules": {"t": path}})
    assert config is not None
    [site], [slot] = config.modules["t"].sites, config.slots
    assert site.is_transcoder and site.name == "mlp_in.1"
    assert (slot.hook_out, slot.has_skip) == (HookPoint.MLP_OUT, True)


def test_a_transcoder_between_other_points_is_refused(
    vllm_config: Any, tmp_path: Path
) -> None:
    path = write_transcoder(tmp_path / "t", "post_attn", "mlp_out")
    message = refusal(vllm_config, {"modules": {"t": path}})
    assert "from post_attn to mlp_out, expected one from mlp_in to mlp_out" in message


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"hook": "mlp_in", "hook_out": "attn_out", "width": 8}, "from mlp_in to attn"),
        ({"hook": "mlp_in", "skip": True, "width": 8}, "only with hook_out"),
        ({"hook": "mlp_in", "hook_out": "x", "width": 8}, "hook_out: found"),
        ({"hook": "mlp_in", "hook_out": "mlp_out", "vectors": 1}, "only with width"),
    ],
)
def test_a_bad_spare_transcoder_slot_is_refused(
    vllm_config: Any, slot: dict[str, Any], message: str
) -> None:
    found = refusal(vllm_config, {"spare": [{"layer": 1, **slot}]})
    assert message in found


def test_a_missing_path_is_refused_in_one_line(vllm_config: Any) -> None:
    message = refusal(vllm_config, {"modules": {"bridge": "/no/such/sae"}})
    assert "bridge" in message
    assert "/no/such/sae" in message


@pytest.mark.parametrize(
    ("steering", "path"),
    [
        (3, "additional_config.steering"),
        ({"module": {}}, "additional_config.steering"),
        ({"modules": ["a"]}, "additional_config.steering.modules"),
        ({"modules": {"": "p"}}, "additional_config.steering.modules"),
        ({"modules": {"a": 3}}, "additional_config.steering.modules.a"),
        ({"modules": {"a": {}}}, "modules.a.path"),
        ({"modules": {"a": {"path": ""}}}, "modules.a.path"),
        ({"modules": {"a": {"path": "p", "unit": 1}}}, "modules.a"),
        ({"modules": {"a": {"path": "p", "feature_units": "mm"}}}, "a.feature_units"),
        ({"modules": {"a": {"path": "p", "skip_token_ids": [True]}}}, "skip_token_ids"),
        ({"modules": {"a": {"path": "p", "norm_guard": -1}}}, "a.norm_guard"),
        ({"modules": {"a": {"path": "p", "sites": "post"}}}, "a.sites"),
        ({"max_clamps": 0}, "steering.max_clamps"),
        ({"max_clamps": True}, "steering.max_clamps"),
        ({"max_clamps": "64"}, "steering.max_clamps"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(
    vllm_config: Any, steering: Any, path: str
) -> None:
    message = refusal(vllm_config, steering)
    assert path in message
    assert "expected" in message


@pytest.mark.parametrize(
    ("part", "changes", "name"),
    [
        ("cache_config", {"kv_sharing_fast_prefill": True}, "KV-sharing fast prefill"),
        ("model_config", {"runner_type": "pooling"}, "pooling models"),
        ("model_config", {"is_diffusion": True}, "models that write by diffusion"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(
    vllm_config: Any, part: str, changes: dict[str, Any], name: str
) -> None:
    changed = copy.copy(getattr(vllm_config, part))
    for field, value in changes.items():
        setattr(changed, field, value)
    config = copy.copy(vllm_config)
    setattr(config, part, changed)
    refuse_unsupported_features(vllm_config)
    with pytest.raises(SteeringConfigError, match=name):
        refuse_unsupported_features(config)


def test_weights_sent_by_a_trainer_are_refused(vllm_config: Any) -> None:
    config = copy.copy(vllm_config)
    config.weight_transfer_config = WeightTransferConfig()
    with pytest.raises(SteeringConfigError, match="weights sent by a trainer"):
        refuse_unsupported_features(config)


def test_the_rust_front_end_is_refused_only_with_steering(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "Rust front end" in refusal(vllm_config, {"modules": {}})
    resolve_steering(vllm_config)


def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def additional(*argv: str) -> Any:
    args = parser().parse_args(["--model", "m", *argv])
    made = AsyncEngineArgs.__new__(AsyncEngineArgs)
    made.additional_config = args.additional_config
    return fold_modules(made.additional_config, args.steering_modules)


def test_the_flag_fills_additional_config() -> None:
    folded = additional("--steering-modules", "a=/p=1", '{"name": "b", "path": "q"}')
    assert folded == {"steering": {"modules": {"a": "/p=1", "b": {"path": "q"}}}}


def test_the_flag_joins_additional_config_wherever_it_stands() -> None:
    other = ("--additional-config", '{"steering": {"max_clamps": 3}, "x": 1}')
    flag = ("--steering-modules", "a=p")
    expected = {"steering": {"max_clamps": 3, "modules": {"a": "p"}}, "x": 1}
    assert additional(*other, *flag) == expected
    assert additional(*flag, *other) == expected


def test_dotted_additional_config_works_as_well() -> None:
    folded = additional("--additional-config.steering.modules.a", "p")
    assert folded == {"steering": {"modules": {"a": "p"}}}


def test_engine_args_from_the_command_line_hold_the_modules(model_path: Path) -> None:
    argv = ["--model", str(model_path), "--steering-modules", "a=p"]
    made = AsyncEngineArgs.from_cli_args(parser().parse_args(argv))
    assert type(made) is AsyncEngineArgs
    assert made.additional_config == {"steering": {"modules": {"a": "p"}}}


def test_a_module_given_twice_is_refused() -> None:
    with pytest.raises(SystemExit):
        additional("--steering-modules", "a=p", "a=q")
    with pytest.raises(SteeringConfigError, match="'a'"):
        fold_modules({"steering": {"modules": {"a": "p"}}}, {"a": "q"})


@pytest.mark.parametrize(
    "bad",
    [
        *("a", "=p", "a=", "{", '{"path": "p"}', '{"name": 1}'),
        pytest.param('{"a":' * 100_000, id="nested"),
    ],
)
def test_what_is_no_module_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="found"):
        parse_module(bad)


def kv_config(name: str, *children: str, path: str | None = None) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector=name,
        kv_role="kv_both",
        kv_connector_module_path=path,
        kv_connector_extra_config={
            "connectors": [
                {"kv_connector": child, "kv_role": "kv_both"} for child in children
            ]
        },
    )


def kv_name(value: KVTransferConfig | str) -> str:
    """A name that is the same in every process, as a configuration's text is not."""
    return value if isinstance(value, str) else str(value.kv_connector)


TOKEN_KEYED = sorted(
    set(KVConnectorFactory._registry) - {*BLOCK_HASH_CONNECTORS, MULTI_CONNECTOR}
)


@pytest.mark.parametrize(
    ("connector", "named"),
    [
        *((kv_config(name), name) for name in TOKEN_KEYED),
        (kv_config("Mine", path="my.module"), "Mine (my.module)"),
        # A custom class that has an allowed name.
        (kv_config("OffloadingConnector", path="x"), "OffloadingConnector (x)"),
        (
            kv_config(MULTI_CONNECTOR, "OffloadingConnector", "ExampleConnector"),
            "ExampleConnector in MultiConnector",
        ),
    ],
    ids=kv_name,
)
def test_a_kv_connector_that_does_not_key_by_block_hash_is_refused(
    vllm_config: Any, connector: KVTransferConfig, named: str
) -> None:
    config = copy.copy(vllm_config)
    config.kv_transfer_config = connector
    with pytest.raises(SteeringConfigError, match="block hashes") as caught:
        refuse_unsupported_features(config)
    assert f"found {named}," in str(caught.value)
    assert "OffloadingConnector" in str(caught.value)


@pytest.mark.parametrize(
    "connector",
    [
        *map(kv_config, BLOCK_HASH_CONNECTORS),
        kv_config(MULTI_CONNECTOR, *BLOCK_HASH_CONNECTORS),
    ],
    ids=kv_name,
)
def test_a_kv_connector_that_keys_by_block_hash_is_allowed(
    vllm_config: Any, connector: KVTransferConfig
) -> None:
    config = copy.copy(vllm_config)
    config.kv_transfer_config = connector
    refuse_unsupported_features(config)


def test_every_allowed_kv_connector_is_of_this_vllm() -> None:
    assert set(BLOCK_HASH_CONNECTORS) < set(KVConnectorFactory._registry)


@pytest.mark.parametrize("hook", ["attn_z", "attn_out", "mlp_in", "mlp_out"])
def test_points_besides_the_stream_are_refused_in_float16(
    vllm_config: Any, hook: str
) -> None:
    config = copy.copy(vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.model_config.dtype = torch.float16
    message = refusal(config, {"spare": [{"layer": 0, "hook": hook, "width": 8}]})
    assert f"found {hook} in float16, expected bfloat16 or float32" in message
    resolved(config, {"spare": [{"layer": 0, "hook": "post_block", "width": 8}]})
