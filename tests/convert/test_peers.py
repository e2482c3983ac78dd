"""What we write, run by other people's engines: llama.cpp (node-llama-cpp) and vLLM, on the CPU, in fp32.

Opt-in, because the engines take gigabytes: `make test-peers` installs them into .cache/peers and runs this. The oracle
is transformers' greedy generation, 32 tokens, for MHA, GQA and MQA with linear RoPE.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import names, open_checkpoint
from convert.adapter import write_adapter
from convert.gguf import open_gguf
from convert.gguf_writer import KINDS, write_gguf
from convert.writer import write_folder
from deepseek_coder import Tokenizer

pytestmark = [pytest.mark.peers, pytest.mark.network]
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".cache" / "peers"
NODE = PEERS / "node"
VLLM = PEERS / "vllm" / "bin" / "python"
PROMPT = "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot = items[0]\n"

LLAMA_CPP = """
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: process.argv[2], useMmap: false});
// By default keys and values are kept as float16.
const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
// More threads than cores wait for each other: 3.5 s a token instead of 0.06.
const context = await model.createContext({contextSize: 512, threads: 1, ...exact});
const [prompt, text] = JSON.parse(process.argv[3]);
const made = [];
for await (const token of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    made.push(token);
    if (made.length === 32) break;
}
const {prefix, suffix, middle} = model.tokens.infill;
console.log(JSON.stringify({made, ids: model.tokenize(text), infill: [prefix, suffix, middle], bos: model.tokens.bos}));
process.exit(0);
"""
VLLM_SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    folder, prompt, adapter = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    settings = dict(dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=2, enable_prefix_caching=False)
    llm = LLM(folder, enable_lora=bool(adapter), **settings)
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    out = llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=request)
    print("RESULT " + json.dumps(list(out[0].outputs[0].token_ids)))
"""


@pytest.fixture(scope="module", params=["MHA", "GQA", "MQA"])
def model(request: Any, tmp_path_factory: Any, llama_cpp_vocabularies: Path) -> dict[str, Any]:
    """A random model with DeepSeek-Coder's vocabulary and RoPE: folders, GGUF, prompt and transformers' tokens."""
    heads = 4
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32256,
        hidden_size=heads * 64,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads={"MHA": heads, "GQA": 2, "MQA": 1}[request.param],
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        initializer_range=0.1,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        bos_token_id=32013,
        eos_token_id=32014,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder / "theirs")
    with open_gguf(llama_cpp_vocabularies / "ggml-vocab-deepseek-coder.gguf") as vocabulary:
        files = vocabulary.tokenizer_files
    with open_checkpoint(folder / "theirs") as source:
        tensors = {name: source.tensor(name) for name in names.huggingface(source.config)}
        write_folder(folder / "ours", source.config, tensors.items(), tokenizer_files=files)
        for kind in KINDS:
            write_gguf(folder / f"{kind}.gguf", source.config, tensors.items(), kind, tokenizer_files=files)
        plain_config = source.config
    prompt = Tokenizer(files, "vocabulary").encode(PROMPT, bos=True)
    return {"folder": folder, "prompt": prompt, "config": plain_config, "made": greedy(folder / "ours", prompt)}


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=-1
    )
    return made[0, len(prompt) :].tolist()


