"""Where a model's files come from, and that a converted GGUF file is the model that it was."""

import copy
import functools
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from perigee.workers.model import checkpoint
from perigee.workers.model.checkpoint import DEFAULT_MODEL, digests, eos_token_ids, resolve, tokenizer_digest
from perigee.workers.model.errors import CheckpointError
from perigee.workers.model.gguf import Reader
from tests import tiny_llama as tiny
from tests.moonlight_files import TRAP_FILE, write_tiktoken

VOCABULARY = ["<s>", "</s>", "<turn>", "<|keep me|>", *"abcdefghijklmnopqrstuvwxyz0123456789!", "Ġ", "Ċ", "th", "the"]
KINDS = [3, 3, 3, 4] + [1] * (len(VOCABULARY) - 4)
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 32, 4, 2, 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing here touches the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perigee" / "models"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k: the halves of each head, row by row in turn."""
    rows = [
        half * (weight.shape[0] // heads // 2) + pair
        for pair in range(weight.shape[0] // heads // 2)
        for half in (0, 1)
    ]
    return np.concatenate([head[rows] for head in np.split(weight, heads)])


def tensors() -> dict[str, np.ndarray]:
    """One layer under its Hugging Face names, without an output matrix."""
    random = np.random.default_rng(7)
    shapes = {
        "model.embed_tokens": (len(VOCABULARY), HIDDEN),
        "model.norm": (HIDDEN,),
        "model.layers.0.input_layernorm": (HIDDEN,),
        "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
        "model.layers.0.self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "model.layers.0.self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
        "model.layers.0.post_attention_layernorm": (HIDDEN,),
        "model.layers.0.mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "model.layers.0.mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {f"{name}.weight": random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    strings: dict[str, str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    without: str = "",
    add_bos: bool = False,
) -> Path:
    """A GGUF file as llama.cpp writes them, with one small layer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(KINDS)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in (strings or {}).items():
        writer.add_string(key, value)
    heads = {"model.layers.0.self_attn.q_proj": HEADS, "model.layers.0.self_attn.k_proj": KV_HEADS}
    for name, weight in tensors().items():
        stem = name.removesuffix(".weight")
        if GGUF_NAMES[stem] != without:
            writer.add_tensor(
                f"{GGUF_NAMES[stem]}.weight", interleaved(weight, heads[stem]) if stem in heads else weight
            )
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "small.gguf")


def read(directory: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


def test_a_complete_directory_is_returned_as_it_is(tiny_llama: Path) -> None:
    assert resolve(str(tiny_llama), "float32") == tiny_llama


def test_an_incomplete_directory_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json or tiktoken\.model$"):
        resolve(str(tmp_path), "float32")
    (tmp_path / "tiktoken.model").touch()
    with pytest.raises(CheckpointError, match=r"lacks \*\.safetensors$"):
        resolve(str(tmp_path), "float32")


def test_an_unknown_name_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(CheckpointError, match=r"'smollm9' does not exist; allowed are .*smollm2-135m-instruct"):
        resolve("smollm9", "float32")


def test_the_built_in_model_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoint.BUILT_IN, "absent", "no_such_package")
    with pytest.raises(CheckpointError, match="no-such-package, which is not installed"):
        resolve("absent", "float32")


def test_a_converted_file_has_the_weights_under_their_hugging_face_names(small_gguf: Path) -> None:
    converted = load_file(resolve(str(small_gguf), "float32") / "model.safetensors")
    expected = tensors()
    assert converted.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(converted[name], weight, err_msg=name)


def test_bfloat16_weights_are_rounded_as_torch_rounds(small_gguf: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    converted = load_torch(resolve(str(small_gguf), "bfloat16") / "model.safetensors")
    for name, weight in tensors().items():
        assert torch.equal(converted[name], torch.from_numpy(weight).bfloat16()), name


def test_the_configuration_is_what_the_file_says(small_gguf: Path) -> None:
    directory = resolve(str(small_gguf), "float32")
    config = read(directory, "config.json")
    assert {key: config[key] for key in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim")} == {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
    }
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100_000.0, 1e-5)
    assert config["tie_word_embeddings"] is True
    assert read(directory, "tokenizer_config.json")["chat_template"] == "{{ messages[0]['content'] }}"
    assert eos_token_ids(directory) == (1, 2)


def test_an_output_matrix_means_that_embeddings_are_not_tied(tmp_path: Path) -> None:
    output = np.ones((len(VOCABULARY), HIDDEN), np.float32)
    directory = resolve(str(write_gguf(tmp_path / "m.gguf", extra={"output.weight": output})), "float32")
    assert read(directory, "config.json")["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(directory / "model.safetensors")["lm_head.weight"], output)


def test_the_tokenizer_merges_splits_digits_and_keeps_special_tokens_whole(small_gguf: Path) -> None:
    tokenizer = Tokenizer.from_file(str(resolve(str(small_gguf), "float32") / "tokenizer.json"))
    encoded = tokenizer.encode("the 42<turn><|keep me|>\n")
    assert encoded.tokens == ["the", "Ġ", "4", "2", "<turn>", "<|keep me|>", "Ċ"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "the 42<turn><|keep me|>\n"
    assert tokenizer.decode(encoded.ids) == "the 42<|keep me|>\n"


def test_a_file_that_wants_a_first_token_gets_it(tmp_path: Path) -> None:
    directory = resolve(str(write_gguf(tmp_path / "m.gguf", add_bos=True)), "float32")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode("the").tokens == ["<s>", "the"]
    assert tokenizer.encode("the", add_special_tokens=False).tokens == ["the"]


def test_llama_3_splits_numbers_by_three_digits(tmp_path: Path) -> None:
    directory = resolve(str(write_gguf(tmp_path / "m.gguf", pre="llama-bpe")), "float32")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert [text for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str("it's 1234!")] == [
        "it", "'s", "Ġ", "123", "4", "!",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not served"),
        ({"tokenizer": "llama"}, r"tokenizer\.ggml\.model is 'llama'"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken'"),
        ({"strings": {"llama.rope.scaling.type": "yarn"}}, r"llama\.rope\.scaling\.type is 'yarn'"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"tensor 'rope_freqs\.weight' has no place"),
        ({"without": "blk.0.ffn_up"}, r"the first is 'model\.layers\.0\.mlp\.up_proj\.weight'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(str(write_gguf(tmp_path / "m.gguf", **options)), "float32")


@pytest.mark.parametrize("content", [b"GGUF", b"not a model at all, but long enough to be read as one", b""])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf: not a GGUF file"):
        resolve(str(tmp_path / "m.gguf"), "float32")


def test_a_truncated_file_is_refused_and_leaves_nothing(small_gguf: Path, cache: Path) -> None:
    os.truncate(small_gguf, small_gguf.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="not a GGUF file that can be read"):
        resolve(str(small_gguf), "float32")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_file_is_converted_once_for_each_dtype(small_gguf: Path) -> None:
    first = resolve(str(small_gguf), "float32")
    written = (first / "model.safetensors").stat().st_mtime_ns
    moved = shutil.copy(small_gguf, small_gguf.with_name("copy.gguf"))
    assert resolve(str(moved), "float32") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert resolve(str(small_gguf), "bfloat16") != first


def test_what_a_killed_converter_left_is_replaced(small_gguf: Path, cache: Path) -> None:
    finished = resolve(str(small_gguf), "float32")
    left = finished.with_suffix(".partial")
    finished.rename(left)
    (left / "model.safetensors").write_bytes(b"half")
    assert load_file(resolve(str(small_gguf), "float32") / "model.safetensors").keys() == tensors().keys()
    assert not left.exists()


def test_concurrent_converters_agree(small_gguf: Path, cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(resolve, [(str(small_gguf), "float32")] * 3)
    assert len(set(found)) == 1
    assert [path for path in cache.iterdir() if path.is_dir()] == [found[0]]


def test_digests_tell_models_apart_by_what_differs(tiny_llama: Path, tmp_path: Path) -> None:
    original = digests(tiny_llama)
    other = tmp_path / "other"
    other.mkdir()
    assert digests(tiny.write(other, seed=1)) == checkpoint.CheckpointDigests(
        digests(other).weights, original.config, original.tokenizer
    )
    assert digests(other).weights != original.weights


def test_the_chat_template_counts_for_the_tokenizers_digest(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(copy) == digests(copy).tokenizer != tokenizer_digest(tiny_llama)


def test_digests_do_not_depend_on_how_json_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    config = read(copy, "config.json")
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert digests(copy) == digests(tiny_llama)


def test_end_of_sequence_tokens_come_from_all_places(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 3, "content": "<end>"}]}')
    assert eos_token_ids(tmp_path) == (3, 5, 7)


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """A directory with a tiktoken vocabulary, and weights in two files with an index."""
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "sharded"))
    (directory / "tokenizer.json").unlink()
    write_tiktoken(directory, 384)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, directory / file)
    write_index(directory, {name: file for file, held in files.items() for name in held})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_directory_with_shards_and_a_tiktoken_vocabulary_is_complete(sharded: Path) -> None:
    assert resolve(str(sharded), "bfloat16") == sharded
    # 1 and 2 are config.json's; [EOS] gets its id from the configuration of the tokenizer.
    assert eos_token_ids(sharded) == (1, 2, 384 + 1)
    digests(sharded)
    assert not (sharded / TRAP_FILE).exists()


def test_the_tiktoken_vocabulary_counts_for_the_tokenizers_digest(sharded: Path) -> None:
    before = tokenizer_digest(sharded)
    vocabulary = sharded / "tiktoken.model"
    vocabulary.write_bytes(vocabulary.read_bytes().replace(b" 300\n", b" 999\n"))
    assert tokenizer_digest(sharded) != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(sharded: Path, name: str) -> None:
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    (sharded / name).touch()
    with pytest.raises(CheckpointError, match=rf"lacks \*\.safetensors; of {name} nothing is read: only safetensors"):
        resolve(str(sharded), "float32")


def test_a_shard_that_the_index_names_but_is_missing_is_named(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2-of-2\.safetensors, which .*index\.json names \(1 of 2"):
        resolve(str(sharded), "float32")


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    write_index(sharded, {"model.norm.weight": "model-1-of-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-1-of-2\.safetensors: no tensor model\.norm\.weight"):
        resolve(str(sharded), "float32")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "not an index of safetensors files"),
        ({"model.norm.weight": "../elsewhere.safetensors"}, r"'\.\./elsewhere\.safetensors' is not the name of a saf"),
        ({"model.norm.weight": "config.json"}, r"'config\.json' is not the name of a safetensors file"),
        ({"model.norm.weight": 5}, "5 is not the name of a safetensors file"),
    ],
)
def test_a_malformed_index_is_refused(sharded: Path, weight_map: Any, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=f"index.json: .*{message}"):
        resolve(str(sharded), "float32")


def write_safetensors(path: Path, dtype: str, data_bytes: int, name: str = "model.layers.0.mlp.up_proj.weight") -> None:
    """A file with one tensor of a dtype that numpy may not know."""
    tensor = {"dtype": dtype, "shape": [data_bytes], "data_offsets": [0, data_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_quantized_weights_are_refused_by_tensor_and_dtype(sharded: Path, dtype: str) -> None:
    write_safetensors(sharded / "model-3.safetensors", dtype, 4)
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight has dtype {dtype}, which is not supported; .*BF16"):
        resolve(str(sharded), "float32")


def test_what_is_no_weight_may_have_any_dtype(sharded: Path) -> None:
    write_safetensors(sharded / "model-3.safetensors", "I64", 8, "model.position_ids")
    assert resolve(str(sharded), "float32") == sharded


@pytest.mark.parametrize("missing_bytes", [1, 3000])
def test_a_shard_that_is_cut_short_is_named(sharded: Path, missing_bytes: int) -> None:
    file = sharded / "model-2-of-2.safetensors"
    os.truncate(file, file.stat().st_size - missing_bytes)
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors: holds \d+ bytes, its header asks for \d+"):
        resolve(str(sharded), "float32")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x04" + bytes(7) + b"[[]]"])
def test_a_shard_that_is_no_safetensors_file_is_named(sharded: Path, content: bytes) -> None:
    (sharded / "model-1-of-2.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-1-of-2\.safetensors: not a safetensors file"):
        resolve(str(sharded), "float32")


def test_malformed_json_is_refused_with_the_file_s_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"config\.json: holds a list"):
        eos_token_ids(tmp_path)


TEXTS = [
    "The capital of France is Paris.",
    "In 1969, 3.14159 of 10,000,000",
    "naïve café — “quotes” … ‽ Ελλάδα Россия 你好世界 こんにちは مرحبا",
    "😀👩‍👩‍👧‍👦🇫🇷 emoji \u200b zero width",
    "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n\treturn  x ** 2    # twice\r\n\r\n",
    "it's they'll WE'VE I'd don't",
    " leading and trailing  ",
    "",
]


@pytest.fixture(scope="module")
def built_in() -> Iterator[Path]:
    """The built-in model's GGUF file. Transformers reads it with the `gguf` library too, here without the minute that
    slicing a memmap takes, and parses its metadata once only.
    """
    from transformers import modeling_gguf_pytorch_utils as theirs

    load = theirs.load_gguf_checkpoint
    metadata = functools.cache(load)

    def load_once(path: str, return_tensors: bool = False, **options: Any) -> Any:
        return load(path, return_tensors=True, **options) if return_tensors else copy.deepcopy(metadata(str(path)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", Reader)
        patch.setattr(theirs, "load_gguf_checkpoint", load_once)
        yield checkpoint._built_in_file(DEFAULT_MODEL)


@pytest.mark.slow
def test_the_built_in_model_is_what_transformers_reads_from_the_same_file(built_in: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(built_in.parent, gguf_file=built_in.name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(str(built_in), return_tensors=True, model_to_load=empty)["tensors"]
    loaded = AutoModelForCausalLM.from_pretrained(resolve(DEFAULT_MODEL, "float32"), dtype=torch.float32)
    weights = loaded.state_dict()
    assert weights.keys() - expected.keys() == {"lm_head.weight"}
    for name, weight in expected.items():
        assert torch.equal(weights[name], torch.as_tensor(weight)), name
    for field in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "max_position_embeddings"):
        assert getattr(loaded.config, field) == getattr(config, field), field


@pytest.mark.slow
def test_the_built_in_tokenizer_is_what_transformers_reads_from_the_same_file(built_in: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(built_in.parent, gguf_file=built_in.name)
    ours = AutoTokenizer.from_pretrained(resolve(DEFAULT_MODEL, "bfloat16"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    # Transformers reads no `tokenizer.ggml.pre`. The tokenizer that the model was trained with splits all numerals.
    assert ours.tokenize("x²½") == ["x", "Â²", "Â½"]
    assert eos_token_ids(Path(ours.name_or_path)) == (2,)
