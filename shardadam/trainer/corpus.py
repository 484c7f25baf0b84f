"""The text: the standard library's own, files as bytes, or token files; split into a train and an eval side."""

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardadam.trainer.config import ConfigError, DataConfig

EOS = 256  # follows every document of bytes
_EDGE = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Token segments, such as memory-mapped files; a window never spans two of them."""

    segments: Sequence[np.ndarray]
    names: Sequence[str]
    vocab_size: int

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    def window(self, segment: int, start: int, length: int) -> np.ndarray:
        """`length` tokens as int32.

        Raises:
          ConfigError: a token that the model's vocabulary does not have.
        """
        tokens = self.segments[segment][start : start + length].astype(np.int64)
        if tokens.size and tokens.max() >= self.vocab_size:
            raise ConfigError(
                f"'{self.names[segment]}': token id {tokens.max()} is not below 'model.vocab_size', {self.vocab_size}; "
                "check 'data.token_dtype', or raise 'model.vocab_size'"
            )
        return tokens.astype(np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """What a run trains and is evaluated on."""

    train: Tokens
    eval: Tokens
    sha256: str
    """Of the text; for token files, which may be terabytes, of each one's name, size and ends."""
    bytes_per_token: bool
    """Whether tokens are bytes, so that bits per byte can be told."""


class _Document(NamedTuple):
    name: str
    tokens: np.ndarray
    digest: bytes


def load_corpus(config: DataConfig, *, vocab_size: int, window: int) -> Corpus:
    """Reads the text and splits it by each file's hash, so that a file stays on its side whatever else comes or goes.

    Raises:
      ConfigError: no file matches, a file cannot be read, or too little text for one window on either side.
    """
    documents = list(_token_files(config) if config.tokens is not None else _text_files(config))
    digest = hashlib.sha256(b"".join(document.digest for document in documents)).hexdigest()
    train, held_out = _split(documents, config.eval_fraction)
    sides = []
    for side, some in (("train", train), ("eval", held_out)):
        tokens = _join(some, vocab_size) if config.tokens is None else _separate(some, vocab_size)
        longest = max((len(segment) for segment in tokens.segments), default=0)
        if longest < window:
            raise ConfigError(
                f"data: the longest {side} text has {longest} tokens, one window needs {window} ('model.max_len' + 1); "
                "give more text or a smaller 'model.max_len'"
            )
        sides.append(tokens)
    return Corpus(train=sides[0], eval=sides[1], sha256=digest, bytes_per_token=config.tokens is None)


def _text_files(config: DataConfig) -> Iterator[_Document]:
    if config.files is None:
        named = _standard_library()
    else:
        named = ((path, _read(path)) for path in _matching(config.files, "data.files"))
    for name, text in named:
        yield _Document(name, np.frombuffer(text, np.uint8), _digest(name, text))


def _standard_library() -> Iterator[tuple[str, bytes]]:
    """The running Python's help topics and its own sources, without its tests: about 12 MB, always there."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name].encode()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(inside.parts):
            yield inside.as_posix(), _read(str(path))


def _token_files(config: DataConfig) -> Iterator[_Document]:
    assert config.tokens is not None
    dtype = np.dtype(config.token_dtype)
    for path in _matching(config.tokens, "data.tokens"):
        try:
            size = Path(path).stat().st_size
            with open(path, "rb") as file:
                head = file.read(_EDGE)
                file.seek(max(size - _EDGE, 0))
                tail = file.read(_EDGE)
        except OSError as error:
            raise ConfigError(f"data: cannot read '{path}' ({error.strerror})") from None
        if size == 0 or size % dtype.itemsize:
            raise ConfigError(
                f"data: '{path}' has {size} bytes, not a positive multiple of {dtype.itemsize}, the size of "
                f"'data.token_dtype', {dtype.name}; the file is cut off, or of another dtype"
            )
        yield _Document(path, np.memmap(path, dtype, "r"), _digest(path, b"%d " % size + head + tail))


def _matching(pattern: str, field: str) -> list[str]:
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not paths:
        missing = "no file matches" if glob.has_magic(pattern) else "no such file"
        raise ConfigError(
            f"'{field}' is '{pattern}': {missing}, seen from {Path.cwd()}; give a path or a glob in quotes"
        )
    return paths


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"data: cannot read '{path}' ({error.strerror})") from None


def _digest(name: str, content: bytes) -> bytes:
    # Only the file's own name: a corpus is the same wherever it lies.
    return hashlib.sha256(Path(name).name.encode() + b"\0" + content).digest()


def _split(documents: list[_Document], eval_fraction: float) -> tuple[list[_Document], list[_Document]]:
    """Train and eval documents; a single document is cut in two."""
    if len(documents) == 1:
        name, tokens, digest = documents[0]
        cut = int(len(tokens) * (1 - eval_fraction))
        return [_Document(name, tokens[:cut], digest)], [_Document(name, tokens[cut:], digest)]
    limit = int(eval_fraction * 2**64)
    keys = [int.from_bytes(document.digest[:8], "big") for document in documents]
    # Few files may all fall on one side: then the nearest one changes sides.
    chosen = {i for i, key in enumerate(keys) if key < limit} or {int(np.argmin(np.array(keys, np.uint64)))}
    if len(chosen) == len(documents):
        chosen.remove(int(np.argmax(np.array(keys, np.uint64))))
    return (
        [document for i, document in enumerate(documents) if i not in chosen],
        [document for i, document in enumerate(documents) if i in chosen],
    )


def _join(documents: list[_Document], vocab_size: int) -> Tokens:
    """Bytes -> one segment, in the documents' order; EOS first, so that every byte is a target, and after each."""
    eos = np.array([EOS], np.uint16)
    parts = [eos, *(part for document in documents for part in (document.tokens.astype(np.uint16), eos))]
    return Tokens(segments=[np.concatenate(parts)], names=["text"], vocab_size=vocab_size)


def _separate(documents: list[_Document], vocab_size: int) -> Tokens:
    return Tokens(
        segments=[document.tokens for document in documents],
        names=[document.name for document in documents],
        vocab_size=vocab_size,
    )