def llama_cpp(gguf: Path, prompt: list[int]) -> dict[str, Any]:
    assert (NODE / "node_modules" / "node-llama-cpp").is_dir(), "run make test-peers, which installs node-llama-cpp"
    (NODE / "run.mjs").write_text(LLAMA_CPP)
    command = ["node", "run.mjs", str(gguf), json.dumps([prompt, PROMPT])]
    done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def vllm(folder: Path, prompt: list[int], adapter: Path | None = None) -> list[int]:
    assert VLLM.is_file(), "run make test-peers, which installs vLLM"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": "",
    }
    script = PEERS / "run_vllm.py"
    script.write_text(VLLM_SCRIPT)
    command = [str(VLLM), str(script), str(folder), json.dumps(prompt), str(adapter or "")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def test_llama_cpp(model: dict[str, Any]) -> None:
    result = llama_cpp(model["folder"] / "float32.gguf", model["prompt"])
    assert result["made"] == model["made"]
    assert len(set(result["made"])) > 8, "a model that repeats itself compares little"
    assert result["ids"] == model["prompt"][1:]
    assert result["bos"] == 32013
    # Prefix, suffix and middle as llama.cpp calls them.
    assert result["infill"] == [32016, 32015, 32017]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0"])
@torch.no_grad()
def test_llama_cpp_runs_smaller_types(model: dict[str, Any], kind: str) -> None:
    """The same rounded numbers, expanded by us. llama.cpp rounds activations too: where its tokens part from those of
    transformers, the two candidates must be nearly equal, measured in standard deviations of the logits."""
    folder, prompt = model["folder"], model["prompt"]
    made = llama_cpp(folder / f"{kind}.gguf", prompt)["made"]
    with open_checkpoint(folder / f"{kind}.gguf") as source:
        write_folder(folder / kind, source.config, ((name, source.tensor(name)) for name in source.shapes))
    wanted = greedy(folder / kind, prompt)
    if made != wanted:
        at = [ours == theirs for ours, theirs in zip(made, wanted, strict=True)].index(False)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32).eval()
        logits = theirs(torch.tensor([prompt + wanted[:at]])).logits[0, -1]
        gap = ((logits[wanted[at]] - logits[made[at]]) / logits.std()).item()
        print(f"{kind}: {at} tokens equal, then a gap of {gap:.4f}")
        assert gap < {"float16": 0.01, "bfloat16": 0.05, "q8_0": 0.1}[kind]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_llama_cpp_and_transformers_speak_alike(smollm2: Path, tmp_path: Path, kind: str) -> None:
    """Trained weights, whose likeliest token stands out, rounded to each type: 32 equal tokens."""
    with open_gguf(smollm2) as source:
        stream = ((name, source.tensor(name)) for name in source.shapes)
        write_gguf(tmp_path / "m.gguf", source.config, stream, kind, tokenizer_files=source.tokenizer_files)
    with open_gguf(tmp_path / "m.gguf") as written:
        write_folder(tmp_path / "out", written.config, ((name, written.tensor(name)) for name in written.shapes))
        prompt = Tokenizer(written.tokenizer_files, "vocabulary").encode(PROMPT)
    result = llama_cpp(tmp_path / "m.gguf", prompt)
    assert result["ids"] == prompt
    assert result["made"] == greedy(tmp_path / "out", prompt)


def test_vllm(model: dict[str, Any]) -> None:
    assert vllm(model["folder"] / "ours", model["prompt"]) == model["made"]


def test_vllm_loads_our_adapters(model: dict[str, Any]) -> None:
    """An adapter for a fused matrix, unmerged in vLLM, merged by us in transformers."""
    from convert.adapter import Merged, open_adapter

    folder, config = model["folder"], model["config"]
    generator = torch.Generator().manual_seed(2)
    name = "layers.0.attention.wqkv.weight"
    rows = sum(part.shape[0] for part in names.fused(config)[name])
    pair = torch.randn(8, 256, generator=generator) * 0.1, torch.randn(rows, 8, generator=generator) * 0.1
    write_adapter(folder / "adapter", config, {name: pair}, alpha=16, force=True)
    with open_checkpoint(folder / "ours") as base:
        merged = Merged(base, open_adapter(folder / "adapter", base.config))
        tensors = ((name, merged.tensor(name)) for name in merged.shapes)
        write_folder(folder / "merged", base.config, tensors, force=(folder / "merged").exists())
    expected = greedy(folder / "merged", model["prompt"])
    assert expected != model["made"]
    assert vllm(folder / "ours", model["prompt"], folder / "adapter") == expected
