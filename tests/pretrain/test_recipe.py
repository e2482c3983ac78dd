from pathlib import Path

import pytest

from pretrain import recipe

RECIPES = sorted((Path(recipe.__file__).parent / "recipes").rglob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.name)
def test_every_recipe_that_is_shipped(file):
    made = recipe.load(file)
    assert recipe.from_dict(recipe.to_dict(made), "again") == made
    made.model_config(32022, 32013, 32014)


def test_the_released_sizes():
    made = recipe.load(next(f for f in RECIPES if f.name == "2-long-16k.toml"))
    config = made.model_config(32022, 32013, 32014)
    assert (config.num_parameters, config.rope_theta, config.rope_factor) == (1_346_471_936, 100000.0, 4.0)
    assert (config.vocab_size, config.max_position_embeddings, config.init_std) == (32256, 16384, 0.006)
    made = recipe.load(next(f for f in RECIPES if f.name == "1-base-4k.toml"))
    assert made.model_config(32022, 32013, 32014).rope_theta == 10000.0


@pytest.mark.parametrize(
    "text, change, message",
    [
        ("[train]\nstep = 3\n", None, r"r\.toml: train\.step is not a known key; known are run, steps"),
        ("[trane]\nsteps = 3\n", None, r"unknown section \[trane\]"),
        ("steps = 3\n", None, "unknown section"),
        ("train = 3\n", None, "a section"),
        ("[train\n", None, "not valid TOML"),
        ("[train]\nsteps = 'x'\n", None, r"train\.steps is 'x'; int is expected"),
        ("[train]\nsteps = true\n", None, "int is expected"),
        ("[data]\nfim_rate = 2\n", None, "fim_rate is 2.0; it must be between 0 and 1"),
        ("[data]\nfim_loss = 'some'\n", None, "fim_loss"),
        ("[data]\nfim_modes = ['pms']\n", None, r"data.fim_modes is \('pms',\); it must be a list of psm, spm, joint"),
        ("[data]\nfim_modes = []\n", None, "data.fim_modes"),
        ("[data]\nfim_spans = ['line', 3]\n", None, "data.fim_spans is .*; it must be a list of char, line, ast"),
        ("[data]\nfim_spans = 'line'\n", None, "data.fim_spans is 'line'; tuple is expected"),
        ("[data]\npacking = 'tight'\n", None, 'data.packing is \'tight\'; it must be "best_fit" or "concat"'),
        ("", "train.micro_batch=0", r"r\.toml: train\.micro_batch is 0; it must be 1 or more"),
        ("", "train.batch=0", "train.batch is 0; it must be a multiple of train.micro_batch, 1"),
        ("[train]\nbatch = 3\nmicro_batch = 2\n", None, "train.batch is 3; it must be a multiple"),
        ("", "train.steps=-1", "train.steps is -1; it must be 0 or more"),
        ("", "train.device=foo", "train.device is 'foo'"),
        ("", "train.dtype=foo", "train.dtype is 'foo'; it must be one of float32, bfloat16, float16"),
        ("", "train.dtype=int8", "train.dtype is 'int8'"),
        ("", "data.workers=-1", "data.workers is -1; it must be 0 or more"),
        ("", "optimizer.betas=[0.9]", r"optimizer.betas is \(0.9,\); it must be two numbers"),
        ("", "optimizer.betas=[0.9, 1]", "optimizer.betas"),
        ("", "optimizer.learning_rate=0", "optimizer.learning_rate is 0.0; it must be above 0"),
        ("", "optimizer.learning_rate=nan", "optimizer.learning_rate is nan"),
        ("", "optimizer.stage_ends=[0.9, 0.8]", "optimizer.stage_ends is .*; it must be increasing fractions"),
        ("", "optimizer.stage_ends=[0.8, 1.1]", "optimizer.stage_ends"),
        ("", "optimizer.stage_ends=['a']", "optimizer.stage_ends"),
        ("", "model.vocab_multiple=0", "model.vocab_multiple is 0; it must be 1 or more"),
        ("[model]\nreleased = 'deepseek-coder-2b'\n", None, "is not a released"),
        ("", "steps=3", r"write section\.key=value"),
        ("", "train.sheps=3", "train.sheps is not a known key"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, text, change, message):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.load(file, [change] if change else []).model_config(100, 1, 2)


def test_changes_on_top(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text("[train]\nsteps = 3\n")
    made = recipe.load(file, ["train.steps=5", "optimizer.stage_ends=[0.5]", "train.run=somewhere", "data.fim_rate=1"])
    assert (made.train.steps, made.optimizer.stage_ends, made.train.run, made.data.fim_rate) == (
        5,
        (0.5,),
        "somewhere",
        1.0,
    )
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        recipe.load(tmp_path / "missing.toml")
