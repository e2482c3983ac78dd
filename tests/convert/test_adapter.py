"""LoRA adapters, against PEFT."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import names, open_checkpoint
from convert.adapter import Adapter, Merged, Pair, open_adapter, split_fused, write_adapter
from convert.writer import write_folder

peft = pytest.importorskip("peft")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapted(tmp_path: Path, tiny_model: Any) -> Callable[..., Any]:
    """A base model and an adapter with random weights, both saved by the peers; the merged model of PEFT."""

    def make(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        model = tiny_model().to(dtype)
        model.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM"} | settings
        )
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(tmp_path / "adapter")
        return wrapped.merge_and_unload()

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {
            "rank_pattern": {"model.layers.1.mlp.down_proj": 2, "k_proj": 8},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "o_proj": 3},
        },
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merges_exactly_as_peft(tmp_path: Path, adapted: Any, settings: dict[str, Any], dtype: torch.dtype) -> None:
    expected = dict(adapted(dtype, **settings).named_parameters())
    with open_checkpoint(tmp_path / "base") as base:
        merged = Merged(base, open_adapter(tmp_path / "adapter", base.config))
        changed = 0
        for name in merged.shapes:
            tensor = merged.tensor(name)
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[name]), name
            changed += not torch.equal(tensor, base.tensor(name))
        assert changed == len(open_adapter(tmp_path / "adapter", base.config).pairs) > 0


def test_what_peft_takes_out_of_the_base_model(tmp_path: Path, adapted: Any) -> None:
    """With PiSSA the base is another matrix: PEFT's merge is not base + B A, so such an adapter must be refused."""
    expected = dict(adapted(init_lora_weights="pissa").named_parameters())
    file = tmp_path / "adapter" / "adapter_config.json"
    with open_checkpoint(tmp_path / "base") as base:
        with pytest.raises(ValueError, match="init_lora_weights 'pissa' changes the base model"):
            open_adapter(tmp_path / "adapter", base.config)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
        merged = Merged(base, open_adapter(tmp_path / "adapter", base.config))
        name = "model.layers.1.mlp.up_proj.weight"
        assert not torch.allclose(merged.tensor(name), expected[name], atol=1e-3)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", False])
