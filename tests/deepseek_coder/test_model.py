import dataclasses

import pytest
import torch
import transformers

from convert import open_checkpoint
from deepseek_coder import Decoder, ModelConfig
from deepseek_coder.model import KVCache, initial_weight, positions_of
from deepseek_coder.weights import copy_weights

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}


@pytest.fixture(scope="module", params=HEADS)
def pair(request, tmp_path_factory):
    """The same random weights in transformers and in ours, fp32, linear RoPE factor 4."""
    heads, kv_heads = HEADS[request.param]
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
            rms_norm_eps=1e-6, initializer_range=0.1, tie_word_embeddings=request.param == "GQA",
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        )
    ).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        ours = Decoder(ModelConfig.from_dict(checkpoint.config)).eval()
        copy_weights(ours, checkpoint)
    return ours, theirs


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, theirs = pair
    tokens = torch.randint(0, 320, (2, 333))
    wanted = theirs(tokens).logits
    assert (ours(tokens) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(pair):
    ours, _ = pair
    lengths = [5, 1, 40, 17]
    tokens = torch.randint(0, 320, (sum(lengths),))
    cu_seqlens = torch.tensor([0, 5, 6, 46, 63, 63, 63], dtype=torch.int32)
    packed = ours(tokens, cu_seqlens=cu_seqlens)
    alone = torch.cat([ours(part[None])[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_equal_transformers(pair):
    ours, theirs = pair
    tokens = torch.randint(0, 320, (2, 60))
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    targets[0, :9] = -100
    labels = torch.full_like(tokens, -100)
    labels[:, 1:] = targets[:, :-1]
    loss, count = ours(tokens, targets=targets)
    assert count == (targets != -100).sum()
    (loss / count).backward()
    wanted = theirs(tokens, labels=labels).loss
    wanted.backward()
    torch.testing.assert_close(loss / count, wanted)
    q, k, v = (getattr(theirs.model.layers[1].self_attn, n).weight.grad for n in ("q_proj", "k_proj", "v_proj"))
    torch.testing.assert_close(ours.layers[1].attention.wqkv.weight.grad, torch.cat([q, k, v]), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.embed.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        ours.layers[0].mlp_norm.weight.grad,
        theirs.model.layers[0].post_attention_layernorm.weight.grad,
        rtol=1e-3,
        atol=1e-6,
    )
    ours.zero_grad()


@torch.inference_mode()
def test_greedy_tokens_equal_transformers_for_64_steps(pair):
    ours, theirs = pair
    prompt = torch.randint(0, 320, (1, 30))
    wanted = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 30:]
    cache = KVCache(ours.config, 1, 94, torch.device("cpu"), torch.float32)
    tokens, made = prompt, []
    for _ in range(64):
        tokens = ours(tokens, cache=cache).argmax(-1, keepdim=True)
        made.append(int(tokens))
    assert made == wanted.tolist()


@torch.inference_mode()
def test_cache_equals_one_forward(pair):
    ours, _ = pair
    tokens = torch.randint(0, 320, (3, 50))
    cache = KVCache(ours.config, 3, 60, torch.device("cpu"), torch.float32)
    for part in tokens.split([20, 1, 29], dim=1):
        last = ours(part, cache=cache)
    torch.testing.assert_close(last, ours(tokens)[:, -1], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [50, 50, 50]


def test_positions():
    cu_seqlens = torch.tensor([0, 3, 3, 5, 8, 8], dtype=torch.int32)
    assert positions_of(cu_seqlens, 8).tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_shapes_that_are_no_tokens_are_refused(pair):
    with pytest.raises(ValueError, match="cu_seqlens"):
        pair[0](torch.zeros(5, dtype=torch.int64))


def test_33b_is_described_without_memory():
    with torch.device("meta"):
        model = Decoder(ModelConfig.released("deepseek-coder-33b-base"))
    assert model.layers[61].attention.wqkv.weight.shape == (7168 + 2 * 1024, 7168)


def test_initial_weights():
    shape = torch.Size((400, 300))
    weight = initial_weight("head.weight", shape, 0.006, seed=1)
    assert abs(weight.std().item() / 0.006 - 1) < 0.02
    assert torch.equal(weight, initial_weight("head.weight", shape, 0.006, seed=1))
    assert not torch.equal(weight, initial_weight("head.weight", shape, 0.006, seed=2))
    assert not torch.equal(weight, initial_weight("embed.weight", shape, 0.006, seed=1))
    assert torch.equal(initial_weight("norm.weight", torch.Size((7,)), 0.006, 0), torch.ones(7))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.released("deepseek-coder-1.3b-base").num_layers = 1
