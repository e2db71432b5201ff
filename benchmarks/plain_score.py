"""Score a saved language model with Transformers alone: what anybody without manyhands would compute.

    python benchmarks/plain_score.py RUN/checkpoint-N TEXT [--seq-len 64] [--rows 436]

One document, then the end of text, in rows of --seq-len targets; the last --rows are scored in float32. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys

BATCH = 64  # rows


def main() -> int:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--rows", type=int, help="the last so many; default: all")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32).eval()
    with open(given.text, encoding="utf-8", newline="") as file:
        ids = tokenizer(file.read(), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([*ids, tokenizer.eos_token_id])
    starts = list(range(0, len(tokens) - 1, given.seq_len))
    starts = starts[-given.rows :] if given.rows else starts
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(starts), BATCH):
            windows = [tokens[s : s + given.seq_len + 1] for s in starts[first : first + BATCH]]
            whole = torch.stack([w for w in windows if len(w) == given.seq_len + 1] or [windows[0]])
            for block in (whole, *(w[None] for w in windows[len(whole) :])):  # [rows, seq_len + 1]
                logits = model(block[:, :-1]).logits  # [rows, seq_len, vocabulary]
                total += cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum").item()
                count += block[:, 1:].numel()
    assert not any(name.split(".")[0] == "manyhands" for name in sys.modules)
    print(json.dumps({"loss": total / count, "targets": count}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
