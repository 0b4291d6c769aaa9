"""Program that reads exported folders with transformers alone, as a user would.

``python read_export.py TOKENS OUT FOLDER...`` saves ``{folder: logits}`` in float32, and fails
where a folder does not load, or loads with tensors missing, unexpected or of another type.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def logits_of(folder: str, tokens: torch.Tensor) -> torch.Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=True, dtype="auto"
    )
    assert not any(report.values()), (folder, report)
    config = json.loads((Path(folder) / "config.json").read_text())
    assert str(model.dtype) == f"torch.{config['dtype']}", (folder, model.dtype)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        cached, plain = (
            model.generate(
                tokens[:1, :5], max_new_tokens=4, do_sample=False, use_cache=use, pad_token_id=0
            )
            for use in (True, False)
        )
    assert torch.equal(cached, plain), folder
    return logits.float()


if __name__ == "__main__":
    tokens_file, output, *folders = sys.argv[1:]
    tokens = torch.load(tokens_file, weights_only=True)
    found = {folder: logits_of(folder, tokens) for folder in folders}
    torch.save({"version": transformers.__version__, "logits": found}, output)
