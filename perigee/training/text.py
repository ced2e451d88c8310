"""Text to train on, and the tokenizer made of it."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from perigee.training.errors import TrainingError

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_SUFFIXES = (".md", ".py", ".rst", ".txt")
# Of Python's own library: packages that come from elsewhere, and what is not written to be read.
_LEFT_OUT = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
# One document of so many is held out, by its content: so the same ones are, whatever else there is.
_HELD_OUT_OF = 16


def documents(source: Path | None, num_bytes: int) -> list[str]:
    """About `num_bytes` of the text files under `source`, or, without one, of the running Python's standard library
    (sources and documentation, under the PSF licence). Always the same ones, spread over all there are.

    Raises TrainingError if there are none.
    """
    root = source or Path(sysconfig.get_path("stdlib"))
    paths = [root] if root.is_file() else sorted(_text_files(root), key=lambda path: _order(path.relative_to(root)))
    chosen: list[str] = []
    total = 0
    for path in paths:
        if total >= num_bytes:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        total += len(text.encode())
        chosen.append(text)
    if not chosen:
        raise TrainingError(f"text: {str(root)!r} holds no text; read are files that end in {', '.join(_SUFFIXES)}")
    return chosen


def is_held_out(text: str) -> bool:
    """Whether a document is for measuring alone."""
    return int(_digest(text)[:8], 16) % _HELD_OUT_OF == 0


def digest(texts: Sequence[str]) -> str:
    """Names these texts."""
    return _digest("\0".join(texts))[:16]


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens, of which the first ends a text. Each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _text_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.suffix in _SUFFIXES and not _LEFT_OUT & set(path.relative_to(root).parts) and path.stat().st_size:
            yield path


def _order(path: Path) -> str:
    """As good as random, but the same on every machine."""
    return _digest(path.as_posix())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
