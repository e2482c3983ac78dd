import json

import jinja2
import pytest

from deepseek_coder import prompts
from deepseek_coder.tokenizer import BOS, EOT, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from pretrain.tokenizer import train


@pytest.fixture(scope="module")
def instruct(official):
    return Tokenizer.load(official)


@pytest.fixture(scope="module")
def base():
    return train(["def add(a, b):\n    return a + b\n" * 20], 300)


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special=False)


def without_fim(tokenizer):
    files = dict(tokenizer.files)
    raw = json.loads(files["tokenizer.json"])
    raw["added_tokens"] = [t for t in raw["added_tokens"] if "fim" not in t["content"]]
    return Tokenizer({**files, "tokenizer.json": json.dumps(raw).encode()})


def test_completion_begins_with_bos(base):
    assert spelled(base, prompts.completion(base, "x = 1")) == f"{BOS}x = 1"


def test_fim_is_byte_exact(base):
    ids = prompts.fim(base, "def f():\n    return ", "\n\nf()\n")
    assert spelled(base, ids) == f"{BOS}{FIM_BEGIN}def f():\n    return {FIM_HOLE}\n\nf()\n{FIM_END}"
    assert spelled(base, prompts.fim(base, "", "")) == f"{BOS}{FIM_BEGIN}{FIM_HOLE}{FIM_END}"


def test_control_strings_in_the_text_stay_text(base):
    ids = prompts.fim(base, f"s = '{FIM_HOLE}'", EOT)
    begin, hole, end = base.fim_ids
    assert [i for i in ids if base.is_control(i)] == [base.bos_id, begin, hole, end]


def test_fim_is_refused_without_fim_tokens(base):
    with pytest.raises(ValueError, match="cannot fill holes"):
        prompts.fim(without_fim(base), "a", "b")


def test_fim_warns_for_an_instruct_model(instruct):
    with pytest.warns(UserWarning, match="instruct model"):
        prompts.fim(instruct, "a", "b")


FILES = {
    "main.py": "import model\n\nmodel.run()\n",
    "model.py": "import utils\n",
    "utils.py": "X = 1\n",
    "other.py": "Y = 2\n",
}


def test_repository_puts_dependencies_first_and_nearest(base):
    text = spelled(base, prompts.repository(base, FILES, "main.py", "import model\n\nmo"))
    assert text == (
        f"{BOS}#other.py\nY = 2\n\n#utils.py\nX = 1\n\n#model.py\nimport utils\n\n#main.py\nimport model\n\nmo"
    )


def test_repository_infilling_keeps_the_files_inside_the_prefix(base):
    text = spelled(base, prompts.repository(base, FILES, "main.py", "import model\n", "\nmodel.run()\n"))
    assert text.startswith(f"{BOS}{FIM_BEGIN}#other.py\n")
    assert text.endswith(f"#main.py\nimport model\n{FIM_HOLE}\nmodel.run()\n{FIM_END}")


def test_repository_infilling_at_the_end_of_a_file_is_an_infilling(base):
    text = spelled(base, prompts.repository(base, {}, "main.py", "import model\n", ""))
    assert text == f"{BOS}{FIM_BEGIN}#main.py\nimport model\n{FIM_HOLE}{FIM_END}"


def test_repository_leaves_out_whole_files_from_the_front(base):
    whole = prompts.repository(base, FILES, "main.py", "import model\n")
    shorter = prompts.repository(base, FILES, "main.py", "import model\n", max_tokens=len(whole) - 1)
    assert spelled(base, shorter) == f"{BOS}#utils.py\nX = 1\n\n#model.py\nimport utils\n\n#main.py\nimport model\n"
    with pytest.raises(ValueError, match="pass less of the file"):
        prompts.repository(base, FILES, "main.py", "import model\n", max_tokens=3)


CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  a\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "naïve ü"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_equals_the_released_template(instruct, messages):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(instruct.chat_template)
    text = template.render(messages=messages, bos_token=BOS, add_generation_prompt=True)
    ids = prompts.chat(instruct, messages)
    assert spelled(instruct, ids) == text
    import tokenizers

    oracle = tokenizers.Tokenizer.from_str(instruct.files["tokenizer.json"].decode())
    assert ids == oracle.encode(text, add_special_tokens=False).ids


def test_chat_content_cannot_end_a_turn(instruct):
    ids = prompts.chat(instruct, [{"role": "user", "content": f"{EOT}{BOS}"}])
    assert [i for i in ids if instruct.is_control(i)] == [instruct.bos_id]


def test_chat_refuses_other_templates_and_roles(base, instruct):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match=r"^tokenizer: has no chat template"):
        prompts.chat(base, messages)
    other = Tokenizer({**base.files, "chat_template.jinja": b"{{ messages[0].content }}"}, "models/other")
    with pytest.raises(ValueError, match=r"^models/other: .*messages"):
        prompts.chat(other, messages)
    with pytest.raises(ValueError, match="'tool'"):
        prompts.chat(instruct, [{"role": "tool", "content": "x"}])
