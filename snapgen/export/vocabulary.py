"""The tokenizer of an exported text encoder, as files that an app reads without our libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snapgen import io


def write_vocabulary(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write `vocab.json` (token -> id) and, for byte-pair encodings, `merges.txt`, the names that CLIP's have.

    Returns:
        What an app needs besides: `kind` ("WordLevel", "BPE"), `length` that a sequence is padded to, `lowercase`, and
        the tokens `bos`, `eos`, `pad` and `unk`.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    io.write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n")
    if backend["model"]["type"] == "BPE":
        # Pairs are lists or, in older files, strings.
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
        io.write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    return {
        "kind": backend["model"]["type"],
        "length": int(tokenizer.model_max_length),
        "lowercase": "Lowercase" in json.dumps(backend["normalizer"]),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "unk": tokenizer.unk_token,
    }
