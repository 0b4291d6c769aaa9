"""Encode texts with exported tokenizers as a transformers user would; imports no Moetron code.

``python read_tokenizers.py TEXTS.json OUT.json FOLDER...`` writes ``{folder: [ids, ...]}``.
"""

import json
import sys
from pathlib import Path

import transformers


def ids_of(folder: str, texts: list[str]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    single = [list(tokenizer(text).input_ids) for text in texts]
    assert [list(ids) for ids in tokenizer(texts).input_ids] == single
    assert [list(tokenizer.encode(text)) for text in texts] == single
    return single


if __name__ == "__main__":
    texts_file, output, *folders = sys.argv[1:]
    texts = json.loads(Path(texts_file).read_text())
    found = {folder: ids_of(folder, texts) for folder in folders}
    Path(output).write_text(json.dumps({"version": transformers.__version__, "ids": found}))
