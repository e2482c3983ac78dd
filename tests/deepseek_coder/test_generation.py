import pytest
import torch

from deepseek_coder import Decoder, ModelConfig, generate, load, prompts
from deepseek_coder.generation import _before_stop, stream
from pretrain.tokenizer import train


@pytest.fixture(scope="module")
def small():
    """A random model whose embedding has more rows than its vocabulary has tokens."""
    tokenizer = train(["def add(a, b):\n    return a + b  # größer ☃\n" * 20], 300)
    rows = tokenizer.vocab_size + 100
    config = ModelConfig(rows, 64, 96, 2, 4, 2, head_dim=16, max_position_embeddings=64, eos_token_ids=(1,))
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), tokenizer


class Scripted(torch.nn.Module):
    """Stands for a model that wants to say `ids`, one after another."""

    def __init__(self, config, ids):
        super().__init__()
        self.config, self.ids = config, list(ids)
        self.embed = torch.nn.Embedding(1, 1)

    def forward(self, tokens, cache):
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, self.ids.pop(0)] = 10.0
        return logits


def say(small, text, end=True, **options):
    model, tokenizer = small
    ids = tokenizer.encode(text) + ([tokenizer.eos_id] if end else [])
    options.setdefault("max_new_tokens", 50)
    return list(stream(Scripted(model.config, ids), tokenizer, "x", **options))


def test_it_ends_at_every_end(small):
    assert "".join(say(small, "return a + b")) == "return a + b"
    model, tokenizer = small
    for end in ("<｜end▁of▁sentence｜>", "<|EOT|>"):
        scripted = Scripted(model.config, [*tokenizer.encode("ab"), tokenizer.control[end]])
        assert generate(scripted, tokenizer, "x") == "ab"
    assert "".join(say(small, "return a + b", end=False, max_new_tokens=2)) in "return a + b"


def test_stop_strings_are_held_back_and_left_out(small):
    pieces = say(small, "def add(a, b):\n    return a", stop=["\n    ret", "never"])
    assert "".join(pieces) == "def add(a, b):"
    assert "".join(say(small, "ab\n", stop=["\n\n"])) == "ab\n"


def test_before_stop():
    assert _before_stop("abc", ["bc"]) == ("a", True)
    assert _before_stop("ab", ["bc"]) == ("a", False)
    assert _before_stop("abc", ["x", ""]) == ("abc", False)
    assert _before_stop("xayb", ["b", "ay"]) == ("x", True)


def test_characters_are_whole(small):
    assert "".join(say(small, "größer ☃")) == "größer ☃"
    assert all("�" not in piece for piece in say(small, "größer ☃"))


def test_padding_rows_are_never_sampled(small):
    model, tokenizer = small
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 100  # padding rows that shout
    for seed in range(5):
        assert isinstance(generate(model, tokenizer, "def", 20, temperature=1.5, seed=seed), str)
    from deepseek_coder.generation import _tokens

    ids = [i for seed in range(5) for i in _tokens(model, tokenizer, "def", 20, 1.5, 1.0, seed)]
    assert ids
    assert max(ids) < tokenizer.vocab_size


def test_sampling_is_reproducible_and_varied(small):
    texts = [generate(*small, "def", 16, temperature=1.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    greedy = generate(*small, "def", 16)
    assert greedy == generate(*small, "def", 16, temperature=1.0, top_p=1e-9, seed=5)


def test_the_context_bounds_a_completion(small):
    model, tokenizer = small
    prompt = [2] * 60
    from deepseek_coder.generation import _tokens

    made = list(_tokens(Scripted(model.config, [3] * 99), tokenizer, prompt, 50, 0.0, 1.0, 0))
    assert len(made) == 4
    with pytest.raises(ValueError, match="the prompt is 64 tokens, the model's context 64"):
        generate(model, tokenizer, [2] * 64)
    with pytest.raises(ValueError, match="empty"):
        generate(model, tokenizer, [])
    with pytest.raises(ValueError, match="top_p"):
        generate(model, tokenizer, "x", top_p=0.0)


@pytest.fixture(scope="module")
def pair(smollm2, tmp_path_factory):
    import transformers

    from deepseek_coder import save

    ours, tokenizer = load(smollm2)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    save(folder, ours, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return ours, theirs, tokenizer


@pytest.mark.network
class TestSmolLM2:
    """Real trained weights; transformers on the same dequantised tensors is the oracle."""

    @torch.inference_mode()
    def test_logits(self, pair):
        ours, theirs, tokenizer = pair
        with open(__file__, encoding="utf-8") as file:
            tokens = torch.tensor([tokenizer.encode(file.read())[:512]])
        wanted = theirs(tokens).logits
        assert (ours(tokens) - wanted).abs().max() < 1e-4 * wanted.abs().max()

    @pytest.mark.parametrize(
        "prompt", ["The capital of France is", "def fibonacci(n):\n    ", "#include <stdio.h>\n\nint main() {\n    "]
    )
    def test_greedy_continuations(self, pair, prompt):
        ours, theirs, tokenizer = pair
        ids = prompts.completion(tokenizer, prompt)
        wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        made = generate(ours, tokenizer, prompt, max_new_tokens=32)
        assert made == tokenizer.decode(i for i in wanted)
        if prompt.startswith("The capital"):
            assert made.startswith(" Paris.")