def test_beginnings_that_leave_the_base_model(tmp_path: Path, adapted: Any, init: object) -> None:
    expected = dict(adapted(init_lora_weights=init).named_parameters())
    with open_checkpoint(tmp_path / "base") as base:
        merged = Merged(base, open_adapter(tmp_path / "adapter", base.config))
        assert all(torch.equal(merged.tensor(name), expected[name]) for name in merged.shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_large_matrices_in_parts(dtype: torch.dtype) -> None:
    """More rows than are added at a time, and not a multiple of them."""
    weight, a, b = torch.randn(2500, 8).to(dtype), torch.randn(2, 8), torch.randn(2500, 2)
    merged = Adapter(Path(), {"x": Pair(a, b, 0.3)}, {}).merge("x", weight)
    assert torch.equal(merged, (weight.float() + b @ a * 0.3).to(dtype))


def test_pickled_adapters(tmp_path: Path, adapted: Any) -> None:
    expected = adapted()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with open_checkpoint(tmp_path / "base") as base:
        merged = Merged(base, open_adapter(tmp_path / "adapter", base.config))
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(merged.tensor(name), dict(expected.named_parameters())[name])


def test_peft_loads_what_we_write(tmp_path: Path, tiny_config: Any, tiny_model: Any) -> None:
    """Fused and single pairs, unequal ranks; PEFT's unmerged logits are those of our merged folder."""
    import transformers

    model = tiny_model().eval()
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    shapes = {
        name: (sum(p.shape[0] for p in parts), parts[0].shape[-1]) for name, parts in names.fused(tiny_config).items()
    }
    ranks = {
        "layers.0.attention.wqkv.weight": 4,
        "layers.1.mlp.w_gate_up.weight": 2,
        "model.layers.1.self_attn.o_proj.weight": 4,
    }
    shapes["model.layers.1.self_attn.o_proj.weight"] = (32, 32)
    pairs = {
        name: (
            torch.randn(r, shapes[name][1], generator=generator),
            torch.randn(shapes[name][0], r, generator=generator),
        )
        for name, r in ranks.items()
    }
    write_adapter(tmp_path / "adapter", tiny_config, pairs, alpha=3.0, base_model=str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 6
    with open_checkpoint(tmp_path / "base") as base:
        merged = Merged(base, open_adapter(tmp_path / "adapter", base.config))
        fused = [
            torch.cat([merged.tensor(part.name) - base.tensor(part.name) for part in names.fused(tiny_config)[name]])
            for name in list(ranks)[:2]
        ]
        write_folder(tmp_path / "out", base.config, ((name, merged.tensor(name)) for name in merged.shapes))
    for name, delta in zip(ranks, fused, strict=False):
        a, b = pairs[name]
        torch.testing.assert_close(delta, 3.0 / ranks[name] * b @ a, atol=1e-5, rtol=1e-4)
    tokens = torch.arange(40)[None]
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(ours(tokens).logits, wrapped(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours(tokens).logits, model(tokens).logits, atol=1e-2)
    with pytest.raises(FileExistsError, match="add --force"):
        write_adapter(tmp_path / "adapter", tiny_config, pairs, alpha=3.0)
    write_adapter(tmp_path / "adapter", tiny_config, pairs, alpha=3.0, force=True)


def test_an_adapter_of_a_fused_model_is_split(tmp_path: Path, tiny_config: Any) -> None:
    """PEFT on a model with our fused layers writes our names."""
    a, b = torch.randn(2, 32), torch.randn(64, 2)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    prefix = "base_model.model.layers.1.attention.wqkv"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    adapter = open_adapter(tmp_path, tiny_config)
    rows = [
        adapter.merge(f"model.layers.1.self_attn.{x}_proj.weight", torch.zeros(n, 32))
        for x, n in zip("qkv", (32, 16, 16), strict=True)
    ]
    assert len(adapter.pairs) == 3
    torch.testing.assert_close(torch.cat(rows), b @ a)
    with pytest.raises(ValueError, match="lora_B has 63 rows"):
        split_fused("layers.1.attention.wqkv.weight", a, b[1:], tiny_config)


def test_command_inspects_a_hostile_adapter(tmp_path: Path, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that rich would take for markup, or the terminal for a command."""
    from typer.testing import CliRunner

    from convert.__main__ import app

    adapted()
    file = tmp_path / "adapter" / "adapter_config.json"
    hostile = {"base_model_name_or_path": "[/x]\x1b[2J", "target_modules": 5}
    file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["--inspect", str(tmp_path / "adapter")])
    assert done.exit_code == 0, done.exception
    assert "[/x]?[2J" in done.output


def test_command_merges(tmp_path: Path, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from convert.__main__ import app

    monkeypatch.setenv("COLUMNS", "200")
    expected = dict(adapted().named_parameters())
    arguments = ["base", "out", "--merge-adapter", "adapter", "--verify"]
    done = CliRunner().invoke(app, [a if a.startswith("--") else str(tmp_path / a) for a in arguments])
    assert done.exit_code == 0, done.output
    with open_checkpoint(tmp_path / "out") as out:
        assert all(torch.equal(out.tensor(name), expected[name]) for name in out.shapes)
    assert "LoRA adapter adapter is merged" in (tmp_path / "out" / "README.md").read_text()
    done = CliRunner().invoke(app, ["--inspect", str(tmp_path / "adapter")])
    assert done.exit_code == 0
    for text in ("4, alpha 6", "down_proj, gate_proj", "--merge-adapter", "nothing"):
        assert text in done.output
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in CliRunner().invoke(app, ["--inspect", str(tmp_path / "adapter")]).output


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base model"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"r": 0}, "r is 0"),
        ({"r": 3}, "has rank 4, the config says 3"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"alpha_pattern": {"(a+)+": 1}}, "more than a module's name"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is None"),
        ({"rank_pattern": [1]}, "it must be an object"),
    ],
)
def test_other_adapters_are_refused(
    tmp_path: Path, adapted: Any, changes: dict[str, Any], named: str, tiny_config: Any
) -> None:
    adapted()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        open_adapter(tmp_path / "adapter", tiny_config)
    assert str(tmp_path / "adapter") in str(caught.value)


@pytest.mark.parametrize(
    "tensors, named",
    [
        ({}, "holds no LoRA matrices"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)},
            "no LoRA matrix of a linear layer",
        ),
        ({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}, "has no lora_B"),
        (
            {
                "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 32),
                "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(48, 2),
            },
            "no such matrix",
        ),
        (
            {
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32),
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(48, 3),
            },
            "save the adapter again",
        ),
    ],
)
def test_wrong_matrices(tmp_path: Path, tiny_config: Any, tensors: Any, named: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{named}"):
        open_adapter(tmp_path, tiny_config)


def test_missing_files(tmp_path: Path, tiny_config: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: not found"):
        open_adapter(tmp_path, tiny_config)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        open_adapter(tmp_path, tiny_config)


@pytest.mark.parametrize("name, rows", [("model.embed_tokens.weight", 64), ("model.norm.weight", 32), ("x", 1)])
def test_only_linear_layers_are_written(tmp_path: Path, tiny_config: Any, name: str, rows: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        write_adapter(tmp_path / "out", tiny_config, {name: (torch.ones(2, 32), torch.ones(rows, 2))}, alpha=1)
    assert list(tmp_path.iterdir()) == []
